//! A tiny random Llama model with a tokenizer, chat data, and a run's messages.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng as _, SeedableRng as _};
use safetensors::tensor::TensorView;
use serde_json::{Map, Value, json};
use tempfile::TempDir;
use tunesmith_core::hyperparameters::{DataFacts, Hyperparameters};
use tunesmith_core::job::TrainSpec;
use tunesmith_core::metrics::{RowLoss, StepMetrics};
use tunesmith_core::protocol::{CheckpointWritten, FromTrainer, Note, Started, TrainRequest};
use tunesmith_engine::train::{Outcome, StopFlag, TrainOptions, train_with};
use tunesmith_engine::{EngineError, NamedTensor};

use crate::device::test_device_name;

pub(crate) const LAYERS: usize = 2;
pub(crate) const HIDDEN: usize = 24;
pub(crate) const INTERMEDIATE: usize = 40;
pub(crate) const HEADS: usize = 4;
pub(crate) const KEY_VALUE_HEADS: usize = 2;
pub(crate) const HEAD_DIM: usize = 6;
pub(crate) const CONTEXT: u64 = 256;
pub(crate) const TEMPLATE: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' \
     + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}\
     {% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";
pub(crate) const MERGE: &str = "h a";
pub(crate) const SPECIAL: [&str; 3] = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"];

/// The tokens of the tiny tokenizer: three special ones, one a byte in GPT-2's spelling,
/// and the one merge.
pub(crate) fn vocabulary() -> Vec<String> {
    let printable =
        |byte: u32| matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff).then_some(byte);
    let mut others = 256..;
    let bytes = (0..256).map(|byte| printable(byte).or_else(|| others.next()).expect("endless"));
    let letters = bytes.map(|code| char::from_u32(code).expect("a character").to_string());
    SPECIAL.map(str::to_owned).into_iter().chain(letters).chain(["ha".to_owned()]).collect()
}

pub(crate) fn config() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "num_key_value_heads": KEY_VALUE_HEADS,
        "head_dim": HEAD_DIM, "max_position_embeddings": CONTEXT, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "rope_scaling": null, "tie_word_embeddings": true,
        "vocab_size": vocabulary().len(), "bos_token_id": 1, "eos_token_id": 2,
        "pad_token_id": 2,
    })
}

/// Every weight of the tiny model, drawn anew from the same seed: uniform in ±0.25, norms near 1.
pub(crate) fn weights() -> Vec<NamedTensor> {
    let mut random = ChaCha8Rng::seed_from_u64(5);
    let mut tensor = |name: String, shape: &[usize]| {
        let centre = if shape.len() == 1 { 1.0 } else { 0.0 };
        let uniform = |bits: u32| (bits as f32 / u32::MAX as f32 - 0.5) / 2.0 + centre;
        let data = (0..shape.iter().product()).map(|_| uniform(random.next_u32())).collect();
        NamedTensor { name, shape: shape.to_vec(), data }
    };
    let (queries, keys) = (HEADS * HEAD_DIM, KEY_VALUE_HEADS * HEAD_DIM);
    let mut tensors =
        vec![tensor("model.embed_tokens.weight".into(), &[vocabulary().len(), HIDDEN])];
    for layer in 0..LAYERS {
        for (name, shape) in [
            ("input_layernorm", &[HIDDEN][..]),
            ("self_attn.q_proj", &[queries, HIDDEN]),
            ("self_attn.k_proj", &[keys, HIDDEN]),
            ("self_attn.v_proj", &[keys, HIDDEN]),
            ("self_attn.o_proj", &[HIDDEN, queries]),
            ("post_attention_layernorm", &[HIDDEN]),
            ("mlp.gate_proj", &[INTERMEDIATE, HIDDEN]),
            ("mlp.up_proj", &[INTERMEDIATE, HIDDEN]),
            ("mlp.down_proj", &[HIDDEN, INTERMEDIATE]),
        ] {
            tensors.push(tensor(format!("model.layers.{layer}.{name}.weight"), shape));
        }
    }
    tensors.push(tensor("model.norm.weight".into(), &[HIDDEN]));
    tensors
}

pub(crate) fn write_safetensors(path: &Path, tensors: &[NamedTensor]) {
    let views = tensors.iter().map(|tensor| {
        let bytes = bytemuck::cast_slice(&tensor.data);
        let view = TensorView::new(safetensors::Dtype::F32, tensor.shape.clone(), bytes);
        (tensor.name.clone(), view.expect("a view"))
    });
    let metadata = [("format".to_owned(), "pt".to_owned())].into_iter().collect();
    safetensors::serialize_to_file(views, Some(metadata), path).expect("safetensors");
}

pub(crate) fn read_safetensors(path: &Path) -> BTreeMap<String, (Vec<usize>, Vec<f32>)> {
    let bytes = fs::read(path).expect("safetensors");
    let file = safetensors::SafeTensors::deserialize(&bytes).expect("safetensors");
    file.tensors()
        .into_iter()
        .map(|(name, view)| {
            (name, (view.shape().to_vec(), bytemuck::pod_collect_to_vec(view.data())))
        })
        .collect()
}

