//! One model in a child process: started on its first order, and gone after its last.

use crate::adapters::{Adapters, Need};
use crate::fetch::{self, FetchError};
use crate::models::Context;
use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tempfile::TempDir;
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;
use tunesmith_core::errors::{ApiError, ErrorCode};
use tunesmith_core::hyperparameters::AdapterType;
use tunesmith_core::sampling::{FromSampler, SampleRequest, ToSampler};
use tunesmith_core::serving::{SampleLine, SampleOrder};
use tunesmith_worker::{CachedModel, FramedChild};

/// How long a child that was told to exit may take.
pub(crate) const EXIT_GRACE: Duration = Duration::from_secs(5);

type Child = FramedChild<ToSampler, FromSampler>;

/// An order on its way to a child.
#[derive(Debug)]
pub(crate) struct Asked {
    /// No other order of the process has it.
    pub(crate) id: u64,
    pub(crate) order: SampleOrder,
    /// Whoever asked; it hears nothing more when this is dropped.
    pub(crate) lines: mpsc::UnboundedSender<SampleLine>,
}

/// What a model is told.
#[derive(Debug)]
pub(crate) enum ToModel {
    /// Answer.
    Answer(Box<Asked>),
    /// Nobody waits for this order any more.
    Cancel(u64),
}

/// Keeps the model that `first` asks for in memory until nobody can ask it any more: every sender
/// of `orders` is gone, those of the orders under way included.
pub(crate) async fn run(
    context: Arc<Context>,
    slots: Arc<Semaphore>,
    first: SampleOrder,
    mut orders: mpsc::UnboundedReceiver<ToModel>,
) {
    let name = first.in_memory();
    // Nobody closes it.
    let Ok(_slot) = slots.acquire_owned().await else { return };
    // Its files stay as long as the child, which may read from them when it likes.
    let (failure, mut unanswered) = match start(&context, &first).await {
        Err(failure) => (failure, Vec::new()),
        Ok((child, _files)) => {
            let mut model = Model {
                context: &context,
                child,
                running: HashMap::new(),
                adapters: Adapters::default(),
                fetching: JoinSet::new(),
            };
            let ended = model.serve(&mut orders).await;
            model.child.close();
            let exit = model.child.wait(EXIT_GRACE).await;
            let Err(failure) = ended else { return };
            let failure = failure.unwrap_or_else(|| match exit {
                Ok(exit) => exit.to_string(),
                Err(error) => error.to_string(),
            });
            let message = format!(
                "The model's process ended while it answered: {failure}. The next request starts \
                 it again."
            );
            (message, model.unanswered())
        }
    };
    tracing::error!(model = name, failure, "a model is gone");
    // What is sent from now on finds the channel closed.
    orders.close();
    while let Some(order) = orders.recv().await {
        if let ToModel::Answer(asked) = order {
            unanswered.push(asked.lines);
        }
    }
    let error = ApiError::new(ErrorCode::SamplerFailed, failure);
    for lines in unanswered {
        let _ = lines.send(SampleLine::Failed { error: error.clone() });
    }
}

/// Starts the child and waits until the model is in its memory. With it come the files that it reads.
async fn start(context: &Context, first: &SampleOrder) -> Result<(Child, ModelFiles), String> {
    let files = fetch_model(context, first).await.map_err(|error| {
        tracing::error!(%error, "a model's files did not come");
        format!("The model cannot be loaded: {error}")
    })?;
    let config = &context.config;
    let name = first.in_memory();
    let log = move |line: &str| {
        tracing::info!(target: "tunesmith::sampler", model = name, "{line}");
    };
    let started = async {
        let mut child = Child::start("sampler's child", &config.child, log)?;
        child
            .send(&ToSampler::Load {
                base_model_dir: files.path().to_owned(),
                device: config.device.clone(),
                precision: config.precision,
                max_batch: config.max_batch,
                cache_bytes: config.cache_bytes,
            })
            .await?;
        let said = child.next().await?;
        Ok::<_, tunesmith_worker::ChildError>((child, said))
    };
    let (mut child, said) =
        started.await.map_err(|error| format!("The model cannot be loaded: {error}."))?;
    match said {
        Some(FromSampler::Loaded { device }) => {
            tracing::info!(model = first.in_memory(), device, "a model is in memory");
            Ok((child, files))
        }
        Some(FromSampler::LoadFailed { message }) => {
            Err(format!("The model cannot be loaded: {message}"))
        }
        Some(other) => Err(format!("The model cannot be loaded: its process said {other:?}.")),
        None => {
            let exit = child.wait(EXIT_GRACE).await.map_err(|error| error.to_string())?;
            Err(format!("The model cannot be loaded: {exit}."))
        }
    }
}

/// A model's files.
enum ModelFiles {
    /// Those of a base model, which the cache keeps meanwhile.
    Cached(CachedModel),
    /// A tuned model's own, in a directory that goes with it.
    Own(TempDir),
}

impl ModelFiles {
    fn path(&self) -> &Path {
        match self {
            Self::Cached(model) => model.path(),
            Self::Own(dir) => dir.path(),
        }
    }
}

async fn fetch_model(context: &Context, order: &SampleOrder) -> Result<ModelFiles, FetchError> {
    if let Some(tuned) = order.tuned.as_ref().filter(|tuned| tuned.kind == AdapterType::Full) {
        return Ok(ModelFiles::Own(fetch::tuned(context, tuned).await?));
    }
    Ok(ModelFiles::Cached(fetch::base_model(context, &order.base_model).await?))
}

/// A model in memory.
struct Model<'a> {
    context: &'a Arc<Context>,
    child: Child,
    running: HashMap<u64, Running>,
    adapters: Adapters,
    fetching: JoinSet<(String, Result<TempDir, FetchError>)>,
}

