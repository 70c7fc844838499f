//! The trace that a request says it is a part of: the header `traceparent` of W3C Trace Context.

use actix_web::http::header::HeaderMap;
use opentelemetry::global;
use opentelemetry::propagation::Extractor;
use opentelemetry::trace::TraceContextExt as _;
use tracing::Span;
use tracing_opentelemetry::OpenTelemetrySpanExt as _;

/// Makes `span` a part of that trace, if there is one and traces are exported.
pub(crate) fn join(span: &Span, headers: &HeaderMap) {
    let parent = global::get_text_map_propagator(|known| known.extract(&Headers(headers)));
    // It fails where nobody collects spans.
    let _ = span.set_parent(parent);
}

/// Gives `span` another name. A field says it only until the span has a parent, which begins it.
pub(crate) fn rename(span: &Span, name: String) {
    span.context().span().update_name(name);
}

struct Headers<'a>(&'a HeaderMap);

impl Extractor for Headers<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key)?.to_str().ok()
    }

    fn keys(&self) -> Vec<&str> {
        self.0.keys().map(|name| name.as_str()).collect()
    }
}
