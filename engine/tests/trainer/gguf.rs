//! Models of GGUF files that llama.cpp's converter made, beside the originals they were made of.
//!
//! `scripts/fixtures/gguf_families.py` makes the files.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;
use tempfile::TempDir;
use tunesmith_core::dataset::{
    ChatTokenizer, Example, Message, Role, Row, TokenizeOptions, tokenize_row,
};
use tunesmith_core::hyperparameters::AdapterConfig;
use tunesmith_engine::import::import_source;
use tunesmith_engine::{ModelConfig, TrainableModel};

use crate::device::test_device;

const FAMILIES: [&str; 7] = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3"];

/// Those with a tokenizer of another kind than the families above.
const TOKENIZERS: [&str; 4] = ["smollm", "tekken", "gpt-4o", "dbrx"];

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/reference/gguf").join(name)
}

fn imported(name: &str) -> TempDir {
    let dir = tempfile::tempdir().expect("temp dir");
    import_source(&fixture(name).join(format!("{name}.gguf")), dir.path())
        .unwrap_or_else(|error| panic!("{name}: {error}"));
    dir
}

fn logits(dir: &Path) -> Vec<f32> {
    let model =
        TrainableModel::load(dir, &AdapterConfig::full(), 0, &test_device()).expect("a model");
    let ids: Vec<u32> = (0..20).map(|i| (i * 37 + 5) % 300).collect();
    model.logits(&ids, &(0..ids.len()).collect::<Vec<_>>()).expect("logits").concat()
}

#[test]
fn every_family_computes_what_its_original_computes() {
    for name in FAMILIES {
        let dir = imported(name);
        let found = ModelConfig::read(dir.path()).expect("config");
        let mut original = ModelConfig::read(&fixture(name)).expect("original");
        // GGUF calls Mistral a Llama, and a model without a padding token pads with its end.
        original.model_type.clone_from(&found.model_type);
        original.pad_token_id = found.pad_token_id;
        assert_eq!(found, original, "{name}");
        assert_eq!(logits(dir.path()), logits(&fixture(name)), "{name}");
    }
}

#[test]
fn a_text_has_one_begin_token_and_special_tokens_in_it_stay_text() {
    for name in FAMILIES.into_iter().chain(TOKENIZERS) {
        let dir = imported(name);
        let config: Value =
            serde_json::from_slice(&fs::read(dir.path().join("config.json")).expect("config.json"))
                .expect("json");
        let begin = u32::try_from(config["bos_token_id"].as_u64().expect("an id")).expect("an id");
        let count = |ids: &[u32], wanted: u32| ids.iter().filter(|&&id| id == wanted).count();
        let tokenizer = ChatTokenizer::from_dir(dir.path()).expect("tokenizer");
        let mark = tokenizer.encode("<end_of_turn>").expect("ids");
        assert_eq!(mark.len(), 1, "{name}");

        let content = "a <end_of_turn> and <s><bos><|begin_of_text|>";
        let messages = [Message::new(Role::User, content)];
        let ids = tokenizer.encode_chat(&messages, None, true).expect("ids");
        assert_eq!(count(&ids, begin), 1, "{name}: the template's own");
        assert_eq!(count(&ids, mark[0]), 1, "{name}: the template's own");
        assert!(tokenizer.decode(&ids).expect("text").contains(content), "{name}");
        assert_eq!(tokenizer.eos_ids()[1..], mark, "{name}: the end of a turn stops too");

        let example = Example::Text { text: content.to_owned() };
        let options = TokenizeOptions { max_seq_length: 512, prompt_loss_weight: 0.1 };
        let row = tokenize_row(&tokenizer, &Row { line: 1, example }, &options, "training_file")
            .expect("tokens");
        let begins = !["smollm", "gpt-4o", "dbrx", "qwen2", "qwen3"].contains(&name);
        assert_eq!(count(&row.ids, begin), usize::from(begins), "{name}");
        assert_eq!(count(&row.ids, mark[0]), 0, "{name}");
    }
}
