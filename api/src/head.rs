//! HEAD: what GET would answer, without the content (RFC 9110 §9.3.2). Every path that has GET has
//! HEAD; no handler knows of it.

use actix_web::HttpResponse;
use actix_web::body::{BodySize, BoxBody, MessageBody};
use actix_web::dev::ServiceRequest;
use actix_web::http::Method;
use actix_web::http::header::RANGE;
use bytes::Bytes;
use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};

/// Makes a HEAD request one that GET's handler takes. Ranges are for GET alone (RFC 9110 §14.2).
pub(crate) fn ask_as_get(request: &mut ServiceRequest) {
    request.head_mut().method = Method::GET;
    request.headers_mut().remove(RANGE);
}

/// The reply with all its headers, the length of its content among them. Nothing of the content is
/// read or made, so a stream that would never end does no harm.
pub(crate) fn without_content(reply: HttpResponse<impl MessageBody>) -> HttpResponse<BoxBody> {
    reply.map_body(|_, content| BoxBody::new(Unsent(content.size())))
}

/// Content of a size, none of which is there.
struct Unsent(BodySize);

impl MessageBody for Unsent {
    type Error = Infallible;

    fn size(&self) -> BodySize {
        self.0
    }

    fn poll_next(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Bytes, Infallible>>> {
        Poll::Ready(None)
    }
}

#[cfg(test)]
mod tests {
    use crate::testing::{Reply, TestApi, chat_rows};
    use reqwest::Method;
    use reqwest::header::{HeaderMap, RANGE};

    async fn head(api: &TestApi, path: &str) -> Reply {
        let reply = Reply::of(api.request(Method::HEAD, path)).await;
        assert!(reply.body.is_empty(), "{path}");
        reply
    }

    fn told(headers: &HeaderMap, name: &str) -> Option<String> {
        headers.get(name).map(|value| value.to_str().expect("text").to_owned())
    }

    #[tokio::test]
    async fn content_has_its_length_and_tag_and_a_range_is_not_read() {
        let api = TestApi::start().await;
        let rows = chat_rows(10);
        let path = format!("/v1/files/{}/content", api.upload(rows.clone()).await);
        let whole = api.get(&path).await;
        let ranged = api.request(Method::HEAD, &path).header(RANGE, "bytes=0-9");
        for told_of in [head(&api, &path).await, Reply::of(ranged).await] {
            assert_eq!((told_of.status.as_u16(), told_of.body.len()), (200, 0));
            assert_eq!(told(&told_of.headers, "content-length"), Some(rows.len().to_string()));
            for name in ["etag", "accept-ranges", "content-type", "content-disposition"] {
                let value = told(&whole.headers, name);
                assert!(value.is_some(), "{name}");
                assert_eq!(told(&told_of.headers, name), value);
            }
        }
        // The connection is good for more, the content of which is all there.
        assert_eq!(api.get(&path).await.body, whole.body);
    }

    #[tokio::test]
    async fn a_stream_that_would_stay_open_ends_at_once() {
        let api = TestApi::start().await.with_base_model().await;
        let job = api.start_job().await;
        for topic in ["events", "metrics"] {
            let path = format!("/v1/fine_tuning/jobs/{job}/{topic}?stream=true");
            let reply = head(&api, &path).await;
            assert_eq!(reply.status, 200);
            assert_eq!(reply.header("content-type"), Some("text/event-stream"));
        }
        assert_eq!(api.job(&job).await.id.as_str(), job);
    }

    #[tokio::test]
    async fn refusals_are_those_of_get() {
        let api = TestApi::start().await;
        let nobody = api.client_with(None);
        for (client, path, status) in [
            (&*api, "/v1/files/file-none", 404),
            (&*api, "/v1/nope", 404),
            (&nobody, "/v1/files", 401),
            (&*api, "/v1/files?limit=x", 400),
        ] {
            let asked = client.get(path).await;
            let told_of = Reply::of(client.request(Method::HEAD, path)).await;
            assert_eq!((told_of.status, told_of.status.as_u16()), (asked.status, status), "{path}");
            assert_eq!(
                told(&told_of.headers, "content-type"),
                told(&asked.headers, "content-type")
            );
            assert!(told_of.body.is_empty() && told_of.headers.contains_key("x-request-id"));
        }
        let reply = head(&api, "/v1/uploads").await;
        assert_eq!((reply.status.as_u16(), reply.header("allow")), (405, Some("POST")));
        let reply = Reply::of(api.request(Method::PUT, "/v1/files/a")).await;
        assert_eq!(reply.header("allow"), Some("GET, HEAD, DELETE"));
    }
}
