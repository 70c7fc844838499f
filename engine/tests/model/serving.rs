//! Many requests over one base model and adapters that PEFT saved.

use std::collections::HashMap;

use tunesmith_core::hyperparameters::Precision;
use tunesmith_core::sampling::{EndReason, FromSampler, SampleRequest, Sampling};
use tunesmith_engine::sample;
use tunesmith_engine::serve::{Batcher, ServedModel};

use crate::device::test_device;
use crate::support::{ids, reference, reference_path, smollm2};

const ADAPTERS: [&str; 4] = ["lora", "dora", "dora_rslora_qv", "lora_last_layer"];
const CACHE_BYTES: usize = 16 << 20;

/// Greedy, with the two most likely tokens.
fn request(id: u64, adapter: Option<&str>, prompt: &[u32], max_tokens: u32) -> SampleRequest {
    SampleRequest {
        id,
        adapter: adapter.map(str::to_owned),
        prompt: prompt.to_vec(),
        n: 1,
        sampling: Sampling { seed: 1, top_logprobs: 2, ..Sampling::greedy(max_tokens) },
        low_priority: false,
    }
}

/// One answer as it was told.
#[derive(Debug, Default, Clone, PartialEq)]
struct Told {
    tokens: Vec<u32>,
    /// Of the tokens and of the most likely ones.
    logprobs: Vec<f32>,
    end: Option<EndReason>,
    cached_tokens: u32,
}

/// What was said of each answer and each failed request; in the order of the ends.
#[derive(Debug, Default)]
struct Heard {
    answers: HashMap<(u64, u32), Told>,
    failed: HashMap<u64, String>,
    ended: Vec<u64>,
}

impl Heard {
    fn hear(&mut self, message: FromSampler) {
        match message {
            FromSampler::Token { id, index, token, top } => {
                let told = self.answers.entry((id, index)).or_default();
                assert_eq!(told.end, None, "nothing follows the end");
                assert_eq!(top.len(), 2);
                told.tokens.push(token.id);
                told.logprobs.extend([token.logprob, top[0].logprob, top[1].logprob]);
            }
            FromSampler::End { id, index, reason, cached_tokens } => {
                let told = self.answers.entry((id, index)).or_default();
                (told.end, told.cached_tokens) = (Some(reason), cached_tokens);
                self.ended.push(id);
            }
            FromSampler::Failed { id, message, .. } => {
                self.failed.insert(id, message);
            }
            other => panic!("{other:?}"),
        }
    }

    fn answer(&self, id: u64) -> &Told {
        &self.answers[&(id, 0)]
    }
}

fn on_cpu() -> bool {
    test_device().to_string() == "cpu"
}

/// What the CPU loses nothing with; elsewhere a product of bf16 rounds its inputs.
fn precision() -> Precision {
    if on_cpu() { Precision::Auto } else { Precision::Fp32 }
}

fn batcher(max_answers: usize) -> Batcher {
    let dir = reference_path("adapters/model");
    let model = ServedModel::load(&dir, &test_device(), precision()).unwrap();
    let mut batcher = Batcher::new(model, max_answers, CACHE_BYTES);
    for name in ADAPTERS {
        let dir = reference_path(&format!("adapters/final/{name}"));
        batcher.load_adapter(name.to_owned(), &dir).unwrap();
    }
    batcher
}

/// Answers all requests at once.
fn run(batcher: &mut Batcher, requests: &[SampleRequest]) -> Heard {
    let mut heard = Heard::default();
    for request in requests {
        batcher.submit(request.clone(), &mut |message| heard.hear(message));
    }
    while !batcher.is_idle() {
        batcher.step(&mut |message| heard.hear(message)).unwrap();
    }
    heard
}

/// What is answered beside an answer changes nothing of it: on the CPU, not a bit.
fn assert_alike(one: &Told, other: &Told) {
    if on_cpu() {
        assert_eq!(one, other);
    }
    assert_eq!(one.tokens, other.tokens);
    for (a, b) in one.logprobs.iter().zip(&other.logprobs) {
        assert!((a - b).abs() < 1e-4, "{a} {b}");
    }
}

fn prompt(first: u32, length: u32) -> Vec<u32> {
    (0..length).map(|i| (first + 7 * i) % 60 + 3).collect()
}

