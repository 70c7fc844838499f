//! The page of a job, and the playground. Their files are part of the program; the data they show
//! comes over REST.

use actix_web::http::header::{CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE};
use actix_web::{HttpResponse, web};

const INDEX: &str = include_str!("../../../dashboard/dist/index.html");
const SCRIPT: &str = include_str!("../../../dashboard/dist/assets/app.js");
const STYLE: &str = include_str!("../../../dashboard/dist/assets/app.css");

/// The page holds an API key: nothing but its own files may run in it, and none may frame it.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; \
    img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; \
    frame-ancestors 'none'";

/// `GET /jobs/{id}` and `GET /playground`: one page, whose script reads the address.
pub(crate) async fn page() -> HttpResponse {
    file("text/html; charset=utf-8", INDEX)
}

/// `GET /assets/{name}`
pub(crate) async fn asset(name: web::Path<String>) -> HttpResponse {
    match name.as_str() {
        "app.js" => file("text/javascript; charset=utf-8", SCRIPT),
        "app.css" => file("text/css; charset=utf-8", STYLE),
        _ => HttpResponse::NotFound().finish(),
    }
}

fn file(kind: &'static str, content: &'static str) -> HttpResponse {
    HttpResponse::Ok()
        .insert_header((CONTENT_TYPE, kind))
        // The names do not change from one version to the next.
        .insert_header((CACHE_CONTROL, "no-cache"))
        .insert_header((CONTENT_SECURITY_POLICY, POLICY))
        .insert_header(("x-content-type-options", "nosniff"))
        .body(content)
}
