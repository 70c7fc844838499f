//! Exports of tuned models, and the check that each passes before it is given out.
//!
//! The first request of an export has a sampler reload it and compare its logits with the served
//! model's ([`tunesmith_core::export_check`]). It is the archive itself that goes there, made by the
//! code that makes every download, and its files' sums are kept with the result: a later download
//! that has other bytes breaks off, and the next one is checked anew.

mod probe;
mod upstream;

use crate::archive::{Entry, lock};
use crate::failure::Failure;
use crate::streaming::{Content, ContentError};
use crate::tokenizers::Tokenizers;
use crate::{gguf, merged, stored};
use futures::future::{BoxFuture, FutureExt as _, Shared};
use futures::{StreamExt as _, TryStreamExt as _};
use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tunesmith_core::errors::{ApiError, ErrorCode};
use tunesmith_core::export_check::{
    Bound, Comparison, ExportCheck, ExportForm, MergedForm, PassedCheck,
};
use tunesmith_core::gguf::StorageType;
use tunesmith_core::weights::{BeyondType, FloatType};
use tunesmith_store::Store;
use tunesmith_store::export_checks::CheckedExport;
use tunesmith_store::models::Model;
use upstream::Upstream;

/// Another version of the program may write other bytes.
const VERSION: &str = env!("CARGO_PKG_VERSION");
/// How long a request waits for a check: less than proxies and clients wait for a reply.
const PATIENCE: Duration = Duration::from_secs(45);
/// When one comes back for an export that is being checked.
const COME_BACK: Duration = Duration::from_secs(5);
/// How long a sampler that could not check an export is not asked about it again.
const NOT_AGAIN: Duration = Duration::from_secs(600);

/// Whether an export is to be checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Wanted {
    /// Where a sampler can do it.
    Auto,
    /// Or not given out.
    Required,
    /// No.
    None,
}

impl Wanted {
    /// The words of requests for it, the default first.
    pub(crate) const WORDS: [&str; 3] = ["auto", "required", "none"];

    /// What one of the [words](Self::WORDS) means.
    pub(crate) fn parse(word: &str) -> Self {
        match word {
            "required" => Self::Required,
            "none" => Self::None,
            _ => Self::Auto,
        }
    }
}

/// A model in one form.
#[derive(Debug, Clone)]
pub(crate) struct Export {
    pub(crate) model: Model,
    pub(crate) form: ExportForm,
}

impl Export {
    /// Its files, which are made when they are read.
    ///
    /// # Errors
    /// What cannot be had in this form.
    pub(crate) async fn entries(&self, store: &Store) -> Result<Vec<Entry>, Failure> {
        match self.form {
            ExportForm::Gguf(storage) => gguf::entries(store, &self.model, storage).await,
            ExportForm::Merged(form) => merged::entries(store, &self.model, form).await,
            ExportForm::Adapter | ExportForm::Model => stored::entries(store, &self.model).await,
        }
    }

    /// Whether its files are objects of the store, and not made while they are sent.
    pub(crate) fn is_stored(&self) -> bool {
        match self.form {
            ExportForm::Adapter | ExportForm::Model => true,
            ExportForm::Merged(_) | ExportForm::Gguf(_) => false,
        }
    }

    /// When the weights were made, in seconds since 1970.
    pub(crate) fn modified(&self) -> u64 {
        u64::try_from(self.model.created_at.unix_timestamp()).unwrap_or(0)
    }

    fn key(&self) -> Key {
        (self.model.name.clone(), self.form)
    }

