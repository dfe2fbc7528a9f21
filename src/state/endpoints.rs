//! Endpoints: the live endpoints of a service and who is least loaded.
