//! What one forward pass computes on: documents laid end to end, without padding.

use std::ops::Range;

use crate::error::EngineError;

/// Rows of a micro-batch, concatenated. Attention is block-diagonal by segment and positions
/// restart in each, so a row's loss does not depend on its neighbours and nothing is padded.
#[derive(Debug, Clone, PartialEq)]
pub struct Batch {
    /// Token ids of all rows, end to end; length T.
    pub ids: Vec<u32>,
    /// Weight of each token *as a target*: `weights[t]` multiplies −log p(ids[t] | ids before it
    /// in its segment). A segment's first token is never a target, whatever its weight says.
    pub weights: Vec<f32>,
    /// Where each row lies in `ids`; consecutive, covering `0..T`.
    pub segments: Vec<Range<usize>>,
    /// The row number (0-based, in the data set) that each segment came from.
    pub rows: Vec<usize>,
}

impl Batch {
    /// One sequence whose every token but the first is a target of weight 1.
    #[must_use]
    pub fn single(ids: &[u32]) -> Self {
        Self {
            ids: ids.to_vec(),
            weights: vec![1.0; ids.len()],
            segments: std::iter::once(0..ids.len()).collect(),
            rows: vec![0],
        }
    }

    /// Checks that the segments cover the ids in order and that each token has a sound weight.
    ///
    /// # Errors
    /// [`EngineError::Data`] naming what does not fit.
    pub fn check(&self) -> Result<(), EngineError> {
        let mut covered = 0;
        for segment in &self.segments {
            if segment.start != covered || segment.end <= segment.start {
                return Err(EngineError::Data(format!(
                    "segment {segment:?} of a batch does not follow token {covered}"
                )));
            }
            covered = segment.end;
        }
        if covered != self.ids.len()
            || self.weights.len() != self.ids.len()
            || self.rows.len() != self.segments.len()
        {
            return Err(EngineError::Data(format!(
                "a batch of {} ids has {} weights, {} rows, and {} segments that end at {covered}",
                self.ids.len(),
                self.weights.len(),
                self.rows.len(),
                self.segments.len()
            )));
        }
        match self.weights.iter().find(|weight| !weight.is_finite() || **weight < 0.0) {
            Some(weight) => {
                Err(EngineError::Data(format!("a loss weight is {weight}: use 0 or more")))
            }
            None => Ok(()),
        }
    }

    /// What there is to predict, in order; targets of weight 0 are left out. Ids are shifted
    /// against positions here and nowhere else.
    pub fn targets(&self) -> impl Iterator<Item = Target> + '_ {
        self.segments
            .iter()
            .flat_map(|segment| segment.start + 1..segment.end)
            .map(|token| Target {
                position: token - 1,
                id: self.ids[token],
                weight: self.weights[token],
            })
            .filter(|target| target.weight != 0.0)
    }

    /// Σ of the weights of all targets: the denominator of the mean loss.
    #[must_use]
    pub fn total_weight(&self) -> f64 {
        self.segments
            .iter()
            .flat_map(|segment| &self.weights[(segment.start + 1).min(segment.end)..segment.end])
            .map(|&weight| f64::from(weight))
            .sum()
    }

    /// How many tokens the batch holds.
    #[must_use]
    pub fn tokens(&self) -> usize {
        self.ids.len()
    }
}

/// One token to predict.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Target {
    /// The position whose logits predict it: the one before it.
    pub position: usize,
    /// The token that is there.
    pub id: u32,
    /// Factor on its −log p.
    pub weight: f32,
}

/// Sums over a batch's targets, from which means are made once, at the end of a step.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct BatchOutcome {
    /// Σ wᵢ·NLLᵢ.
    pub weighted_nll: f64,
    /// Σ wᵢ.
    pub weight: f64,
    /// Σ wᵢ over the targets that were also the most likely token.
    pub weighted_correct: f64,
}

impl std::ops::AddAssign for BatchOutcome {
    fn add_assign(&mut self, other: Self) {
        self.weighted_nll += other.weighted_nll;
        self.weight += other.weight;
        self.weighted_correct += other.weighted_correct;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn two_segments() -> Batch {
        Batch {
            ids: vec![10, 11, 12, 20, 21],
            weights: vec![9.0, 0.0, 0.5, 9.0, 1.0],
            segments: vec![0..3, 3..5],
            rows: vec![0, 1],
        }
    }

    #[test]
    fn targets_are_shifted_once_and_never_cross_segments() {
        let targets: Vec<Target> = two_segments().targets().collect();
        let expected = [
            Target { position: 1, id: 12, weight: 0.5 },
            Target { position: 3, id: 21, weight: 1.0 },
        ];
        assert_eq!(targets, expected);
    }

    #[test]
    fn total_weight_leaves_out_first_tokens() {
        assert_eq!(two_segments().total_weight(), 1.5);
    }

    #[test]
    fn segments_with_a_gap_or_an_overlap_are_refused() {
        for segments in [[0..2, 3..5], [0..3, 2..5], [0..5, 5..5], [0..3, 3..4]] {
            let rows = vec![0; segments.len()];
            assert!(Batch { segments: segments.into(), rows, ..two_segments() }.check().is_err());
        }
    }

    #[test]
    fn weight_that_is_negative_or_nan_is_refused() {
        for weight in [-0.1, f32::NAN] {
            let batch = Batch { weights: vec![weight; 5], ..two_segments() };
            assert!(batch.check().is_err());
        }
    }
}
