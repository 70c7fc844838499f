//! Hyperparameters: what a client may ask for, the range of each, and what `"auto"` becomes.
//!
//! A default value, a range and a parameter's name are each written once, here.

use crate::errors::{ApiError, ErrorCode};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

mod adapter;
mod method;
mod optimization;
mod precision;
mod reader;
mod schema;
mod start;
#[cfg(test)]
mod tests;
mod unused;

pub use adapter::{
    AdapterConfig, AdapterType, InitLoraWeights, Quantization, TARGET_MODULES, fused_module_of,
    target_modules_of,
};
pub use method::{Method, PreferenceLoss};
pub use optimization::{LrScheduler, MuonLearningRate, OnDivergence, Optimizer};
pub use precision::Precision;
pub use schema::request_schema;

use method::PREFERENCE_NAMES;
use reader::{Reader, above, closed};

/// A value, or `"auto"`: the service chooses when it has seen the data.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Auto<T> {
    /// Resolved when the files are validated.
    #[default]
    Auto,
    /// As the client said.
    Value(T),
}

impl<T: Copy> Auto<T> {
    /// The client's value, or what `resolve` makes of `"auto"`.
    pub fn unwrap_or_else(self, resolve: impl FnOnce() -> T) -> T {
        match self {
            Self::Auto => resolve(),
            Self::Value(value) => value,
        }
    }
}

/// A learning rate of 1.0 × the multiplier, for LoRA.
pub const LORA_LEARNING_RATE: f64 = 2e-4;
/// The same for full fine-tuning: a tenth, as the optimum of the two usually differs by that.
pub const FULL_LEARNING_RATE: f64 = 2e-5;
/// The same for preference pairs and LoRA: ten times that of full fine-tuning, as above.
pub const LORA_PREFERENCE_LEARNING_RATE: f64 = 1e-5;
/// The same for preference pairs and full fine-tuning, TRL's default: the base model is good at
/// both answers, and steps of the usual size would unlearn them together.
pub const FULL_PREFERENCE_LEARNING_RATE: f64 = 1e-6;
/// Learning rates outside this range are taken, with a warning.
pub const SENSIBLE_LEARNING_RATES: (f64, f64) = (1e-7, 1e-3);
/// The fewest examples that a job trains on.
pub const MIN_EXAMPLES: usize = 10;
/// Checkpoints by `"auto"` lie at most this many steps apart, so that a lost worker costs little.
const MAX_AUTO_CHECKPOINT_STEPS: u64 = 200;
/// `"auto"` evaluates about this often in a run.
const AUTO_EVALUATIONS: u64 = 10;