/// Writes the tiny model as a Hugging Face directory.
pub(crate) fn write_model(dir: &Path) {
    fs::create_dir_all(dir).expect("model directory");
    let vocabulary = vocabulary();
    let vocab: Map<String, Value> =
        vocabulary.iter().enumerate().map(|(id, token)| (token.clone(), json!(id))).collect();
    let added: Vec<Value> = SPECIAL
        .iter()
        .enumerate()
        .map(|(id, token)| {
            json!({"id": id, "content": token, "single_word": false, "lstrip": false,
                   "rstrip": false, "normalized": false, "special": true})
        })
        .collect();
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
                            "use_regex": true});
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added,
        "normalizer": null, "pre_tokenizer": byte_level, "post_processor": null,
        "decoder": byte_level,
        "model": {"type": "BPE", "dropout": null, "unk_token": null,
                  "continuing_subword_prefix": null, "end_of_word_suffix": null,
                  "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
                  "vocab": vocab, "merges": [MERGE]},
    });
    let tokenizer_config = json!({
        "bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>",
        "unk_token": "<|endoftext|>", "chat_template": TEMPLATE, "model_max_length": CONTEXT,
        "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": false,
    });
    let generation = json!({"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2});
    for (name, json) in [
        ("config.json", config()),
        ("tokenizer.json", tokenizer),
        ("tokenizer_config.json", tokenizer_config),
        ("generation_config.json", generation),
    ] {
        fs::write(dir.join(name), json.to_string()).expect(name);
    }
    write_safetensors(&dir.join("model.safetensors"), &weights());
}

/// `rows` conversations of different lengths.
pub(crate) fn chat_rows(rows: usize) -> String {
    let mut text = String::new();
    for row in 0..rows {
        let messages = json!({"messages": [
            {"role": "user", "content": format!("What is {row}?")},
            {"role": "assistant", "content": "ha".repeat(1 + row * 5 % 7)},
        ]});
        writeln!(text, "{messages}").expect("text");
    }
    text
}

/// A directory with the tiny model and a training file, from which requests are made.
pub(crate) struct Bench {
    pub(crate) dir: TempDir,
    rows: usize,
}

impl Bench {
    pub(crate) fn new(rows: usize) -> Self {
        let dir = tempfile::tempdir().expect("temp dir");
        write_model(&dir.path().join("base"));
        fs::write(dir.path().join("train.jsonl"), chat_rows(rows)).expect("data");
        Self { dir, rows }
    }

    pub(crate) fn base(&self) -> PathBuf {
        self.dir.path().join("base")
    }

    /// A request with `hyperparameters` that writes to the directory `name`. Products multiply f32
    /// unless another `precision` is named: what tests compare is exact to that, on any CPU.
    pub(crate) fn request(&self, name: &str, hyperparameters: &Value) -> TrainRequest {
        let mut hyperparameters = hyperparameters.clone();
        hyperparameters
            .as_object_mut()
            .expect("an object")
            .entry("precision")
            .or_insert("fp32".into());
        let output_dir = self.dir.path().join(name);
        fs::create_dir_all(&output_dir).expect("output directory");
        let fields = hyperparameters.as_object().expect("an object");
        let (parsed, unknown) = Hyperparameters::parse(fields, "hyperparameters").expect("valid");
        assert!(unknown.is_empty(), "{unknown:?}");
        let facts = DataFacts { examples: self.rows, context_length: CONTEXT };
        let hyperparameters = parsed.resolve(&facts);
        TrainRequest {
            job_id: "ftjob-test".into(),
            start_from: None,
            spec: TrainSpec {
                start_from: None,
                model: "tiny".to_owned(),
                base_is_tuned: false,
                seed: 11,
                hyperparameters,
            },
            base_model_dir: self.base(),
            training_file: self.dir.path().join("train.jsonl"),
            validation_file: None,
            resume_from: None,
            output_dir,
            device: test_device_name(),
        }
    }
}

/// What a run said.
#[derive(Debug, Default)]
pub(crate) struct Transcript {
    pub(crate) started: Option<Started>,
    pub(crate) steps: Vec<StepMetrics>,
    pub(crate) rows: Vec<RowLoss>,
    pub(crate) checkpoints: Vec<CheckpointWritten>,
    pub(crate) notes: Vec<Note>,
    pub(crate) last: Option<FromTrainer>,
}

impl Transcript {
    pub(crate) fn take(&mut self, message: FromTrainer) {
        match &message {
            FromTrainer::Started(started) => self.started = Some(started.clone()),
            FromTrainer::Step(metrics) => self.steps.push(metrics.clone()),
            FromTrainer::Rows { rows } => self.rows.extend(rows.iter().cloned()),
            FromTrainer::Checkpoint(checkpoint) => self.checkpoints.push(checkpoint.clone()),
            FromTrainer::Note(note) => self.notes.push(note.clone()),
            _ => {}
        }
        self.last = Some(message);
    }

    pub(crate) fn started(&self) -> &Started {
        self.started.as_ref().expect("started")
    }

    pub(crate) fn train_losses(&self) -> Vec<f64> {
        self.steps.iter().map(|step| step.train_loss).collect()
    }

    /// The directory of the checkpoint at `step`.
    pub(crate) fn checkpoint(&self, step: u64) -> &Path {
        let checkpoint = self.checkpoints.iter().find(|checkpoint| checkpoint.step == step);
        &checkpoint.unwrap_or_else(|| panic!("no checkpoint at step {step}")).dir
    }
}

/// Runs to the end, or to the step after which `stop_after` stops it.
pub(crate) fn run(
    request: &TrainRequest,
    options: &TrainOptions,
    stop_after: Option<u64>,
) -> (Transcript, Result<Outcome, EngineError>) {
    let stop = StopFlag::default();
    let mut transcript = Transcript::default();
    let outcome = train_with(request, options, &stop, &mut |message| {
        if let FromTrainer::Step(metrics) = &message
            && Some(metrics.step) == stop_after
        {
            stop.stop();
        }
        transcript.take(message);
        Ok(())
    });
    (transcript, outcome)
}

/// Runs to the end.
pub(crate) fn finish(request: &TrainRequest) -> Transcript {
    let (transcript, outcome) = run(request, &TrainOptions::default(), None);
    assert!(matches!(outcome, Ok(Outcome::Finished { .. })), "{outcome:?}");
    transcript
}
