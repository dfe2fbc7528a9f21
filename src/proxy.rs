//! Proxy: the way of a request, top to bottom.
