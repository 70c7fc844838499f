//! Watchers of jobs, and the worker that has something to say for each of them.

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::io::AsyncWriteExt as _;
use tokio::sync::mpsc;
use tunesmith_core::ids::WorkerId;
use tunesmith_store::events::{Level, NewEvent};
use tunesmith_store::lease::Lease;
use tunesmith_store::{Store, StoreConfig};

use super::http::{Client, Target};
use super::{Outcome, percentiles};

/// What is said begins so, and ends with its number.
const WORD: &str = "said ";
/// Until all watchers have read what lies before.
const SETTLE: Duration = Duration::from_secs(2);
/// How often a job says something, as a worker reports steps.
const EVERY: Duration = Duration::from_secs(1);
/// After the last was said.
const PATIENCE: Duration = Duration::from_secs(10);

/// The times from just before an event's transaction to its arrival, over all watchers.
pub(crate) async fn run(
    target: Target<'_>,
    database_url: &str,
    watchers: usize,
    seconds: usize,
    jobs: &[&str],
) -> Outcome<Value> {
    let store = Store::connect(&StoreConfig {
        database_url: database_url.to_owned(),
        object_store_url: "memory:///".to_owned(),
    })
    .await?;
    let mut leases = Vec::new();
    let worker = WorkerId::from("bench".to_owned());
    while let Some(claimed) = store.claim_job(&worker).await? {
        if jobs.contains(&claimed.lease.job_id.as_str()) {
            leases.push(Arc::new(claimed.lease));
        }
    }
    if leases.len() != jobs.len() {
        return Err(format!("{} of {} jobs are queued", leases.len(), jobs.len()).into());
    }
    let (arrived, mut arrivals) = mpsc::unbounded_channel();
    for index in 0..watchers {
        let job = jobs[index % jobs.len()];
        let path = format!("/v1/fine_tuning/jobs/{job}/events?stream=true");
        let mut client = Client::connect(target.address).await?;
        let head = format!("{}\r\n", target.head("GET", &path));
        client.socket.write_all(head.as_bytes()).await?;
        client.head().await?;
        let arrived = arrived.clone();
        tokio::spawn(async move {
            while let Ok(line) = client.line().await {
                let Some(number) = number_in(&line) else { continue };
                // The receiver is gone once all came.
                let _ = arrived.send((number, Instant::now()));
            }
        });
    }
    tokio::time::sleep(SETTLE).await;

    // Spread over the second, as jobs are that know nothing of each other.
    let (started, mut starts) = mpsc::unbounded_channel();
    let mut clock = tokio::time::interval(EVERY / u32::try_from(leases.len())?);
    for number in 0..leases.len() * seconds {
        clock.tick().await;
        let lease = Arc::clone(&leases[number % leases.len()]);
        tokio::spawn(say(store.clone(), lease, number, started.clone()));
    }
    drop(started);
    let mut begun = vec![None; leases.len() * seconds];
    while let Some((number, at)) = starts.recv().await {
        begun[number] = Some(at);
    }
    let expected = seconds * watchers;
    let mut times = Vec::with_capacity(expected);
    while times.len() < expected {
        let next = tokio::time::timeout(PATIENCE, arrivals.recv()).await;
        let (number, at) =
            next.map_err(|_| "a line did not arrive")?.ok_or("no watcher is left")?;
        let begun = begun[number].ok_or("a line arrived that was not said")?;
        times.push(at.duration_since(begun));
    }
    Ok(json!({
        "jobs": jobs.len(),
        "streams": watchers,
        "arrivals": times.len(),
        "milliseconds": percentiles(&mut times),
    }))
}

/// Commits one event; tells when that began.
async fn say(
    store: Store,
    lease: Arc<Lease>,
    number: usize,
    started: mpsc::UnboundedSender<(usize, Instant)>,
) {
    let event = NewEvent::message(Level::Info, format!("{WORD}{number}"));
    let begun = Instant::now();
    match store.record_steps(&lease, &[], &[event]).await {
        // The receiver waits for all.
        Ok(()) => drop(started.send((number, begun))),
        Err(error) => eprintln!("{error}"),
    }
}

/// The number in the line of an event that was said here.
fn number_in(line: &[u8]) -> Option<usize> {
    let line = std::str::from_utf8(line).ok()?;
    let (_, number) = line.split_once(&format!("\"message\":\"{WORD}"))?;
    number.split('"').next()?.parse().ok()
}
