//! The adapters that a child holds, and the orders that wait for one.

use crate::model::Asked;
use std::collections::HashMap;
use std::time::Instant;

/// What is to be done for an order that needs an adapter.
pub(crate) enum Need {
    /// The child has it: ask now.
    Ask(Box<Asked>),
    /// It is to be fetched; the order waits here.
    Fetch,
    /// It is on its way; the order waits here.
    Wait,
}

/// The adapters of one child.
#[derive(Default)]
pub(crate) struct Adapters {
    known: HashMap<String, Adapter>,
}

struct Adapter {
    used: Instant,
    /// Orders that wait for it; none when the child has it.
    waiting: Option<Vec<Asked>>,
}

impl Adapters {
    /// Takes an order that needs the adapter `name`.
    pub(crate) fn need(&mut self, name: &str, asked: Box<Asked>) -> Need {
        let used = Instant::now();
        match self.known.get_mut(name) {
            Some(Adapter { used: last, waiting: None }) => {
                *last = used;
                Need::Ask(asked)
            }
            Some(Adapter { used: last, waiting: Some(waiting) }) => {
                *last = used;
                waiting.push(*asked);
                Need::Wait
            }
            None => {
                let waiting = Some(vec![*asked]);
                self.known.insert(name.to_owned(), Adapter { used, waiting });
                Need::Fetch
            }
        }
    }

    /// The child has it now: the orders that waited.
    pub(crate) fn loaded(&mut self, name: &str) -> Vec<Asked> {
        self.known.get_mut(name).and_then(|adapter| adapter.waiting.take()).unwrap_or_default()
    }

    /// It cannot be had: the orders that waited.
    pub(crate) fn failed(&mut self, name: &str) -> Vec<Asked> {
        self.known.remove(name).and_then(|adapter| adapter.waiting).unwrap_or_default()
    }

    /// Forgets the adapters that were not asked for longest, until there are `most`; gives their
    /// names. Those on their way stay.
    pub(crate) fn make_room(&mut self, most: usize) -> Vec<String> {
        let mut gone = Vec::new();
        while self.known.len() > most {
            let held = self.known.iter().filter(|(_, adapter)| adapter.waiting.is_none());
            let oldest = held.min_by_key(|(_, adapter)| adapter.used);
            let Some(name) = oldest.map(|(name, _)| name.clone()) else { break };
            self.known.remove(&name);
            gone.push(name);
        }
        gone
    }

    /// Nobody waits for the order any more; says whether it waited here.
    pub(crate) fn forget(&mut self, id: u64) -> bool {
        self.known.values_mut().filter_map(|adapter| adapter.waiting.as_mut()).any(|waiting| {
            let before = waiting.len();
            waiting.retain(|asked| asked.id != id);
            waiting.len() < before
        })
    }

    /// All orders that wait.
    pub(crate) fn take_waiting(&mut self) -> Vec<Asked> {
        self.known.drain().filter_map(|(_, adapter)| adapter.waiting).flatten().collect()
    }
}
