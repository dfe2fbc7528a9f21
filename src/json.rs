//! JSON: a streaming extractor of a few pointers from a body that goes on unchanged.
