//! Rows → micro-batches: what one forward and backward pass computes on.

use tunesmith_core::dataset::TokenizedRow;

use crate::batch::{Batch, Segment};

pub use tunesmith_core::memory::TOKENS_PER_PASS;

/// Beginnings shorter than this are not worth a segment of their own.
pub(crate) const MIN_SHARED_TOKENS: usize = 16;

/// How a step's rows are cut into passes. No choice changes a step's loss or gradient but for
/// rounding and for which inputs LoRA dropout hits, since sums are normalised once a step.
///
/// A row may be several sequences, as where a chat template drops earlier thoughts; these are laid
/// out one by one, and may part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Batching {
    /// The most rows in one pass.
    pub batch_size: usize,
    /// Whether the rows of a pass are computed at once, laid end to end, or one after another.
    pub packing: bool,
    /// Whether rows of a pass that begin alike, as with one system prompt, share the computation
    /// of that beginning. Not together with what is random for each token of a row.
    pub share_prefixes: bool,
    /// The most tokens computed in one pass; one longer row makes a pass of its own.
    pub tokens_per_pass: usize,
}

impl Batching {
    /// Lays `numbers`, rows of `rows`, out as micro-batches in that order; rows that share a
    /// beginning come together, where the first of them stands.
    #[must_use]
    pub fn micro_batches(&self, rows: &[TokenizedRow], numbers: &[usize]) -> Vec<Batch> {
        self.passes(rows, numbers).iter().map(Pass::batch).collect()
    }

    /// How many tokens each of them has.
    pub(crate) fn sizes(&self, rows: &[TokenizedRow], numbers: &[usize]) -> Vec<usize> {
        self.passes(rows, numbers).iter().map(Pass::tokens).collect()
    }

    /// Passes that only measure: nothing in them is random, and only their tokens are limited.
    pub(crate) fn measuring(self) -> Self {
        Self { batch_size: usize::MAX, packing: true, share_prefixes: true, ..self }
    }

    fn passes<'a>(&self, rows: &'a [TokenizedRow], numbers: &[usize]) -> Vec<Pass<'a>> {
        let batch_size = if self.packing { self.batch_size } else { 1 };
        let mut passes: Vec<Pass<'_>> = Vec::new();
        for group in numbers.chunks(batch_size) {
            let mut pass = Pass::new(self.share_prefixes);
            for sequence in group.iter().flat_map(|&number| Sequence::all(rows, number)) {
                if !pass.is_empty() && pass.tokens_with(&sequence) > self.tokens_per_pass {
                    passes.push(std::mem::replace(&mut pass, Pass::new(self.share_prefixes)));
                }
                pass.push(sequence);
            }
            passes.push(pass);
        }
        passes
    }
}

/// The sequences of one pass, by their beginnings.
struct Pass<'a> {
    share_prefixes: bool,
    families: Vec<Family<'a>>,
}

/// A sequence of a row; most rows are one.
struct Sequence<'a> {
    row: usize,
    ids: &'a [u32],
    weights: &'a [f32],
}

/// Sequences that begin alike.
struct Family<'a> {
    /// Never empty.
    members: Vec<Sequence<'a>>,
    /// How many first tokens all members have in common; each member has at least one more.
    shared: usize,
}

impl<'a> Sequence<'a> {
    /// Those of row `number`.
    fn all(rows: &'a [TokenizedRow], number: usize) -> impl Iterator<Item = Self> {
        let row = &rows[number];
        row.sequences().map(move |range| Self {
            row: number,
            ids: &row.ids[range.clone()],
            weights: &row.weights[range],
        })
    }
}

impl<'a> Pass<'a> {
    fn new(share_prefixes: bool) -> Self {
        Self { share_prefixes, families: Vec::new() }
    }

    fn is_empty(&self) -> bool {
        self.families.is_empty()
    }

    /// The family that a sequence belongs to, and what its members would then share.
    fn family_of(&self, sequence: &Sequence<'_>) -> Option<(usize, usize)> {
        if !self.share_prefixes {
            return None;
        }
        let ids = sequence.ids;
        self.families.iter().enumerate().find_map(|(index, family)| {
            let first = family.members[0].ids;
            let longest = family.shared.min(ids.len().saturating_sub(1));
            let shared = first.iter().zip(ids).take(longest).take_while(|(a, b)| a == b).count();
            (shared >= MIN_SHARED_TOKENS).then_some((index, shared))
        })
    }

    /// Tokens to compute, with a sequence added.
    fn tokens_with(&self, sequence: &Sequence<'_>) -> usize {
        let joined = self.family_of(sequence);
        let mut tokens = sequence.ids.len();
        for (index, family) in self.families.iter().enumerate() {
            tokens += match joined {
                Some((joined, shared)) if joined == index => family.tokens(shared) - shared,
                _ => family.tokens(family.shared),
            };
        }
        tokens
    }

