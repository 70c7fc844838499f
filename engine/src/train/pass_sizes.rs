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

    /// The largest passes of the run's steps and of what it measures.
    pub(super) fn largest_passes(&self, run: &Cut<'_>) -> LargestPasses {
        match self {
            Self::Rows(Dataset { train, valid }) => run.largest(
                train,
                &[valid],
                |row| row.ids.len(),
                |batching, rows, numbers| batching.sizes(rows, numbers),
            ),
            // What answers are compared with is measured once, on all pairs.
            Self::Pairs(Dataset { train, valid }) => {
                run.largest(train, &[train, valid], tokens, |batching, pairs, numbers| {
                    PairBatch::sizes(pairs, numbers, batching)
                })
            }
        }
    }
}

/// How a run's examples are cut.
#[derive(Debug)]
pub(super) struct Cut<'a> {
    pub(super) sampler: &'a Sampler,
    pub(super) steps: u64,
    /// Among which a step's examples are shared.
    pub(super) replicas: usize,
    pub(super) batching: Batching,
}

impl Cut<'_> {
    /// Of examples with that many `tokens`, and passes of those `sizes`.
    fn largest<E>(
        &self,
        trained: &[E],
        measured: &[&Vec<E>],
        tokens: impl Fn(&E) -> usize,
        sizes: impl Fn(&Batching, &[E], &[usize]) -> Vec<usize>,
    ) -> LargestPasses {
        let of_step = |numbers: Vec<usize>| {
            let tokens = |number: usize| tokens(&trained[number]);
            let share = |share: &[usize]| sizes(&self.batching, trained, share);
            deal(&numbers, tokens, self.replicas, share).0
        };
        let of_all = |examples: &&Vec<E>| {
            let numbers: Vec<usize> = (0..examples.len()).collect();
            sizes(&self.batching.measuring(), examples, &numbers)
        };
        LargestPasses {
            trained: self.sampler.steps(self.steps).flat_map(of_step).max().unwrap_or(0),
            measured: measured.iter().flat_map(of_all).max().unwrap_or(0),
        }
    }
}
