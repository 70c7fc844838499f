//! Rows → micro-batches: what one forward and backward pass computes on.

use tunesmith_core::dataset::TokenizedRow;

use crate::batch::Batch;

/// The most tokens of one pass, where more than one row shares it. On a CPU more than this gains
/// no speed, and the memory of a pass grows with its tokens.
pub const TOKENS_PER_PASS: usize = 2048;

/// How a step's rows are cut into passes. No choice changes a step's loss or gradient but for
/// rounding and for which inputs LoRA dropout hits, since sums are normalised once a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Batching {
    /// The most rows in one pass.
    pub batch_size: usize,
    /// Whether the rows of a pass are computed at once, laid end to end, or one after another.
    pub packing: bool,
    /// The most tokens in one pass; one longer row makes a pass of its own.
    pub tokens_per_pass: usize,
}

impl Batching {
    /// Lays `numbers`, rows of `rows`, out as micro-batches in that order.
    #[must_use]
    pub fn micro_batches(&self, rows: &[TokenizedRow], numbers: &[usize]) -> Vec<Batch> {
        let batch_size = if self.packing { self.batch_size } else { 1 };
        let mut batches: Vec<Batch> = Vec::new();
        for group in numbers.chunks(batch_size) {
            let mut room = 0;
            for &number in group {
                let row = &rows[number];
                let tokens = row.ids.len();
                match batches.last_mut() {
                    Some(batch) if room >= tokens => append(batch, row, number),
                    _ => {
                        room = self.tokens_per_pass.max(tokens);
                        let mut batch = Batch {
                            ids: Vec::new(),
                            weights: Vec::new(),
                            segments: Vec::new(),
                            rows: Vec::new(),
                        };
                        append(&mut batch, row, number);
                        batches.push(batch);
                    }
                }
                room -= tokens;
            }
        }
        batches
    }
}

fn append(batch: &mut Batch, row: &TokenizedRow, number: usize) {
    let start = batch.ids.len();
    batch.ids.extend_from_slice(&row.ids);
    batch.weights.extend_from_slice(&row.weights);
    batch.segments.push(start..batch.ids.len());
    batch.rows.push(number);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(lengths: &[usize]) -> Vec<TokenizedRow> {
        let row = |(index, &length): (usize, &usize)| TokenizedRow {
            line: index + 1,
            ids: vec![index as u32; length],
            weights: vec![1.0; length],
            truncated: false,
        };
        lengths.iter().enumerate().map(row).collect()
    }

    fn row_numbers(batches: &[Batch]) -> Vec<Vec<usize>> {
        batches.iter().map(|batch| batch.rows.clone()).collect()
    }

    #[test]
    fn packing_lays_the_rows_of_a_batch_end_to_end() {
        let rows = rows(&[3, 2, 4, 1, 5]);
        let batching = Batching { batch_size: 2, packing: true, tokens_per_pass: 100 };
        let batches = batching.micro_batches(&rows, &[4, 0, 2, 1, 3]);
        assert_eq!(row_numbers(&batches), [vec![4, 0], vec![2, 1], vec![3]]);
        assert_eq!(batches[0].segments, [0..5, 5..8]);
        assert_eq!(batches[0].ids, [4, 4, 4, 4, 4, 0, 0, 0]);
        assert!(batches.iter().all(|batch| batch.check().is_ok()));
    }

    #[test]
    fn without_packing_each_row_is_a_pass() {
        let batching = Batching { batch_size: 4, packing: false, tokens_per_pass: 100 };
        let batches = batching.micro_batches(&rows(&[3, 2, 4]), &[0, 1, 2]);
        assert_eq!(row_numbers(&batches), [[0], [1], [2]]);
    }

    #[test]
    fn a_pass_ends_where_the_next_row_would_pass_the_budget() {
        let batching = Batching { batch_size: 8, packing: true, tokens_per_pass: 6 };
        let batches = batching.micro_batches(&rows(&[3, 3, 1, 9, 2]), &[0, 1, 2, 3, 4]);
        assert_eq!(row_numbers(&batches), [vec![0, 1], vec![2], vec![3], vec![4]]);
    }
}