#[test]
fn answers_of_mixed_adapters_in_one_batch_are_those_of_each_alone() {
    // Of the prompts, not all fit into one pass.
    let who = [
        (None, 3),
        (Some("lora"), 30),
        (Some("dora"), 16),
        (Some("lora"), 60),
        (Some("dora_rslora_qv"), 150),
        (None, 17),
        (Some("lora_last_layer"), 4),
    ];
    let requests: Vec<SampleRequest> = (0..)
        .zip(who)
        .map(|(i, (adapter, length))| request(i, adapter, &prompt(i as u32, length), 12))
        .collect();
    let together = run(&mut batcher(8), &requests);
    for request in requests {
        let alone = run(&mut batcher(8), std::slice::from_ref(&request));
        let told = alone.answer(request.id);
        assert_alike(together.answer(request.id), told);

        let base = reference_path("adapters/model");
        let dir = request.adapter.map(|name| reference_path(&format!("adapters/final/{name}")));
        let model = sample::load(&base, dir.as_deref(), &test_device()).unwrap();
        assert_eq!(told.tokens, model.generate_greedy(&request.prompt, 12, &[]).unwrap());
        assert_eq!(told.end, Some(EndReason::Length));
        // The whole sequence at once, as training computes it.
        let all: Vec<u32> = request.prompt.iter().chain(&told.tokens).copied().collect();
        let positions: Vec<usize> = (request.prompt.len() - 1..all.len() - 1).collect();
        let rows = model.logits(&all, &positions).unwrap();
        for ((logits, token), logprobs) in
            rows.iter().zip(&told.tokens).zip(told.logprobs.chunks_exact(3))
        {
            let total: f64 = logits.iter().map(|&logit| f64::from(logit).exp()).sum();
            let expected = f64::from(logits[*token as usize]) - total.ln();
            assert!((f64::from(logprobs[0]) - expected).abs() < 1e-4, "{logprobs:?} {expected}");
            assert_eq!(logprobs[0], logprobs[1], "greedy takes the most likely");
            assert!(logprobs[2] <= logprobs[1]);
        }
    }
}

#[test]
fn adapters_answer_differently() {
    let mut batcher = batcher(8);
    let adapters = [None, Some("lora"), Some("dora")];
    let requests: Vec<SampleRequest> = adapters
        .iter()
        .enumerate()
        .map(|(i, adapter)| request(i as u64, *adapter, &prompt(0, 5), 4))
        .collect();
    let heard = run(&mut batcher, &requests);
    assert_ne!(heard.answer(0).logprobs, heard.answer(1).logprobs);
    assert_ne!(heard.answer(1).logprobs, heard.answer(2).logprobs);
}

#[test]
fn smollm2_answers_two_prompts_at_once_as_pytorch_does() {
    let model = ServedModel::load(&smollm2(), &test_device(), precision()).unwrap();
    let mut batcher = Batcher::new(model, 4, 256 << 20);
    let prompts = reference("a_logits.json");
    let requests: Vec<SampleRequest> = prompts
        .as_object()
        .unwrap()
        .values()
        .enumerate()
        .map(|(i, prompt)| {
            let mut request = request(i as u64, None, &ids(&prompt["ids"]), 32);
            request.sampling.stop_ids = vec![2];
            request
        })
        .collect();
    let heard = run(&mut batcher, &requests);
    for (i, prompt) in prompts.as_object().unwrap().values().enumerate() {
        let told = heard.answer(i as u64);
        let mut expected = ids(&prompt["greedy32_ids"]);
        let stops = expected.last() == Some(&2);
        if stops {
            // The token that ends an answer is not part of it.
            expected.pop();
        }
        assert_eq!(told.tokens, expected);
        let end = if stops { EndReason::Stop } else { EndReason::Length };
        assert_eq!(told.end, Some(end));
    }
}

#[test]
fn prompt_that_begins_like_an_earlier_one_is_computed_from_where_they_part() {
    let mut batcher = batcher(4);
    let first = prompt(1, 40);
    let told = run(&mut batcher, &[request(1, Some("lora"), &first, 5)]).answer(1).clone();
    assert_eq!(told.cached_tokens, 0);
    // The next turn: the prompt, the answer, and something new.
    let next: Vec<u32> = first.iter().chain(&told.tokens).copied().chain(prompt(9, 6)).collect();
    let reused = run(&mut batcher, &[request(2, Some("lora"), &next, 5)]).answer(2).clone();
    // The last token of the answer was never computed; portable forms keep no cache that can be cut.
    let expected = if on_cpu() { 44 } else { 0 };
    assert_eq!(reused.cached_tokens, expected);
    let fresh = run(&mut self::batcher(4), &[request(2, Some("lora"), &next, 5)]);
    assert_eq!(reused.tokens, fresh.answer(2).tokens);
    for (a, b) in reused.logprobs.iter().zip(&fresh.answer(2).logprobs) {
        assert!((a - b).abs() < 1e-5, "{a} {b}");
    }
    // Other weights: nothing of it holds for another adapter, or once it was loaded anew.
    let other = run(&mut batcher, &[request(3, Some("dora"), &next, 5)]);
    assert_eq!(other.answer(3).cached_tokens, 0);
    batcher.load_adapter("lora".to_owned(), &reference_path("adapters/final/dora")).unwrap();
    let renamed = run(&mut batcher, &[request(4, Some("lora"), &next, 5)]);
    assert_eq!(renamed.answer(4).tokens, other.answer(3).tokens);
    assert_eq!(renamed.answer(4).cached_tokens, 0);
}

