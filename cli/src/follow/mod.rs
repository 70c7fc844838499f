//! Following a job until it ends: a progress bar on a terminal, plain lines elsewhere.

mod curve;
mod view;

use crate::rest::wire::{CurvePart, Event, Job, Page};
use crate::rest::{Client, RestError};
use crate::table::one_line;
use curve::Curve;
use std::collections::HashSet;
use std::process::ExitCode;
use std::time::{Duration, Instant};
use tunesmith_core::state::JobStatus;
use view::View;

/// Between two looks at the server, which itself learns of a step within two seconds.
const POLL_INTERVAL: Duration = Duration::from_secs(1);
/// How long a server that answered before may be away: a restart takes less.
const PATIENCE: Duration = Duration::from_secs(60);
/// Events asked for at a time. More than come in between two looks.
const EVENTS: &str = "100";

/// What one look at the server showed.
struct Look {
    job: Job,
    /// The curve after the newest step known.
    curve: CurvePart,
    /// The newest events, newest first.
    events: Vec<Event>,
}

impl Look {
    async fn take(client: &Client, id: &str, after_step: u64) -> Result<Self, RestError> {
        // The job first: when it has ended, the lists read after it are complete.
        let job = client.get(&["fine_tuning", "jobs", id], &[]).await?;
        let after = after_step.to_string();
        let curve =
            client.get(&["fine_tuning", "jobs", id, "metrics"], &[("after", &after)]).await?;
        let events: Page<Event> =
            client.get(&["fine_tuning", "jobs", id, "events"], &[("limit", EVENTS)]).await?;
        Ok(Self { job, curve, events: events.data })
    }
}

/// Shows the job's progress until it ends, then its outcome.
///
/// # Errors
/// When there is no such job, or the server stays away for longer than a restart takes.
pub(crate) async fn follow(client: &Client, id: &str) -> anyhow::Result<ExitCode> {
    let mut view = View::new();
    let mut curve = Curve::default();
    let mut seen = HashSet::new();
    let mut answered: Option<Instant> = None;
    let job = loop {
        match Look::take(client, id, curve.last_step()).await {
            Ok(look) => {
                answered = Some(Instant::now());
                for event in look.events.into_iter().rev() {
                    if seen.insert(event.id.clone()) && !event.is_metrics() {
                        view.say(&event.line());
                    }
                }
                curve.extend(look.curve);
                view.show(&look.job, &curve);
                if look.job.status.is_terminal() {
                    break look.job;
                }
            }
            Err(error) if error.is_transient() && answered.is_some_and(is_recent) => {
                view.wait(&error.to_string());
            }
            Err(error) => return Err(error.into()),
        }
        tokio::time::sleep(POLL_INTERVAL).await;
    };
    view.finish();
    Ok(outcome(&job, &curve))
}

fn is_recent(answered: Instant) -> bool {
    answered.elapsed() < PATIENCE
}

/// Prints how the job ended; only a job that succeeded gives success.
fn outcome(job: &Job, curve: &Curve) -> ExitCode {
    let summary = curve.summary();
    if !summary.is_empty() {
        println!("{summary}");
    }
    let id = &job.id;
    match job.status {
        JobStatus::Succeeded => {
            let model = job.fine_tuned_model.as_deref().unwrap_or("without a name");
            let tokens = job.trained_tokens.unwrap_or_default();
            println!("job {id} succeeded: model {model}, {tokens} tokens trained");
            ExitCode::SUCCESS
        }
        status => {
            let reason = job.error.as_ref().and_then(|error| error.message.as_deref());
            let reason = reason.map(|reason| format!(": {}", one_line(reason))).unwrap_or_default();
            eprintln!("job {id} {status}{reason}");
            ExitCode::FAILURE
        }
    }
}