    /// What may be done about an export that is refused.
    fn way_out(&self) -> &'static str {
        match self.form {
            ExportForm::Gguf(StorageType::Q4_K_M) => {
                "Ask for type=q8_0 or type=f16, which lose less, or take this one as it is with \
                 check=none."
            }
            ExportForm::Gguf(_) => {
                "Ask for format=merged, or take this one as it is with check=none. If both are \
                 refused, the model's weights are damaged in the object store: restore them."
            }
            ExportForm::Merged(MergedForm {
                dtype: Some(FloatType::F16 | FloatType::Bf16),
                ..
            }) => {
                "Ask for dtype=f32, or take this one as it is with check=none. If both are refused, \
                 the model's weights are damaged in the object store: restore them."
            }
            ExportForm::Adapter | ExportForm::Model | ExportForm::Merged(_) => {
                "The weights of the model, or of its base model, are probably damaged in the object \
                 store: restore them. With check=none the export comes as it is."
            }
        }
    }

    /// An export with a number that its type cannot hold.
    fn beyond(&self, tensor: &str, beyond: BeyondType) -> ApiError {
        let (what, way_out, param) = match self.form {
            ExportForm::Gguf(_) => (self.form.to_string(), "format=merged", "type"),
            _ => (beyond.float.to_string(), "dtype=bf16 or dtype=f32", "dtype"),
        };
        let message = format!(
            "'{}' cannot be given out in {what}: the tensor {tensor} has a number that would become \
             infinite ({beyond}). Ask for {way_out}.",
            self.model.name
        );
        ApiError::new(ErrorCode::WeightsNotAvailable, message).with_param(param)
    }

    fn refused(&self, why: &str) -> ApiError {
        let message = format!(
            "The export of '{}' ({}) is not given out, as it is not what is served: {why}. {}",
            self.model.name,
            self.form,
            self.way_out()
        );
        ApiError::new(ErrorCode::ExportCheckFailed, message).with_param("format")
    }
}

type Key = (String, ExportForm);

/// How a check ended.
#[derive(Debug, Clone)]
enum Outcome {
    Passed(Arc<CheckedExport>),
    Refused(ApiError),
    /// It says nothing about the export; in a sentence.
    NotMade(String),
    /// No sampler is there.
    NoSampler,
}

/// A check under way, which does not end when a request that waits for it does.
type Running = Shared<BoxFuture<'static, Outcome>>;

/// Whether an export fits its type, once it is known.
type Fitting = Shared<BoxFuture<'static, Result<(), ApiError>>>;

/// Exports that are known to fit, at most.
const MAX_FITTING: usize = 10_000;

/// What was found out about an export.
pub(crate) struct Verdict {
    /// For its manifest.
    pub(crate) check: ExportCheck,
    /// The files that were checked.
    files: Option<Arc<CheckedExport>>,
}

/// The checks. Cheap to clone.
#[derive(Clone)]
pub(crate) struct ExportChecks(Arc<Inner>);

struct Inner {
    store: Store,
    upstream: Upstream,
    running: Mutex<HashMap<Key, Running>>,
    /// Why a sampler could not check an export, and when.
    not_made: Mutex<HashMap<Key, (Instant, String)>>,
    /// Exports in half precision that nobody compares: whether each number fits.
    fitting: Mutex<HashMap<Key, Fitting>>,
}

impl ExportChecks {
    /// # Errors
    /// An HTTP client that cannot be made.
    pub(crate) fn new(store: Store, tokenizers: Arc<Tokenizers>) -> reqwest::Result<Self> {
        Ok(Self(Arc::new(Inner {
            upstream: Upstream::new(store.clone(), tokenizers)?,
            store,
            running: Mutex::default(),
            not_made: Mutex::default(),
            fitting: Mutex::default(),
        })))
    }

    /// What is known of an export with these files, after a check where there was none.
    ///
    /// # Errors
    /// `export_check_failed` with the numbers, `export_being_checked`, `export_not_checked` where a
    /// check is required, and those of the store.
    pub(crate) async fn verdict(
        &self,
        export: &Export,
        entries: &[Entry],
        wanted: Wanted,
    ) -> Result<Verdict, Failure> {
        if wanted == Wanted::None {
            self.require_fitting(export).await?;
            let check = ExportCheck::not_made("The download asked for no check.");
            return Ok(Verdict { check, files: None });
        }
        let store = &self.0.store;
        let known = store.checked_export(&export.model.name, export.form, VERSION).await?;
        if let Some(known) = known.filter(|known| has_files(known, entries)) {
            return Ok(Verdict::passed(Arc::new(known)));
        }
        let outcome = match self.0.not_made_lately(export) {
            Some(reason) if wanted == Wanted::Auto => Outcome::NotMade(reason),
            _ => {
                let running = self.begin(export);
                tokio::time::timeout(PATIENCE, running).await.map_err(|_| being_checked(export))?
            }
        };
        let reason = match outcome {
            Outcome::Passed(checked) => return Ok(Verdict::passed(checked)),
            Outcome::Refused(error) => return Err(error.into()),
            Outcome::NotMade(reason) => reason,
            Outcome::NoSampler => "No sampler is running.".to_owned(),
        };
        if wanted == Wanted::Required {
            let message = format!(
                "The export of '{}' ({}) was not compared with the served model: {reason} Leave \
                 out check=required to get it unchecked.",
                export.model.name, export.form
            );
            let error = ApiError::new(ErrorCode::ExportNotChecked, message).with_param("check");
            return Err(Failure::retry_after(error, COME_BACK));
        }
        self.require_fitting(export).await?;
        Ok(Verdict { check: ExportCheck::not_made(reason), files: None })
    }

