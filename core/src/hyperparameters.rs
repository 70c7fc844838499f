//! Hyperparameters: what a client may ask for, the range of each, and what `"auto"` becomes.
//!
//! A default value, a range and a parameter's name are each written once, here.

use crate::errors::{ApiError, ErrorCode};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::fmt;

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

/// How the learning rate moves after warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LrScheduler {
    /// Stays at its peak.
    Constant,
    /// Falls on a straight line to 0 at the last step.
    #[default]
    Linear,
    /// Falls on half a cosine wave to 0 at the last step.
    Cosine,
}

/// Which weights train.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AdapterType {
    /// Low-rank matrices beside frozen weights (Hu et al. 2021).
    #[default]
    Lora,
    /// Every weight of the model.
    Full,
}

/// The seven projections of a decoder layer, by Hugging Face's names.
pub const TARGET_MODULES: [&str; 7] =
    ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];

/// What is trained, and how a LoRA adapter is shaped. Field names and meanings are PEFT's.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AdapterConfig {
    /// LoRA or full fine-tuning.
    #[serde(rename = "type")]
    pub kind: AdapterType,
    /// Rank of the two matrices.
    pub r: usize,
    /// Numerator of the scale alpha / r.
    pub alpha: f64,
    /// Probability that an input of A is zeroed in training.
    pub dropout: f64,
    /// Which projections get an adapter, in the order of [`TARGET_MODULES`].
    pub target_modules: Vec<String>,
    /// Scale alpha / √r (rank-stabilised LoRA, Kalajdzievski 2023) in place of alpha / r.
    pub use_rslora: bool,
}

impl Default for AdapterConfig {
    fn default() -> Self {
        Self {
            kind: AdapterType::Lora,
            r: 16,
            alpha: 32.0,
            dropout: 0.0,
            target_modules: TARGET_MODULES.map(str::to_owned).to_vec(),
            use_rslora: false,
        }
    }
}

impl AdapterConfig {
    /// Full fine-tuning: no adapter.
    #[must_use]
    pub fn full() -> Self {
        Self { kind: AdapterType::Full, ..Self::default() }
    }

    /// The factor on B·A: alpha / r, or alpha / √r for rsLoRA.
    #[must_use]
    pub fn scale(&self) -> f64 {
        let rank = self.r as f64;
        if self.use_rslora { self.alpha / rank.sqrt() } else { self.alpha / rank }
    }
}

/// A learning rate of 1.0 × the multiplier, for LoRA.
pub const LORA_LEARNING_RATE: f64 = 2e-4;
/// The same for full fine-tuning: a tenth, as the optimum of the two usually differs by that.
pub const FULL_LEARNING_RATE: f64 = 2e-5;
/// Learning rates outside this range are taken, with a warning.
pub const SENSIBLE_LEARNING_RATES: (f64, f64) = (1e-7, 1e-3);
/// The fewest examples that a job trains on.
pub const MIN_EXAMPLES: usize = 10;
/// Checkpoints by `"auto"` lie at most this many steps apart, so that a lost worker costs little.
const MAX_AUTO_CHECKPOINT_STEPS: u64 = 200;
/// `"auto"` evaluates about this often in a run.
const AUTO_EVALUATIONS: u64 = 10;

/// A closed range of numbers (open below where `above_min`), as an error message states it.
#[derive(Debug, Clone, Copy)]
struct Range {
    min: f64,
    max: f64,
    above_min: bool,
}

const fn closed(min: f64, max: f64) -> Range {
    Range { min, max, above_min: false }
}

const fn above(min: f64, max: f64) -> Range {
    Range { min, max, above_min: true }
}

impl Range {
    fn holds(self, value: f64) -> bool {
        value <= self.max && if self.above_min { value > self.min } else { value >= self.min }
    }
}

impl fmt::Display for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { min, max, above_min } = self;
        if *above_min {
            write!(f, "greater than {min} and at most {max}")
        } else {
            write!(f, "between {min} and {max}")
        }
    }
}

