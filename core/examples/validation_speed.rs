//! How fast a file is validated, tokens counted, on one core:
//! `cargo run --release -p tunesmith-core --example validation_speed MODEL_DIRECTORY`.
//!
//! 100,000 chat rows of made-up words whose frequencies fall as those of a language do (Zipf), so
//! that most words come again and some never do. Prints the MB/s of the report that the server
//! makes of an upload, and of its parts.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng as _, SeedableRng as _};
use serde_json::json;
use std::path::Path;
use std::time::Instant;
use tunesmith_core::dataset::{
    ChatTokenizer, FileReport, ReadOptions, ReportOptions, RowReader, TokenizeOptions,
};
use tunesmith_core::hyperparameters::Method;

const ROWS: usize = 100_000;
/// The mark that a report should reach.
const MARK_MB_PER_SECOND: f64 = 20.0;

fn main() {
    let Some(directory) = std::env::args().nth(1) else {
        eprintln!("give the directory of a model with tokenizer.json and a chat template");
        std::process::exit(2);
    };
    let tokenizer = match ChatTokenizer::from_dir(Path::new(&directory)) {
        Ok(tokenizer) => tokenizer,
        Err(error) => {
            eprintln!("{directory}: {error}");
            std::process::exit(1);
        }
    };
    let file = rows();
    let megabytes = file.len() as f64 / 1e6;
    println!("{ROWS} rows, {megabytes:.1} MB");

    let read = ReadOptions::new(Method::Supervised, "training_file");
    let began = Instant::now();
    let rows = RowReader::open(file.as_slice(), &read).map(Iterator::count);
    let reading = began.elapsed().as_secs_f64();
    assert!(rows.is_ok_and(|rows| rows == ROWS), "a row is lost");
    println!("rows read and checked: {:.1} MB/s", megabytes / reading);

    let options = TokenizeOptions { max_seq_length: 2048, prompt_loss_weight: 0.1 };
    let options = ReportOptions { read, tokenizer: Some((&tokenizer, options)), shown_rows: 0 };
    let began = Instant::now();
    let report = FileReport::make(file.as_slice(), &options, || true);
    let seconds = began.elapsed().as_secs_f64();
    let report = match report {
        Ok(report) => report,
        Err(error) => {
            eprintln!("{error}");
            std::process::exit(1);
        }
    };
    assert_eq!((report.examples, report.problem_count), (ROWS, 0), "{:?}", report.problems);
    let tokens = report.tokens.map_or(0, |tokens| tokens.total);
    println!("{tokens} tokens, {:.2} million a second", tokens as f64 / seconds / 1e6);
    let speed = megabytes / seconds;
    println!("validation MB/s {speed:.1} mark >={MARK_MB_PER_SECOND}");
}

/// A file of chat rows, each of about a kilobyte.
fn rows() -> Vec<u8> {
    let mut random = ChaCha8Rng::seed_from_u64(1);
    let words: Vec<String> = (0..30_000).map(|_| word(&mut random)).collect();
    let mut file = Vec::new();
    for _ in 0..ROWS {
        let row = json!({"messages": [
            {"role": "system", "content": "You are a helpful assistant. Answer in full sentences."},
            {"role": "user", "content": text(&mut random, &words, 40)},
            {"role": "assistant", "content": text(&mut random, &words, 110)},
        ]});
        file.extend(row.to_string().into_bytes());
        file.push(b'\n');
    }
    file
}

fn word(random: &mut ChaCha8Rng) -> String {
    const SYLLABLES: [&str; 24] = [
        "an", "ter", "con", "ing", "re", "der", "pro", "lo", "mi", "sta", "tion", "ex", "ver",
        "al", "com", "per", "in", "ment", "sub", "ly", "tra", "dis", "ne", "ple",
    ];
    let syllables = 1 + random.next_u32() as usize % 4;
    (0..syllables).map(|_| SYLLABLES[random.next_u32() as usize % SYLLABLES.len()]).collect()
}

/// Sentences of `count` words; that of rank k comes about 1/k as often as the first.
fn text(random: &mut ChaCha8Rng, words: &[String], count: usize) -> String {
    let mut text = String::new();
    for number in 0..count {
        let uniform = f64::from(random.next_u32()) / f64::from(u32::MAX);
        let rank = (words.len() as f64).powf(uniform) as usize;
        text.push_str(&words[rank.min(words.len() - 1)]);
        text.push_str(match (number + 1 == count, random.next_u32() % 12) {
            (true, _) => ".",
            (false, 0) => ". ",
            (false, 1) => ", ",
            (false, 2) => "\n",
            (false, _) => " ",
        });
    }
    text
}
