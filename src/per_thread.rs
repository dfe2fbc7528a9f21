//! Per thread: one of something for each worker, as far as they reach. Every request changes it, and what several cores
//! change goes to and fro between them.

use std::sync::atomic::{AtomicUsize, Ordering};

/// `PLACES` of it, each with its cache lines to itself; each thread has one of them.
pub struct PerThread<T, const PLACES: usize>([Line<T>; PLACES]);

#[derive(Default)]
#[repr(align(128))]
struct Line<T>(T);

/// Threads in the order in which they came first.
fn thread_number() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    thread_local! {
        static NUMBER: usize = NEXT.fetch_add(1, Ordering::Relaxed);
    }
    NUMBER.with(|number| *number)
}

impl<T, const PLACES: usize> PerThread<T, PLACES> {
    /// This thread's, always the same one; with more threads than places it shares it.
    pub fn here(&self) -> &T {
        &self.0[thread_number() % PLACES].0
    }

    pub fn all(&self) -> impl Iterator<Item = &T> {
        self.0.iter().map(|line| &line.0)
    }
}

impl<T: Default, const PLACES: usize> Default for PerThread<T, PLACES> {
    fn default() -> PerThread<T, PLACES> {
        PerThread(std::array::from_fn(|_| Line::default()))
    }
}

/// How many of something are open.
#[derive(Default)]
pub struct OpenCount(PerThread<AtomicUsize, 16>);

impl OpenCount {
    pub fn begin(&self) {
        self.0.here().fetch_add(1, Ordering::Relaxed);
    }

    pub fn end(&self) {
        self.0.here().fetch_sub(1, Ordering::Release);
    }

    /// How many are open, give or take what begins and ends meanwhile. One that begins behind the sum while another ends
    /// in front of it is missed, so nothing is taken for 0 that is not so twice.
    pub fn get(&self) -> usize {
        // What another thread ended than began it wraps around, and so does the sum.
        let sum = || self.0.all().fold(0_usize, |sum, count| sum.wrapping_add(count.load(Ordering::Acquire)));
        match sum() {
            0 => sum(),
            count => count,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;

    use super::{OpenCount, PerThread};

    #[test]
    fn a_thread_keeps_its_place() {
        let places: PerThread<u8, 64> = PerThread::default();
        assert!(std::ptr::eq(places.here(), places.here()));
        assert!(places.all().any(|place| std::ptr::eq(place, places.here())));
        let elsewhere = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(|| std::ptr::from_ref(places.here()) as usize)).collect();
            threads.into_iter().map(|thread| thread.join().expect("no panic")).collect::<Vec<_>>()
        });
        assert!(elsewhere.iter().any(|place| *place != std::ptr::from_ref(places.here()) as usize), "{elsewhere:?}");
    }

    #[test]
    fn what_is_open_on_any_thread_counts() {
        let open = OpenCount::default();
        let (begun, counted) = (Barrier::new(41), Barrier::new(41));
        let counted_then = std::thread::scope(|scope| {
            for _ in 0..40 {
                scope.spawn(|| {
                    open.begin();
                    begun.wait();
                    counted.wait();
                    open.end();
                });
            }
            begun.wait();
            let counted_then = open.get();
            counted.wait();
            counted_then
        });
        assert_eq!(counted_then, 40);
        assert_eq!(open.get(), 0);
        open.begin();
        std::thread::scope(|scope| scope.spawn(|| open.end()).join().expect("no panic"));
        assert_eq!(open.get(), 0, "whichever thread ends it");
    }
}
