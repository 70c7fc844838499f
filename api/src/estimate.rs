//! What a job would take: steps, tokens, time, memory and money, each with what it rests on.

use schemars::JsonSchema;
use serde::Serialize;
use tunesmith_core::dataset::FileReport;
use tunesmith_core::hyperparameters::{Precision, ResolvedHyperparameters};
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
        memory: memory(base, resolved, training),
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

fn memory(base: &BaseModel, resolved: &ResolvedHyperparameters, training: &FileReport) -> Memory {
    let Some(size) = ModelSize::from_config(&base.config) else {
        let basis = format!("The config.json of {} does not say every size.", base.name);
        return Memory { peak_bytes: None, parts: None, basis };
    };
    let counts = training.tokens.as_ref();
    let longest = counts.map_or(0, |counts| counts.longest.min(counts.max_seq_length));
    let pass = PassSize {
        tokens: TOKENS_PER_PASS.max(longest) as u64,
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
