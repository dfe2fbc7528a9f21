//! Admin: the API, probes, metrics and live page of a running proxy.
