//! The `Range` header: one range of bytes, as RFC 9110 §14 lays down.

use std::ops::Range;

/// What a `Range` header asks of content of a known size.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Wanted {
    /// No range, several, or one that is not understood: the whole, as the RFC allows.
    Whole,
    /// These bytes.
    Part(Range<u64>),
    /// Nothing that is there.
    Unsatisfiable,
}

/// Reads the header's value against content of `size` bytes.
pub(crate) fn wanted(header: Option<&str>, size: u64) -> Wanted {
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
