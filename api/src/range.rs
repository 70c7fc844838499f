//! The `Range` header: one range of bytes, as RFC 9110 §14 lays down.

use crate::streaming::Content;
use actix_web::http::StatusCode;
use actix_web::http::header::{ACCEPT_RANGES, CONTENT_RANGE, ETAG, HeaderMap, IF_RANGE, RANGE};
use actix_web::{HttpResponse, HttpResponseBuilder};
use futures::{StreamExt as _, TryStreamExt as _, future, stream};
use std::ops::Range;
use tunesmith_core::errors::{ApiError, ErrorCode};

/// What a `Range` header asks of content of a known size.
#[derive(Debug, PartialEq, Eq)]
enum Wanted {
    /// No range, several, or one that is not understood: the whole, as the RFC allows.
    Whole,
    /// These bytes.
    Part(Range<u64>),
    /// Nothing that is there.
    Unsatisfiable,
}

/// Begins the reply to a request for content of `size` bytes that `tag` tells from any other, and
/// says which of its bytes are wanted. `what` has that content.
///
/// # Errors
/// `range_not_satisfiable`.
pub(crate) fn reply(
    headers: &HeaderMap,
    tag: &str,
    size: u64,
    what: &str,
) -> Result<(HttpResponseBuilder, Option<Range<u64>>), ApiError> {
    let tag = format!("\"{tag}\"");
    let text = |name| headers.get(name).and_then(|value| value.to_str().ok());
    // Who has a part of something else is sent the whole.
    let is_of_this = text(IF_RANGE).is_none_or(|other| other.trim() == tag);
    let range = match wanted(text(RANGE).filter(|_| is_of_this), size) {
        Wanted::Whole => None,
        Wanted::Part(range) => Some(range),
        Wanted::Unsatisfiable => {
            let message = format!("The range lies outside {what}, which has {size} bytes.");
            return Err(ApiError::new(ErrorCode::RangeNotSatisfiable, message));
        }
    };
    let mut reply = HttpResponse::Ok();
    reply.insert_header((ACCEPT_RANGES, "bytes")).insert_header((ETAG, tag));
    if let Some(Range { start, end }) = range {
        let place = format!("bytes {start}-{}/{size}", end - 1);
        reply.status(StatusCode::PARTIAL_CONTENT).insert_header((CONTENT_RANGE, place));
    }
    Ok((reply, range))
}

/// The bytes of `range` out of content that can only be made from its beginning. Nothing behind
/// them is made.
pub(crate) fn part(content: Content, range: Range<u64>) -> Content {
    let rest = (content, 0);
    stream::try_unfold(rest, move |(mut content, begin)| {
        let range = range.clone();
        async move {
            if begin >= range.end {
                return Ok(None);
            }
            let Some(piece) = content.try_next().await? else { return Ok(None) };
            let end = begin + piece.len() as u64;
            let cut = |at: u64| (at.clamp(begin, end) - begin) as usize;
            Ok(Some((piece.slice(cut(range.start)..cut(range.end)), (content, end))))
        }
    })
    .try_filter(|piece| future::ready(!piece.is_empty()))
    .boxed()
}

/// Reads the header's value against content of `size` bytes.
fn wanted(header: Option<&str>, size: u64) -> Wanted {
    let Some((first, last)) = header
        .and_then(|text| text.trim().strip_prefix("bytes="))
        .and_then(|range| range.trim().split_once('-'))
    else {
        return Wanted::Whole;
    };
    let range = match (first.trim(), last.trim()) {
        ("", suffix) => {
            let Ok(suffix) = suffix.parse::<u64>() else { return Wanted::Whole };
            size.saturating_sub(suffix)..size
        }
        (first, "") => {
            let Ok(first) = first.parse() else { return Wanted::Whole };
            first..size
        }
        (first, last) => {
            let (Ok(first), Ok(last)) = (first.parse::<u64>(), last.parse::<u64>()) else {
                return Wanted::Whole;
            };
            if last < first {
                return Wanted::Whole;
            }
            first..last.saturating_add(1).min(size)
        }
    };
    if range.start < range.end { Wanted::Part(range) } else { Wanted::Unsatisfiable }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::streaming::ContentError;
    use bytes::Bytes;

    #[tokio::test]
    async fn a_part_is_cut_out_of_whatever_pieces() {
        let all = b"0123456789";
        for size in [1, 3, 10] {
            for (start, end) in [(0, 10), (0, 1), (2, 5), (3, 6), (9, 10)] {
                let pieces = all.chunks(size).map(|piece| Ok(Bytes::copy_from_slice(piece)));
                let content = futures::stream::iter(pieces.collect::<Vec<_>>()).boxed();
                let pieces: Vec<Bytes> =
                    part(content, start..end).try_collect().await.expect("no error");
                assert_eq!(pieces.concat(), &all[start as usize..end as usize], "{size}");
            }
        }
    }

    #[tokio::test]
    async fn what_breaks_off_behind_a_part_is_not_made() {
        let reason = "damaged".to_owned();
        let broken = Err(ContentError::Merge { name: "w".to_owned(), reason });
        let pieces = vec![Ok(Bytes::from_static(b"ab")), Ok(Bytes::from_static(b"cd")), broken];
        let content = futures::stream::iter(pieces).boxed();
        let pieces: Vec<Bytes> = part(content, 1..3).try_collect().await.expect("no error");
        assert_eq!(pieces.concat(), b"bc");
    }

    #[test]
    fn first_last_open_and_suffix_ranges_are_cut_at_the_end() {
        for (header, range) in [
            ("bytes=0-0", 0..1),
            ("bytes=2-4", 2..5),
            ("bytes=2-", 2..10),
            ("bytes=-3", 7..10),
            ("bytes=-30", 0..10),
            ("bytes=8-99", 8..10),
            ("bytes=0-18446744073709551615", 0..10),
        ] {
            assert_eq!(wanted(Some(header), 10), Wanted::Part(range), "{header}");
        }
    }

    #[test]
    fn a_range_past_the_end_is_unsatisfiable() {
        assert_eq!(wanted(Some("bytes=10-"), 10), Wanted::Unsatisfiable);
        assert_eq!(wanted(Some("bytes=-0"), 10), Wanted::Unsatisfiable);
        assert_eq!(wanted(Some("bytes=0-1"), 0), Wanted::Unsatisfiable);
    }

    #[test]
    fn what_is_not_one_range_of_bytes_gives_the_whole() {
        for header in ["lines=1-2", "bytes=4-2", "bytes=0-1,3-4", "bytes=a-b", "bytes", "bytes=-"] {
            assert_eq!(wanted(Some(header), 10), Wanted::Whole, "{header}");
        }
        assert_eq!(wanted(None, 10), Wanted::Whole);
    }
}
