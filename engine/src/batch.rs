//! What one forward pass computes on: documents laid end to end, without padding.

use std::ops::Range;

use crate::error::EngineError;

/// Rows of a micro-batch, concatenated. Attention is block-diagonal by segment and positions
/// restart in each, so a row's loss does not depend on its neighbours and nothing is padded.
///
/// Rows that begin alike may share that beginning: it is a segment of its own, computed once, and
/// the rest of each row is a segment that continues it. Causal attention makes this exact: what a
/// token sees and predicts does not depend on what follows it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Batch {
    /// Token ids of all rows, end to end; length T.
    pub ids: Vec<u32>,
    /// Weight of each token *as a target*: `weights[t]` multiplies −log p(ids[t] | ids before it
    /// in its row). A row's first token is never a target, whatever its weight says. In a shared
    /// beginning it is the sum over the rows that share it.
    pub weights: Vec<f32>,
    /// The segments, consecutive in `ids` and covering `0..T`.
    pub segments: Vec<Segment>,
    /// The rows (numbers in the data set, from 0) that the batch was made of, one entry for each
    /// sequence.
    pub rows: Vec<usize>,
}

/// Consecutive tokens of a row: all of them, or those after a beginning shared with other rows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segment {
    /// Where it lies in the batch's ids.
    pub tokens: Range<usize>,
    /// Where the beginning lies that it continues, an earlier segment's `tokens`; else empty.
    pub prefix: Range<usize>,
}

impl Segment {
    /// A row of its own.
    #[must_use]
    pub fn whole(tokens: Range<usize>) -> Self {
        Self { tokens, prefix: 0..0 }
    }

    /// The position in its row of the segment's first token.
    #[must_use]
    pub fn first_position(&self) -> usize {
        self.prefix.len()
    }

    /// How many tokens its last token sees, itself included.
    #[must_use]
    pub fn context(&self) -> usize {
        self.prefix.len() + self.tokens.len()
    }

    /// Each token that is predicted, and the one whose logits predict it.
    fn predictions(&self) -> impl Iterator<Item = (usize, usize)> {
        let tokens = self.tokens.clone();
        let first = self.prefix.clone().last().map(|last| (last, tokens.start));
        first.into_iter().chain(tokens.clone().zip(tokens.skip(1)))
    }
}

impl Batch {
    /// One sequence whose every token but the first is a target of weight 1.
    #[must_use]
    pub fn single(ids: &[u32]) -> Self {
        Self {
            ids: ids.to_vec(),
            weights: vec![1.0; ids.len()],
            segments: vec![Segment::whole(0..ids.len())],
            rows: vec![0],
        }
    }