    /// Refuses an export with a number beyond half precision, which could not be said any more once
    /// bytes are on their way. Its numbers are all computed for that, once.
    async fn require_fitting(&self, export: &Export) -> Result<(), Failure> {
        if export.is_stored() {
            return Ok(());
        }
        let fitting = {
            let mut all = lock(&self.0.fitting);
            if all.len() >= MAX_FITTING {
                all.clear();
            }
            all.entry(export.key()).or_insert_with(|| self.0.fits(export.clone())).clone()
        };
        let fits = tokio::time::timeout(PATIENCE, fitting).await;
        let fits = fits.map_err(|_| being_checked(export))?;
        if fits.is_err() {
            lock(&self.0.fitting).remove(&export.key());
        }
        Ok(fits?)
    }

    /// The check of an export that runs already, or a new one.
    fn begin(&self, export: &Export) -> Running {
        let mut running = lock(&self.0.running);
        if let Some(running) = running.get(&export.key()) {
            return running.clone();
        }
        let (inner, for_task) = (Arc::clone(&self.0), export.clone());
        let task = tokio::spawn(async move {
            let outcome = inner.check(&for_task).await;
            lock(&inner.running).remove(&for_task.key());
            outcome
        });
        let started = task
            .map(|ended| {
                ended.unwrap_or_else(|_| Outcome::NotMade("The check was cut short.".to_owned()))
            })
            .boxed()
            .shared();
        running.insert(export.key(), started.clone());
        started
    }

    /// `content`, which forgets the check if it turns out to be of other files. It breaks off only
    /// after that, so that whoever asks again is not held to the old sums.
    pub(crate) fn watched(&self, content: Content, export: &Export) -> Content {
        let (inner, export) = (Arc::clone(&self.0), export.clone());
        content
            .or_else(move |error| {
                // A task of its own: a client that goes away does not stop it.
                let forgotten = matches!(error, ContentError::Hash { .. })
                    .then(|| tokio::spawn(Arc::clone(&inner).forget(export.clone())));
                async move {
                    if let Some(forgotten) = forgotten {
                        let _ = forgotten.await;
                    }
                    Err(error)
                }
            })
            .boxed()
    }
}

impl Inner {
    async fn forget(self: Arc<Self>, export: Export) {
        let forgotten = self.store.forget_checked_export(&export.model.name, export.form);
        if let Err(error) = forgotten.await {
            tracing::warn!(%error, "the check of a changed export stays");
        }
    }

    /// Begins to compute the numbers of an export in half precision.
    fn fits(&self, export: Export) -> Fitting {
        let store = self.store.clone();
        let task = tokio::spawn(async move {
            let (store, model) = (&store, &export.model);
            let tried = match export.form {
                ExportForm::Merged(form) => merged::try_half_precision(store, model, form).await,
                ExportForm::Gguf(storage) => gguf::try_half_precision(store, model, storage).await,
                ExportForm::Adapter | ExportForm::Model => Ok(Ok(())),
            };
            match tried {
                Ok(Err(ContentError::Beyond { name, beyond })) => Err(export.beyond(&name, beyond)),
                // What else is wrong the download will find too, and say.
                Ok(_) | Err(_) => Ok(()),
            }
        });
        task.map(|ended| ended.unwrap_or(Ok(()))).boxed().shared()
    }

