//! The document as a page: plain HTML that is made here, without a script.

use super::DOCUMENT;
use actix_web::HttpResponse;
use actix_web::http::header::{CONTENT_SECURITY_POLICY, CONTENT_TYPE};
use minijinja::{Environment, context};
use serde::Serialize;
use serde_json::{Value, json};
use std::sync::LazyLock;

/// The page runs nothing and loads nothing; its style stands in it.
const POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; \
    form-action 'none'; frame-ancestors 'none'";

/// How deep objects in objects are shown.
const MAX_DEPTH: usize = 6;

static PAGE: LazyLock<String> = LazyLock::new(|| {
    let mut environment = Environment::new();
    // The name's ending asks for HTML's escapes.
    let page = environment
        .add_template("reference.html", include_str!("reference.html"))
        .and_then(|()| environment.get_template("reference.html"))
        .and_then(|template| {
            template.render(context! {
                info => template_value(&DOCUMENT["info"]),
                groups => template_value(&json!(groups(&DOCUMENT))),
            })
        });
    // Template and document are parts of the program, and a test renders them.
    page.expect("the page of the reference renders")
});

/// `GET /docs`
pub(in crate::routes) async fn reference() -> HttpResponse {
    HttpResponse::Ok()
        .insert_header((CONTENT_TYPE, "text/html; charset=utf-8"))
        .insert_header((CONTENT_SECURITY_POLICY, POLICY))
        .insert_header(("x-content-type-options", "nosniff"))
        .body(PAGE.as_str())
}

/// JSON as templates see it. All that is shown is text, true or false, and lists and maps of those.
fn template_value(value: &Value) -> minijinja::Value {
    match value {
        Value::Null => ().into(),
        Value::Bool(is_true) => (*is_true).into(),
        Value::Number(number) => number.to_string().into(),
        Value::String(text) => text.as_str().into(),
        Value::Array(items) => items.iter().map(template_value).collect::<Vec<_>>().into(),
        Value::Object(fields) => minijinja::Value::from_pairs(
            fields.iter().map(|(key, value)| (key.as_str(), template_value(value))),
        ),
    }
}

/// The operations under one tag.
#[derive(Debug, Serialize)]
struct Group {
    name: String,
    description: String,
    operations: Vec<Shown>,
}

#[derive(Debug, Serialize)]
struct Shown {
    id: String,
    method: String,
    path: String,
    summary: String,
    description: String,
    parameters: Vec<Field>,
    body: Vec<Field>,
    example: Option<String>,
    replies: Vec<Reply>,
}

#[derive(Debug, Serialize)]
struct Reply {
    status: String,
    description: String,
    content: String,
    fields: Vec<Field>,
}

/// A line of a table of fields; `name` is the path within the body.
#[derive(Debug, Serialize)]
struct Field {
    name: String,
    kind: String,
    is_required: bool,
    description: String,
}