macro_rules! hyperparameters {
    ($($(#[$doc:meta])* $name:ident: $kind:ty = $read:ident($($range:expr)?);)*) => {
        /// What the client asked for; everything may be left to the service.
        #[derive(Debug, Clone, PartialEq, Default)]
        pub struct Hyperparameters {
            $($(#[$doc])* pub $name: Auto<$kind>,)*
            /// What trains: LoRA of a shape, or everything.
            pub adapter: AdapterConfig,
        }

        /// The same with nothing left to choose, as the job shows it and the trainer obeys it.
        #[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
        pub struct ResolvedHyperparameters {
            $($(#[$doc])* pub $name: $kind,)*
            /// What trains: LoRA of a shape, or everything.
            pub adapter: AdapterConfig,
        }

        const NAMES: &[&str] = &[$(stringify!($name),)* "adapter"];

        impl Hyperparameters {
            fn read(reader: &Reader<'_>) -> Result<Self, ApiError> {
                Ok(Self {
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
                Value::Object(map)
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
    /// Decoupled weight decay of AdamW.
    weight_decay: f64 = number(closed(0.0, 1.0));
    /// Gradients are scaled down to this global L2 norm; 0 leaves them as they are.
    max_grad_norm: f64 = number(closed(0.0, 1_000_000.0));
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
    /// Steps between evaluations on the validation rows.
    eval_steps: u64 = integer(closed(1.0, 10_000_000.0));
    /// Steps between checkpoints.
    checkpoint_steps: u64 = integer(closed(1.0, 10_000_000.0));
    /// Share of the training rows that is held out for validation.
    validation_split: f64 = number(closed(0.0, 0.5));
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
        let reader = Reader { fields, path };
        let parsed = Self::read(&reader)?;
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
        let unknown = fields.keys().filter(|key| !NAMES.contains(&key.as_str())).cloned().collect();
        Ok((parsed, unknown))
    }

    /// The method's own learning rate, by which a multiplier counts.
    #[must_use]
    pub fn default_learning_rate(&self) -> f64 {
        match self.adapter.kind {
            AdapterType::Lora => LORA_LEARNING_RATE,
            AdapterType::Full => FULL_LEARNING_RATE,
        }
    }

    /// Sentences about values that are allowed and rarely meant.
    #[must_use]
    pub fn warnings(&self) -> Vec<String> {
        let rate = match self.learning_rate {
            Auto::Value(rate) => rate,
            Auto::Auto => {
                self.default_learning_rate() * self.learning_rate_multiplier.unwrap_or_else(|| 1.0)
            }
        };
        let (low, high) = SENSIBLE_LEARNING_RATES;
        if (low..=high).contains(&rate) {
            return Vec::new();
        }
        vec![format!(
            "The learning rate {rate:e} lies outside {low:e} to {high:e}, where fine-tuning \
             usually works: expect {}.",
            if rate > high { "a loss that jumps or grows" } else { "a loss that hardly moves" }
        )]
    }

    /// Turns every `"auto"` into a value.
    #[must_use]
    pub fn resolve(&self, facts: &DataFacts) -> ResolvedHyperparameters {
        let examples = facts.examples.max(1) as u64;
        let default_rate = self.default_learning_rate();
        let learning_rate = self
            .learning_rate
            .unwrap_or_else(|| default_rate * self.learning_rate_multiplier.unwrap_or_else(|| 1.0));
        let mut resolved = ResolvedHyperparameters {
            n_epochs: self.n_epochs.unwrap_or_else(|| auto_epochs(examples)),
            batch_size: self.batch_size.unwrap_or_else(|| auto_batch_size(examples)),
            learning_rate_multiplier: self
                .learning_rate_multiplier
                .unwrap_or_else(|| learning_rate / default_rate),
            learning_rate,
            lr_scheduler: self.lr_scheduler.unwrap_or_else(LrScheduler::default),
            warmup_ratio: self.warmup_ratio.unwrap_or_else(|| 0.03),
            weight_decay: self.weight_decay.unwrap_or_else(|| 0.0),
            max_grad_norm: self.max_grad_norm.unwrap_or_else(|| 1.0),
            gradient_accumulation_steps: self.gradient_accumulation_steps.unwrap_or_else(|| 1),
            max_steps: self.max_steps.unwrap_or_else(|| 0),
            max_seq_length: self
                .max_seq_length
                .unwrap_or_else(|| facts.context_length)
                .min(facts.context_length),
            prompt_loss_weight: self.prompt_loss_weight.unwrap_or_else(|| 0.1),
            packing: self.packing.unwrap_or_else(|| true),
            eval_steps: 1,
            checkpoint_steps: 1,
            validation_split: self.validation_split.unwrap_or_else(|| 0.0),
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

impl ResolvedHyperparameters {
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

/// Reads fields of one JSON object; every error names the field by its whole path.
struct Reader<'a> {
    fields: &'a Map<String, Value>,
    path: &'a str,
}

impl Reader<'_> {
    /// The field, unless it is absent, null or `"auto"`.
    fn given(&self, name: &str) -> Option<&Value> {
        self.fields.get(name).filter(|value| !value.is_null() && *value != "auto")
    }

    fn invalid(&self, name: &str, value: &Value, rule: impl fmt::Display) -> ApiError {
        ApiError::new(
            ErrorCode::InvalidValue,
            format!("Invalid value for '{name}': {value}. It must be {rule}."),
        )
        .with_param(format!("{}.{name}", self.path))
    }

    fn number(&self, name: &str, range: Range) -> Result<Auto<f64>, ApiError> {
        let Some(value) = self.given(name) else { return Ok(Auto::Auto) };
        value
            .as_f64()
            .filter(|&number| range.holds(number))
            .map(Auto::Value)
            .ok_or_else(|| self.invalid(name, value, format_args!("\"auto\" or a number {range}")))
    }

    fn integer(&self, name: &str, range: Range) -> Result<Auto<u64>, ApiError> {
        let Some(value) = self.given(name) else { return Ok(Auto::Auto) };
        value
            .as_f64()
            .filter(|number| number.fract() == 0.0 && range.holds(*number))
            .map(|number| Auto::Value(number as u64))
            .ok_or_else(|| {
                self.invalid(name, value, format_args!("\"auto\" or a whole number {range}"))
            })
    }

    fn boolean(&self, name: &str) -> Result<Auto<bool>, ApiError> {
        let Some(value) = self.given(name) else { return Ok(Auto::Auto) };
        value
            .as_bool()
            .map(Auto::Value)
            .ok_or_else(|| self.invalid(name, value, "\"auto\", true or false"))
    }

    fn word(&self, name: &str) -> Result<Auto<LrScheduler>, ApiError> {
        let Some(value) = self.given(name) else { return Ok(Auto::Auto) };
        LrScheduler::deserialize(value).map(Auto::Value).map_err(|_| {
            self.invalid(name, value, "\"auto\", \"constant\", \"linear\" or \"cosine\"")
        })
    }

    fn adapter(&self) -> Result<AdapterConfig, ApiError> {
        let mut adapter = AdapterConfig::default();
        let Some(value) = self.given("adapter") else { return Ok(adapter) };
        let Value::Object(fields) = value else {
            return Err(self.invalid("adapter", value, "an object such as {\"type\": \"lora\"}"));
        };
        let path = format!("{}.adapter", self.path);
        let reader = Reader { fields, path: &path };
        const KNOWN: [&str; 6] = ["type", "r", "alpha", "dropout", "target_modules", "use_rslora"];
        if let Some((name, value)) = fields.iter().find(|(key, _)| !KNOWN.contains(&key.as_str())) {
            return Err(reader.invalid(
                name,
                value,
                format_args!("left out: an adapter has {}", KNOWN.join(", ")),
            ));
        }
        if let Some(value) = reader.given("type") {
            adapter.kind = AdapterType::deserialize(value)
                .map_err(|_| reader.invalid("type", value, "\"lora\" or \"full\""))?;
        }
        let r = reader.integer("r", closed(1.0, 1024.0))?;
        adapter.r = r.unwrap_or_else(|| adapter.r as u64) as usize;
        // PEFT users set alpha to twice the rank; who gives only the rank gets that too.
        adapter.alpha =
            reader.number("alpha", above(0.0, 65_536.0))?.unwrap_or_else(|| 2.0 * adapter.r as f64);
        adapter.dropout =
            reader.number("dropout", closed(0.0, 0.9))?.unwrap_or_else(|| adapter.dropout);
        adapter.use_rslora = reader.boolean("use_rslora")?.unwrap_or_else(|| adapter.use_rslora);
        if let Some(value) = reader.given("target_modules") {
            adapter.target_modules = target_modules(value).ok_or_else(|| {
                let all = TARGET_MODULES.join(", ");
                reader.invalid(
                    "target_modules",
                    value,
                    format_args!("\"all-linear\" or a list with at least one of {all}"),
                )
            })?;
        }
        Ok(adapter)
    }
}

/// The modules that `value` names, in the order of [`TARGET_MODULES`]; `None` if it names none or
/// one that is not there.
fn target_modules(value: &Value) -> Option<Vec<String>> {
    if value == "all-linear" {
        return Some(TARGET_MODULES.map(str::to_owned).to_vec());
    }
    let named: Vec<&str> = value.as_array()?.iter().map(Value::as_str).collect::<Option<_>>()?;
    if named.is_empty() || named.iter().any(|name| !TARGET_MODULES.contains(name)) {
        return None;
    }
    Some(TARGET_MODULES.into_iter().filter(|m| named.contains(m)).map(str::to_owned).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const PATH: &str = "method.supervised.hyperparameters";

    fn parse(value: &Value) -> Result<Hyperparameters, ApiError> {
        Hyperparameters::parse(value.as_object().expect("object"), PATH).map(|(parsed, _)| parsed)
    }

    fn resolve(value: &Value, examples: usize) -> ResolvedHyperparameters {
        parse(value).expect("valid").resolve(&DataFacts { examples, context_length: 8192 })
    }

    #[test]
    fn a_value_out_of_range_is_refused_naming_parameter_value_and_range() {
        let error = parse(&json!({"n_epochs": 51})).expect_err("over the range");
        assert_eq!(error.code, ErrorCode::InvalidValue);
        assert_eq!(error.param.as_deref(), Some("method.supervised.hyperparameters.n_epochs"));
        assert_eq!(
            error.message,
            "Invalid value for 'n_epochs': 51. It must be \"auto\" or a whole number between 1 and 50."
        );
        for bad in [
            json!({"batch_size": 0}),
            json!({"batch_size": 1.5}),
            json!({"batch_size": "4"}),
            json!({"learning_rate": 0}),
            json!({"learning_rate": -1e-4}),
            json!({"lr_scheduler": "sawtooth"}),
            json!({"warmup_ratio": 1.1}),
            json!({"packing": 1}),
            json!({"prompt_loss_weight": 2}),
            json!({"validation_split": 0.9}),
            json!({"adapter": "lora"}),
            json!({"adapter": {"r": 0}}),
            json!({"adapter": {"type": "prefix"}}),
            json!({"adapter": {"target_modules": []}}),
            json!({"adapter": {"target_modules": ["q_proj", "w_pack"]}}),
            json!({"adapter": {"rank": 8}}),
            json!({"learning_rate": 1e-4, "learning_rate_multiplier": 2}),
        ] {
            let error = parse(&bad).expect_err(&bad.to_string());
            assert!(error.param.expect("param").starts_with(PATH), "{bad}");
        }
    }

    #[test]
    fn an_adapters_error_names_its_whole_path() {
        let error = parse(&json!({"adapter": {"dropout": 2}})).expect_err("over the range");
        assert_eq!(
            error.param.as_deref(),
            Some("method.supervised.hyperparameters.adapter.dropout")
        );
    }

    #[test]
    fn unknown_names_are_handed_back() {
        let fields = json!({"n_epochs": 2, "n_epoch": 3});
        let (parsed, unknown) =
            Hyperparameters::parse(fields.as_object().expect("object"), PATH).expect("valid");
        assert_eq!(parsed.n_epochs, Auto::Value(2));
        assert_eq!(unknown, ["n_epoch"]);
    }

    #[test]
    fn auto_follows_the_published_rules() {
        for (examples, epochs, batch) in
            [(10, 10, 1), (3, 25, 1), (33, 3, 1), (1000, 3, 2), (10_000, 2, 20), (200_000, 1, 256)]
        {
            let resolved = resolve(&json!({"n_epochs": "auto"}), examples);
            assert_eq!((resolved.n_epochs, resolved.batch_size), (epochs, batch), "{examples}");
        }
    }

    #[test]
    fn the_learning_rate_follows_method_and_multiplier() {
        assert_eq!(resolve(&json!({}), 100).learning_rate, LORA_LEARNING_RATE);
        let full = resolve(&json!({"adapter": {"type": "full"}}), 100);
        assert_eq!(full.learning_rate, FULL_LEARNING_RATE);
        let doubled = resolve(&json!({"learning_rate_multiplier": 2}), 100);
        assert_eq!(doubled.learning_rate, 2.0 * LORA_LEARNING_RATE);
        let absolute = resolve(&json!({"learning_rate": 1e-4}), 100);
        assert_eq!(absolute.learning_rate_multiplier, 0.5);
    }

    #[test]
    fn a_learning_rate_outside_the_sensible_range_warns() {
        assert!(parse(&json!({"learning_rate": 1e-3})).expect("valid").warnings().is_empty());
        assert_eq!(parse(&json!({"learning_rate": 2e-3})).expect("valid").warnings().len(), 1);
        assert_eq!(parse(&json!({"learning_rate": 1e-8})).expect("valid").warnings().len(), 1);
    }

    #[test]
    fn a_last_shorter_step_counts_in_full() {
        let resolved = resolve(&json!({"batch_size": 4, "n_epochs": 3}), 5);
        assert_eq!(resolved.steps_per_epoch(5), 2);
        assert_eq!(resolved.total_steps(5), 6);
        let capped = resolve(&json!({"batch_size": 4, "n_epochs": 3, "max_steps": 5}), 5);
        assert_eq!(capped.total_steps(5), 5);
    }

    #[test]
    fn a_split_leaves_a_row_on_each_side() {
        let resolved = resolve(&json!({"validation_split": 0.01}), 20);
        assert_eq!((resolved.held_out_rows(20), resolved.train_rows(20)), (1, 19));
        assert_eq!(resolve(&json!({}), 20).held_out_rows(20), 0);
    }

    #[test]
    fn auto_checkpoints_lie_evenly_and_at_most_200_steps_apart() {
        assert_eq!(resolve(&json!({"batch_size": 4}), 48).checkpoint_steps, 12);
        assert_eq!(resolve(&json!({"batch_size": 1}), 1000).checkpoint_steps, 200);
        assert_eq!(resolve(&json!({"batch_size": 1}), 201).checkpoint_steps, 101);
    }

    #[test]
    fn resolved_values_survive_json() {
        let resolved = resolve(&json!({"learning_rate": 0.000_123_456_789}), 77);
        let text = serde_json::to_string(&resolved).expect("json");
        assert_eq!(serde_json::from_str::<ResolvedHyperparameters>(&text).expect("back"), resolved);
    }

    #[test]
    fn the_wire_shows_auto_until_it_is_resolved() {
        let wire = parse(&json!({"n_epochs": 2})).expect("valid").to_wire();
        assert_eq!(wire["n_epochs"], 2);
        assert_eq!(wire["batch_size"], "auto");
    }

    #[test]
    fn a_rank_alone_brings_twice_itself_as_alpha() {
        let adapter = resolve(&json!({"adapter": {"r": 4}}), 20).adapter;
        assert_eq!((adapter.r, adapter.alpha, adapter.scale()), (4, 8.0, 2.0));
        let stabilised = resolve(&json!({"adapter": {"r": 4, "use_rslora": true}}), 20).adapter;
        assert_eq!(stabilised.scale(), 4.0);
    }
}
