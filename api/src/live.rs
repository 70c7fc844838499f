//! What jobs say, sent to whoever watches them, as server-sent events.
//!
//! One task listens to the database. When a job that is watched has said something, the task reads
//! it once and hands the same bytes to each of the job's watchers; an open stream by itself asks
//! the database for nothing. A watcher reads what lies before it by itself, then follows.

use std::collections::{HashMap, HashSet};
use std::convert::Infallible;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use actix_web::HttpResponse;
use actix_web::http::header::{CACHE_CONTROL, CONTENT_ENCODING, HeaderValue};
use bytes::Bytes;
use futures::Stream;
use futures::stream;
use serde::Serialize;
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::{broadcast, watch};
use tunesmith_core::ids::JobId;
use tunesmith_store::notify::{Channel, Listener, Woken};
use tunesmith_store::watch::{News, Said, Topic};
use tunesmith_store::{Store, StoreError};

use crate::routes::EventObject;

/// A notification may be lost: look this often without one.
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// After an error, before the next try.
const PAUSE: Duration = Duration::from_secs(1);
/// A line that says nothing, so that proxies keep a silent stream open and a peer that is gone is
/// noticed.
const KEEP_ALIVE_EVERY: Duration = Duration::from_secs(15);
/// What a watcher may be behind before it reads from the database again.
const CAPACITY: usize = 256;

/// The jobs that are watched in this process.
#[derive(Debug, Clone)]
pub(crate) struct Live {
    store: Store,
    feeds: Arc<Mutex<Feeds>>,
    stopped: watch::Receiver<bool>,
}

type Feeds = HashMap<(JobId, Topic), Feed>;

/// What is sent to the watchers of one job.
#[derive(Debug)]
struct Feed {
    sender: broadcast::Sender<Frame>,
    /// All up to here was sent.
    place: i64,
}

/// One thing that was said, ready to be sent.
#[derive(Debug, Clone)]
enum Frame {
    Said {
        place: i64,
        text: Bytes,
    },
    /// The job has ended, and all was said.
    End,
}

impl Live {
    /// Streams end when `stopped` turns true.
    pub(crate) fn new(store: Store, stopped: watch::Receiver<bool>) -> Self {
        Self { store, feeds: Arc::default(), stopped }
    }

    /// Sends what jobs say to their watchers, until it is told to stop.
    pub(crate) async fn run(self) {
        let mut stopped = self.stopped.clone();
        let mut listener = None;
        while !*stopped.borrow() {
            let round = tokio::select! {
                round = self.round(&mut listener) => round,
                _ = stopped.changed() => return,
            };
            let Err(error) = round else { continue };
            tracing::warn!(%error, "live streams paused; they go on in a moment");
            listener = None;
            let _ = tokio::time::timeout(PAUSE, stopped.changed()).await;
        }
    }

    /// Waits for one job's news, or until it is time to look at all, and passes them on.
    async fn round(&self, listener: &mut Option<Listener>) -> Result<(), StoreError> {
        let Some(listener) = listener else {
            // What came before the listener was there is found by looking at all.
            *listener = Some(self.store.listen(Channel::Progress).await?);
            return self.look_at_all().await;
        };
        match listener.next(LOOK_EVERY).await? {
            Woken::By(job) => {
                let job = JobId::from(job);
                for topic in [Topic::Events, Topic::Metrics] {
                    self.pass_on(&job, topic).await?;
                }
                Ok(())
            }
            Woken::Unsure => self.look_at_all().await,
        }
    }

    /// One query for all jobs, and more only for those that have something new.
    async fn look_at_all(&self) -> Result<(), StoreError> {
        let jobs: HashSet<JobId> = {
            let mut feeds = self.feeds();
            feeds.retain(|_, feed| feed.sender.receiver_count() > 0);
            feeds.keys().map(|(job, _)| job.clone()).collect()
        };
        if jobs.is_empty() {
            return Ok(());
        }
        let jobs: Vec<JobId> = jobs.into_iter().collect();
        for standing in self.store.standings(&jobs).await? {
            for topic in [Topic::Events, Topic::Metrics] {
                let sent = self.feeds().get(&(standing.job.clone(), topic)).map(|feed| feed.place);
                if sent.is_some_and(|sent| standing.has_ended || sent < standing.place(topic)) {
                    self.pass_on(&standing.job, topic).await?;
                }
            }
        }
        Ok(())
    }

    /// Sends what a job has said since the last time, if anybody watches it.
    async fn pass_on(&self, job: &JobId, topic: Topic) -> Result<(), StoreError> {
        let key = (job.clone(), topic);
        loop {
            let place = match self.feeds().get(&key) {
                Some(feed) if feed.sender.receiver_count() > 0 => feed.place,
                _ => return Ok(()),
            };
            let news = self.store.news(job, topic, place).await?;
            let mut feeds = self.feeds();
            let Some(feed) = feeds.get_mut(&key) else { return Ok(()) };
            let is_empty = news.said.is_empty();
            for (place, text) in frames(&news) {
                feed.place = place;
                // Nobody may be left.
                let _ = feed.sender.send(Frame::Said { place, text });
            }
            if news.is_complete {
                let _ = feed.sender.send(Frame::End);
                feeds.remove(&key);
                return Ok(());
            }
            if is_empty {
                return Ok(());
            }
        }
    }

