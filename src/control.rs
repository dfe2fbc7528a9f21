//! Control: reload, health checks and deadlines, on a runtime of their own.
