//! Logging: diagnostics to stderr, and the access log, one line an exchange, to stdout.
