//! Demo: three built-in agents behind the proxy, and a tour of lines to paste.
