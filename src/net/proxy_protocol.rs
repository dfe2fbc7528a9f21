//! PROXY protocol: versions 1 and 2 (HAProxy, "The PROXY protocol", 2020), parsed without input or output.
