//! What a training run needs of memory, by part, before it runs.
//!
//! The parts follow what the engine keeps: weights and optimiser state for the whole run, gradients
//! for a step, activations for a pass. A test holds the sum against the peak that a trainer shows.

use crate::hyperparameters::{
    AdapterConfig, AdapterType, InitLoraWeights, Optimizer, Precision, ResolvedHyperparameters,
    TARGET_MODULES,
};
use schemars::JsonSchema;
use serde::Serialize;
use serde_json::Value;
use std::fmt;

/// Bytes of a value.
const F32: u64 = 4;
const BF16: u64 = 2;
/// The program, its tokenizer and its buffers.
const PROCESS: u64 = 64 << 20;
/// The most tokens of one pass, where more than one row shares it. On a CPU more than this gains
/// no speed, and the memory of a pass grows with its tokens.
pub const TOKENS_PER_PASS: usize = 2048;
/// Logits that are held at a time.
const CHUNK_LOGITS: u64 = 1 << 24;

/// The sizes of a decoder. Names are Hugging Face's where it has one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ModelSize {
    /// Number of token ids.
    pub vocab_size: u64,
    /// Width of the residual stream.
    pub hidden_size: u64,
    /// Width inside the feed-forward block.
    pub intermediate_size: u64,
    /// Number of layers.
    pub num_hidden_layers: u64,
    /// Width of all queries.
    pub query_width: u64,
    /// Width of all keys, and of all values.
    pub key_value_width: u64,
    /// Whether the output head is the embedding matrix.
    pub tie_word_embeddings: bool,
}

/// How a run cuts its steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PassSize {
    /// The most tokens in one pass that trains.
    pub tokens: u64,
    /// The most tokens in one pass that only measures.
    pub measured_tokens: u64,
    /// Whether a step may have several passes, whose gradients are summed.
    pub several: bool,
    /// Whether the backward pass computes each layer again.
    pub recompute: bool,
}

/// Bytes by part.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, JsonSchema)]
pub struct MemoryEstimate {
    /// The model, and its adapter.
    pub weights: u64,
    /// Gradients of what trains.
    pub gradients: u64,
    /// The optimiser's state.
    pub optimizer: u64,
    /// What the forward pass leaves for the backward pass, beyond the room that gradients take.
    pub activations: u64,
    /// Everything else.
    pub process: u64,
}

impl MemoryEstimate {
    /// What a run of `hyperparameters` on a model of `size` needs.
    #[must_use]
    pub fn new(
        size: &ModelSize,
        hyperparameters: &ResolvedHyperparameters,
        pass: PassSize,
    ) -> Self {
        let weights = size.parameters();
        let trained = size.trained(&hyperparameters.adapter);
        let adapter = match hyperparameters.adapter.kind {
            AdapterType::Lora => trained.values,
            AdapterType::Full => 0,
        };
        // PiSSA keeps where the adapter started, without which it could not be exported.
        let start = match hyperparameters.adapter.init_lora_weights {
            InitLoraWeights::Default => 0,
            InitLoraWeights::Pissa => adapter,
        };
        let gradients = F32 * trained.values;
        let bf16 = hyperparameters.precision == Precision::Bf16;
        let activations = size.activations(&trained, bf16, pass);
        // Going back, a pass's gradients take the place of its activations, which is the more of
        // the two; recomputed layers add theirs to the step's sum one by one.
        let activations = match (pass.recompute, pass.several) {
            (true, _) => activations,
            (false, false) => activations.saturating_sub(gradients),
            (false, true) => activations.max(gradients),
        };
        // An evaluation comes between steps, when no gradients are held.
        let activations =
            activations.max(size.forward(pass.measured_tokens).saturating_sub(gradients));
        let frozen = if bf16 { BF16 } else { F32 };
        let base = match hyperparameters.adapter.quantization.bits() {
            Some(bits) => {
                let projections = size.num_hidden_layers * size.layer_projections();
                let blocks = (projections as f64 * bits / 8.0) as u64;
                blocks + frozen * (weights - projections)
            }
            None => frozen * weights,
        };
        Self {
            weights: match hyperparameters.adapter.kind {
                AdapterType::Lora => base + F32 * (adapter + start),
                AdapterType::Full => F32 * weights,
            },
            gradients,
            optimizer: F32 * size.optimizer_state(hyperparameters.optimizer, &trained),
            activations,
            process: PROCESS,
        }
    }

    /// The sum of all parts.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.weights + self.gradients + self.optimizer + self.activations + self.process
    }
}

