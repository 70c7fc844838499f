//! What a job would take: steps, tokens, time, memory and money, each with what it rests on.

use schemars::JsonSchema;
use serde::Serialize;
use tunesmith_core::dataset::{Bin, FileReport, Shape, TokenCounts};
use tunesmith_core::hyperparameters::{Method, Precision, ResolvedHyperparameters};
use tunesmith_core::memory::{MemoryEstimate, ModelSize, PassSize, Size, TOKENS_PER_PASS};
use tunesmith_store::base_models::BaseModel;
use tunesmith_store::metrics::TrainingSpeed;

/// What the operator charges, where anything.
#[derive(Debug, Clone, PartialEq)]
pub struct Prices {
    /// For an hour of a GPU, or of what trains in its place.
    pub per_gpu_hour: Option<f64>,
    /// For a million tokens seen in training.
    pub per_million_tokens: Option<f64>,
    /// What the prices are in, such as `USD`.
    pub currency: String,
}

impl Default for Prices {
    fn default() -> Self {
        Self { per_gpu_hour: None, per_million_tokens: None, currency: "USD".to_owned() }
    }
}

/// Everything that is estimated of a job.
#[derive(Debug, PartialEq, Serialize, JsonSchema)]
pub(crate) struct Estimates {
    pub(crate) steps: Steps,
    pub(crate) tokens: Amount,
    pub(crate) time: Amount,
    pub(crate) memory: Memory,
    pub(crate) cost: Cost,
}

/// The run's optimiser steps.
#[derive(Debug, PartialEq, Serialize, JsonSchema)]
pub(crate) struct Steps {
    pub(crate) total: u64,
    pub(crate) per_epoch: u64,
    pub(crate) examples_per_step: u64,
    pub(crate) train_examples: usize,
    pub(crate) held_out_examples: usize,
}

/// A number, and what it rests on; the number is missing where there is nothing to rest it on.
#[derive(Debug, PartialEq, Serialize, JsonSchema)]
pub(crate) struct Amount {
    pub(crate) value: Option<f64>,
    pub(crate) unit: &'static str,
    pub(crate) basis: String,
}

/// The peak, and its parts.
#[derive(Debug, PartialEq, Serialize, JsonSchema)]
pub(crate) struct Memory {
    pub(crate) peak_bytes: Option<u64>,
    pub(crate) parts: Option<MemoryEstimate>,
    pub(crate) basis: String,
}

/// A sum of money.
#[derive(Debug, PartialEq, Serialize, JsonSchema)]
pub(crate) struct Cost {
    pub(crate) amount: Option<f64>,
    pub(crate) currency: String,
    pub(crate) basis: String,
}

/// The estimates for a job of `resolved` on the rows that `training` tells of.
pub(crate) fn estimates(
    base: &BaseModel,
    resolved: &ResolvedHyperparameters,
    training: &FileReport,
    validation: Option<&FileReport>,
    speed: Option<TrainingSpeed>,
    prices: &Prices,
) -> Estimates {
    let examples = training.examples;
    let train_examples = resolved.train_rows(examples);
    let steps = Steps {
        total: resolved.total_steps(train_examples),
        per_epoch: resolved.steps_per_epoch(train_examples),
        examples_per_step: resolved.rows_per_step(),
        train_examples,
        held_out_examples: resolved.held_out_rows(examples),
    };
    let tokens = tokens(&steps, training);
    let time = time(tokens.value, speed, base);
    Estimates {
        cost: cost(tokens.value, time.value, prices),
        memory: memory(base, resolved, training, validation),
        steps,
        tokens,
        time,
    }
}

/// Tokens seen in training, each epoch counted.
fn tokens(steps: &Steps, training: &FileReport) -> Amount {
    let unit = "tokens";
    let (Some(counts), true) = (&training.tokens, training.examples > 0 && steps.per_epoch > 0)
    else {
        return Amount { value: None, unit, basis: "No row would train.".to_owned() };
    };
    let epochs = steps.total as f64 / steps.per_epoch as f64;
    let share = steps.train_examples as f64 / training.examples as f64;
    let held_out = match steps.held_out_examples {
        0 => String::new(),
        rows => format!(", less {rows} examples that are held out, taken as of average length"),
    };
    Amount {
        value: Some((counts.kept as f64 * share * epochs).round()),
        unit,
        basis: format!(
            "The {} tokens of the file's rows, cut at {}, in {epochs} epochs{held_out}.",
            counts.kept, counts.max_seq_length
        ),
    }
}

fn time(tokens: Option<f64>, speed: Option<TrainingSpeed>, base: &BaseModel) -> Amount {
    let unit = "seconds";
    match (tokens, speed) {
        (Some(tokens), Some(TrainingSpeed { jobs, tokens_per_second })) => Amount {
            value: Some(tokens / tokens_per_second),
            unit,
            basis: format!(
                "{jobs} earlier job(s) of this kind on {} here trained {tokens_per_second:.1} \
                 tokens a second, evaluations included. Loading and waiting in the queue are not \
                 counted.",
                base.name
            ),
        },
        (_, None) => Amount {
            value: None,
            unit,
            basis: format!("No job of this kind on {} has succeeded here yet.", base.name),
        },
        (None, _) => Amount { value: None, unit, basis: "No row would train.".to_owned() },
    }
}

