//! SSE: an incremental scanner of event streams (WHATWG HTML section 9.2).
