//! A sampler that says what a test tells it, over real HTTP, found as any other.

use super::tokenizer;
use actix_web::{App, HttpResponse, HttpServer, web};
use bytes::Bytes;
use futures::{StreamExt as _, stream};
use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use tunesmith_core::export_check::{CHECK_PATH, CheckOrder, CheckReply};
use tunesmith_core::ids::SamplerId;
use tunesmith_core::sampling::{EndReason, TokenLogprob};
use tunesmith_core::serving::{SAMPLE_PATH, SampleLine, SampleOrder};
use tunesmith_store::Store;
use tunesmith_store::samplers::{SAMPLER_RENEWAL, Sampler};

/// What it is asked and what it says.
#[derive(Clone, Default)]
pub(crate) struct FakeSampler {
    orders: Arc<Mutex<Vec<SampleOrder>>>,
    script: Arc<Mutex<VecDeque<Vec<SampleLine>>>>,
    hung_up: Arc<AtomicUsize>,
    checks: Arc<Mutex<Vec<(CheckOrder, Bytes)>>>,
    check_replies: Arc<Mutex<VecDeque<CheckReply>>>,
}

impl FakeSampler {
    /// One that is there.
    pub(crate) async fn start(store: &Store) -> Self {
        let fake = Self::default();
        let data = web::Data::new(fake.clone());
        let server = HttpServer::new(move || {
            App::new()
                .app_data(data.clone())
                .route(SAMPLE_PATH, web::post().to(sample))
                .route(CHECK_PATH, web::post().to(check))
        })
        .workers(1)
        .h1_allow_half_closed(false)
        .disable_signals()
        .bind("127.0.0.1:0")
        .expect("a free port");
        let url = format!("http://{}", server.addrs()[0]);
        tokio::spawn(server.run());
        let row = row(&url);
        store.announce_sampler(&row).await.expect("announced");
        let store = store.clone();
        tokio::spawn(async move {
            // A test may take longer than a row lasts; its database ends with it.
            while store.announce_sampler(&row).await.is_ok() {
                tokio::time::sleep(SAMPLER_RENEWAL).await;
            }
        });
        fake
    }

    /// The next order gets these words, one token each, and this end.
    pub(crate) fn will_say(&self, words: &[&str], reason: EndReason) {
        let mut lines = words_of(0, words);
        lines.push(SampleLine::End { index: 0, reason, cached_tokens: 2 });
        self.will_send(lines);
    }

    /// The next order gets these lines; without an end, the sampler then waits.
    pub(crate) fn will_send(&self, lines: Vec<SampleLine>) {
        self.script.lock().expect("lock").push_back(lines);
    }

    /// Orders that came.
    pub(crate) fn orders(&self) -> usize {
        self.orders.lock().expect("lock").len()
    }

    /// The order that came last.
    pub(crate) fn last_order(&self) -> SampleOrder {
        self.orders.lock().expect("lock").last().expect("an order").clone()
    }

    /// The next check comes to this.
    pub(crate) fn will_find(&self, reply: CheckReply) {
        self.check_replies.lock().expect("lock").push_back(reply);
    }

    /// Exports that came, each with its archive.
    pub(crate) fn checks(&self) -> Vec<(CheckOrder, Bytes)> {
        self.checks.lock().expect("lock").clone()
    }

    /// Orders that were given up.
    pub(crate) fn hung_up(&self) -> usize {
        self.hung_up.load(Ordering::SeqCst)
    }
}

async fn check(fake: web::Data<FakeSampler>, mut payload: web::Payload) -> HttpResponse {
    let mut body = Vec::new();
    while let Some(piece) = payload.next().await {
        body.extend_from_slice(&piece.expect("a whole body"));
    }
    let end = body.iter().position(|&byte| byte == b'\n').expect("a first line");
    let order = serde_json::from_slice(&body[..end]).expect("an order");
    fake.checks.lock().expect("lock").push((order, body.split_off(end + 1).into()));
    HttpResponse::Ok().json(fake.check_replies.lock().expect("lock").pop_front())
}

/// Says once that there is a sampler at this address.
pub(crate) async fn announce(store: &Store, url: &str) {
    store.announce_sampler(&row(url)).await.expect("announced");
}

fn row(url: &str) -> Sampler {
    Sampler {
        id: SamplerId::generate(&mut rand::rng()),
        url: url.to_owned(),
        token: "t".to_owned(),
        models: Vec::new(),
    }
}

/// Words of the test's base model as tokens.
pub(crate) fn words_of(index: u32, words: &[&str]) -> Vec<SampleLine> {
    let tokenizer = tokenizer();
    let token = |word: &&str| {
        let id = tokenizer.encode_plain(word).expect("ids")[0];
        let token = TokenLogprob { id, logprob: -0.5 };
        SampleLine::Token { index, token, top: vec![token, TokenLogprob { id: 3, logprob: -1.5 }] }
    };
    words.iter().map(token).collect()
}

/// Counts an order that is dropped before its end.
struct UnderWay(Arc<AtomicUsize>, bool);

impl Drop for UnderWay {
    fn drop(&mut self) {
        if !self.1 {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }
}

async fn sample(fake: web::Data<FakeSampler>, order: web::Json<SampleOrder>) -> HttpResponse {
    let n = order.n as usize;
    let default = || {
        let answer = |index| {
            let mut lines = words_of(index, &["answer"]);
            lines.push(SampleLine::End { index, reason: EndReason::Stop, cached_tokens: 0 });
            lines
        };
        (0..order.n).flat_map(answer).collect()
    };
    let script = fake.script.lock().expect("lock").pop_front();
    let lines: Vec<SampleLine> = script.unwrap_or_else(default);
    fake.orders.lock().expect("lock").push(order.into_inner());
    let ends = lines.iter().filter(|line| matches!(line, SampleLine::End { .. })).count();
    let fails = lines.iter().any(|line| matches!(line, SampleLine::Failed { .. }));
    let is_whole = ends == n || fails;
    let under_way = UnderWay(Arc::clone(&fake.hung_up), is_whole);
    let begun = (lines.into_iter(), under_way);
    HttpResponse::Ok().streaming(stream::unfold(begun, |(mut lines, under_way)| async move {
        let Some(line) = lines.next() else {
            if !under_way.1 {
                std::future::pending::<()>().await;
            }
            return None;
        };
        let text = format!("{}\n", serde_json::to_string(&line).expect("json"));
        Some((Ok::<_, Infallible>(Bytes::from(text)), (lines, under_way)))
    }))
}
