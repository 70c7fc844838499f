//! Makes the deliveries that the store has noted, one after another and each until it has arrived
//! or three days are over.
//!
//! Any number of processes may do this side by side: a claim keeps a delivery to one of them.

mod address;
mod send;
mod signature;

pub(crate) use address::AddressPolicy;
pub use ipnet::IpNet;
pub(crate) use send::{Message, send};
pub(crate) use signature::new_secret;

use crate::background::{Work, work_off_until};
use futures::StreamExt as _;
use std::time::Duration;
use tokio::sync::watch;
use tunesmith_store::notify::Channel;
use tunesmith_store::webhooks::Delivery;
use tunesmith_store::{Store, StoreError};

/// Deliveries that are under way at one time.
const AT_ONCE: u32 = 16;
/// A notification may be lost: look this often without one.
const LOOK_EVERY: Duration = Duration::from_secs(30);

/// Delivers until `stopped` turns true.
pub(crate) async fn run(store: Store, policy: AddressPolicy, stopped: watch::Receiver<bool>) {
    work_off_until(&Deliveries { store, policy }, stopped).await;
}

struct Deliveries {
    store: Store,
    policy: AddressPolicy,
}

impl Work for Deliveries {
    const CHANNEL: Channel = Channel::Webhooks;
    const NAME: &str = "delivering webhooks";

    fn store(&self) -> &Store {
        &self.store
    }

    async fn next(&self) -> Result<Option<Duration>, StoreError> {
        if deliver_due(&self.store, &self.policy).await? {
            return Ok(None);
        }
        let due = self.store.next_delivery_in().await?.unwrap_or(LOOK_EVERY);
        Ok(Some(due.min(LOOK_EVERY)))
    }
}

/// Makes the deliveries that are due; says whether there were any.
async fn deliver_due(store: &Store, policy: &AddressPolicy) -> Result<bool, StoreError> {
    let due = store.claim_deliveries(AT_ONCE).await?;
    let any = !due.is_empty();
    let noted: Vec<Result<(), StoreError>> = futures::stream::iter(due)
        .map(|delivery| deliver(store, policy, delivery))
        .buffer_unordered(AT_ONCE as usize)
        .collect()
        .await;
    noted.into_iter().collect::<Result<(), _>>()?;
    Ok(any)
}

async fn deliver(
    store: &Store,
    policy: &AddressPolicy,
    delivery: Delivery,
) -> Result<(), StoreError> {
    let message = Message {
        url: &delivery.url,
        id: &delivery.event_id,
        body: &delivery.body,
        secrets: &delivery.secrets,
    };
    match send(policy, &message).await {
        Ok(status) => {
            let arrived = status.is_success();
            if !arrived {
                let (event, attempt) = (&delivery.event_id, delivery.attempt);
                tracing::info!(event, attempt, %status, "a webhook was not taken");
            }
            store.record_attempt(&delivery, arrived, Some(status.as_u16()), None).await
        }
        Err(error) => {
            let (event, attempt) = (&delivery.event_id, delivery.attempt);
            tracing::info!(event, attempt, %error, "a webhook was not delivered");
            store.record_attempt(&delivery, false, None, Some(&error.to_string())).await
        }
    }
}