impl fmt::Display for MemoryEstimate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} (weights {}, gradients {}, optimizer {}, activations {}, the program {})",
            Size(self.total()),
            Size(self.weights),
            Size(self.gradients),
            Size(self.optimizer),
            Size(self.activations),
            Size(self.process)
        )
    }
}

/// A number of bytes as people read it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size(pub u64);

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const MIB: f64 = (1 << 20) as f64;
        let mib = self.0 as f64 / MIB;
        if mib < 1024.0 { write!(f, "{mib:.0} MiB") } else { write!(f, "{:.1} GiB", mib / 1024.0) }
    }
}

/// What of a model trains.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Trained {
    values: u64,
    /// Whether these are weights of the model, and not an adapter beside them.
    weights: bool,
    /// The decoder layers that the backward pass goes through: the last ones.
    layers: u64,
    /// Whether embedding and head are among it.
    vocabulary: bool,
    /// What DoRA adds to a token's activations in one layer: inputs that are kept, and outputs.
    dora_inputs: u64,
    dora_outputs: u64,
}

impl ModelSize {
    /// The sizes in a Hugging Face `config.json`; `None` where it does not say them all. A family's
    /// own defaults, which some files rely on, are not guessed.
    #[must_use]
    pub fn from_config(config: &Value) -> Option<Self> {
        let size = |name: &str| config.get(name).and_then(Value::as_u64).filter(|&size| size > 0);
        let hidden_size = size("hidden_size")?;
        let heads = size("num_attention_heads")?;
        let family = config.get("model_type").and_then(Value::as_str)?;
        let has_own_head = family.starts_with("gemma") || family.starts_with("qwen3");
        let head_dim = match size("head_dim") {
            Some(head_dim) => head_dim,
            None if has_own_head => return None,
            None => hidden_size / heads,
        };
        let key_value_heads = match config.get("num_key_value_heads") {
            None if has_own_head => return None,
            None | Some(Value::Null) => heads,
            Some(_) => size("num_key_value_heads")?,
        };
        Some(Self {
            vocab_size: size("vocab_size")?,
            hidden_size,
            intermediate_size: size("intermediate_size")?,
            num_hidden_layers: size("num_hidden_layers")?,
            query_width: heads * head_dim,
            key_value_width: key_value_heads * head_dim,
            tie_word_embeddings: config
                .get("tie_word_embeddings")
                .and_then(Value::as_bool)
                .unwrap_or(family.starts_with("gemma")),
        })
    }

    /// Inputs and outputs of a projection.
    fn projection(&self, module: &str) -> (u64, u64) {
        match module {
            "q_proj" => (self.hidden_size, self.query_width),
            "k_proj" | "v_proj" => (self.hidden_size, self.key_value_width),
            "o_proj" => (self.query_width, self.hidden_size),
            "down_proj" => (self.intermediate_size, self.hidden_size),
            _ => (self.hidden_size, self.intermediate_size),
        }
    }

    /// Values of all weights; norms and biases, which are few, as two norms a layer.
    #[must_use]
    pub fn parameters(&self) -> u64 {
        self.num_hidden_layers * self.layer_parameters()
            + self.vocabulary_matrices()
            + self.hidden_size
    }

    /// Values of all projections of one layer.
    fn layer_projections(&self) -> u64 {
        let projections = TARGET_MODULES.iter().map(|module| {
            let (inputs, outputs) = self.projection(module);
            inputs * outputs
        });
        projections.sum()
    }

    fn layer_parameters(&self) -> u64 {
        self.layer_projections() + 2 * self.hidden_size
    }

    /// What `adapter` trains of this model.
    fn trained(&self, adapter: &AdapterConfig) -> Trained {
        let first = adapter.first_trained_layer(self.num_hidden_layers as usize);
        let layers = self.num_hidden_layers - first as u64;
        let vocabulary = adapter.kind == AdapterType::Full && adapter.trainable_layers == 0;
        let values = match adapter.kind {
            AdapterType::Lora => layers * self.layer_lora_parameters(adapter),
            AdapterType::Full if vocabulary => self.parameters(),
            AdapterType::Full => layers * self.layer_parameters() + self.hidden_size,
        };
        let weights = adapter.kind == AdapterType::Full;
        let (dora_inputs, dora_outputs) = self.dora_operands(adapter);
        Trained { values, weights, layers, vocabulary, dora_inputs, dora_outputs }
    }

