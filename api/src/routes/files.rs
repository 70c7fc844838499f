//! `/v1/files`: what clients upload and jobs produce.

use super::openapi::words;
use crate::auth::Authenticated;
use crate::failure::Failure;
use crate::page::Page;
use crate::query::Query;
use crate::server::AppState;
use crate::{range, redirect, streaming};
use actix_web::http::header::{ContentDisposition, ContentType};
use actix_web::{HttpRequest, HttpResponse, web};
use schemars::JsonSchema;
use serde::Serialize;
use serde_json::json;
use tunesmith_core::ids::FileId;
use tunesmith_store::files::{File, FileStatus, Purpose};
use tunesmith_store::page::{Order, PageRequest};

/// OpenAI's limit and default.
pub(super) const MAX_LIST: u64 = 10_000;

/// A file on the wire.
#[derive(Debug, Serialize, JsonSchema)]
pub(crate) struct FileObject {
    id: String,
    #[schemars(extend("const" = "file"))]
    object: &'static str,
    bytes: u64,
    created_at: i64,
    filename: String,
    #[schemars(extend("enum" = words(Purpose::ALL, Purpose::as_str)))]
    purpose: &'static str,
    #[schemars(extend("enum" = words(FileStatus::ALL, FileStatus::as_str)))]
    status: &'static str,
    expires_at: Option<i64>,
    status_details: Option<String>,
}

impl From<&File> for FileObject {
    fn from(file: &File) -> Self {
        Self {
            id: file.id.to_string(),
            object: "file",
            bytes: file.bytes,
            created_at: file.created_at.unix_timestamp(),
            filename: file.filename.clone(),
            purpose: file.purpose.as_str(),
            // Only whole files are shown.
            status: FileStatus::Processed.as_str(),
            expires_at: file.expires_at.map(|time| time.unix_timestamp()),
            status_details: file.status_details.clone(),
        }
    }
}

/// `GET /v1/files`
pub(crate) async fn list(
    state: web::Data<AppState>,
    caller: Authenticated,
    query: Query,
) -> Result<web::Json<Page<FileObject>>, Failure> {
    let order = match query.word("order", &["desc", "asc"])? {
        "asc" => Order::Ascending,
        _ => Order::Descending,
    };
    let request = PageRequest { order, ..query.page(MAX_LIST, MAX_LIST)? };
    // A purpose that no file has, an unknown one too, gives an empty list.
    let purpose = match query.text("purpose").map(Purpose::parse) {
        Some(None) => {
            return Ok(web::Json(Page::new(Vec::new(), false, |file: &FileObject| &file.id)));
        }
        Some(known) => known,
        None => None,
    };
    let page = state.store.list_files(&caller.project_id, purpose, &request).await?;
    let files = page.items.iter().map(FileObject::from).collect();
    Ok(web::Json(Page::new(files, page.has_more, |file| &file.id)))
}

/// `GET /v1/files/{id}`
pub(crate) async fn retrieve(
    state: web::Data<AppState>,
    caller: Authenticated,
    id: web::Path<String>,
) -> Result<web::Json<FileObject>, Failure> {
    let file = state.store.file(&caller.project_id, &FileId::from(id.into_inner())).await?;
    Ok(web::Json(FileObject::from(&file)))
}

/// `DELETE /v1/files/{id}`
pub(crate) async fn delete(
    state: web::Data<AppState>,
    caller: Authenticated,
    id: web::Path<String>,
) -> Result<HttpResponse, Failure> {
    let id = FileId::from(id.into_inner());
    state.store.delete_file(&caller.project_id, &id).await?;
    Ok(HttpResponse::Ok().json(json!({ "id": id, "object": "file", "deleted": true })))
}

/// `GET /v1/files/{id}/content`, whole or one range of it.
pub(crate) async fn content(
    request: HttpRequest,
    state: web::Data<AppState>,
    caller: Authenticated,
    id: web::Path<String>,
    query: Query,
) -> Result<HttpResponse, Failure> {
    let file = state.store.file(&caller.project_id, &FileId::from(id.into_inner())).await?;
    if query.flag("redirect")? {
        return redirect::redirect(state.store.objects(), &file.object(), &query).await;
    }
    redirect::refuse_expires_in(&query)?;
    let (mut reply, range) = range::reply(request.headers(), &file.sha256, file.bytes, "the file")?;
    let objects = state.store.objects();
    let (bytes, content) = match range {
        None => (file.bytes, objects.get(&file.object()).await?.stream),
        Some(range) => {
            let bytes = range.end - range.start;
            (bytes, objects.get_range(&file.object(), range).await?.stream)
        }
    };
    Ok(reply
        .insert_header(ContentType::octet_stream())
        .insert_header(ContentDisposition::attachment(file.filename.as_str()))
        .body(streaming::body(file.id.to_string(), bytes, content)))
}

#[cfg(test)]
mod tests;
