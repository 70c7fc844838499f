//! `tunesmith jobs`: creates, lists, shows, cancels and follows jobs, over REST.

use super::files;
use crate::follow;
use crate::preview_table;
use crate::rest::wire::{Job, Page};
use crate::rest::{Client, ServerArgs};
use crate::table;
use anyhow::bail;
use serde_json::{Map, Value, json};
use std::path::Path;
use std::process::ExitCode;
use tunesmith_core::hyperparameters::Method;
use tunesmith_core::ids::FileId;

/// `tunesmith jobs …`.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    /// Create a job and print its id
    Create(Box<CreateArgs>),
    /// Say what a job would be, and what is wrong with it, without making it
    Preview(Box<CreateArgs>),
    /// List the project's jobs, newest first
    List {
        /// The most to list
        #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u16).range(1..=100))]
        limit: u16,
        #[command(flatten)]
        server: ServerArgs,
    },
    /// Show a job as the server has it, in JSON
    Get {
        /// The job's id
        id: String,
        #[command(flatten)]
        server: ServerArgs,
    },
    /// Cancel a job
    Cancel {
        /// The job's id
        id: String,
        #[command(flatten)]
        server: ServerArgs,
    },
    /// Watch a job until it ends; the exit code is 0 if it succeeds
    Follow {
        /// The job's id
        id: String,
        #[command(flatten)]
        server: ServerArgs,
    },
}

/// What to train on what.
#[derive(Debug, clap::Args)]
pub(crate) struct CreateArgs {
    /// The base model's name
    #[arg(long)]
    model: String,
    /// A file to upload, or the id of one that is there
    #[arg(long, value_name = "FILE_OR_ID")]
    training_file: String,
    /// The same, for validation
    #[arg(long, value_name = "FILE_OR_ID")]
    validation_file: Option<String>,
    /// Part of the tuned model's name
    #[arg(long)]
    suffix: Option<String>,
    /// Same seed, same numbers
    #[arg(long)]
    seed: Option<u32>,
    /// What to learn from: examples (supervised), or preference pairs (dpo)
    #[arg(long, default_value = "supervised", value_parser = method)]
    method: Method,
    /// As in the request's method.supervised.hyperparameters, e.g. '{"n_epochs": 2}'
    #[arg(long, value_name = "JSON", value_parser = json_object)]
    hyperparameters: Option<JsonObject>,
    /// Watch the job until it ends
    #[arg(long)]
    follow: bool,
    #[command(flatten)]
    server: ServerArgs,
}

fn method(word: &str) -> Result<Method, String> {
    Method::parse(word)
        .ok_or_else(|| format!("it must be one of {}", Method::ALL.map(Method::as_str).join(", ")))
}

/// An object in JSON, as an argument.
#[derive(Debug, Clone, PartialEq)]
struct JsonObject(Map<String, Value>);

fn json_object(text: &str) -> Result<JsonObject, String> {
    serde_json::from_str(text)
        .map(JsonObject)
        .map_err(|error| format!("{error}: give an object such as '{{\"n_epochs\": 2}}'"))
}

/// Runs the command.
pub(crate) async fn run(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Create(args) => return create(&args).await,
        Command::Preview(args) => return preview(&args).await,
        Command::List { limit, server } => {
            let limit = limit.to_string();
            let page: Page<Job> =
                server.client()?.get(&["fine_tuning", "jobs"], &[("limit", &limit)]).await?;
            let rows: Vec<_> = page.data.iter().map(row).collect();
            let header = ["ID", "CREATED", "STATUS", "MODEL", "TUNED MODEL"];
            print!("{}", table::render(header, &rows));
            if page.has_more {
                eprintln!("there are more: raise --limit");
            }
        }
        Command::Get { id, server } => {
            let job: Value = server.client()?.get(&["fine_tuning", "jobs", &id], &[]).await?;
            println!("{job:#}");
        }
        Command::Cancel { id, server } => {
            let path = ["fine_tuning", "jobs", &id, "cancel"];
            let job: Job = server.client()?.post(&path, None).await?;
            println!("job {} {}", job.id, job.status);
        }
        Command::Follow { id, server } => return follow::follow(&server.client()?, &id).await,
    }
    Ok(ExitCode::SUCCESS)
}

fn row(job: &Job) -> [String; 5] {
    let status = if job.paused { "paused".to_owned() } else { job.status.to_string() };
    let tuned = job.fine_tuned_model.clone().unwrap_or_default();
    [job.id.clone(), table::time(job.created_at), status, job.model.clone(), tuned]
}

async fn create(args: &CreateArgs) -> anyhow::Result<ExitCode> {
    let client = args.server.client()?;
    let body = body(&client, args).await?;
    let job: Job = client.post(&["fine_tuning", "jobs"], Some(&body)).await?;
    println!("{}", job.id);
    if args.follow { follow::follow(&client, &job.id).await } else { Ok(ExitCode::SUCCESS) }
}