#[test]
fn several_answers_to_one_prompt_share_it_and_draw_apart() {
    let mut several = request(1, None, &prompt(2, 300), 8);
    several.n = 3;
    several.sampling.temperature = 1.5;
    let heard = run(&mut batcher(4), &[several.clone()]);
    let tokens: Vec<&Vec<u32>> = (0..3).map(|i| &heard.answers[&(1, i)].tokens).collect();
    assert!(tokens.iter().all(|tokens| tokens.len() == 8));
    assert!(tokens[0] != tokens[1] && tokens[1] != tokens[2]);
    // The same request again, beside another: the same answers.
    let beside = request(2, Some("dora"), &prompt(5, 4), 20);
    let again = run(&mut batcher(8), &[beside, several]);
    for i in 0..3 {
        assert_alike(&again.answers[&(1, i)], &heard.answers[&(1, i)]);
    }
}

#[test]
fn answers_begin_as_room_is_left_and_low_priority_waits() {
    let mut batcher = batcher(2);
    let requests: Vec<SampleRequest> = (0..5)
        .map(|id| {
            let tokens = [4, 20, 3, 3, 3][id as usize];
            SampleRequest { low_priority: id == 2, ..request(id, None, &prompt(1, 4), tokens) }
        })
        .collect();
    let heard = run(&mut batcher, &requests);
    // 0 and 1 begin; 3 and 4 follow 0 one after the other; 2 came before them and is last but 1.
    assert_eq!(heard.ended, [0, 3, 4, 2, 1]);
}

#[test]
fn cancelled_request_is_not_heard_of_again_and_leaves_room() {
    let mut batcher = batcher(1);
    let mut heard = Heard::default();
    for id in [1, 2, 3] {
        batcher.submit(request(id, None, &prompt(1, 4), 50), &mut |message| heard.hear(message));
    }
    for _ in 0..3 {
        batcher.step(&mut |message| heard.hear(message)).unwrap();
    }
    assert!(heard.answer(1).tokens.len() > 1);
    batcher.cancel(1);
    batcher.cancel(2);
    let before = heard.answer(1).tokens.len();
    while !batcher.is_idle() {
        batcher.step(&mut |message| heard.hear(message)).unwrap();
    }
    assert_eq!(heard.answer(1).tokens.len(), before);
    assert!(!heard.answers.contains_key(&(2, 0)));
    assert_eq!((heard.answer(3).tokens.len(), heard.ended.as_slice()), (50, &[3][..]));
}

#[test]
fn what_cannot_be_answered_is_refused_with_the_rule() {
    let mut batcher = batcher(2);
    let context = 512;
    let cases = [
        (request(1, None, &[], 4), "no token"),
        (request(2, None, &prompt(1, context), 4), "context of 512"),
        (request(3, None, &[5000], 4), "5000"),
        (request(4, Some("nobody"), &[5], 4), "nobody is not loaded"),
        (SampleRequest { n: 3, ..request(5, None, &[5], 4) }, "use 1 to 2"),
    ];
    for (request, words) in cases {
        let id = request.id;
        let heard = run(&mut batcher, &[request]);
        assert!(heard.failed[&id].contains(words), "{:?}", heard.failed[&id]);
        assert!(heard.answers.is_empty());
    }
    // An answer ends where the context does.
    let heard = run(&mut batcher, &[request(9, None, &prompt(1, context - 3), 50)]);
    assert_eq!(heard.answer(9).tokens.len(), 3);
    assert_eq!(heard.answer(9).end, Some(EndReason::Length));
}

#[test]
fn request_that_needs_more_cache_than_there_is_is_refused_with_the_numbers() {
    let dir = reference_path("adapters/model");
    let model = ServedModel::load(&dir, &test_device(), precision()).unwrap();
    // For about 100 tokens; each answer takes room for 64 at a time.
    let mut batcher = Batcher::new(model, 4, 50_000);
    let mut large = request(1, None, &prompt(1, 10), 40);
    large.n = 4;
    let heard = run(&mut batcher, &[large]);
    assert!(heard.failed[&1].contains("256 tokens"), "{}", heard.failed[&1]);
    let heard = run(&mut batcher, &[request(2, None, &prompt(1, 10), 5)]);
    assert_eq!(heard.answer(2).tokens.len(), 5);
}

#[test]
fn adapter_of_another_model_is_named() {
    let model = ServedModel::load(&reference_path("families/phi3"), &test_device(), precision());
    let mut batcher = Batcher::new(model.unwrap(), 4, CACHE_BYTES);
    let error = batcher.load_adapter("x".to_owned(), &reference_path("adapters/final/lora"));
    assert!(error.unwrap_err().to_string().contains("qkv_proj"));
}