    /// Values of the adapter of one layer.
    fn layer_lora_parameters(&self, adapter: &AdapterConfig) -> u64 {
        let modules = adapter.target_modules.iter().map(|module| {
            let (inputs, outputs) = self.projection(module);
            let magnitudes = if adapter.use_dora { outputs } else { 0 };
            adapter.r as u64 * (inputs + outputs) + magnitudes
        });
        modules.sum()
    }

    /// Values that DoRA keeps of a token in one layer: the inputs of each adapted projection that
    /// are not kept anyway, and what it gives before its magnitudes. Projections of one input are
    /// kept together.
    fn dora_operands(&self, adapter: &AdapterConfig) -> (u64, u64) {
        if adapter.kind == AdapterType::Full || !adapter.use_dora {
            return (0, 0);
        }
        let together: [(u64, &[&str]); 4] = [
            (self.hidden_size, &["q_proj", "k_proj", "v_proj"]),
            (0, &["o_proj"]),
            (self.hidden_size, &["gate_proj", "up_proj"]),
            (self.intermediate_size, &["down_proj"]),
        ];
        let is_target = |module: &&str| adapter.target_modules.iter().any(|name| name == module);
        let adapted = together.into_iter().filter(|(_, modules)| modules.iter().any(is_target));
        adapted.fold((0, 0), |(inputs, outputs), (input, modules)| {
            let width: u64 = modules.iter().map(|module| self.projection(module).1).sum();
            (inputs + input, outputs + width)
        })
    }

    /// Values that the optimiser remembers of the trained ones.
    fn optimizer_state(&self, optimizer: Optimizer, trained: &Trained) -> u64 {
        match optimizer {
            // Both moments.
            Optimizer::Adamw => 2 * trained.values,
            // A value a row and one a column are too few to count.
            Optimizer::Adafactor => 0,
            // The momentum of the layers' matrices, and both moments of embedding and head.
            Optimizer::Muon if trained.vocabulary => trained.values + self.vocabulary_matrices(),
            Optimizer::Muon => trained.values,
        }
    }

    /// Values of the embedding, and of the head where it is another.
    fn vocabulary_matrices(&self) -> u64 {
        let matrices = if self.tie_word_embeddings { 1 } else { 2 };
        matrices * self.vocab_size * self.hidden_size
    }

    /// Bytes that a pass holds at its peak.
    fn activations(&self, trained: &Trained, bf16: bool, pass: PassSize) -> u64 {
        let (hidden, inner) = (self.hidden_size, self.intermediate_size);
        let qkv = self.query_width + 2 * self.key_value_width;
        // Of each token: the layer's input and the middle of the residual stream; queries, keys
        // and values, and what attention makes of them.
        let numbers = 2 * hidden + qkv + self.query_width + trained.dora_outputs;
        let layer = match bf16 {
            // Gate and up. Their product and both norms' outputs are computed again, but for DoRA.
            false => F32 * (numbers + 2 * inner + trained.dora_inputs),
            // The product too, as it was made of numbers that are not kept; and what attention
            // makes is kept once as it is, and once as the next projection's input.
            true => F32 * numbers + BF16 * (3 * inner + self.query_width + trained.dora_inputs),
        };
        // Layers below the first one that trains leave nothing for the backward pass.
        let kept = if pass.recompute {
            trained.layers * F32 * hidden + layer
        } else {
            trained.layers * layer
        };
        // Going back through the feed-forward block: the gradients of gate, up and their product.
        let gradients = F32 * (2 * hidden + 3 * inner);
        // A chunk's logits; the head's gradient is made while the chunks are.
        let head = F32 * CHUNK_LOGITS.min(pass.tokens * self.vocab_size);
        let head_gradient = if trained.vocabulary { F32 * self.vocab_size * hidden } else { 0 };
        let rounded = if bf16 { BF16 * self.rounded_weights(trained, pass) } else { 0 };
        pass.tokens * (kept + gradients) + head + head_gradient + rounded
    }

    /// Bytes that a pass holds which leaves nothing for a backward pass.
    fn forward(&self, tokens: u64) -> u64 {
        let (hidden, inner) = (self.hidden_size, self.intermediate_size);
        let qkv = self.query_width + 2 * self.key_value_width;
        // The residual stream before and after a layer, and within it the widest that there is at
        // a time: what attention reads, with its turned queries, and what it makes of them.
        let attention = hidden + qkv + 2 * self.query_width;
        let numbers = 2 * hidden + attention.max(hidden + 3 * inner);
        tokens * F32 * numbers + F32 * CHUNK_LOGITS.min(tokens * self.vocab_size)
    }