/// Prints what the server says of the job; the exit code is 0 if it would run.
async fn preview(args: &CreateArgs) -> anyhow::Result<ExitCode> {
    let client = args.server.client()?;
    let body = body(&client, args).await?;
    let preview: Value = client.post(&["fine_tuning", "jobs", "preview"], Some(&body)).await?;
    print!("{}", preview_table::render(&preview));
    let would_run = preview["would_run"].as_bool().unwrap_or(false);
    Ok(if would_run { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The body of the request, once its files are there.
async fn body(client: &Client, args: &CreateArgs) -> anyhow::Result<Value> {
    let training_file = file_id(client, &args.training_file).await?;
    let validation_file = match &args.validation_file {
        Some(file) => Some(file_id(client, file).await?),
        None => None,
    };
    Ok(request(args, &training_file, validation_file.as_ref()))
}

/// The body of the create request; what was not given is left to the server.
fn request(args: &CreateArgs, training_file: &FileId, validation_file: Option<&FileId>) -> Value {
    let mut own = Map::new();
    if let Some(JsonObject(hyperparameters)) = &args.hyperparameters {
        own.insert("hyperparameters".to_owned(), json!(hyperparameters));
    }
    let mut body = json!({
        "model": args.model,
        "training_file": training_file,
        "method": {"type": args.method, args.method.as_str(): own},
    });
    let optional = [
        ("validation_file", validation_file.map(|file| json!(file))),
        ("suffix", args.suffix.as_ref().map(|suffix| json!(suffix))),
        ("seed", args.seed.map(|seed| json!(seed))),
    ];
    for (name, value) in optional {
        if let Some(value) = value {
            body[name] = value;
        }
    }
    body
}

/// The id of `file`: of a path, after it is uploaded; an id stands for itself.
async fn file_id(client: &Client, file: &str) -> anyhow::Result<FileId> {
    let path = Path::new(file);
    let is_file = tokio::fs::metadata(path).await.is_ok_and(|metadata| metadata.is_file());
    if is_file {
        let uploaded = files::upload(client, path, files::FINE_TUNE).await?;
        eprintln!("{file} is uploaded as {}", uploaded.id);
        return Ok(uploaded.id.into());
    }
    if file.starts_with(FileId::PREFIX) {
        return Ok(file.into());
    }
    bail!("{file} is neither a file here nor the id of an uploaded one ({}…)", FileId::PREFIX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Debug, Parser)]
    struct Cli {
        #[command(subcommand)]
        command: Command,
    }

    fn parse(args: &[&str]) -> Result<Command, clap::Error> {
        Cli::try_parse_from(["jobs"].iter().chain(args)).map(|cli| cli.command)
    }

    fn create_args(extra: &[&str]) -> CreateArgs {
        let args = ["create", "--model", "m", "--training-file", "file-1"];
        match parse(&[&args, extra].concat()).expect("parses") {
            Command::Create(args) => *args,
            other => panic!("not create: {other:?}"),
        }
    }

    #[test]
    fn a_request_holds_what_was_given_and_nothing_else() {
        let plain = request(&create_args(&[]), &"file-1".into(), None);
        assert_eq!(
            plain,
            json!({
                "model": "m", "training_file": "file-1",
                "method": {"type": "supervised", "supervised": {}},
            })
        );
        let args = create_args(&[
            "--suffix",
            "acme",
            "--seed",
            "7",
            "--hyperparameters",
            r#"{"n_epochs":2,"adapter":{"r":4}}"#,
        ]);
        let full = request(&args, &"file-1".into(), Some(&"file-2".into()));
        assert_eq!(full["validation_file"], "file-2");
        assert_eq!((&full["suffix"], &full["seed"]), (&json!("acme"), &json!(7)));
        assert_eq!(
            full["method"]["supervised"]["hyperparameters"],
            json!({"n_epochs": 2, "adapter": {"r": 4}})
        );
    }

    #[test]
    fn a_method_is_named_with_its_hyperparameters() {
        let args = create_args(&["--method", "dpo", "--hyperparameters", r#"{"beta": 0.2}"#]);
        assert_eq!(
            request(&args, &"file-1".into(), None)["method"],
            json!({"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.2}}})
        );
        let args = ["create", "--model", "m", "--training-file", "f", "--method", "ppo"];
        let error = parse(&args).expect_err("no such method").to_string();
        assert!(error.contains("supervised, dpo"), "{error}");
    }

    #[test]
    fn hyperparameters_that_are_no_object_are_refused_with_an_example() {
        for text in ["{n_epochs: 2}", "[1]", "2"] {
            let args =
                ["create", "--model", "m", "--training-file", "f", "--hyperparameters", text];
            let error = parse(&args).expect_err(text).to_string();
            assert!(error.contains(r#"{"n_epochs": 2}"#), "{error}");
        }
    }

    #[test]
    fn follow_needs_an_id() {
        assert!(parse(&["follow"]).is_err());
        assert!(
            matches!(parse(&["follow", "ftjob-1"]), Ok(Command::Follow { id, .. }) if id == "ftjob-1")
        );
    }

    #[tokio::test]
    async fn a_file_that_is_neither_here_nor_an_id_is_refused_before_any_call() {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let url = "http://127.0.0.1:1/v1".parse().expect("url");
        let client = Client::new(url, Some("sk-test")).expect("client");
        let id = file_id(&client, "file-abc").await.expect("an id");
        assert_eq!(id.as_str(), "file-abc");
        let error = file_id(&client, "no/such.jsonl").await.expect_err("neither").to_string();
        assert!(error.contains("no/such.jsonl is neither"), "{error}");
    }
}
