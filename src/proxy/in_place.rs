//! Boxes that are filled where they lie.

use std::pin::Pin;

/// As `Box::new(make())`, but the room is there before the value, so that the value can be made in it. `Box::new` makes a
/// large one on the stack first and copies all of it, also what is not set yet of a future that has not begun.
#[inline(always)]
pub fn boxed<T>(make: impl FnOnce() -> T) -> Box<T> {
    Box::write(Box::new_uninit(), make())
}

/// As `Box::pin(make())`; see [`boxed`].
#[inline(always)]
pub fn pinned<F>(make: impl FnOnce() -> F) -> Pin<Box<F>> {
    Box::into_pin(boxed(make))
}
