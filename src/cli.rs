//! CLI: the command line and the commands that talk to a running proxy.
