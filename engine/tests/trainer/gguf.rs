//! Texts and conversations in the tokenizers of GGUF files made by llama.cpp's converter.
//!
//! `scripts/fixtures/gguf_families.py` makes the files.

use std::fs;
use std::path::Path;

use serde_json::Value;
use tempfile::TempDir;
use tunesmith_core::dataset::{
    ChatTokenizer, Example, Message, Role, Row, TokenizeOptions, tokenize_row,
};
use tunesmith_engine::import::import_source;

const TOKENIZERS: [&str; 5] = ["mistral", "smollm", "tekken", "gpt-4o", "dbrx"];

fn imported(name: &str) -> TempDir {
    let path = format!("tests/reference/gguf/{name}/{name}.gguf");
    let dir = tempfile::tempdir().expect("temp dir");
    import_source(&Path::new(env!("CARGO_MANIFEST_DIR")).join(path), dir.path())
        .unwrap_or_else(|error| panic!("{name}: {error}"));
    dir
}

#[test]
fn a_text_has_one_begin_token_and_special_tokens_in_it_stay_text() {
    for name in TOKENIZERS {
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
        let begins = ["mistral", "tekken"].contains(&name);
        assert_eq!(count(&row.ids, begin), usize::from(begins), "{name}");
        assert_eq!(count(&row.ids, mark[0]), 0, "{name}");
    }
}
