//! Net: sockets as the proxy sees them; everything that touches the operating system's network goes through here.