    /// Tokens to compute.
    fn tokens(&self) -> usize {
        self.families.iter().map(|family| family.tokens(family.shared)).sum()
    }

    fn push(&mut self, sequence: Sequence<'a>) {
        match self.family_of(&sequence) {
            Some((index, shared)) => {
                self.families[index].members.push(sequence);
                self.families[index].shared = shared;
            }
            None => {
                let shared = sequence.ids.len().saturating_sub(1);
                self.families.push(Family { members: vec![sequence], shared });
            }
        }
    }

    fn batch(&self) -> Batch {
        let mut batch = Batch::default();
        for Family { members, shared } in &self.families {
            let shared = if members.len() > 1 { *shared } else { 0 };
            let mut prefix = 0..0;
            if shared > 0 {
                prefix = batch.ids.len()..batch.ids.len() + shared;
                batch.ids.extend_from_slice(&members[0].ids[..shared]);
                // In f64, so that the sum over many rows is rounded once.
                batch.weights.extend((0..shared).map(|token| {
                    let weights = members.iter().map(|member| f64::from(member.weights[token]));
                    weights.sum::<f64>() as f32
                }));
                batch.segments.push(Segment::whole(prefix.clone()));
            }
            for member in members {
                let start = batch.ids.len();
                batch.ids.extend_from_slice(&member.ids[shared..]);
                batch.weights.extend_from_slice(&member.weights[shared..]);
                let tokens = start..batch.ids.len();
                batch.segments.push(Segment { tokens, prefix: prefix.clone() });
                batch.rows.push(member.row);
            }
        }
        batch
    }
}

