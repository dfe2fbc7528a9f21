//! Sessions: which version and endpoint a conversation is pinned to.

/// The key of a session: what the client calls its conversation, within its principal's scope.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct SessionKey {
    /// A keyed digest of the `session.scope` value, where scope is configured (the value itself is never kept).
    pub scope: Option<[u8; 16]>,
    pub text: Box<str>,
}
