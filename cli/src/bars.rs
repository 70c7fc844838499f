//! How progress bars look. They are drawn on standard error, and only where that is a terminal.

use indicatif::{ProgressBar, ProgressStyle};
use std::time::Duration;

/// A wait of unknown length.
pub(crate) const WAITING: &str = "{spinner} {elapsed} {wide_msg}";
/// Steps out of a known number.
pub(crate) const STEPS: &str = "{bar:30.cyan/dim} {pos}/{len} {wide_msg}";
/// Bytes out of a known number.
const BYTES: &str = "{bar:30.cyan/dim} {bytes}/{total_bytes} · {bytes_per_sec} · {eta} left";
/// Bytes without a known end.
const STREAM: &str = "{spinner} {bytes} · {bytes_per_sec}";

/// How often a spinner turns.
const TICK: Duration = Duration::from_millis(200);

/// One of the templates above, which all parse, as a test shows.
pub(crate) fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}

/// A spinner with a message to come.
pub(crate) fn spinner() -> ProgressBar {
    let bar = ProgressBar::no_length().with_style(style(WAITING));
    bar.enable_steady_tick(TICK);
    bar
}

/// A bar that counts bytes.
pub(crate) fn bytes(length: Option<u64>) -> ProgressBar {
    match length {
        Some(length) => ProgressBar::new(length).with_style(style(BYTES)),
        None => ProgressBar::no_length().with_style(style(STREAM)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_template_parses() {
        for template in [WAITING, STEPS, BYTES, STREAM] {
            ProgressStyle::with_template(template).expect(template);
        }
    }
}
