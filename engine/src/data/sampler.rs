//! Which rows a step trains on, as a pure function of the seed and the step.
//!
//! A resumed run asks for the step it is at and needs nothing of what ran before.

use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;

/// What a random order is for: orders for different purposes are independent.
#[derive(Debug, Clone, Copy)]
enum Purpose {
    Epoch(u64),
    Split,
}

/// The order of the rows within an epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum RowOrder {
    /// A new one every epoch, drawn from the seed.
    #[default]
    Shuffled,
    /// As they lie in the file, to compare with another program.
    File,
}

/// Deals the rows of a training set out to steps, each row once an epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sampler {
    /// Rows of the training set.
    pub rows: usize,
    /// Rows to one optimiser step; an epoch's last step takes what is left.
    pub rows_per_step: usize,
    /// The job's seed.
    pub seed: u64,
    /// Shuffled or not.
    pub order: RowOrder,
}

impl Sampler {
    /// Steps in one pass over the rows.
    #[must_use]
    pub fn steps_per_epoch(&self) -> u64 {
        self.rows.div_ceil(self.rows_per_step) as u64
    }

    /// The rows of step number `step`, counted from 0 over the whole run.
    #[must_use]
    pub fn rows_of_step(&self, step: u64) -> Vec<usize> {
        let (epoch, step) = (step / self.steps_per_epoch(), step % self.steps_per_epoch());
        let start = step as usize * self.rows_per_step;
        let end = (start + self.rows_per_step).min(self.rows);
        self.order_of(epoch)[start..end].to_vec()
    }

    /// The rows of each of the first `steps` steps; an epoch's order is drawn once.
    pub fn steps(&self, steps: u64) -> impl Iterator<Item = Vec<usize>> {
        let (sampler, per_epoch) = (*self, self.steps_per_epoch());
        (0..steps.div_ceil(per_epoch.max(1)))
            .flat_map(move |epoch| {
                let order = sampler.order_of(epoch);
                let steps = order.chunks(sampler.rows_per_step).map(<[usize]>::to_vec);
                steps.collect::<Vec<_>>()
            })
            .take(steps as usize)
    }

    /// All rows, in the order of an epoch.
    fn order_of(&self, epoch: u64) -> Vec<usize> {
        match self.order {
            RowOrder::File => (0..self.rows).collect(),
            RowOrder::Shuffled => shuffled(self.rows, self.seed, Purpose::Epoch(epoch)),
        }
    }
}

/// Splits rows into those that train and `held_out` that validate, each in file order. `parts` says
/// how many rows each text gave: these stay together, but for those of one text at most, of which the
/// last ones validate. A text that both trained and validated would look better than it is.
#[must_use]
pub fn split(parts: &[usize], held_out: usize, seed: u64) -> (Vec<usize>, Vec<usize>) {
    let mut ends = Vec::with_capacity(parts.len());
    let mut rows = 0;
    for part in parts {
        rows += part;
        ends.push(rows);
    }
    let mut validates = vec![false; rows];
    let mut missing = held_out;
    for text in shuffled(parts.len(), seed, Purpose::Split).into_iter().rev() {
        let taken = parts[text].min(missing);
        validates[ends[text] - taken..ends[text]].fill(true);
        missing -= taken;
    }
    (0..rows).partition(|&row| !validates[row])
}

