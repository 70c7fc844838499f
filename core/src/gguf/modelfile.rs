//! Ollama's `Modelfile` beside a GGUF.

use std::fmt::Write as _;

/// The text. Ollama takes the chat template from the file's metadata where it knows it.
pub(super) fn modelfile(weights: &str, stops: &[String]) -> String {
    let mut text = format!("FROM ./{weights}\n");
    for stop in stops {
        // Writing to a String cannot fail.
        let _ = writeln!(
            text,
            "PARAMETER stop \"{}\"",
            stop.replace('\\', "\\\\").replace('"', "\\\"")
        );
    }
    text
}