fn memory(
    base: &BaseModel,
    resolved: &ResolvedHyperparameters,
    training: &FileReport,
    validation: Option<&FileReport>,
) -> Memory {
    let Some(size) = ModelSize::from_config(&base.config) else {
        let basis = format!("The config.json of {} does not say every size.", base.name);
        return Memory { peak_bytes: None, parts: None, basis };
    };
    let together = if resolved.packing { resolved.batch_size } else { 1 };
    let largest = |file: &FileReport, examples: u64| {
        let counts = file.tokens.as_ref();
        counts.map_or(0, |counts| tokens_of_a_pass(counts, file.shape, resolved.method, examples))
    };
    let measured = match validation {
        Some(file) => largest(file, file.examples as u64),
        None => largest(training, resolved.held_out_rows(training.examples) as u64),
    };
    let pass = PassSize {
        tokens: largest(training, together),
        measured_tokens: measured,
        several: resolved.rows_per_step() > 1,
        recompute: false,
    };
    let parts = MemoryEstimate::new(&size, resolved, pass);
    let precision = match resolved.precision {
        Precision::Auto => " in fp32, of which a device that prefers bf16 takes less",
        Precision::Fp32 | Precision::Bf16 => "",
    };
    Memory {
        peak_bytes: Some(parts.total()),
        parts: Some(parts),
        basis: format!(
            "The sizes in the config.json of {}, and passes of at most {} tokens on one device{precision}. A \
             worker with less than {} free makes smaller passes or computes layers again, and \
             refuses the job if that does not do.",
            base.name,
            pass.tokens,
            Size(parts.total())
        ),
    }
}

/// The most tokens in a pass of `examples` examples of a file.
fn tokens_of_a_pass(
    counts: &TokenCounts,
    shape: Option<Shape>,
    method: Method,
    examples: u64,
) -> u64 {
    if examples == 0 {
        return 0;
    }
    // Of a pair each answer is cut by itself, with its prompt.
    let parts = if method == Method::Dpo { 2 } else { 1 };
    let longest = counts.longest.min(parts * counts.max_seq_length) as u64;
    let together = if shape == Some(Shape::Text) {
        // Its windows, which the histogram does not know.
        examples * longest
    } else {
        let mut left = examples;
        let of_bin = |bin: &Bin| {
            let taken = left.min(bin.rows as u64);
            left -= taken;
            taken * bin.up_to.min(longest)
        };
        counts.histogram.iter().rev().map(of_bin).sum()
    };
    together.min(TOKENS_PER_PASS as u64).max(longest)
}

fn cost(tokens: Option<f64>, seconds: Option<f64>, prices: &Prices) -> Cost {
    let currency = prices.currency.clone();
    let (amount, basis) = match (prices.per_million_tokens, prices.per_gpu_hour) {
        (Some(price), _) => (
            tokens.map(|tokens| tokens / 1e6 * price),
            format!("{price} {currency} for a million tokens seen in training."),
        ),
        (None, Some(price)) => (
            seconds.map(|seconds| seconds / 3600.0 * price),
            format!("{price} {currency} for an hour of one GPU, by the estimated time."),
        ),
        (None, None) => (None, "This server's operator has set no price.".to_owned()),
    };
    Cost { amount, currency, basis }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pass_has_the_longest_rows_together_and_no_more_than_a_pass_may() {
        let bin = |up_to, rows| Bin { up_to, rows };
        let counts = TokenCounts {
            max_seq_length: 512,
            longest: 700,
            histogram: vec![bin(64, 90), bin(128, 7), bin(1024, 2)],
            ..TokenCounts::default()
        };
        let of = |shape, method, examples| tokens_of_a_pass(&counts, shape, method, examples);
        let chats = |examples| of(Some(Shape::Chat), Method::Supervised, examples);
        assert_eq!([0, 1, 2, 4].map(chats), [0, 512, 1024, 1024 + 2 * 128]);
        assert_eq!(chats(100), TOKENS_PER_PASS as u64);
        // The two answers of a pair are cut one by one.
        assert_eq!(of(Some(Shape::Preference), Method::Dpo, 2), 1400);
        // A text may train in any number of windows.
        assert_eq!(of(Some(Shape::Text), Method::Supervised, 3), 3 * 512);
    }

    #[test]
    fn cost_follows_the_price_that_is_set() {
        let prices = Prices { per_gpu_hour: Some(2.0), ..Prices::default() };
        let cost = super::cost(Some(3e6), Some(1800.0), &prices);
        assert_eq!((cost.amount, cost.currency.as_str()), (Some(1.0), "USD"));
        assert_eq!(super::cost(Some(3e6), None, &prices).amount, None);
        let prices = Prices { per_million_tokens: Some(4.0), ..prices };
        let cost = super::cost(Some(3e6), None, &prices);
        assert_eq!(cost.amount, Some(12.0));
        assert!(cost.basis.contains("million tokens"));
        assert_eq!(super::cost(Some(3e6), Some(1.0), &Prices::default()).amount, None);
    }
}
