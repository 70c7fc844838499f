//! What chunks of text became, as far as it is remembered.

use super::tokenizer::Encoded;
use ahash::AHashMap;

/// Longer chunks are encoded each time: they hardly come again.
const MAX_CHUNK_BYTES: usize = 64;
/// Longer parts do not fit into a key.
const MAX_PART_BYTES: usize = 15;
/// Parts that are remembered, and chunks: as many as fill a table of that size, about 6 MB and
/// 15 MB of them.
const MAX_KNOWN: usize = (1 << 17) / 8 * 7;
/// Tokens of a part that lie beside its key.
const NEAR: usize = 3;

/// A token's id, and where it lies in its chunk.
type ChunkToken = (u32, u8, u8);

/// The tokens of chunks: of those that are short, of ASCII and without a gap between their tokens,
/// which are most, in a denser way.
#[derive(Default)]
pub(super) struct KnownChunks {
    parts: AHashMap<u128, PartTokens>,
    /// The tokens of parts that have more than [`NEAR`]: ids and ends.
    far: Vec<(u32, u8)>,
    chunks: AHashMap<Box<str>, Box<[ChunkToken]>>,
}

/// A token begins where the one before it ends. Of more than [`NEAR`] tokens the first id is the
/// place of the first one in [`KnownChunks::far`].
#[derive(Clone, Copy)]
struct PartTokens {
    ids: [u32; NEAR],
    ends: [u8; NEAR],
    count: u8,
}

/// The first `length` bytes of `text` and that length, as one number; none where they are too many.
pub(super) fn part_key(text: &[u8], length: usize) -> Option<u128> {
    if length > MAX_PART_BYTES {
        return None;
    }
    let bytes = text.first_chunk().copied().unwrap_or_else(|| {
        let mut bytes = [0; 16];
        bytes[..length].copy_from_slice(&text[..length]);
        bytes
    });
    let kept = u128::from_le_bytes(bytes) & ((1 << (8 * length)) - 1);
    Some(kept | (length as u128) << (8 * MAX_PART_BYTES))
}

impl KnownChunks {
    /// Appends the tokens of the part of this key, which begins at `from`, if they are known.
    pub(super) fn recall_part(&self, key: u128, from: usize, encoded: &mut Encoded) -> bool {
        let Some(part) = self.parts.get(&key) else { return false };
        let count = usize::from(part.count);
        let mut start = from;
        let mut push = |id, end| {
            let end = from + usize::from(end);
            encoded.ids.push(id);
            encoded.offsets.push((start, end));
            start = end;
        };
        if count <= NEAR {
            for (&id, &end) in part.ids.iter().zip(&part.ends).take(count) {
                push(id, end);
            }
        } else {
            let first = part.ids[0] as usize;
            for &(id, end) in &self.far[first..first + count] {
                push(id, end);
            }
        }
        true
    }

    /// Remembers `tokens`, ids and ends, for the part of this key.
    pub(super) fn learn_part(&mut self, key: u128, tokens: &[(u32, usize)]) {
        if self.parts.len() >= MAX_KNOWN {
            return;
        }
        let mut part = PartTokens { ids: [0; NEAR], ends: [0; NEAR], count: tokens.len() as u8 };
        if tokens.len() <= NEAR {
            for (place, &(id, end)) in tokens.iter().enumerate() {
                (part.ids[place], part.ends[place]) = (id, end as u8);
            }
        } else {
            part.ids[0] = self.far.len() as u32;
            self.far.extend(tokens.iter().map(|&(id, end)| (id, end as u8)));
        }
        self.parts.insert(key, part);
    }

    /// Appends the tokens of `chunk`, which begins at `from`, if they are known.
    pub(super) fn recall(&self, chunk: &str, from: usize, encoded: &mut Encoded) -> bool {
        let Some(tokens) = self.chunks.get(chunk) else { return false };
        for &(id, start, end) in tokens {
            encoded.ids.push(id);
            encoded.offsets.push((from + usize::from(start), from + usize::from(end)));
        }
        true
    }

    /// Remembers the tokens of `chunk` with their places in it.
    pub(super) fn learn(&mut self, chunk: &str, tokens: impl Iterator<Item = (u32, usize, usize)>) {
        if chunk.len() <= MAX_CHUNK_BYTES && self.chunks.len() < MAX_KNOWN {
            let tokens = tokens.map(|(id, start, end)| (id, start as u8, end as u8));
            self.chunks.insert(chunk.into(), tokens.collect());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Recalled = Option<(Vec<u32>, Vec<(usize, usize)>)>;

    fn recalled(recall: impl FnOnce(&mut Encoded) -> bool) -> Recalled {
        let mut encoded = Encoded { ids: Vec::new(), offsets: Vec::new() };
        recall(&mut encoded).then_some((encoded.ids, encoded.offsets))
    }

    fn key(text: &str) -> u128 {
        part_key(text.as_bytes(), text.len()).expect("a short part")
    }

    #[test]
    fn a_key_is_the_parts_alone_whatever_stands_behind_it() {
        let long = b"abcdefghijklmnopqrstuvwxyz";
        assert_eq!(part_key(long, 3), part_key(b"abc", 3));
        assert_eq!(part_key(long, 15), part_key(&long[..15], 15));
        assert_eq!(part_key(long, 16), None);
        let keys = ["", "\0", "\0\0", "a", "a\0", "\0a", "b", "abcdefghijklmno"].map(key);
        for (place, key) in keys.iter().enumerate() {
            assert!(!keys[..place].contains(key), "{place}");
        }
    }

    #[test]
    fn parts_of_any_number_of_tokens_come_back_where_they_are_asked_for() {
        let mut known = KnownChunks::default();
        let word = "abcdefghijklmno";
        for count in 0..=word.len() {
            let tokens: Vec<_> =
                (0..count).map(|token| (token as u32 + 70_000, token + 1)).collect();
            known.learn_part(key(&word[..count]), &tokens);
        }
        for count in 0..=word.len() {
            let found = recalled(|encoded| known.recall_part(key(&word[..count]), 9, encoded));
            let ids = (0..count as u32).map(|token| token + 70_000).collect();
            let offsets = (0..count).map(|token| (9 + token, 10 + token)).collect();
            assert_eq!(found, Some((ids, offsets)), "{count}");
        }
        assert_eq!(recalled(|encoded| known.recall_part(key("z"), 0, encoded)), None);
    }

    #[test]
    fn chunks_come_back_as_they_were_and_long_ones_are_not_kept() {
        let mut known = KnownChunks::default();
        // Two tokens of one character, as it is where one is cut.
        known.learn("\u{e9}", [(5, 0, 2), (6, 0, 2)].into_iter());
        let found = recalled(|encoded| known.recall("\u{e9}", 4, encoded));
        assert_eq!(found, Some((vec![5, 6], vec![(4, 6), (4, 6)])));
        let long = "\u{e9}".repeat(MAX_CHUNK_BYTES);
        known.learn(&long, std::iter::once((5, 0, long.len())));
        assert_eq!(recalled(|encoded| known.recall(&long, 0, encoded)), None);
    }

    #[test]
    fn what_is_remembered_has_an_end() {
        let mut known = KnownChunks::default();
        for number in 0..=MAX_KNOWN {
            known.learn_part(number as u128, &[(1, 1)]);
            known.learn(&number.to_string(), std::iter::empty());
        }
        assert_eq!((known.parts.len(), known.chunks.len()), (MAX_KNOWN, MAX_KNOWN));
        assert!(known.parts.capacity() == MAX_KNOWN && known.chunks.capacity() == MAX_KNOWN);
    }
}
