//! An export at a sampler, which compares it with the served model.

use super::{Export, probe};
use crate::archive::{archive, lock};
use crate::failure::Failure;
use crate::streaming::ContentError;
use crate::tokenizers::Tokenizers;
use bytes::Bytes;
use futures::{StreamExt as _, TryStreamExt as _, stream};
use reqwest::StatusCode;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tunesmith_core::export_check::{
    CHECK_PATH, CheckOrder, CheckReply, Comparison, ExportCheck, ExportManifest,
};
use tunesmith_core::serving::TunedWeights;
use tunesmith_core::weights::{BeyondType, ManifestFile};
use tunesmith_store::Store;
use tunesmith_store::samplers::Sampler;

/// A sampler that is there takes a connection at once.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// It says nothing while it checks: this tells whether its machine is there.
const KEEP_ALIVE: Duration = Duration::from_secs(15);
/// A check with the export's way to the sampler, at most.
const LONGEST: Duration = Duration::from_secs(3600);

/// What a client reads of a fault of ours.
const FAULT: &str = "the server cannot reach its database or its object store for now";

/// What came of asking.
pub(super) enum Reply {
    /// The comparison, and the files that were compared.
    Compared(Comparison, Vec<ManifestFile>),
    /// The export is not to be given out; the end of a sentence.
    Unfit(String),
    /// A tensor has a number that the export's type cannot hold.
    Beyond { name: String, beyond: BeyondType },
    /// It could not be compared; the end of a sentence.
    NotMade(String),
    /// Nobody is there to ask.
    NoSampler,
}

/// Where exports are sent.
pub(super) struct Upstream {
    store: Store,
    tokenizers: Arc<Tokenizers>,
    http: reqwest::Client,
}

impl Upstream {
    /// # Errors
    /// An HTTP client that cannot be made.
    pub(super) fn new(store: Store, tokenizers: Arc<Tokenizers>) -> reqwest::Result<Self> {
        let client = reqwest::Client::builder()
            // Samplers are neighbours, and models are for them alone.
            .no_proxy()
            .connect_timeout(CONNECT_TIMEOUT)
            .tcp_keepalive(KEEP_ALIVE)
            .timeout(LONGEST)
            // An archive cannot be sent again on a connection that has just gone.
            .pool_max_idle_per_host(0);
        // A sampler that is busy with another check reads nothing meanwhile.
        #[cfg(target_os = "linux")]
        let client = client.tcp_user_timeout(None);
        Ok(Self { store, tokenizers, http: client.build()? })
    }

    /// Has a sampler compare the export with what it serves; one that has the base model in memory,
    /// and so on its disk, comes first.
    pub(super) async fn compare(&self, export: &Export) -> Reply {
        match self.ask_all(export).await {
            Ok(reply) => reply,
            Err(failure) => Reply::NotMade(match failure.client_error() {
                Ok(error) => error.message,
                Err(fault) => {
                    tracing::error!(error = %fault, "an export could not be sent to a sampler");
                    FAULT.to_owned()
                }
            }),
        }
    }

    async fn ask_all(&self, export: &Export) -> Result<Reply, Failure> {
        let mut samplers = self.store.live_samplers().await?;
        if samplers.is_empty() {
            return Ok(Reply::NoSampler);
        }
        let model = &export.model;
        let base = self.store.base_model_by_id(&model.base_model_id).await?;
        samplers.sort_by_key(|sampler| !sampler.models.iter().any(|name| name == base.id.as_str()));
        let tokenizer = self.tokenizers.of(&base).await??;
        let order = CheckOrder {
            prompts: probe::prompts(&tokenizer, base.context_length),
            base_model: base.id,
            tuned: TunedWeights { place: model.place.clone(), kind: model.adapter.kind },
            form: export.form,
        };
        let mut reply = Reply::NoSampler;
        for sampler in &samplers {
            reply = self.ask(sampler, export, &order).await?;
            match &reply {
                Reply::Compared(..) | Reply::Unfit(_) | Reply::Beyond { .. } => break,
                Reply::NotMade(reason) => {
                    tracing::info!(sampler = %sampler.id, reason, "a sampler does not check");
                }
                Reply::NoSampler => {
                    tracing::warn!(sampler = %sampler.id, "a sampler does not answer");
                }
            }
        }
        Ok(reply)
    }

    async fn ask(
        &self,
        sampler: &Sampler,
        export: &Export,
        order: &CheckOrder,
    ) -> Result<Reply, Failure> {
        let entries = export.entries(&self.store).await?;
        let about = ExportManifest {
            files: Vec::new(),
            base_model: None,
            check: ExportCheck::not_made("This is the check."),
        };
        let archive = archive(entries, export.modified(), about).map_err(Failure::internal)?;
        let mut line = serde_json::to_vec(order).map_err(Failure::internal)?;
        line.push(b'\n');
        // What is wrong with the export is told apart from what is wrong with the sampler.
        let broken = Arc::new(Mutex::new(None));
        let broke = Arc::clone(&broken);
        let content = archive.content.inspect_err(move |error| {
            *lock(&broke) = Some(match error {
                ContentError::Beyond { name, beyond } => {
                    Reply::Beyond { name: name.clone(), beyond: *beyond }
                }
                ContentError::Store(error) => {
                    tracing::error!(%error, "an export could not be read");
                    Reply::NotMade(FAULT.to_owned())
                }
                wrong => Reply::Unfit(wrong.to_string()),
            });
        });
        let body = stream::iter([Ok(Bytes::from(line))]).chain(content);
        let url = format!("{}{CHECK_PATH}", sampler.url);
        let request = self.http.post(url).bearer_auth(&sampler.token);
        let sent = request.body(reqwest::Body::wrap_stream(body)).send().await;
        if let Some(reply) = lock(&broken).take() {
            return Ok(reply);
        }
        let reply = match sent {
            Ok(reply) => reply,
            Err(error) if error.is_connect() => return Ok(Reply::NoSampler),
            Err(error) => return Ok(Reply::NotMade(cause(&error))),
        };
        match reply.status() {
            StatusCode::OK => {}
            // Its address is another process's by now.
            StatusCode::UNAUTHORIZED | StatusCode::NOT_FOUND => return Ok(Reply::NoSampler),
            status => return Ok(Reply::NotMade(format!("the sampler answered {status}"))),
        }
        Ok(match reply.json().await {
            Ok(CheckReply::Compared(comparison)) => {
                Reply::Compared(comparison, lock(&archive.sums).clone())
            }
            Ok(CheckReply::Unfit { reason }) => Reply::Unfit(reason),
            Ok(CheckReply::NotMade { reason }) => Reply::NotMade(reason),
            Err(error) => Reply::NotMade(cause(&error)),
        })
    }
}

/// The innermost cause, which says more than the outer ones.
fn cause(error: &reqwest::Error) -> String {
    let mut cause: &dyn std::error::Error = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    format!("the sampler broke off: {cause}")
}
