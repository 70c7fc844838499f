//! The caches of answers that have ended, for prompts that begin alike: the next turn of a chat, or
//! the same instructions before another question.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::models::decoder::{Adaptation, KeyValueCache};

/// Fewer tokens than this are not worth the room that they take.
const MIN_TOKENS: usize = 16;

/// What is kept, the most recently used last.
#[derive(Debug, Default)]
pub(super) struct Prefixes {
    kept: VecDeque<Kept>,
    /// Tokens that their memory would hold.
    room: usize,
}

#[derive(Debug)]
struct Kept {
    /// Keys and values depend on it.
    adaptation: Option<Arc<Adaptation>>,
    /// As many as the cache has.
    ids: Vec<u32>,
    cache: KeyValueCache,
}

impl Kept {
    fn room(&self) -> usize {
        KeyValueCache::room_of(self.ids.len())
    }
}

impl Prefixes {
    /// Keeps the cache of `ids`.
    pub(super) fn keep(
        &mut self,
        adaptation: Option<Arc<Adaptation>>,
        mut ids: Vec<u32>,
        cache: KeyValueCache,
    ) {
        ids.truncate(cache.tokens());
        if ids.len() < MIN_TOKENS {
            return;
        }
        // What the new one begins with is not needed beside it.
        let is_within =
            |kept: &Kept| same(&kept.adaptation, &adaptation) && ids.starts_with(&kept.ids);
        self.kept.retain(|kept| !is_within(kept));
        self.kept.push_back(Kept { adaptation, ids, cache });
        self.room = self.kept.iter().map(Kept::room).sum();
    }

    /// A cache of the longest beginning of `prompt` that is kept, but not of its last token, whose
    /// logits are wanted.
    pub(super) fn find(
        &mut self,
        adaptation: &Option<Arc<Adaptation>>,
        prompt: &[u32],
    ) -> KeyValueCache {
        let prompt = &prompt[..prompt.len() - 1];
        let shared = |kept: &Kept| match same(&kept.adaptation, adaptation) {
            true => kept.ids.iter().zip(prompt).take_while(|(a, b)| a == b).count(),
            false => 0,
        };
        let longest = self.kept.iter().map(shared).enumerate().max_by_key(|&(_, tokens)| tokens);
        let Some((index, tokens)) = longest.filter(|&(_, tokens)| tokens >= MIN_TOKENS) else {
            return KeyValueCache::default();
        };
        let found = self.kept.remove(index).expect("it was just found");
        let cache = found.cache.prefix(tokens);
        self.kept.push_back(found);
        cache.unwrap_or_default()
    }

    /// Lets go of the least recently used ones until they take room for `tokens` or fewer.
    pub(super) fn shrink_to(&mut self, tokens: usize) {
        while self.room > tokens
            && let Some(kept) = self.kept.pop_front()
        {
            self.room -= kept.room();
        }
    }

    /// Lets go of all that was computed with an adapter.
    pub(super) fn forget(&mut self, adaptation: &Arc<Adaptation>) {
        self.kept.retain(|kept| !same(&kept.adaptation, &Some(Arc::clone(adaptation))));
        self.room = self.kept.iter().map(Kept::room).sum();
    }
}

/// Whether both are computed with the same adapter, or both with none.
pub(super) fn same(a: &Option<Arc<Adaptation>>, b: &Option<Arc<Adaptation>>) -> bool {
    match (a, b) {
        (Some(a), Some(b)) => Arc::ptr_eq(a, b),
        (None, None) => true,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, Tensor};

    use super::*;
    use crate::models::rope::RotaryTable;
    use crate::ops::attention::{Heads, Scores};
    use crate::ops::cached_attention::{Extension, cached_attention};

    /// A cache of one layer.
    fn cache(tokens: usize) -> KeyValueCache {
        let heads = Heads { query: 1, key_value: 1, dim: 2 };
        let scores = Scores { scale: 1.0, softcap: None, window: None, bf16: false };
        let rotary = RotaryTable::from_frequencies(&[1.0], 1.0, 0, tokens);
        let mut layer = None;
        let extension = Extension { rows: 0..tokens, first_position: 0, cache: &mut layer };
        let qkv = Tensor::ones([tokens, heads.qkv_width()], &Device::flex());
        cached_attention(qkv, heads, scores, &rotary, &mut [extension]);
        KeyValueCache::of_layers(vec![layer], tokens)
    }

    fn ids(tokens: u32, last: u32) -> Vec<u32> {
        (0..tokens - 1).chain([last]).collect()
    }

    fn found(prefixes: &mut Prefixes, prompt: &[u32]) -> usize {
        prefixes.find(&None, prompt).tokens()
    }

    #[test]
    fn longest_beginning_is_found_and_the_last_token_is_left_to_be_computed() {
        let mut prefixes = Prefixes::default();
        prefixes.keep(None, ids(20, 99), cache(20));
        prefixes.keep(None, ids(30, 98), cache(30));
        assert_eq!(found(&mut prefixes, &ids(40, 1)), 29);
        assert_eq!(found(&mut prefixes, &ids(30, 98)), 29);
        assert_eq!(found(&mut prefixes, &[ids(20, 99), vec![7, 8]].concat()), 20);
        assert_eq!(found(&mut prefixes, &[5, 6, 7]), 0);
        let other = Some(Arc::new(Adaptation::default()));
        assert_eq!(prefixes.find(&other, &ids(40, 1)).tokens(), 0);
    }

    #[test]
    fn least_recently_used_goes_first_and_what_goes_on_replaces_what_it_began_with() {
        let mut prefixes = Prefixes::default();
        prefixes.keep(None, ids(20, 99), cache(20));
        prefixes.keep(None, [ids(20, 99), vec![1; 10]].concat(), cache(30));
        assert_eq!((prefixes.kept.len(), prefixes.room), (1, KeyValueCache::room_of(30)));
        let other: Vec<u32> = (500..525).collect();
        prefixes.keep(None, other.clone(), cache(25));
        found(&mut prefixes, &ids(40, 1));
        prefixes.shrink_to(2 * KeyValueCache::room_of(30) - 1);
        assert_eq!(found(&mut prefixes, &other), 0);
        assert_eq!(prefixes.room, KeyValueCache::room_of(30));
        prefixes.shrink_to(0);
        assert_eq!((prefixes.kept.len(), prefixes.room), (0, 0));
    }

    #[test]
    fn what_is_hardly_worth_its_room_is_not_kept() {
        let mut prefixes = Prefixes::default();
        prefixes.keep(None, ids(15, 1), cache(15));
        assert_eq!(prefixes.room, 0);
    }
}
