//! The API's description: OpenAPI 3.1, made from the code that answers.
//!
//! Replies are described by the types that are sent, requests by the constants and tables that they
//! are checked against. `docs/openapi.yaml` is this document; a test compares the two, and another
//! sends every example to a server.

mod completions;
mod operation;
mod operations;
mod reference;
mod requests;
#[cfg(test)]
mod tests;

pub(super) use reference::reference;

use actix_web::HttpResponse;
use actix_web::http::header::CONTENT_TYPE;
use schemars::generate::SchemaSettings;
use serde_json::{Map, Value, json};
use std::sync::LazyLock;

static DOCUMENT: LazyLock<Value> = LazyLock::new(make);

static YAML: LazyLock<String> = LazyLock::new(|| {
    // A JSON value has no map keys but text and no numbers but finite ones.
    serde_saphyr::to_string(&*DOCUMENT).expect("a JSON value is also YAML")
});

/// The description of the REST API: OpenAPI 3.1 in YAML.
#[must_use]
pub fn yaml() -> &'static str {
    &YAML
}

/// `GET /openapi.yaml`
pub(super) async fn document() -> HttpResponse {
    HttpResponse::Ok().insert_header((CONTENT_TYPE, "application/yaml")).body(yaml())
}

/// The methods of a route's path, as an `Allow` header names them. Where GET is, HEAD is too.
pub(super) fn methods_of(pattern: &str) -> String {
    let methods = DOCUMENT["paths"][pattern.replace(":.+}", "}")].as_object();
    let methods = methods.into_iter().flat_map(|methods| methods.keys());
    let names = methods.map(|method| match method.as_str() {
        "get" => "GET, HEAD".to_owned(),
        method => method.to_uppercase(),
    });
    names.collect::<Vec<_>>().join(", ")
}

/// The words of a closed list, for the `enum` of a field.
pub(super) fn words<T: Copy>(all: &[T], word: impl Fn(T) -> &'static str) -> Vec<&'static str> {
    all.iter().map(|item| word(*item)).collect()
}

fn make() -> Value {
    let settings = SchemaSettings::draft2020_12().for_serialize().with(|settings| {
        settings.definitions_path = "/components/schemas".into();
        settings.meta_schema = None;
    });
    let mut generator = settings.into_generator();
    let mut paths = Map::new();
    for operation in operations::all(&mut generator) {
        let path = paths.entry(operation.path).or_insert_with(|| json!({}));
        path[operation.method] = operation.to_openapi();
    }
    let mut schemas = requests::named(&mut generator);
    schemas.extend(generator.take_definitions(true));
    schemas.sort_keys();
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "tunesmith",
            "version": env!("CARGO_PKG_VERSION"),
            "description": "Fine-tuning behind OpenAI's contract: the paths, fields and errors that \
                            OpenAI's SDKs know, and a few more. What answers GET answers HEAD \
                            alike, without the content. Every reply has an `x-request-id`; what a request has that nothing reads is named in \
                            `x-tunesmith-warning`.",
            "license": { "name": "Apache-2.0", "identifier": "Apache-2.0" },
        },
        "servers": [{ "url": "/", "description": "The server that this document came from." }],
        "security": [{ "key": [] }],
        "tags": operations::TAGS
            .map(|(name, description)| json!({ "name": name, "description": description })),
        "paths": paths,
        "components": {
            "securitySchemes": {
                "key": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "An API key of a project, or an admin key of an organisation \
                                    where that is said.",
                },
            },
            "schemas": schemas,
        },
    })
}