    /// Checks that the segments cover the ids in order and that each token has a sound weight.
    ///
    /// # Errors
    /// [`EngineError::Data`] naming what does not fit.
    pub fn check(&self) -> Result<(), EngineError> {
        let mut covered = 0;
        for (index, Segment { tokens, prefix }) in self.segments.iter().enumerate() {
            if tokens.start != covered || tokens.end <= tokens.start {
                return Err(EngineError::Data(format!(
                    "segment {tokens:?} of a batch does not follow token {covered}"
                )));
            }
            let is_whole =
                |segment: &Segment| segment.prefix.is_empty() && segment.tokens == *prefix;
            if !prefix.is_empty() && !self.segments[..index].iter().any(is_whole) {
                return Err(EngineError::Data(format!(
                    "segment {tokens:?} of a batch continues {prefix:?}, which is no row's \
                     beginning before it"
                )));
            }
            covered = tokens.end;
        }
        if covered != self.ids.len() || self.weights.len() != self.ids.len() {
            return Err(EngineError::Data(format!(
                "a batch of {} ids has {} weights and {} segments that end at {covered}",
                self.ids.len(),
                self.weights.len(),
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
    /// against positions here and nowhere else. A position may come more than once: the end of a
    /// shared beginning predicts how each row goes on.
    pub fn targets(&self) -> impl Iterator<Item = Target> + '_ {
        self.segments
            .iter()
            .flat_map(Segment::predictions)
            .map(|(position, token)| Target {
                position,
                id: self.ids[token],
                weight: self.weights[token],
            })
            .filter(|target| target.weight != 0.0)
    }

    /// Of each of the batch's sequences, in their order, its row with Σ wᵢ·NLLᵢ and Σ wᵢ over its
    /// own targets, each with the weight that it has in the row. `nll` is that of the batch's
    /// targets, in order, and `weights` gives the weights of a row's sequence of these ids.
    ///
    /// A token of a shared beginning is predicted once, and its loss is that of every row that
    /// shares it.
    ///
    pub fn row_sums<'a>(
        &self,
        nll: &[f64],
        weights: impl Fn(usize, &[u32]) -> &'a [f32],
    ) -> Vec<(usize, f64, f64)> {
        let mut of_token = vec![0.0; self.ids.len()];
        let predicted = self.segments.iter().flat_map(Segment::predictions);
        let targets = predicted.filter(|&(_, token)| self.weights[token] != 0.0);
        targets.zip(nll).for_each(|((_, token), &nll)| of_token[token] = nll);
        let is_shared = |segment: &Segment| {
            self.segments
                .iter()
                .any(|other| !other.prefix.is_empty() && other.prefix == segment.tokens)
        };
        let own = self.segments.iter().filter(|segment| !is_shared(segment));
        own.zip(&self.rows)
            .map(|(segment, &row)| {
                let tokens = || segment.prefix.clone().chain(segment.tokens.clone());
                let ids: Vec<u32> = tokens().map(|token| self.ids[token]).collect();
                let weighted = tokens().zip(weights(row, &ids)).skip(1);
                let add = |(sum, total), (token, &weight): (usize, &f32)| {
                    let weight = f64::from(weight);
                    // A target of no weight was not computed.
                    let loss = if weight == 0.0 { 0.0 } else { weight * of_token[token] };
                    (sum + loss, total + weight)
                };
                let (sum, weight) = weighted.fold((0.0, 0.0), add);
                (row, sum, weight)
            })
            .collect()
    }

    /// Σ of the weights of all targets: the denominator of the mean loss.
    #[must_use]
    pub fn total_weight(&self) -> f64 {
        self.targets().map(|target| f64::from(target.weight)).sum()
    }

    /// How many tokens are computed.
    #[must_use]
    pub fn tokens(&self) -> usize {
        self.ids.len()
    }

    /// How many tokens the rows have; a shared beginning counts once for each of them.
    #[must_use]
    pub fn row_tokens(&self) -> usize {
        let continued =
            |segment: &Segment| self.segments.iter().any(|other| other.prefix == segment.tokens);
        self.segments.iter().filter(|segment| !continued(segment)).map(Segment::context).sum()
    }

    /// The greatest number of tokens that any token sees, itself included.
    #[must_use]
    pub fn longest_context(&self) -> usize {
        self.segments.iter().map(Segment::context).max().unwrap_or(0)
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
            segments: vec![Segment::whole(0..3), Segment::whole(3..5)],
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
            let segments = segments.map(Segment::whole).into();
            assert!(Batch { segments, ..two_segments() }.check().is_err());
        }
    }

    /// The rows 10 11 12 and 10 11 20 21, which share their first two tokens.
    fn shared_beginning() -> Batch {
        let continued = |tokens| Segment { tokens, prefix: 0..2 };
        Batch {
            ids: vec![10, 11, 12, 20, 21],
            weights: vec![9.0, 0.2, 0.5, 0.0, 1.0],
            segments: vec![Segment::whole(0..2), continued(2..3), continued(3..5)],
            rows: vec![0, 1],
        }
    }

    #[test]
    fn the_end_of_a_shared_beginning_predicts_how_each_row_goes_on() {
        let batch = Batch { weights: vec![9.0, 0.2, 0.5, 0.7, 1.0], ..shared_beginning() };
        let targets: Vec<_> = batch.targets().map(|t| (t.position, t.id, t.weight)).collect();
        assert_eq!(targets, [(0, 11, 0.2), (1, 12, 0.5), (1, 20, 0.7), (3, 21, 1.0)]);
        assert_eq!((batch.tokens(), batch.row_tokens(), batch.longest_context()), (5, 7, 4));
        assert!(batch.check().is_ok());
    }

    #[test]
    fn sums_of_a_row_are_those_of_its_own_targets() {
        let rows = [vec![9.0, 0.0, 0.5], vec![9.0, 1.0]];
        let batch = two_segments();
        let sums = batch.row_sums(&[3.0, 4.0], |row, _| rows[row].as_slice());
        assert_eq!(sums, [(0, 1.5, 0.5), (1, 4.0, 1.0)]);
        // Of two targets, the heavier counts more.
        let batch = Batch { weights: vec![9.0, 0.25, 0.75, 9.0, 1.0], ..two_segments() };
        let rows = [vec![9.0, 0.25, 0.75], vec![9.0, 1.0]];
        let sums = batch.row_sums(&[4.0, 8.0, 1.0], |row, _| rows[row].as_slice());
        assert_eq!(sums, [(0, 7.0, 1.0), (1, 1.0, 1.0)]);
    }

    #[test]
    fn rows_with_a_shared_beginning_have_their_own_weights_in_it() {
        // The first row learns the second token with weight 1, the other row does not.
        let batch = Batch { weights: vec![9.0, 1.0, 1.0, 0.0, 1.0], ..shared_beginning() };
        let rows = [vec![9.0, 1.0, 1.0], vec![9.0, 0.0, 0.0, 1.0]];
        let targets: Vec<_> = batch.targets().map(|target| target.id).collect();
        assert_eq!(targets, [11, 12, 21]);
        let sums = batch.row_sums(&[2.0, 4.0, 5.0], |row, ids| {
            assert_eq!(ids[..2], [10, 11]);
            rows[row].as_slice()
        });
        assert_eq!(sums, [(0, 6.0, 2.0), (1, 5.0, 1.0)]);
    }

    #[test]
    fn segment_that_continues_what_is_no_earlier_row_is_refused() {
        for prefix in [0..1, 2..3, 3..5, 4..9] {
            let mut batch = shared_beginning();
            batch.segments[2].prefix = prefix;
            assert!(batch.check().is_err());
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
