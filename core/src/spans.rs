//! Spans: how long the parts of a service's work take, for who collects traces.

/// The target of all spans. Log lines never show them: a program that exports traces takes what
/// bears this target, and any other ignores it.
pub const TARGET: &str = "otel";