    /// Weights of which a pass holds a copy in bf16 while what trains is f32.
    fn rounded_weights(&self, trained: &Trained, pass: PassSize) -> u64 {
        let head = if trained.vocabulary { self.vocab_size * self.hidden_size } else { 0 };
        let layers = match (trained.weights, pass.recompute) {
            (false, _) => 0,
            (true, false) => trained.layers,
            (true, true) => trained.layers.min(1),
        };
        head + layers * self.layer_parameters()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hyperparameters::{DataFacts, Hyperparameters, Quantization};

    const SMOLLM2_135M: ModelSize = ModelSize {
        vocab_size: 49_152,
        hidden_size: 576,
        intermediate_size: 1536,
        num_hidden_layers: 30,
        query_width: 576,
        key_value_width: 192,
        tie_word_embeddings: true,
    };

    fn estimate(kind: &str, tokens: u64, recompute: bool) -> MemoryEstimate {
        estimate_of(&serde_json::json!({"type": kind}), tokens, recompute)
    }

    fn estimate_in(precision: &str, kind: &str, tokens: u64, recompute: bool) -> MemoryEstimate {
        let fields = serde_json::json!({"adapter": {"type": kind}, "precision": precision});
        estimate_with(&fields, tokens, recompute)
    }

    fn estimate_of(adapter: &serde_json::Value, tokens: u64, recompute: bool) -> MemoryEstimate {
        let fields = serde_json::json!({"adapter": adapter, "precision": "fp32"});
        estimate_with(&fields, tokens, recompute)
    }

    fn estimate_with(fields: &serde_json::Value, tokens: u64, recompute: bool) -> MemoryEstimate {
        let pass = PassSize { tokens, measured_tokens: 0, several: false, recompute };
        MemoryEstimate::new(&SMOLLM2_135M, &resolved(fields), pass)
    }

    fn resolved(fields: &serde_json::Value) -> ResolvedHyperparameters {
        let (parsed, _) =
            Hyperparameters::parse(fields.as_object().expect("object"), "").expect("valid");
        parsed.resolve(&DataFacts { examples: 100, context_length: 2048 })
    }

    #[test]
    fn parameters_are_those_of_the_published_model() {
        assert_eq!(SMOLLM2_135M.parameters(), 134_515_008);
        assert_eq!(SMOLLM2_135M.trained(&AdapterConfig::default()).values, 4_884_480);
    }

    #[test]
    fn frozen_layers_have_weights_and_nothing_else() {
        let last = serde_json::json!({"type": "full", "trainable_layers": 3});
        let (last, full) = (estimate_of(&last, 4096, false), estimate("full", 4096, false));
        assert_eq!(last.weights, full.weights);
        // A layer has 3,540,096 values; the final norm has 576.
        let trained = 3 * 3_540_096 + 576;
        assert_eq!((last.gradients, last.optimizer), (4 * trained, 8 * trained));
        assert!(last.activations * 4 < full.activations, "{last} {full}");

        let last = serde_json::json!({"type": "lora", "trainable_layers": 3});
        let (last, lora) = (estimate_of(&last, 4096, false), estimate("lora", 4096, false));
        assert_eq!(last.gradients * 10, lora.gradients);
        assert!(last.activations * 4 < lora.activations, "{last} {lora}");
    }

    #[test]
    fn sizes_are_those_of_the_models_own_file() {
        let mut config = serde_json::json!({
            "model_type": "llama", "vocab_size": 49_152, "hidden_size": 576,
            "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
            "num_key_value_heads": 3, "tie_word_embeddings": true,
        });
        assert_eq!(ModelSize::from_config(&config), Some(SMOLLM2_135M));
        config["model_type"] = "qwen3".into();
        assert_eq!(ModelSize::from_config(&config), None, "its heads are not said");
        config["head_dim"] = 128.into();
        let size = ModelSize::from_config(&config).expect("sizes");
        assert_eq!((size.query_width, size.key_value_width), (9 * 128, 3 * 128));
        assert_eq!(ModelSize::from_config(&serde_json::json!({"model_type": "llama"})), None);
    }

    #[test]
    fn full_fine_tuning_keeps_four_values_of_each_weight_and_lora_of_each_of_its_own() {
        let full = estimate("full", 1, false);
        assert_eq!(full.weights + full.gradients + full.optimizer, 16 * 134_515_008);
        let lora = estimate("lora", 1, false);
        let pissa = estimate_of(&serde_json::json!({"init_lora_weights": "pissa"}), 1, false);
        assert_eq!(pissa.weights - lora.weights, 4 * 4_884_480);
        let adapter = 16 * 4_884_480;
        assert_eq!(lora.weights + lora.gradients + lora.optimizer, 4 * 134_515_008 + adapter);
    }

    #[test]
    fn dora_has_a_magnitude_a_row_and_keeps_what_it_scales() {
        let of = |targets: &[&str]| {
            let adapter = serde_json::json!({"target_modules": targets, "use_dora": true});
            let plain = serde_json::json!({"target_modules": targets});
            let (dora, lora) = (estimate_of(&adapter, 100, true), estimate_of(&plain, 100, true));
            (dora.gradients - lora.gradients, dora.activations - lora.activations)
        };
        // Queries and keys are projected as one, with the values.
        let qkv = 576 + 2 * 192;
        assert_eq!(of(&["q_proj", "k_proj"]), (4 * 30 * (576 + 192), 4 * 100 * (576 + qkv)));
        assert_eq!(of(&["o_proj"]), (4 * 30 * 576, 4 * 100 * 576));
        assert_eq!(of(&["down_proj"]), (4 * 30 * 576, 4 * 100 * (1536 + 576)));
    }

    #[test]
    fn optimizers_remember_two_values_of_each_weight_or_fewer() {
        let trained = SMOLLM2_135M.trained(&AdapterConfig::full());
        let remembered = |optimizer| SMOLLM2_135M.optimizer_state(optimizer, &trained);
        assert_eq!(remembered(Optimizer::Adamw), 2 * 134_515_008);
        assert_eq!(remembered(Optimizer::Muon), 134_515_008 + 49_152 * 576);
        assert_eq!(remembered(Optimizer::Adafactor), 0);
        let last = AdapterConfig { trainable_layers: 1, ..AdapterConfig::full() };
        let last = SMOLLM2_135M.trained(&last);
        assert_eq!(SMOLLM2_135M.optimizer_state(Optimizer::Muon, &last), last.values);
    }

    #[test]
    fn recomputing_leaves_one_layers_activations_and_the_inputs_of_all() {
        let (kept, recomputed) = (estimate("lora", 2048, false), estimate("lora", 2048, true));
        assert!(recomputed.activations * 3 < kept.activations, "{recomputed} {kept}");
    }

    #[test]
    fn bf16_halves_frozen_weights_and_leaves_what_trains_as_it_is() {
        let (single, half) =
            (estimate("lora", 1024, false), estimate_in("bf16", "lora", 1024, false));
        assert_eq!(single.weights - half.weights, 2 * 134_515_008);
        assert_eq!((single.gradients, single.optimizer), (half.gradients, half.optimizer));
        // Of a token and layer: gate and up, against those and their product and what attention makes.
        let spared = 4 * 2 * 1536 - 2 * (3 * 1536 + 576);
        assert_eq!(single.activations - half.activations, 1024 * 30 * spared);
        let (single, half) = (estimate("full", 1, false), estimate_in("bf16", "full", 1, false));
        assert_eq!(single.weights, half.weights);
    }

    #[test]
    fn quantised_projections_take_their_bits_and_the_rest_is_as_it_was() {
        let mut resolved = resolved(&serde_json::json!({"precision": "fp32"}));
        let pass = PassSize { tokens: 1, measured_tokens: 0, several: false, recompute: false };
        let whole = MemoryEstimate::new(&SMOLLM2_135M, &resolved, pass);
        // 30 layers of q, k, v and o, and of gate, up and down.
        let projections = 30 * (576 * (2 * 576 + 2 * 192) + 3 * 576 * 1536);
        for (quantization, bits) in [(Quantization::Int8, 17), (Quantization::Nf4, 9)] {
            resolved.adapter.quantization = quantization;
            let less = MemoryEstimate::new(&SMOLLM2_135M, &resolved, pass);
            assert_eq!(whole.weights - less.weights, 4 * projections - projections * bits / 16);
            assert_eq!(MemoryEstimate { weights: whole.weights, ..less }, whole);
        }
    }

    #[test]
    fn sizes_are_read_in_mib_and_gib() {
        assert_eq!(Size(64 << 20).to_string(), "64 MiB");
        assert_eq!(Size(3 << 29).to_string(), "1.5 GiB");
        assert!(estimate("lora", 64, false).to_string().contains("(weights 532 MiB, gradients"));
    }
}