/// The numbers `0..rows` in a random order (Fisher and Yates).
///
/// Written out, since a run may be resumed by a later version of this program: `rand` does not
/// promise that its shuffle stays the same.
fn shuffled(rows: usize, seed: u64, purpose: Purpose) -> Vec<usize> {
    let (kind, number) = match purpose {
        Purpose::Epoch(epoch) => (0, epoch),
        Purpose::Split => (1, 0),
    };
    let mut key = [0; 32];
    for (bytes, part) in key.chunks_exact_mut(8).zip([seed, kind, number]) {
        bytes.copy_from_slice(&part.to_le_bytes());
    }
    let mut random = ChaCha8Rng::from_seed(key);
    let mut order: Vec<usize> = (0..rows).collect();
    for last in (1..rows).rev() {
        // The high half of a 128-bit product is uniform in 0..=last but for one part in 2^64.
        let other = (u128::from(random.next_u64()) * (last as u128 + 1)) >> 64;
        order.swap(last, other as usize);
    }
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sampler(rows: usize, rows_per_step: usize) -> Sampler {
        Sampler { rows, rows_per_step, seed: 42, order: RowOrder::Shuffled }
    }

    fn rows_of_epoch(sampler: &Sampler, epoch: u64) -> Vec<usize> {
        let steps = sampler.steps_per_epoch();
        (epoch * steps..(epoch + 1) * steps).flat_map(|step| sampler.rows_of_step(step)).collect()
    }

    #[test]
    fn every_row_is_seen_once_an_epoch() {
        for (rows, rows_per_step) in [(1, 1), (5, 4), (7, 7), (12, 4), (100, 7)] {
            let sampler = sampler(rows, rows_per_step);
            for epoch in 0..3 {
                let mut seen = rows_of_epoch(&sampler, epoch);
                seen.sort_unstable();
                assert_eq!(seen, (0..rows).collect::<Vec<_>>(), "{rows} by {rows_per_step}");
            }
        }
    }

    #[test]
    fn every_row_is_seen_once_an_epoch_across_a_resume_too() {
        let straight = sampler(13, 4);
        for stop in 0..2 * straight.steps_per_epoch() {
            // A resumed run knows the request and the step, and nothing else.
            let resumed = sampler(13, 4);
            let steps = 2 * straight.steps_per_epoch();
            let seen: Vec<usize> = (0..stop)
                .flat_map(|step| straight.rows_of_step(step))
                .chain((stop..steps).flat_map(|step| resumed.rows_of_step(step)))
                .collect();
            for epoch in seen.chunks(13) {
                let mut epoch = epoch.to_vec();
                epoch.sort_unstable();
                assert_eq!(epoch, (0..13).collect::<Vec<_>>(), "stopped after {stop} steps");
            }
        }
    }

    #[test]
    fn five_rows_by_four_make_two_steps_and_the_second_has_one_row() {
        let sampler = sampler(5, 4);
        assert_eq!(sampler.steps_per_epoch(), 2);
        assert_eq!(sampler.rows_of_step(0).len(), 4);
        assert_eq!(sampler.rows_of_step(1).len(), 1);
        assert_eq!(sampler.rows_of_step(2).len(), 4);
    }

    #[test]
    fn epochs_and_seeds_differ_in_order_and_the_same_seed_does_not() {
        let here = sampler(50, 5);
        assert_ne!(rows_of_epoch(&here, 0), rows_of_epoch(&here, 1));
        assert_ne!(rows_of_epoch(&here, 0), rows_of_epoch(&Sampler { seed: 43, ..here }, 0));
        assert_eq!(rows_of_epoch(&here, 1), rows_of_epoch(&sampler(50, 5), 1));
    }

    #[test]
    fn the_order_is_the_same_in_every_version_of_this_program() {
        assert_eq!(rows_of_epoch(&sampler(8, 8), 0), [4, 5, 0, 3, 6, 7, 1, 2]);
    }

    #[test]
    fn all_steps_at_once_are_the_steps_one_by_one() {
        for order in [RowOrder::Shuffled, RowOrder::File] {
            let sampler = Sampler { order, ..sampler(13, 4) };
            for steps in [0, 1, 4, 5, 11] {
                let one_by_one = (0..steps).map(|step| sampler.rows_of_step(step));
                assert!(sampler.steps(steps).eq(one_by_one), "{steps} steps");
            }
        }
    }

    #[test]
    fn file_order_is_the_files() {
        let sampler = Sampler { order: RowOrder::File, ..sampler(5, 2) };
        assert_eq!(rows_of_epoch(&sampler, 1), [0, 1, 2, 3, 4]);
    }

    #[test]
    fn a_split_parts_the_rows_by_the_seed() {
        let (train, valid) = split(&[1; 20], 5, 1);
        assert_eq!((train.len(), valid.len()), (15, 5));
        let mut all = [train, valid.clone()].concat();
        all.sort_unstable();
        assert_eq!(all, (0..20).collect::<Vec<_>>());
        assert_ne!(split(&[1; 20], 5, 2).1, valid);
        assert_eq!(split(&[1; 3], 0, 1), (vec![0, 1, 2], vec![]));
    }

    #[test]
    fn windows_of_a_text_stay_together_when_rows_are_split() {
        let parts = [4, 1, 7, 3, 5];
        let mut torn = 0;
        for seed in 0..20 {
            let (train, valid) = split(&parts, 6, seed);
            assert_eq!((train.len(), valid.len()), (14, 6));
            let mut start = 0;
            for part in parts {
                let held_out: Vec<usize> =
                    (start..start + part).filter(|row| valid.contains(row)).collect();
                start += part;
                if !held_out.is_empty() && held_out.len() < part {
                    torn += 1;
                    // Its end, in one piece.
                    assert_eq!(held_out, (start - held_out.len()..start).collect::<Vec<_>>());
                }
            }
        }
        assert!((1..=20).contains(&torn), "{torn} torn in 20");
        assert_eq!(split(&[5], 2, 1), (vec![0, 1, 2], vec![3, 4]));
    }
}
