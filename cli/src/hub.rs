//! Base models from the Hugging Face hub, or from a mirror that HF_ENDPOINT names.

use anyhow::{Context as _, bail, ensure};
use hf_hub::api::sync::{ApiBuilder, ApiRepo};
use std::path::{Path, PathBuf};

/// Attempts at a file that breaks off, each going on where the one before ended.
const RETRIES: usize = 3;

/// Whether `source` is written like a hub id: `name` or `owner/name`.
pub(crate) fn is_id(source: &str) -> bool {
    let part = |part: &str| {
        !part.is_empty()
            && !part.starts_with('.')
            && part.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
    };
    match source.split_once('/') {
        Some((owner, name)) => part(owner) && part(name),
        None => part(source),
    }
}

/// Whether a model directory needs the hub's file `name`: configuration, tokenizer, chat template
/// and safetensors of the repository's top level. A name from the hub never leads elsewhere.
fn is_wanted(name: &str) -> bool {
    const FILES: [&str; 12] = [
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "merges.txt",
        "chat_template.jinja",
        "tokenizer.model",
        "LICENSE",
        "model.safetensors.index.json",
    ];
    FILES.contains(&name)
        || (name.starts_with("model") && name.ends_with(".safetensors") && !name.contains('/'))
}

/// Downloads the model `id` into the hub's own cache (below HF_HOME) and gives the directory that
/// holds its files. HF_ENDPOINT names another hub; HF_TOKEN opens gated models.
///
/// # Errors
/// When the hub does not know the model, or does not answer.
pub(crate) fn download(id: &str) -> anyhow::Result<PathBuf> {
    let mut builder = ApiBuilder::from_env().with_retries(RETRIES);
    if let Some(token) = std::env::var("HF_TOKEN").ok().filter(|token| !token.is_empty()) {
        builder = builder.with_token(Some(token));
    }
    let api = builder.build().context("the hub's client does not start")?;
    fetch(&api.model(id.to_owned()), id)
}

fn fetch(repository: &ApiRepo, id: &str) -> anyhow::Result<PathBuf> {
    let info = repository.info().with_context(|| {
        format!("{id} is not a path here, and the hub does not give a model of that name")
    })?;
    let wanted = info.siblings.iter().map(|file| file.rfilename.as_str()).filter(|n| is_wanted(n));
    let mut dir: Option<PathBuf> = None;
    for name in wanted {
        let path = repository
            .get(name)
            .with_context(|| format!("{name} of {id} cannot be had from the hub"))?;
        let parent = path.parent().map(Path::to_path_buf);
        // The hub's cache has a directory for each commit.
        ensure!(
            dir.is_none() || dir == parent,
            "{id} changed on the hub in the middle of the download: try again"
        );
        dir = parent;
    }
    match dir {
        Some(dir) => Ok(dir),
        None => bail!("{id} has no config.json and no safetensors on the hub"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead as _, BufReader, Write as _};
    use std::net::{TcpListener, TcpStream};

    #[test]
    fn ids_are_told_from_paths() {
        for id in ["gpt2", "HuggingFaceTB/SmolLM2-135M-Instruct", "a_b/c.d-e"] {
            assert!(is_id(id), "{id}");
        }
        for path in ["", "./gpt2", "/models/x", "a/b/c", "../x", "a/", "a/..", "sm ol"] {
            assert!(!is_id(path), "{path}");
        }
    }

    #[test]
    fn only_a_models_own_files_are_wanted_and_none_outside_its_directory() {
        for name in ["config.json", "model.safetensors", "model-00001-of-00002.safetensors"] {
            assert!(is_wanted(name), "{name}");
        }
        for name in [
            "../config.json",
            "model/../../x.safetensors",
            "onnx/model.onnx",
            "pytorch_model.bin",
            "README.md",
        ] {
            assert!(!is_wanted(name), "{name}");
        }
    }

    /// A hub on a local port with one model, as far as a client looks.
    fn serve_hub(listener: &TcpListener) {
        for stream in listener.incoming() {
            let stream = stream.expect("connection");
            std::thread::spawn(move || while answer(&stream).is_some() {});
        }
    }

    /// Answers one request; `None` when the client has hung up.
    fn answer(stream: &TcpStream) -> Option<()> {
        let mut lines = BufReader::new(stream).lines();
        let request = lines.next()?.ok()?;
        let headers: Vec<String> =
            lines.map_while(Result::ok).take_while(|l| !l.is_empty()).collect();
        let header = |name: &str| {
            headers.iter().find_map(|line| {
                let (key, value) = line.split_once(": ")?;
                key.eq_ignore_ascii_case(name).then(|| value.to_owned())
            })
        };
        let path = request.split(' ').nth(1)?;
        let body = match path {
            "/api/models/acme/tiny/revision/main" => {
                r#"{"sha":"c0ffee","siblings":[{"rfilename":"config.json"},
                    {"rfilename":"README.md"},{"rfilename":"../evil/config.json"}]}"#
            }
            "/acme/tiny/resolve/main/config.json" => r#"{"model_type":"llama"}"#,
            _ => "",
        };
        let authorised = header("authorization").is_some_and(|value| value == "Bearer hf_test");
        let status = match (authorised, body.is_empty(), header("range")) {
            (false, ..) => "401 Unauthorized",
            (_, true, _) => "404 Not Found",
            (.., Some(_)) => "206 Partial Content",
            _ => "200 OK",
        };
        // `bytes=0-0` asks for the length only.
        let body = if authorised { body } else { "" };
        let sent = if header("range").as_deref() == Some("bytes=0-0") { &body[..1] } else { body };
        let mut stream = stream;
        write!(
            stream,
            "HTTP/1.1 {status}\r\ncontent-length: {}\r\ncontent-range: bytes 0-{}/{}\r\n\
             etag: \"e\"\r\nx-repo-commit: c0ffee\r\n\r\n{sent}",
            sent.len(),
            sent.len().saturating_sub(1),
            body.len(),
        )
        .ok()
    }

    fn repository(token: &str, id: &str, cache: &Path) -> ApiRepo {
        let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
        let endpoint = format!("http://{}", listener.local_addr().expect("address"));
        std::thread::spawn(move || serve_hub(&listener));
        ApiBuilder::new()
            .with_endpoint(endpoint)
            .with_cache_dir(cache.to_path_buf())
            .with_token(Some(token.to_owned()))
            .with_progress(false)
            .build()
            .expect("client")
            .model(id.to_owned())
    }

    #[test]
    fn a_model_comes_from_the_hub_with_the_files_it_needs() {
        let cache = tempfile::tempdir().expect("temp dir");
        let dir = fetch(&repository("hf_test", "acme/tiny", cache.path()), "acme/tiny")
            .expect("downloads");
        let names: Vec<_> = std::fs::read_dir(&dir)
            .expect("list")
            .map(|entry| entry.expect("entry").file_name())
            .collect();
        assert_eq!(names, ["config.json"]);
        let config = std::fs::read_to_string(dir.join("config.json")).expect("read");
        assert_eq!(config, r#"{"model_type":"llama"}"#);
    }

    #[test]
    fn an_unknown_model_and_a_wrong_token_name_the_model() {
        let cache = tempfile::tempdir().expect("temp dir");
        for (token, id) in [("hf_test", "acme/none"), ("hf_wrong", "acme/tiny")] {
            let error = fetch(&repository(token, id, cache.path()), id).expect_err("refused");
            assert!(error.to_string().starts_with(&format!("{id} is not a path here")), "{error}");
        }
    }
}
