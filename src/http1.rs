//! HTTP/1.1: a strict codec without input or output (RFC 9110, RFC 9112).