    async fn check(&self, export: &Export) -> Outcome {
        let outcome = match self.upstream.compare(export).await {
            upstream::Reply::Compared(comparison, files) => {
                self.judge(export, comparison, files).await
            }
            upstream::Reply::Beyond { name, beyond } => {
                Outcome::Refused(export.beyond(&name, beyond))
            }
            upstream::Reply::Unfit(reason) => Outcome::Refused(export.refused(&reason)),
            upstream::Reply::NotMade(reason) => {
                let reason = reason.trim_end_matches('.');
                Outcome::NotMade(format!("The check could not be made: {reason}."))
            }
            upstream::Reply::NoSampler => Outcome::NoSampler,
        };
        let (model, form) = (&export.model.name, export.form);
        match &outcome {
            Outcome::Passed(checked) => {
                let error = checked.check.comparison.relative_error;
                tracing::info!(model, %form, relative_error = error, "an export passed its check");
            }
            Outcome::Refused(error) => {
                tracing::error!(model, %form, %error, "an export is refused")
            }
            Outcome::NotMade(reason) => {
                tracing::warn!(model, %form, reason, "an export could not be checked");
                let mut not_made = lock(&self.not_made);
                not_made.retain(|_, (at, _)| at.elapsed() < NOT_AGAIN);
                not_made.insert(export.key(), (Instant::now(), reason.clone()));
            }
            Outcome::NoSampler => {}
        }
        outcome
    }

    async fn judge(
        &self,
        export: &Export,
        comparison: Comparison,
        files: Vec<tunesmith_core::weights::ManifestFile>,
    ) -> Outcome {
        let bound = Bound::of(export.form, comparison.numbers);
        if let Some(beyond) = bound.passed_by(&comparison) {
            let why = format!(
                "{beyond} (at {} positions of {} texts; the most likely token is the same at {:.1} \
                 % of them, and the mean Kullback-Leibler divergence is {:.2e} nats)",
                comparison.positions,
                comparison.texts,
                100.0 * comparison.argmax_agreement,
                comparison.mean_kl,
            );
            return Outcome::Refused(export.refused(&why));
        }
        let checked_at = time::OffsetDateTime::now_utc().unix_timestamp();
        let check = PassedCheck { checked: true, checked_at, comparison, bound };
        let checked = CheckedExport { check, files };
        let kept =
            self.store.keep_checked_export(&export.model.name, export.form, VERSION, &checked);
        if let Err(error) = kept.await {
            tracing::warn!(%error, "a check is not kept and will be made again");
        }
        Outcome::Passed(Arc::new(checked))
    }

    fn not_made_lately(&self, export: &Export) -> Option<String> {
        let not_made = lock(&self.not_made);
        let (at, reason) = not_made.get(&export.key())?;
        (at.elapsed() < NOT_AGAIN).then(|| reason.clone())
    }
}

impl Verdict {
    fn passed(checked: Arc<CheckedExport>) -> Self {
        Self { check: ExportCheck::Passed(checked.check.clone()), files: Some(checked) }
    }

    /// The entries, held to the sums of the files that were checked.
    pub(crate) fn hold(&self, entries: Vec<Entry>) -> Vec<Entry> {
        let Some(checked) = &self.files else { return entries };
        let sum = |name: &str| checked.files.iter().find(|file| file.name == name);
        entries
            .into_iter()
            .map(|entry| match sum(&entry.name) {
                Some(file) => Entry { sha256: Some(file.sha256.clone()), ..entry },
                None => entry,
            })
            .collect()
    }
}

/// Whether it was these files that were checked, as far as can be told before they are read.
fn has_files(checked: &CheckedExport, entries: &[Entry]) -> bool {
    let files = checked.files.iter().map(|file| (&file.name, file.bytes));
    files.eq(entries.iter().map(|entry| (&entry.name, entry.bytes)))
}

fn being_checked(export: &Export) -> Failure {
    let message = format!(
        "The export of '{}' ({}) is being compared with the served model. Ask again in a few \
         seconds, or with check=none to get it unchecked.",
        export.model.name, export.form
    );
    Failure::retry_after(ApiError::new(ErrorCode::ExportBeingChecked, message), COME_BACK)
}

#[cfg(test)]
mod tests;
