//! `tunesmith files`: uploads and lists files, over REST.

use crate::rest::wire::{File, Page};
use crate::rest::{Client, ServerArgs, file_part};
use crate::table;
use anyhow::Context as _;
use reqwest::Method;
use reqwest::multipart::Form;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// The purpose of a file to train on.
pub(crate) const FINE_TUNE: &str = "fine-tune";

/// `tunesmith files …`.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    /// Upload a file and print its id
    Upload {
        /// The file
        path: PathBuf,
        /// What it is for
        #[arg(long, default_value = FINE_TUNE)]
        purpose: String,
        #[command(flatten)]
        server: ServerArgs,
    },
    /// List the project's files, newest first
    List {
        /// The most to list
        #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u16).range(1..=10_000))]
        limit: u16,
        #[command(flatten)]
        server: ServerArgs,
    },
}

/// Runs the command.
pub(crate) async fn run(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Upload { path, purpose, server } => {
            let file = upload(&server.client()?, &path, &purpose).await?;
            println!("{}", file.id);
        }
        Command::List { limit, server } => {
            let limit = limit.to_string();
            let page: Page<File> = server.client()?.get(&["files"], &[("limit", &limit)]).await?;
            let rows: Vec<_> = page.data.iter().map(row).collect();
            let header = ["ID", "CREATED", "BYTES", "PURPOSE", "STATUS", "NAME"];
            print!("{}", table::render(header, &rows));
            if page.has_more {
                eprintln!("there are more: raise --limit");
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn row(file: &File) -> [String; 6] {
    [
        file.id.clone(),
        table::time(file.created_at),
        file.bytes.to_string(),
        file.purpose.clone(),
        file.status.clone(),
        file.filename.clone(),
    ]
}

/// Streams the file at `path` to the server.
///
/// # Errors
/// When the file cannot be read, or the server refuses it.
pub(crate) async fn upload(client: &Client, path: &Path, purpose: &str) -> anyhow::Result<File> {
    let (part, bar) = file_part(path).await?;
    let form = Form::new().text("purpose", purpose.to_owned()).part("file", part);
    let uploaded = client.json(client.request(Method::POST, &["files"]).multipart(form)).await;
    bar.finish_and_clear();
    uploaded.with_context(|| format!("{} was not uploaded", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_of_files_reads_as_a_table() {
        let file = File {
            id: "file-1".to_owned(),
            bytes: 12,
            created_at: 0,
            filename: "a.jsonl".to_owned(),
            purpose: FINE_TUNE.to_owned(),
            status: "processed".to_owned(),
        };
        assert_eq!(row(&file)[1..3], ["1970-01-01 00:00:00", "12"]);
    }
}