macro_rules! hyperparameters {
    ($($(#[$doc:meta])* $name:ident: $kind:ty = $read:ident($($range:expr)?);)*) => {
        /// What the client asked for; everything may be left to the service.
        #[derive(Debug, Clone, PartialEq, Default)]
        pub struct Hyperparameters {
            /// What the job learns from.
            pub method: Method,
            $($(#[$doc])* pub $name: Auto<$kind>,)*
            /// What trains: LoRA of a shape, or everything.
            pub adapter: AdapterConfig,
        }

        /// The same with nothing left to choose, as the job shows it and the trainer obeys it.
        #[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
        #[serde(default)]
        pub struct ResolvedHyperparameters {
            /// What the job learns from.
            pub method: Method,
            $($(#[$doc])* pub $name: $kind,)*
            /// What trains: LoRA of a shape, or everything.
            pub adapter: AdapterConfig,
        }

        const NAMES: &[&str] = &[$(stringify!($name),)* "adapter"];

        impl Hyperparameters {
            fn read(method: Method, reader: &Reader<'_>) -> Result<Self, ApiError> {
                Ok(Self {
                    method,
                    $($name: reader.$read(stringify!($name) $(, $range)?)?,)*
                    adapter: reader.adapter()?,
                })
            }

            /// As the wire shows it before the files are validated.
            #[must_use]
            pub fn to_wire(&self) -> Value {
                let mut map = Map::new();
                $(map.insert(stringify!($name).to_owned(), wire(&self.$name));)*
                map.insert("adapter".to_owned(), serde_json::json!(self.adapter));
                shown(self.method, map)
            }
        }
    };
}

hyperparameters! {
    /// Passes over the training rows.
    n_epochs: u64 = integer(closed(1.0, 50.0));
    /// Rows in one forward and backward pass.
    batch_size: u64 = integer(closed(1.0, 256.0));
    /// Factor on the method's default learning rate.
    learning_rate_multiplier: f64 = number(above(0.0, 10_000.0));
    /// Peak learning rate.
    learning_rate: f64 = number(above(0.0, 1.0));
    /// What the learning rate does after warm-up.
    lr_scheduler: LrScheduler = word();
    /// Share of all steps in which the learning rate rises from 0 to its peak.
    warmup_ratio: f64 = number(closed(0.0, 1.0));
    /// Where a falling schedule ends, as a share of the peak.
    min_lr_ratio: f64 = number(closed(0.0, 1.0));
    /// Share of all steps in which `wsd` falls.
    decay_ratio: f64 = number(closed(0.0, 1.0));
    /// What turns gradients into new weights.
    optimizer: Optimizer = word();
    /// How fast AdamW forgets old gradients: β₁.
    adam_beta1: f64 = number(closed(0.0, 0.999_999));
    /// How fast AdamW forgets old squares of gradients: β₂.
    adam_beta2: f64 = number(closed(0.0, 0.999_999));
    /// Added to the root that AdamW divides by.
    adam_epsilon: f64 = number(above(0.0, 1.0));
    /// How Muon's rate follows a matrix's shape.
    muon_adjust_lr_fn: MuonLearningRate = word();
    /// Decoupled weight decay, of every optimiser.
    weight_decay: f64 = number(closed(0.0, 1.0));
    /// Gradients are scaled down to this global L2 norm; 0 leaves them as they are.
    max_grad_norm: f64 = number(closed(0.0, 1_000_000.0));
    /// α of NEFTune (Jain et al. 2023): in training, uniform noise of ±α / √(L·d) lies on the
    /// embeddings of a row of L tokens and width d; 0 for none.
    neftune_noise_alpha: f64 = number(closed(0.0, 1_000.0));
    /// Forward and backward passes to one optimiser step.
    gradient_accumulation_steps: u64 = integer(closed(1.0, 1024.0));
    /// The most optimiser steps, whatever `n_epochs` says; 0 sets no limit.
    max_steps: u64 = integer(closed(0.0, 10_000_000.0));
    /// Rows are cut at this many tokens.
    max_seq_length: u64 = integer(closed(8.0, 1_048_576.0));
    /// Weight of a prompt token's loss, where a completion token's is 1.
    prompt_loss_weight: f64 = number(closed(0.0, 1.0));
    /// Whether a pass computes all its rows at once, laid end to end, or one after another. The
    /// numbers are the same; packing is faster and takes more memory.
    packing: bool = boolean();
    /// The numbers that matrix products multiply: `bf16`, which halves the memory of frozen
    /// weights and is faster where the device multiplies bf16, or `fp32`. `auto` stays as it is
    /// until a worker knows its device, and then holds for the whole job.
    precision: Precision = word();
    /// Steps between evaluations on the validation rows.
    eval_steps: u64 = integer(closed(1.0, 10_000_000.0));
    /// Steps between checkpoints.
    checkpoint_steps: u64 = integer(closed(1.0, 10_000_000.0));
    /// Share of the training rows that is held out for validation.
    validation_split: f64 = number(closed(0.0, 0.5));
    /// Evaluations without a lower validation loss after which the run ends; 0 for never.
    early_stopping_patience: u64 = integer(closed(0.0, 1_000_000.0));
    /// How far below the lowest so far a validation loss must lie to count as lower.
    early_stopping_threshold: f64 = number(closed(0.0, 1_000.0));
    /// Whether the tuned model is the checkpoint with the lowest validation loss and not the last.
    load_best_model_at_end: bool = boolean();
    /// What happens when the loss or a gradient is no number, or when the loss leaps.
    on_divergence: OnDivergence = word();
    /// A step's loss of more than this times the median of the last ones is a leap; 0 for none.
    spike_factor: f64 = number(closed(0.0, 1_000_000.0));
    /// What is minimised over preference pairs.
    preference_loss: PreferenceLoss = word();
    /// β of DPO and SimPO, how strongly a pair's margin counts; λ of ORPO, its factor.
    beta: f64 = number(above(0.0, 2.0));
    /// γ of SimPO: the margin that a pair should have.
    simpo_gamma: f64 = number(closed(0.0, 10.0));
}

/// The hyperparameters that a method has.
fn shown(method: Method, mut fields: Map<String, Value>) -> Value {
    if method == Method::Supervised {
        fields.retain(|name, _| !PREFERENCE_NAMES.contains(&name.as_str()));
    }
    Value::Object(fields)
}

fn wire<T: Serialize>(value: &Auto<T>) -> Value {
    match value {
        Auto::Auto => Value::from("auto"),
        Auto::Value(value) => serde_json::json!(value),
    }
}

/// What must be known of the data before `"auto"` can become a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DataFacts {
    /// Rows of the training file.
    pub examples: usize,
    /// Tokens that the base model can attend to.
    pub context_length: u64,
}

impl Hyperparameters {
    /// Reads `fields`, the hyperparameters at the request's path `path`.
    ///
    /// Returns them beside the names that are not hyperparameters of ours.
    ///
    /// # Errors
    /// `invalid_value` naming the parameter by its path, its value and the range.
    pub fn parse(fields: &Map<String, Value>, path: &str) -> Result<(Self, Vec<String>), ApiError> {
        Self::parse_for(Method::Supervised, fields, path)
    }

    /// As [`Hyperparameters::parse`], for any method.
    ///
    /// # Errors
    /// As [`Hyperparameters::parse`].
    pub fn parse_for(
        method: Method,
        fields: &Map<String, Value>,
        path: &str,
    ) -> Result<(Self, Vec<String>), ApiError> {
        let has = |name: &str| method != Method::Supervised || !PREFERENCE_NAMES.contains(&name);
        let own = fields.iter().filter(|(name, _)| has(name));
        let own = own.map(|(name, value)| (name.clone(), value.clone())).collect();
        let parsed = Self::read(method, &Reader { fields: &own, path, notes: None })?;
        if let (Auto::Value(_), Auto::Value(_)) =
            (parsed.learning_rate, parsed.learning_rate_multiplier)
        {
            return Err(ApiError::new(
                ErrorCode::InvalidValue,
                "Invalid value for 'learning_rate': it stands beside \
                 'learning_rate_multiplier'. Give one of the two.",
            )
            .with_param(format!("{path}.learning_rate")));
        }
        optimization::check(&parsed, path)?;
        method::check(&parsed, path)?;
        let unknown = fields.keys().filter(|key| !NAMES.contains(&key.as_str()) || !has(key));
        let unknown = unknown.cloned().collect();
        Ok((parsed, unknown))
    }

    /// Checks that there are validation rows where a hyperparameter asks for them. `path` is where
    /// the hyperparameters stand in the request.
    ///
    /// # Errors
    /// `invalid_value` naming the hyperparameter and the way out.
    pub fn check_validation_rows(
        &self,
        has_validation_file: bool,
        path: &str,
    ) -> Result<(), ApiError> {
        let has_split = self.validation_split.unwrap_or_else(|| 0.0) > 0.0;
        if has_validation_file || has_split {
            return Ok(());
        }
        optimization::check_without_validation_rows(self, path)
    }

    /// Checks that a base model of `layers` decoder layers has those that are asked for. `path` is
    /// where the hyperparameters stand in the request.
    ///
    /// # Errors
    /// `invalid_value` naming the hyperparameter and the number of layers.
    pub fn check_layers(&self, layers: usize, path: &str) -> Result<(), ApiError> {
        let Some(rule) = self.adapter.too_many_layers(layers) else { return Ok(()) };
        let asked = self.adapter.trainable_layers;
        Err(ApiError::new(
            ErrorCode::InvalidValue,
            format!("Invalid value for 'trainable_layers': {asked}. It must be {rule}."),
        )
        .with_param(format!("{path}.adapter.trainable_layers")))
    }

    /// The method's own learning rate, by which a multiplier counts.
    #[must_use]
    pub fn default_learning_rate(&self) -> f64 {
        match (self.method, self.adapter.kind) {
            (Method::Supervised, AdapterType::Lora) => LORA_LEARNING_RATE,
            (Method::Supervised, AdapterType::Full) => FULL_LEARNING_RATE,
            (Method::Dpo, AdapterType::Lora) => LORA_PREFERENCE_LEARNING_RATE,
            (Method::Dpo, AdapterType::Full) => FULL_PREFERENCE_LEARNING_RATE,
        }
    }

    /// Sentences about values that are allowed and rarely meant, or change nothing beside the others.
    #[must_use]
    pub fn warnings(&self) -> Vec<String> {
        let rate = match self.learning_rate {
            Auto::Value(rate) => rate,
            Auto::Auto => {
                self.default_learning_rate() * self.learning_rate_multiplier.unwrap_or_else(|| 1.0)
            }
        };
        let (low, high) = SENSIBLE_LEARNING_RATES;
        let mut warnings = unused::warnings(self);
        if !(low..=high).contains(&rate) {
            warnings.push(format!(
                "The learning rate {rate:e} lies outside {low:e} to {high:e}, where fine-tuning \
                 usually works: expect {}.",
                if rate > high { "a loss that jumps or grows" } else { "a loss that hardly moves" }
            ));
        }
        warnings
    }

    /// Turns every `"auto"` into a value.
    #[must_use]
    pub fn resolve(&self, facts: &DataFacts) -> ResolvedHyperparameters {
        let examples = facts.examples.max(1) as u64;
        let default_rate = self.default_learning_rate();
        let learning_rate = self
            .learning_rate
            .unwrap_or_else(|| default_rate * self.learning_rate_multiplier.unwrap_or_else(|| 1.0));
        let early_stopping_patience = self.early_stopping_patience.unwrap_or_else(|| 0);
        let preference_loss = self.preference_loss.unwrap_or_else(PreferenceLoss::default);
        let mut resolved = ResolvedHyperparameters {
            method: self.method,
            n_epochs: self.n_epochs.unwrap_or_else(|| auto_epochs(examples)),
            batch_size: self.batch_size.unwrap_or_else(|| auto_batch_size(examples)),
            learning_rate_multiplier: self
                .learning_rate_multiplier
                .unwrap_or_else(|| learning_rate / default_rate),
            learning_rate,
            lr_scheduler: self.lr_scheduler.unwrap_or_else(LrScheduler::default),
            warmup_ratio: self.warmup_ratio.unwrap_or_else(|| 0.03),
            min_lr_ratio: self.min_lr_ratio.unwrap_or_else(|| 0.0),
            decay_ratio: self.decay_ratio.unwrap_or_else(|| 0.2),
            optimizer: self.optimizer.unwrap_or_else(Optimizer::default),
            adam_beta1: self.adam_beta1.unwrap_or_else(|| 0.9),
            adam_beta2: self.adam_beta2.unwrap_or_else(|| 0.999),
            adam_epsilon: self.adam_epsilon.unwrap_or_else(|| 1e-8),
            muon_adjust_lr_fn: self.muon_adjust_lr_fn.unwrap_or_else(MuonLearningRate::default),
            weight_decay: self.weight_decay.unwrap_or_else(|| 0.0),
            max_grad_norm: self.max_grad_norm.unwrap_or_else(|| 1.0),
            neftune_noise_alpha: self.neftune_noise_alpha.unwrap_or_else(|| 0.0),
            gradient_accumulation_steps: self.gradient_accumulation_steps.unwrap_or_else(|| 1),
            max_steps: self.max_steps.unwrap_or_else(|| 0),
            max_seq_length: self
                .max_seq_length
                .unwrap_or_else(|| facts.context_length)
                .min(facts.context_length),
            prompt_loss_weight: self.prompt_loss_weight.unwrap_or_else(|| match self.method {
                Method::Supervised => 0.1,
                Method::Dpo => 0.0,
            }),
            packing: self.packing.unwrap_or_else(|| true),
            precision: self.precision.unwrap_or_else(Precision::default),
            eval_steps: 1,
            checkpoint_steps: 1,
            validation_split: self.validation_split.unwrap_or_else(|| 0.0),
            early_stopping_patience,
            early_stopping_threshold: self.early_stopping_threshold.unwrap_or_else(|| 0.0),
            load_best_model_at_end: self
                .load_best_model_at_end
                .unwrap_or_else(|| early_stopping_patience > 0),
            on_divergence: self.on_divergence.unwrap_or_else(OnDivergence::default),
            spike_factor: self.spike_factor.unwrap_or_else(|| 0.0),
            preference_loss,
            beta: self.beta.unwrap_or_else(|| preference_loss.default_beta()),
            simpo_gamma: self.simpo_gamma.unwrap_or_else(|| method::DEFAULT_SIMPO_GAMMA),
            adapter: self.adapter.clone(),
        };
        let steps_per_epoch = resolved.steps_per_epoch(resolved.train_rows(facts.examples));
        let total = resolved.total_steps(resolved.train_rows(facts.examples));
        resolved.eval_steps = self.eval_steps.unwrap_or_else(|| (total / AUTO_EVALUATIONS).max(1));
        resolved.checkpoint_steps = self.checkpoint_steps.unwrap_or_else(|| {
            steps_per_epoch
                .div_ceil(steps_per_epoch.div_ceil(MAX_AUTO_CHECKPOINT_STEPS).max(1))
                .max(1)
        });
        resolved
    }
}

impl Default for ResolvedHyperparameters {
    /// What a field has that a stored job lacks, because it is older than the field.
    fn default() -> Self {
        Hyperparameters::default().resolve(&DataFacts { examples: 1, context_length: u64::MAX })
    }
}

impl ResolvedHyperparameters {
    /// As the wire shows them: those that the method has.
    #[must_use]
    pub fn to_wire(&self) -> Value {
        let Value::Object(mut fields) = serde_json::json!(self) else {
            unreachable!("a struct is an object")
        };
        // The object that holds the hyperparameters bears the method's name.
        fields.remove("method");
        shown(self.method, fields)
    }

    /// Rows that train when `examples` rows are in the training file: all but the held-out ones.
    /// At least one row stays on each side of a split that is asked for.
    #[must_use]
    pub fn train_rows(&self, examples: usize) -> usize {
        examples - self.held_out_rows(examples)
    }

    /// Rows of the training file that `validation_split` holds out.
    #[must_use]
    pub fn held_out_rows(&self, examples: usize) -> usize {
        if self.validation_split <= 0.0 || examples < 2 {
            return 0;
        }
        ((examples as f64 * self.validation_split).round() as usize).clamp(1, examples - 1)
    }

    /// Optimiser steps in one pass over `train_rows` rows; a last, shorter one counts in full.
    #[must_use]
    pub fn steps_per_epoch(&self, train_rows: usize) -> u64 {
        (train_rows as u64).div_ceil(self.rows_per_step())
    }

    /// Rows to one optimiser step.
    #[must_use]
    pub fn rows_per_step(&self) -> u64 {
        self.batch_size * self.gradient_accumulation_steps
    }

    /// Optimiser steps of the whole job.
    #[must_use]
    pub fn total_steps(&self, train_rows: usize) -> u64 {
        let all = self.n_epochs * self.steps_per_epoch(train_rows);
        if self.max_steps == 0 { all } else { all.min(self.max_steps) }
    }
}

/// OpenAI's rule: 3, more on little data (at most 25), fewer on very much.
fn auto_epochs(examples: u64) -> u64 {
    const USUAL: u64 = 3;
    const FEWEST_ROWS_SEEN: u64 = 100;
    const MOST_ROWS_SEEN: u64 = 25_000;
    if examples * USUAL < FEWEST_ROWS_SEEN {
        (FEWEST_ROWS_SEEN / examples).min(25)
    } else if examples * USUAL > MOST_ROWS_SEEN {
        (MOST_ROWS_SEEN / examples).max(1)
    } else {
        USUAL
    }
}

/// OpenAI's rule: 0.2 % of the examples, within 1 to 256.
fn auto_batch_size(examples: u64) -> u64 {
    (examples as f64 * 0.002).round().clamp(1.0, 256.0) as u64
}