impl Family<'_> {
    /// Tokens to compute when the members share their first `shared` ones.
    fn tokens(&self, shared: usize) -> usize {
        let all: usize = self.members.iter().map(|member| member.ids.len()).sum();
        all - (self.members.len() - 1) * shared
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(lengths: &[usize]) -> Vec<TokenizedRow> {
        let row = |(index, &length): (usize, &usize)| TokenizedRow {
            line: index + 1,
            ids: vec![index as u32; length],
            weights: vec![1.0; length],
            starts: vec![0],
            truncated: false,
        };
        lengths.iter().enumerate().map(row).collect()
    }

    fn batching(batch_size: usize, tokens_per_pass: usize) -> Batching {
        Batching { batch_size, packing: true, share_prefixes: true, tokens_per_pass }
    }

    /// Rows that begin with `shared` equal tokens and go on with `own` tokens of their own.
    fn rows_after(shared: usize, own: &[usize]) -> Vec<TokenizedRow> {
        let row = |(index, &own): (usize, &usize)| {
            let own = std::iter::repeat_n(1000 + index as u32, own);
            let ids: Vec<u32> = (0..shared as u32).chain(own).collect();
            let weights = vec![0.5 + index as f32; ids.len()];
            TokenizedRow { line: index + 1, ids, weights, starts: vec![0], truncated: false }
        };
        own.iter().enumerate().map(row).collect()
    }

    fn row_numbers(batches: &[Batch]) -> Vec<Vec<usize>> {
        batches.iter().map(|batch| batch.rows.clone()).collect()
    }

    #[test]
    fn packing_lays_the_rows_of_a_batch_end_to_end() {
        let rows = rows(&[3, 2, 4, 1, 5]);
        let batching = batching(2, 100);
        let batches = batching.micro_batches(&rows, &[4, 0, 2, 1, 3]);
        assert_eq!(row_numbers(&batches), [vec![4, 0], vec![2, 1], vec![3]]);
        assert_eq!(batches[0].segments, [0..5, 5..8].map(Segment::whole));
        assert_eq!(batches[0].ids, [4, 4, 4, 4, 4, 0, 0, 0]);
        assert!(batches.iter().all(|batch| batch.check().is_ok()));
    }

    #[test]
    fn without_packing_each_row_is_a_pass() {
        let batching = Batching { packing: false, ..batching(4, 100) };
        let batches = batching.micro_batches(&rows(&[3, 2, 4]), &[0, 1, 2]);
        assert_eq!(row_numbers(&batches), [[0], [1], [2]]);
    }

    #[test]
    fn a_pass_ends_where_the_next_row_would_pass_the_budget() {
        let batching = batching(8, 6);
        let batches = batching.micro_batches(&rows(&[3, 3, 1, 9, 2]), &[0, 1, 2, 3, 4]);
        assert_eq!(row_numbers(&batches), [vec![0, 1], vec![2], vec![3], vec![4]]);
    }

    #[test]
    fn rows_that_begin_alike_share_their_beginning() {
        let rows = rows_after(20, &[3, 1, 2]);
        let batches = batching(8, 100).micro_batches(&rows, &[2, 0, 1]);
        assert_eq!(row_numbers(&batches), [[2, 0, 1]]);
        let batch = &batches[0];
        let continued = |tokens| Segment { tokens, prefix: 0..20 };
        assert_eq!(batch.segments[0], Segment::whole(0..20));
        assert_eq!(batch.segments[1..], [20..22, 22..25, 25..26].map(continued));
        assert_eq!(batch.ids[19..26], [19, 1002, 1002, 1000, 1000, 1000, 1001]);
        assert_eq!(batch.weights[19..21], [0.5 + 1.5 + 2.5, 2.5]);
        assert_eq!((batch.tokens(), batch.row_tokens()), (26, 66));
        assert!(batch.check().is_ok());
        let apart = Batching { share_prefixes: false, ..batching(8, 100) };
        let apart = apart.micro_batches(&rows, &[2, 0, 1]);
        assert_eq!((apart[0].tokens(), apart[0].row_tokens()), (66, 66));
        assert!((apart[0].total_weight() - batch.total_weight()).abs() < 1e-5);
    }

    #[test]
    fn sequences_of_one_row_are_segments_that_do_not_meet_but_may_share_their_beginning() {
        let mut row = rows_after(20, &[2]).remove(0);
        row.ids.extend(0..20);
        row.ids.extend([7, 8, 9]);
        row.weights.extend([0.0; 20]);
        row.weights.extend([1.0; 3]);
        row.starts.push(22);
        let rows = vec![row];
        let batches = batching(8, 100).micro_batches(&rows, &[0]);
        assert_eq!(row_numbers(&batches), [[0, 0]]);
        let continued = |tokens| Segment { tokens, prefix: 0..20 };
        assert_eq!(batches[0].segments[1..], [20..22, 22..25].map(continued));
        assert_eq!(batches[0].ids[22..], [7, 8, 9]);
        assert_eq!(batches[0].row_tokens(), 45);
        let apart = Batching { share_prefixes: false, ..batching(8, 100) };
        let apart = apart.micro_batches(&rows, &[0]);
        assert_eq!(apart[0].segments, [0..22, 22..45].map(Segment::whole));
        assert!((apart[0].total_weight() - batches[0].total_weight()).abs() < 1e-6);
    }

    #[test]
    fn equal_rows_keep_one_token_each() {
        let rows = vec![rows_after(20, &[0]).remove(0); 3];
        let batches = batching(8, 100).micro_batches(&rows, &[0, 1, 2]);
        assert_eq!((batches[0].tokens(), batches[0].row_tokens()), (19 + 3, 60));
        assert!(batches[0].check().is_ok());
    }

    #[test]
    fn short_or_different_beginnings_are_not_shared() {
        let batches = batching(8, 100).micro_batches(&rows_after(15, &[3, 1]), &[0, 1]);
        assert_eq!(batches[0].segments, [0..18, 18..34].map(Segment::whole));
        let mut rows = rows_after(20, &[3, 1]);
        rows[1].ids[0] = 7;
        let batches = batching(8, 100).micro_batches(&rows, &[0, 1]);
        assert_eq!(batches[0].segments, [0..23, 23..44].map(Segment::whole));
    }

    #[test]
    fn two_system_prompts_make_two_families() {
        let mut rows = rows_after(20, &[1, 1, 1, 1]);
        for row in [1, 3] {
            rows[row].ids[0] = 7;
        }
        let batches = batching(8, 100).micro_batches(&rows, &[0, 1, 2, 3]);
        assert_eq!(row_numbers(&batches), [[0, 2, 1, 3]]);
        assert_eq!((batches[0].tokens(), batches[0].row_tokens()), (44, 84));
        assert!(batches[0].check().is_ok());
    }

    #[test]
    fn the_budget_counts_a_shared_beginning_once() {
        let rows = rows_after(20, &[5, 5, 5, 5]);
        let batches = batching(8, 35).micro_batches(&rows, &[0, 1, 2, 3]);
        assert_eq!(row_numbers(&batches), [[0, 1, 2].as_slice(), &[3]]);
    }

    #[test]
    fn packing_cuts_no_document_and_changes_no_number_of_steps() {
        // A step is a list of rows; packing lays them out and can neither drop nor part one.
        let rows = rows(&[3, 90, 4, 1, 64, 7, 2]);
        let numbers = [4, 0, 6, 2, 1, 3];
        for packing in [true, false] {
            for batch_size in [1, 2, 6] {
                let batching = Batching { packing, ..batching(batch_size, 32) };
                let batches = batching.micro_batches(&rows, &numbers);
                let seen: Vec<usize> = row_numbers(&batches).concat();
                assert_eq!(seen, numbers, "{batching:?}");
                for batch in &batches {
                    let whole = batch.segments.iter().zip(&batch.rows);
                    assert!(
                        whole.into_iter().all(|(s, &row)| s.tokens.len() == rows[row].ids.len())
                    );
                }
            }
        }
    }
}
