//! Traces and logs for an OpenTelemetry collector: OTLP in protobuf over HTTP.
//!
//! Everything is set by OpenTelemetry's own environment variables, which its SDK reads. Nothing is
//! exported unless one of them names a collector.

use anyhow::Context as _;
use opentelemetry::trace::TracerProvider as _;
use opentelemetry::{Key, global};
use opentelemetry_appender_tracing::layer::OpenTelemetryTracingBridge;
use opentelemetry_otlp::{LogExporter, SpanExporter};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::logs::SdkLoggerProvider;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::SdkTracerProvider;
use tracing::Subscriber;
use tracing_subscriber::Layer;
use tracing_subscriber::filter::filter_fn;
use tracing_subscriber::registry::LookupSpan;
use tunesmith_core::spans;

/// Any of them names a collector.
const ENDPOINTS: [&str; 3] = [
    "OTEL_EXPORTER_OTLP_ENDPOINT",
    "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
    "OTEL_EXPORTER_OTLP_LOGS_ENDPOINT",
];
const DISABLED: &str = "OTEL_SDK_DISABLED";
/// What the service is called unless OTEL_SERVICE_NAME says otherwise.
const SERVICE: &str = "tunesmith";
/// How the SDK calls a service without a name.
const NAMELESS: &str = "unknown_service";
/// What sends the export must not itself be exported, or it would never end.
const OWN_TARGETS: [&str; 5] = ["opentelemetry", "hyper", "reqwest", "rustls", "h2"];

/// What exports; at its end it sends what is left.
#[derive(Debug)]
pub(crate) struct Export {
    traces: SdkTracerProvider,
    logs: SdkLoggerProvider,
}

impl Export {
    /// As the environment says; nothing if it names no collector.
    ///
    /// # Errors
    /// A setting that makes no sense, such as an endpoint that is no URL.
    pub(crate) fn from_environment() -> anyhow::Result<Option<Self>> {
        let set = |name: &str| std::env::var(name).unwrap_or_default();
        if set(DISABLED).eq_ignore_ascii_case("true")
            || ENDPOINTS.iter().all(|it| set(it).is_empty())
        {
            return Ok(None);
        }
        // The exporters' clients take this process's choice of cryptography; it fails only when it
        // was made already.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let resource = resource();
        let spans = SpanExporter::builder().with_http().build();
        let spans = spans.context("traces cannot be exported: look at OTEL_EXPORTER_OTLP_…")?;
        let lines = LogExporter::builder().with_http().build();
        let lines = lines.context("logs cannot be exported: look at OTEL_EXPORTER_OTLP_…")?;
        let traces = SdkTracerProvider::builder()
            .with_resource(resource.clone())
            .with_batch_exporter(spans)
            .build();
        let logs =
            SdkLoggerProvider::builder().with_resource(resource).with_batch_exporter(lines).build();
        global::set_text_map_propagator(TraceContextPropagator::new());
        Ok(Some(Self { traces, logs }))
    }

    /// Takes all spans, and the log lines that RUST_LOG lets through.
    pub(crate) fn layer<S>(&self) -> impl Layer<S> + use<S>
    where
        S: Subscriber + for<'span> LookupSpan<'span> + Send + Sync,
    {
        let traces = tracing_opentelemetry::layer()
            .with_tracer(self.traces.tracer(SERVICE))
            .with_filter(filter_fn(|it| it.is_span() && it.target() == spans::TARGET));
        let logs = OpenTelemetryTracingBridge::new(&self.logs)
            .with_filter(filter_fn(|it| {
                !OWN_TARGETS.iter().any(|own| it.target().starts_with(own))
            }))
            .with_filter(crate::logging::filter());
        traces.and_then(logs)
    }
}

impl Drop for Export {
    fn drop(&mut self) {
        for (what, ended) in [("traces", self.traces.shutdown()), ("logs", self.logs.shutdown())] {
            if let Err(error) = ended {
                eprintln!("the last {what} could not be exported: {error}");
            }
        }
    }
}

/// What all that is exported says of its source.
fn resource() -> Resource {
    let found = Resource::builder().build();
    let name = found.get(&Key::from_static_str("service.name"));
    let is_named = name.is_some_and(|name| !name.as_str().starts_with(NAMELESS));
    let resource = Resource::builder();
    if is_named { resource.build() } else { resource.with_service_name(SERVICE).build() }
}
