//! Data parallelism: replicas of one model, each with a share of a step's micro-batches.
//!
//! Losses and gradients are sums over tokens, normalised once by the step's total weight (see
//! [`TrainableModel::forward_backward`]). So the sum of the replicas' gradients is that of one
//! device, however unequal their shares are; a mean over replicas would not be. The lead takes the
//! optimiser's step, and the others take its new values, so all replicas stay equal bit for bit.
//!
//! Which replica computes what, and the order in which gradients are added, depend on the rows
//! alone: two equal runs are equal.

use std::cmp::Reverse;
use std::ops::Deref;
use std::panic::resume_unwind;
use std::thread;

use crate::device::Device;
use crate::error::EngineError;
use crate::model::TrainableModel;
use crate::pool::on_pool;

/// A model on each of several devices. It derefs to the lead, whose values are everyone's.
#[derive(Debug)]
pub struct Replicas {
    lead: TrainableModel,
    others: Vec<TrainableModel>,
}

impl Replicas {
    /// `lead`, which is on the first of `devices`, and its replicas on the others. Replicas on one
    /// device share the memory of what does not train.
    #[must_use]
    pub fn new(lead: TrainableModel, devices: &[Device]) -> Self {
        let others = devices.iter().skip(1).map(|device| lead.replica(device)).collect();
        Self { lead, others }
    }

    /// All of them, the lead first.
    pub fn each(&self) -> impl Iterator<Item = &TrainableModel> {
        std::iter::once(&self.lead).chain(&self.others)
    }

    /// How many there are.
    #[must_use]
    pub fn count(&self) -> usize {
        1 + self.others.len()
    }

    /// Calls `work` once for each of `owners`, with its position and on the replica that it names;
    /// the replicas work at the same time, each in order. The results are in the order of `owners`,
    /// and the gradients of all replicas are added to the lead's.
    ///
    /// # Errors
    /// The first error in that order, and its position. What other work computed is added all the
    /// same.
    pub fn accumulate<T: Send>(
        &mut self,
        owners: &[usize],
        work: impl Fn(&mut TrainableModel, usize) -> Result<T, EngineError> + Sync,
    ) -> Result<Vec<T>, (usize, EngineError)> {
        if self.others.is_empty() {
            return (0..owners.len())
                .map(|index| {
                    on_pool(|| work(&mut self.lead, index)).map_err(|error| (index, error))
                })
                .collect();
        }
        let work = &work;
        let mut results: Vec<(usize, Result<T, EngineError>)> = thread::scope(|scope| {
            let threads: Vec<_> = std::iter::once(&mut self.lead)
                .chain(&mut self.others)
                .enumerate()
                .map(|(replica, model)| {
                    scope.spawn(move || {
                        let own = (0..owners.len()).filter(|&index| owners[index] == replica);
                        own.map(|index| (index, work(model, index))).collect::<Vec<_>>()
                    })
                })
                .collect();
            let join = |thread: thread::ScopedJoinHandle<'_, _>| match thread.join() {
                Ok(results) => results,
                Err(panic) => resume_unwind(panic),
            };
            threads.into_iter().flat_map(join).collect()
        });
        for other in &mut self.others {
            self.lead.take_gradients_of(other);
        }
        results.sort_by_key(|(index, _)| *index);
        results.into_iter().map(|(index, result)| result.map_err(|error| (index, error))).collect()
    }

    /// Changes the lead by `update`, which sees the gradients of all, and gives the others its
    /// values.
    ///
    /// # Errors
    /// Those of `update`: the others are then as before.
    pub fn update<T>(
        &mut self,
        update: impl FnOnce(&mut TrainableModel) -> Result<T, EngineError>,
    ) -> Result<T, EngineError> {
        let result = update(&mut self.lead)?;
        for other in &mut self.others {
            other.take_values_of(&self.lead);
        }
        Ok(result)
    }
}

impl Deref for Replicas {
    type Target = TrainableModel;

    fn deref(&self) -> &TrainableModel {
        &self.lead
    }
}

/// Deals the rows of a step out to `replicas` by their `tokens`, and lays each share out as
/// micro-batches. Returns all micro-batches and, for each, the replica that takes it.
pub fn deal<T>(
    rows: &[usize],
    tokens: impl Fn(usize) -> usize,
    replicas: usize,
    lay_out: impl Fn(&[usize]) -> Vec<T>,
) -> (Vec<T>, Vec<usize>) {
    let (mut batches, mut owners) = (Vec::new(), Vec::new());
    for (replica, share) in shares(rows, tokens, replicas).iter().enumerate() {
        batches.extend(lay_out(share));
        owners.resize(batches.len(), replica);
    }
    (batches, owners)
}

/// The rows of each replica, in the order of `rows`: the longest goes first, to whom has the fewest
/// tokens so far (Graham 1969).
fn shares(rows: &[usize], tokens: impl Fn(usize) -> usize, replicas: usize) -> Vec<Vec<usize>> {
    let mut longest_first: Vec<usize> = (0..rows.len()).collect();
    longest_first.sort_by_key(|&index| Reverse(tokens(rows[index])));
    let mut shares = vec![Vec::new(); replicas];
    let mut sums = vec![0; replicas];
    for index in longest_first {
        let replica = (0..replicas).min_by_key(|&replica| sums[replica]).unwrap_or(0);
        sums[replica] += tokens(rows[index]);
        shares[replica].push(index);
    }
    let in_order = |mut share: Vec<usize>| {
        share.sort_unstable();
        share.into_iter().map(|index| rows[index]).collect()
    };
    shares.into_iter().map(in_order).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shares_of(tokens: &[usize], replicas: usize) -> Vec<Vec<usize>> {
        let rows: Vec<usize> = (0..tokens.len()).collect();
        shares(&rows, |row| tokens[row], replicas)
    }

    #[test]
    fn shares_are_balanced_by_tokens_and_not_by_rows() {
        assert_eq!(shares_of(&[10, 100, 20, 30, 40], 2), [vec![1], vec![0, 2, 3, 4]]);
        assert_eq!(shares_of(&[5, 5, 5, 5], 3), [vec![0, 3], vec![1], vec![2]]);
        assert_eq!(shares_of(&[7], 2), [vec![0], vec![]]);
    }

    #[test]
    fn one_replica_takes_the_rows_of_a_step_in_their_order() {
        let rows = [4, 0, 2];
        let lay_out = |share: &[usize]| vec![share.to_vec()];
        assert_eq!(deal(&rows, |row| row, 1, lay_out), (vec![rows.to_vec()], vec![0]));
        let (batches, owners) = deal(&rows, |row| row, 2, lay_out);
        assert_eq!((batches, owners), (vec![vec![4], vec![0, 2]], vec![0, 1]));
    }
}