    /// Joins the watchers of a job.
    async fn subscribe(
        &self,
        job: &JobId,
        topic: Topic,
    ) -> Result<broadcast::Receiver<Frame>, StoreError> {
        let key = (job.clone(), topic);
        if let Some(feed) = self.feeds().get(&key) {
            return Ok(feed.sender.subscribe());
        }
        // A feed begins no later than where its first watcher's own reading ends.
        let standings = self.store.standings(std::slice::from_ref(job)).await?;
        let place = standings.first().map_or(0, |standing| standing.place(topic));
        let mut feeds = self.feeds();
        let feed = feeds
            .entry(key)
            .or_insert_with(|| Feed { sender: broadcast::channel(CAPACITY).0, place });
        Ok(feed.sender.subscribe())
    }

    /// The reply that tells what `job` says after `place` until it ends.
    pub(crate) fn reply(&self, job: JobId, topic: Topic, place: i64) -> HttpResponse {
        let watcher = Watcher {
            live: self.clone(),
            job,
            topic,
            place,
            state: State::Behind { receiver: None },
        };
        HttpResponse::Ok()
            .content_type("text/event-stream")
            .insert_header((CACHE_CONTROL, HeaderValue::from_static("no-cache")))
            // A compressor would hold events back.
            .insert_header((CONTENT_ENCODING, HeaderValue::from_static("identity")))
            .streaming(watcher.stream())
    }

    /// Open streams that wait for news.
    pub(crate) fn open_streams(&self) -> usize {
        self.feeds().values().map(|feed| feed.sender.receiver_count()).sum()
    }

    fn feeds(&self) -> std::sync::MutexGuard<'_, Feeds> {
        // Every change to the map is a single call.
        self.feeds.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One open stream.
struct Watcher {
    live: Live,
    job: JobId,
    topic: Topic,
    /// All up to here was sent.
    place: i64,
    state: State,
}

enum State {
    /// Reads what lies before it; its receiver keeps what is said meanwhile.
    Behind {
        receiver: Option<broadcast::Receiver<Frame>>,
    },
    Following(broadcast::Receiver<Frame>),
    Ended,
}

impl Watcher {
    fn stream(self) -> impl Stream<Item = Result<Bytes, Infallible>> {
        stream::unfold(self, |mut watcher| async move {
            let text = watcher.next().await?;
            Some((Ok(text), watcher))
        })
    }

    /// What to send next; none when the stream is over.
    async fn next(&mut self) -> Option<Bytes> {
        let mut stopped = self.live.stopped.clone();
        loop {
            if *stopped.borrow() {
                // Without the last line: a client comes back and goes on where it was.
                return None;
            }
            let step = tokio::select! {
                step = self.step() => step,
                _ = stopped.changed() => return None,
            };
            match step {
                Ok(Some(text)) => return Some(text),
                Ok(None) if matches!(self.state, State::Ended) => return None,
                Ok(None) => {}
                Err(error) => {
                    tracing::warn!(%error, job = %self.job, "a live stream broke off");
                    return None;
                }
            }
        }
    }

    async fn step(&mut self) -> Result<Option<Bytes>, StoreError> {
        match &mut self.state {
            State::Ended => Ok(None),
            State::Behind { receiver } => {
                let receiver = match receiver.take() {
                    Some(receiver) => receiver,
                    None => self.live.subscribe(&self.job, self.topic).await?,
                };
                let news = self.live.store.news(&self.job, self.topic, self.place).await?;
                let mut text = Vec::new();
                for (place, frame) in frames(&news) {
                    self.place = place;
                    text.extend_from_slice(&frame);
                }
                self.state = if news.is_complete {
                    text.extend_from_slice(&DONE);
                    State::Ended
                } else if news.said.is_empty() {
                    State::Following(receiver)
                } else {
                    State::Behind { receiver: Some(receiver) }
                };
                Ok((!text.is_empty()).then(|| text.into()))
            }
            State::Following(receiver) => {
                match tokio::time::timeout(KEEP_ALIVE_EVERY, receiver.recv()).await {
                    Err(_elapsed) => Ok(Some(KEEP_ALIVE)),
                    Ok(Ok(Frame::Said { place, text })) if place > self.place => {
                        self.place = place;
                        Ok(Some(text))
                    }
                    // It was read before it was sent.
                    Ok(Ok(Frame::Said { .. })) => Ok(None),
                    Ok(Ok(Frame::End)) => {
                        self.state = State::Ended;
                        Ok(Some(DONE))
                    }
                    Ok(Err(RecvError::Closed | RecvError::Lagged(_))) => {
                        self.state = State::Behind { receiver: None };
                        Ok(None)
                    }
                }
            }
        }
    }
}

/// A comment, and no blank line: that would end an event, and the SDKs would read an empty one.
const KEEP_ALIVE: Bytes = Bytes::from_static(b": waiting\n");
/// As OpenAI's streams end.
const DONE: Bytes = Bytes::from_static(b"data: [DONE]\n\n");

/// What was said, each with its place, in the form of the stream. The id is what `Last-Event-ID`
/// takes: an event's own, or a step's place.
fn frames(news: &News) -> impl Iterator<Item = (i64, Bytes)> {
    news.said.iter().map(|(place, said)| {
        let text = match said {
            Said::Event(event) => frame(event.id.as_str(), &EventObject::from(event.clone())),
            Said::Step(step) => frame(&place.to_string(), step),
        };
        (*place, text)
    })
}

fn frame(id: &str, data: &impl Serialize) -> Bytes {
    // JSON as it is written here has no line breaks, and these types have no map keys to fail on.
    let data = serde_json::to_string(data).unwrap_or_default();
    format!("id: {id}\ndata: {data}\n\n").into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_keep_alive_is_a_comment_that_ends_no_event() {
        assert!(KEEP_ALIVE.starts_with(b":") && KEEP_ALIVE.ends_with(b"\n"));
        assert!(!KEEP_ALIVE.ends_with(b"\n\n"));
    }
}