fn groups(document: &Value) -> Vec<Group> {
    let operations: Vec<(&String, &String, &Value)> = document["paths"]
        .as_object()
        .into_iter()
        .flatten()
        .flat_map(|(path, methods)| {
            let methods = methods.as_object().into_iter().flatten();
            methods.map(move |(method, operation)| (path, method, operation))
        })
        .collect();
    let tags = document["tags"].as_array().into_iter().flatten();
    tags.map(|tag| Group {
        name: text(&tag["name"]),
        description: text(&tag["description"]),
        operations: operations
            .iter()
            .filter(|(_, _, operation)| operation["tags"][0] == tag["name"])
            .map(|(path, method, operation)| shown(document, path, method, operation))
            .collect(),
    })
    .collect()
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

fn shown(document: &Value, path: &str, method: &str, operation: &Value) -> Shown {
    let parameters = operation["parameters"].as_array().into_iter().flatten();
    let parameters = parameters.map(|parameter| Field {
        name: text(&parameter["name"]),
        kind: format!("{}, {}", text(&parameter["in"]), kind(document, &parameter["schema"])),
        is_required: parameter["required"] == true,
        description: text(&parameter["description"]),
    });
    let body = operation["requestBody"]["content"].as_object().and_then(|c| c.values().next());
    let replies = operation["responses"].as_object().into_iter().flatten();
    let replies = replies.map(|(status, reply)| {
        let content = reply["content"].as_object();
        let types: Vec<&str> =
            content.into_iter().flatten().map(|(kind, _)| kind.as_str()).collect();
        let is_error = status.starts_with(['4', '5']);
        let schema = content.and_then(|content| content.values().next()).map(|c| &c["schema"]);
        Reply {
            status: status.clone(),
            description: text(&reply["description"]),
            content: types.join(", "),
            fields: schema.filter(|_| !is_error).map(|s| fields(document, s)).unwrap_or_default(),
        }
    });
    Shown {
        id: text(&operation["operationId"]),
        method: method.to_uppercase(),
        path: path.to_owned(),
        summary: text(&operation["summary"]),
        description: text(&operation["description"]),
        parameters: parameters.collect(),
        body: body.map(|body| fields(document, &body["schema"])).unwrap_or_default(),
        example: body.and_then(|body| body.get("example")).map(|example| format!("{example:#}")),
        replies: replies.collect(),
    }
}

fn fields(document: &Value, schema: &Value) -> Vec<Field> {
    let mut found = Vec::new();
    collect(document, schema, "", 0, &mut found);
    found
}

/// The schema that a reference stands for.
fn resolved<'a>(document: &'a Value, schema: &'a Value) -> &'a Value {
    let target = schema["$ref"].as_str().and_then(|target| target.strip_prefix('#'));
    target.and_then(|pointer| document.pointer(pointer)).unwrap_or(schema)
}

/// The schemas that one of `anyOf` or `oneOf` may be, or the schema itself.
fn choices<'a>(document: &'a Value, schema: &'a Value) -> Vec<&'a Value> {
    let schema = resolved(document, schema);
    let choices = schema["anyOf"].as_array().or(schema["oneOf"].as_array());
    match choices {
        Some(choices) => {
            choices.iter().flat_map(|choice| self::choices(document, choice)).collect()
        }
        None => vec![schema],
    }
}

fn collect(document: &Value, schema: &Value, path: &str, depth: usize, found: &mut Vec<Field>) {
    if depth > MAX_DEPTH {
        return;
    }
    for choice in choices(document, schema) {
        let required = choice["required"].as_array();
        for (name, property) in choice["properties"].as_object().into_iter().flatten() {
            let path = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
            // Kinds of one thing, such as graders, share fields.
            if found.iter().all(|field| field.name != path) {
                let own = &property["description"];
                let said = if own.is_string() {
                    own
                } else {
                    &resolved(document, property)["description"]
                };
                found.push(Field {
                    name: path.clone(),
                    kind: kind(document, property),
                    is_required: required.is_some_and(|names| names.iter().any(|n| n == name)),
                    description: text(said).replace('\n', " "),
                });
            }
            collect(document, property, &path, depth + 1, found);
        }
        if choice["items"].is_object() {
            collect(document, &choice["items"], &format!("{path}[]"), depth + 1, found);
        }
    }
}

/// A schema's types, words, ranges and default in one line.
fn kind(document: &Value, schema: &Value) -> String {
    let mut parts: Vec<String> = Vec::new();
    for choice in choices(document, schema) {
        let mut part = match (&choice["const"], choice["enum"].as_array(), &choice["type"]) {
            (Value::Null, None, Value::String(kind)) => kind.clone(),
            (Value::Null, None, Value::Array(kinds)) => {
                kinds.iter().map(text).collect::<Vec<_>>().join(" or ")
            }
            (Value::Null, Some(words), _) => {
                words.iter().map(Value::to_string).collect::<Vec<_>>().join(", ")
            }
            (Value::Null, None, _) => "anything".to_owned(),
            (word, _, _) => word.to_string(),
        };
        for (key, sign) in [
            ("minimum", "≥"),
            ("exclusiveMinimum", ">"),
            ("maximum", "≤"),
            ("minLength", "length ≥"),
            ("maxLength", "length ≤"),
            ("minItems", "items ≥"),
            ("maxItems", "items ≤"),
        ] {
            if choice[key].is_number() {
                part.push_str(&format!(" {sign} {}", choice[key]));
            }
        }
        if !parts.contains(&part) {
            parts.push(part);
        }
    }
    let mut line = parts.join("; ");
    if let Some(default) = schema.get("default") {
        line.push_str(&format!("; default {default}"));
    }
    line
}
