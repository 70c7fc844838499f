//! Which rows of a file have come before, told by their hashes.

use std::collections::HashSet;

/// Copies are told among about this many different rows, so that their hashes take no more than
/// 20 MB.
const MAX_ROWS: usize = (1 << 21) / 8 * 7;
/// Sets that the hashes are spread over. A set that grows holds its hashes twice for a moment: with
/// one set for all, that were 10 MB more.
const SETS: usize = 16;

/// The rows of a file so far.
#[derive(Debug, Default)]
pub(super) struct KnownRows {
    sets: [HashSet<u64>; SETS],
    has_forgotten: bool,
}

impl KnownRows {
    /// Takes the next row; whether it is a copy of one before.
    pub(super) fn is_copy(&mut self, hash: u64) -> bool {
        let set = &mut self.sets[hash as usize % SETS];
        if set.len() < MAX_ROWS / SETS {
            return !set.insert(hash);
        }
        let is_known = set.contains(&hash);
        self.has_forgotten |= !is_known;
        is_known
    }

    /// Whether every copy was told.
    pub(super) fn remembers_all(&self) -> bool {
        !self.has_forgotten
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_are_told_and_rows_past_the_most_are_said_to_be_forgotten() {
        let mut rows = KnownRows::default();
        assert!(!rows.is_copy(5) && !rows.is_copy(6) && rows.is_copy(5));
        // All of one set.
        let last = (MAX_ROWS / SETS) as u64 - 1;
        assert!((1..=last).all(|row| !rows.is_copy(5 + row * SETS as u64)));
        assert!(rows.remembers_all() && rows.is_copy(5 + last * SETS as u64));
        let one_more = 5 + (last + 1) * SETS as u64;
        assert!(!rows.is_copy(one_more) && !rows.is_copy(one_more));
        assert!(!rows.remembers_all() && rows.is_copy(5) && !rows.is_copy(7) && rows.is_copy(7));
    }
}
