//! The header that names what was taken, but is probably not what the client meant.

use actix_web::HttpResponseBuilder;
use actix_web::http::header::HeaderValue;

/// One header line for each warning.
pub(crate) const X_TUNESMITH_WARNING: &str = "x-tunesmith-warning";

/// The sentence for request fields that nothing here reads.
pub(crate) fn unknown_fields(paths: &[String]) -> Option<String> {
    (!paths.is_empty()).then(|| format!("Unknown fields were ignored: {}.", paths.join(", ")))
}

/// Adds the warnings to a reply.
pub(crate) fn add(reply: &mut HttpResponseBuilder, warnings: &[String]) {
    for warning in warnings {
        // A field's name is the client's text: a header takes printable ASCII only.
        let printable = warning.replace(|c: char| !(' '..='~').contains(&c), "?");
        if let Ok(value) = HeaderValue::from_str(&printable) {
            reply.append_header((X_TUNESMITH_WARNING, value));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use actix_web::HttpResponse;

    #[test]
    fn a_name_that_no_header_can_hold_is_still_reported() {
        let mut reply = HttpResponse::Ok();
        add(&mut reply, &[unknown_fields(&["größe\r\nx: y".to_owned()]).expect("one")]);
        let reply = reply.finish();
        let line = reply.headers().get(X_TUNESMITH_WARNING).expect("header");
        assert_eq!(line, "Unknown fields were ignored: gr??e??x: y.");
    }
}
