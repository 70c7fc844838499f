//! How many tokens a run's passes have: what memory is planned by, before there is a model.

use tunesmith_core::dataset::{TokenizedPair, TokenizedRow};

use super::dataset::Dataset;
use crate::data::batching::Batching;
use crate::data::sampler::Sampler;
use crate::parallel::deal;
use crate::preference::{PairBatch, tokens};

/// What a run learns from.
#[derive(Debug)]
pub(super) enum Examples {
    Rows(Dataset<TokenizedRow>),
    Pairs(Dataset<TokenizedPair>),
}

/// The most tokens in a pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct LargestPasses {
    /// That trains.
    pub(super) trained: usize,
    /// That only measures.
    pub(super) measured: usize,
}

impl Examples {
    /// Examples that train.
    pub(super) fn count(&self) -> usize {
        match self {
            Self::Rows(data) => data.train.len(),
            Self::Pairs(data) => data.train.len(),
        }
    }

    /// Tokens of the longest example: what cannot be parted.
    pub(super) fn longest(&self) -> usize {
        match self {
            Self::Rows(data) => data.longest(TokenizedRow::longest_sequence),
            Self::Pairs(data) => data.longest(tokens),
        }
    }

    /// The largest passes of the first `steps` steps, shared among `replicas`, and of evaluations.
    pub(super) fn largest_passes(
        &self,
        sampler: &Sampler,
        steps: u64,
        replicas: usize,
        batching: &Batching,
    ) -> LargestPasses {
        let measuring = batching.measuring();
        let most = |sizes: Vec<usize>| sizes.into_iter().max().unwrap_or(0);
        let all = |count: usize| (0..count).collect::<Vec<_>>();
        match self {
            Self::Rows(Dataset { train, valid }) => {
                let of_step = |rows: Vec<usize>| {
                    let tokens = |row: usize| train[row].ids.len();
                    deal(&rows, tokens, replicas, |share| batching.sizes(train, share)).0
                };
                LargestPasses {
                    trained: sampler
                        .steps(steps)
                        .map(|rows| most(of_step(rows)))
                        .max()
                        .unwrap_or(0),
                    measured: most(measuring.sizes(valid, &all(valid.len()))),
                }
            }
            Self::Pairs(Dataset { train, valid }) => {
                let of_step = |rows: Vec<usize>| {
                    let tokens = |row: usize| tokens(&train[row]);
                    deal(&rows, tokens, replicas, |share| PairBatch::sizes(train, share, batching))
                        .0
                };
                // What answers are compared with is measured once, on all pairs.
                let measured = [train, valid]
                    .map(|pairs| most(PairBatch::sizes(pairs, &all(pairs.len()), &measuring)));
                LargestPasses {
                    trained: sampler
                        .steps(steps)
                        .map(|rows| most(of_step(rows)))
                        .max()
                        .unwrap_or(0),
                    measured: measured.into_iter().max().unwrap_or(0),
                }
            }
        }
    }
}
