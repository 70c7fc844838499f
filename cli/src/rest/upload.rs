//! Files as parts of a form.

use crate::bars;
use anyhow::Context as _;
use futures::StreamExt as _;
use indicatif::ProgressBar;
use reqwest::Body;
use reqwest::multipart::Part;
use std::path::Path;
use tokio_util::io::ReaderStream;

/// The file at `path`, which streams when its form is sent, and the bar that counts what is sent.
///
/// # Errors
/// When the file cannot be read.
pub(crate) async fn file_part(path: &Path) -> anyhow::Result<(Part, ProgressBar)> {
    let unreadable = || format!("{} cannot be read", path.display());
    let file = tokio::fs::File::open(path).await.with_context(unreadable)?;
    let length = file.metadata().await.with_context(unreadable)?.len();
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned());
    let bar = bars::bytes(Some(length));
    let sent = bar.clone();
    let stream = ReaderStream::new(file).inspect(move |chunk| {
        if let Ok(chunk) = chunk {
            sent.inc(chunk.len() as u64);
        }
    });
    let part = Part::stream_with_length(Body::wrap_stream(stream), length)
        .file_name(name.unwrap_or_else(|| path.display().to_string()));
    Ok((part, bar))
}