/// An order that the child works on.
struct Running {
    lines: mpsc::UnboundedSender<SampleLine>,
    /// Answers that are not complete.
    left: u32,
}

/// What a child came to: why it failed, if it said anything that tells; else its exit does.
type Ended = Result<(), Option<String>>;

impl Model<'_> {
    async fn serve(&mut self, orders: &mut mpsc::UnboundedReceiver<ToModel>) -> Ended {
        // Where the adapters on their way to the child lie, by their names.
        let mut dirs: HashMap<String, TempDir> = HashMap::new();
        loop {
            tokio::select! {
                order = orders.recv() => match order {
                    None => return Ok(()),
                    Some(ToModel::Answer(asked)) => self.take(asked).await?,
                    Some(ToModel::Cancel(id)) => self.cancel(id).await?,
                },
                Some(fetched) = self.fetching.join_next() => {
                    let (adapter, dir) = fetched.map_err(|error| Some(error.to_string()))?;
                    match dir {
                        Ok(dir) => {
                            let path = dir.path().to_owned();
                            dirs.insert(adapter.clone(), dir);
                            self.send(&ToSampler::LoadAdapter { adapter, dir: path }).await?;
                        }
                        Err(error) => self.adapter_failed(&adapter, &error.to_string()),
                    }
                },
                said = self.child.next() => match said {
                    Ok(Some(FromSampler::AdapterLoaded { adapter })) => {
                        dirs.remove(&adapter);
                        self.adapter_loaded(&adapter).await?;
                    }
                    Ok(Some(FromSampler::AdapterFailed { adapter, message })) => {
                        dirs.remove(&adapter);
                        self.adapter_failed(&adapter, &message);
                    }
                    Ok(Some(said)) => self.pass_on(said),
                    Ok(None) => return Err(None),
                    Err(error) => {
                        self.child.kill();
                        return Err(Some(error.to_string()));
                    }
                },
            }
        }
    }

    async fn send(&mut self, message: &ToSampler) -> Ended {
        self.child.send(message).await.map_err(|error| Some(error.to_string()))
    }

    /// Takes an order in: for an adapter that the child does not have, it waits.
    async fn take(&mut self, asked: Box<Asked>) -> Ended {
        let adapter = asked.order.tuned.clone().filter(|tuned| tuned.kind == AdapterType::Lora);
        let Some(tuned) = adapter else { return self.sample(*asked, None).await };
        let name = tuned.place.to_string();
        match self.adapters.need(&name, asked) {
            Need::Ask(asked) => self.sample(*asked, Some(name)).await,
            Need::Wait => Ok(()),
            Need::Fetch => {
                let context = Arc::clone(self.context);
                self.fetching.spawn(async move {
                    let dir = fetch::tuned(&context, &tuned).await;
                    (name, dir)
                });
                for adapter in self.adapters.make_room(self.context.config.max_adapters) {
                    self.send(&ToSampler::UnloadAdapter { adapter }).await?;
                }
                Ok(())
            }
        }
    }

    async fn sample(&mut self, asked: Asked, adapter: Option<String>) -> Ended {
        let Asked { id, order, lines } = asked;
        if lines.is_closed() {
            return Ok(());
        }
        self.running.insert(id, Running { lines, left: order.n });
        let SampleOrder { prompt, n, sampling, low_priority, .. } = order;
        let request = SampleRequest { id, adapter, prompt, n, sampling, low_priority };
        self.send(&ToSampler::Sample(request)).await
    }

    async fn cancel(&mut self, id: u64) -> Ended {
        if !self.adapters.forget(id) && self.running.remove(&id).is_some() {
            return self.send(&ToSampler::Cancel { id }).await;
        }
        Ok(())
    }

    async fn adapter_loaded(&mut self, name: &str) -> Ended {
        for asked in self.adapters.loaded(name) {
            self.sample(asked, Some(name.to_owned())).await?;
        }
        Ok(())
    }

    fn adapter_failed(&mut self, name: &str, why: &str) {
        tracing::error!(adapter = name, why, "an adapter cannot be loaded");
        let message = format!("The adapter cannot be loaded: {why}");
        let error = ApiError::new(ErrorCode::SamplerFailed, message);
        for asked in self.adapters.failed(name) {
            let _ = asked.lines.send(SampleLine::Failed { error: error.clone() });
        }
    }

    /// Hands on what the child says of an order.
    fn pass_on(&mut self, said: FromSampler) {
        let (id, line, ends) = match said {
            FromSampler::Token { id, index, token, top } => {
                (id, SampleLine::Token { index, token, top }, 0)
            }
            FromSampler::End { id, index, reason, cached_tokens } => {
                (id, SampleLine::End { index, reason, cached_tokens }, 1)
            }
            FromSampler::Failed { id, code, message } => {
                (id, SampleLine::Failed { error: ApiError::new(code, message) }, u32::MAX)
            }
            other => {
                tracing::warn!(?other, "a sampler's child said something out of turn");
                return;
            }
        };
        // One that was cancelled may still be spoken of.
        let Some(running) = self.running.get_mut(&id) else { return };
        let _ = running.lines.send(line);
        running.left = running.left.saturating_sub(ends);
        if running.left == 0 {
            self.running.remove(&id);
        }
    }

    /// Whoever waits for an answer.
    fn unanswered(mut self) -> Vec<mpsc::UnboundedSender<SampleLine>> {
        let waiting = self.adapters.take_waiting().into_iter().map(|asked| asked.lines);
        self.running.into_values().map(|running| running.lines).chain(waiting).collect()
    }
}
