//! The models in memory: which there are, and which goes when another is asked for.

use crate::config::SamplerConfig;
use crate::model::{self, Asked, ToModel};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;
use tokio::runtime::Handle;
use tokio::sync::{Notify, Semaphore, mpsc};
use tokio_util::task::TaskTracker;
use tunesmith_core::serving::SampleOrder;
use tunesmith_store::Store;
use tunesmith_worker::{ModelCache, WorkDir};

/// What every model works with.
#[derive(Debug)]
pub(crate) struct Context {
    pub(crate) store: Store,
    pub(crate) cache: ModelCache,
    pub(crate) work_dir: WorkDir,
    pub(crate) config: SamplerConfig,
}

/// The models of one sampler.
#[derive(Debug)]
pub(crate) struct Models {
    context: Arc<Context>,
    known: Mutex<HashMap<String, Known>>,
    /// One for each child that may run. A model that must go holds its own until its last answer
    /// is given and its process has exited, and the next one waits for it.
    slots: Arc<Semaphore>,
    tasks: TaskTracker,
    /// Where models live: orders come on the server's threads, which end before them.
    runtime: Handle,
    /// Told when a model comes or goes.
    pub(crate) changed: Notify,
}

#[derive(Debug)]
struct Known {
    orders: mpsc::UnboundedSender<ToModel>,
    used: Instant,
}

impl Models {
    /// No models as yet; they will live in the runtime that this is called in.
    pub(crate) fn new(context: Context) -> Self {
        let slots = Arc::new(Semaphore::new(context.config.max_models));
        Self {
            context: Arc::new(context),
            known: Mutex::default(),
            slots,
            tasks: TaskTracker::new(),
            runtime: Handle::current(),
            changed: Notify::new(),
        }
    }

    /// What every model works with.
    pub(crate) fn context(&self) -> &Context {
        &self.context
    }

    /// Hands an order to its model, which is loaded if it is not there. What it says comes to
    /// `asked`; the returned sender takes the order's cancellation.
    pub(crate) fn ask(&self, asked: Asked) -> mpsc::UnboundedSender<ToModel> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        // A child that died has closed its end.
        known.retain(|_, model| !model.orders.is_closed());
        let name = asked.order.in_memory();
        let orders = match known.get_mut(&name) {
            Some(model) => {
                model.used = Instant::now();
                model.orders.clone()
            }
            None => {
                self.make_room(&mut known);
                let orders = self.start(&asked.order);
                known.insert(name, Known { orders: orders.clone(), used: Instant::now() });
                self.changed.notify_one();
                orders
            }
        };
        drop(known);
        // One that died since says so by hanging up on the order.
        let _ = orders.send(ToModel::Answer(Box::new(asked)));
        orders
    }

    /// Lets go of the models that were not asked for longest.
    fn make_room(&self, known: &mut HashMap<String, Known>) {
        while known.len() >= self.context.config.max_models {
            let oldest = known.iter().min_by_key(|(_, model)| model.used);
            let Some(name) = oldest.map(|(name, _)| name.clone()) else { return };
            tracing::info!(model = name, "a model makes room for another");
            known.remove(&name);
        }
    }

    fn start(&self, order: &SampleOrder) -> mpsc::UnboundedSender<ToModel> {
        let (orders, taken) = mpsc::unbounded_channel();
        let (context, slots) = (Arc::clone(&self.context), Arc::clone(&self.slots));
        let model = model::run(context, slots, order.clone(), taken);
        self.tasks.spawn_on(model, &self.runtime);
        orders
    }

    /// The models in memory or on their way into it.
    pub(crate) fn in_memory(&self) -> Vec<String> {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let living = known.iter().filter(|(_, model)| !model.orders.is_closed());
        let mut names: Vec<String> = living.map(|(name, _)| name.clone()).collect();
        names.sort();
        names
    }

    /// Lets go of all; returns when their processes have exited.
    pub(crate) async fn stop(&self) {
        self.known.lock().unwrap_or_else(PoisonError::into_inner).clear();
        self.tasks.close();
        self.tasks.wait().await;
    }
}
