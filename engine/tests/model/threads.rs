//! One seed, one result, whatever the number of threads.

use std::collections::BTreeSet;

use serde_json::{Value, json};
use tunesmith_core::dataset::{TokenizedAnswer, TokenizedPair};
use tunesmith_core::hyperparameters::{
    AdapterConfig, MuonLearningRate, Optimizer, Precision, PreferenceLoss, Quantization,
};
use tunesmith_engine::preference::{Objective, PairBatch, PairLogps, PairScale};
use tunesmith_engine::{AdamWParams, DropoutKey, TrainableModel};

use crate::device::test_device;
use crate::rerun::rerun;
use crate::support::{model_dir, pack, tiny_config, tiny_ids, tiny_tensors};

/// Wide enough that its products are shared among threads, and with several blocks of rows.
fn config() -> Value {
    let mut config = tiny_config();
    for (name, size) in [("hidden_size", 160), ("intermediate_size", 328), ("head_dim", 40)] {
        config[name] = json!(size);
    }
    config
}

/// What may decide how sums are made.
struct Case {
    name: &'static str,
    adapter: AdapterConfig,
    precision: Precision,
    optimizer: Optimizer,
    /// Whether it learns from pairs, and not from examples.
    pairs: bool,
}

fn cases() -> Vec<Case> {
    let lora = AdapterConfig { r: 8, dropout: 0.1, ..AdapterConfig::default() };
    let full = AdapterConfig::full();
    let quantized = |quantization| AdapterConfig { quantization, ..lora.clone() };
    let case = |name, adapter: &AdapterConfig| Case {
        name,
        adapter: adapter.clone(),
        precision: Precision::Fp32,
        optimizer: Optimizer::Adamw,
        pairs: false,
    };
    let in_bf16 = |case| Case { precision: Precision::Bf16, ..case };
    vec![
        case("lora", &lora),
        case("full", &full),
        in_bf16(case("lora-bf16", &lora)),
        in_bf16(case("full-bf16", &full)),
        case("dora", &AdapterConfig { use_dora: true, ..lora.clone() }),
        case("int8", &quantized(Quantization::Int8)),
        case("nf4", &quantized(Quantization::Nf4)),
        Case { optimizer: Optimizer::Adafactor, ..case("adafactor", &full) },
        Case { optimizer: Optimizer::Muon, ..case("muon", &full) },
        Case { pairs: true, ..case("pairs", &full) },
    ]
}

/// A few steps on rows of several lengths; all bits of losses, norms, weights and moments.
fn bits(case: &Case) -> Vec<u64> {
    let config = config();
    let dir = model_dir(&config, &tiny_tensors(&config));
    let Case { adapter, precision, .. } = case;
    let mut model =
        TrainableModel::load_with_precision(dir.path(), adapter, 7, &test_device(), *precision)
            .unwrap();
    model.set_optimizer(case.optimizer, MuonLearningRate::default());
    let row = |length: usize, seed| (tiny_ids(length, seed), vec![1.0; length]);
    let batches = [pack(&[row(301, 1), row(1, 2), row(77, 3)]), pack(&[row(130, 4), row(129, 5)])];
    let objective = Objective {
        loss: PreferenceLoss::Dpo,
        beta: 0.1,
        simpo_gamma: 0.5,
        prompt_loss_weight: 0.0,
    };
    let answer = |length: usize, seed: u64| TokenizedAnswer {
        ids: tiny_ids(40, 9).into_iter().chain(tiny_ids(length, seed)).collect(),
        completion: 40..40 + length,
        truncated: false,
    };
    let pair = |line, one, two| TokenizedPair {
        line,
        chosen: answer(one, 10 + line as u64),
        rejected: answer(two, 20 + line as u64),
    };
    let pairs = [pair(1, 201, 30), pair(2, 1, 77), pair(3, 130, 129)];
    let pairs =
        [&[0, 1][..], &[2]].map(|numbers| PairBatch::new(&pairs, numbers, &objective, true));
    let references = [PairLogps { chosen: -700.0, rejected: -300.0 }; 2];
    let mut bits = Vec::new();
    for step in 0..3 {
        for micro_batch in 0..2 {
            let key = DropoutKey { seed: 3, step, micro_batch: micro_batch as u64 };
            let loss = if case.pairs {
                let scale = PairScale { pair: 1e-2, chosen: 0.0 };
                let pairs = &pairs[micro_batch];
                let references = &references[..pairs.pairs().len()];
                model
                    .forward_backward_pairs(pairs, &objective, references, scale, key)
                    .unwrap()
                    .loss
            } else {
                model.forward_backward(&batches[micro_batch], 1e-3, key).unwrap().weighted_nll
            };
            bits.push(loss.to_bits());
        }
        let params = AdamWParams { learning_rate: 1e-2, ..AdamWParams::default() };
        bits.push(model.optimizer_step(&params, Some(0.5)).unwrap().to_bits());
    }
    let state = model.optimizer_tensors().unwrap().tensors;
    for tensor in model.trainable_tensors().unwrap().iter().chain(&state) {
        bits.extend(tensor.data.iter().map(|value| u64::from(value.to_bits())));
    }
    bits
}

/// FNV-1a, which tells all but one in 2⁶⁴ apart.
fn hash(bits: &[u64]) -> u64 {
    let bytes = bits.iter().flat_map(|bits| bits.to_le_bytes());
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

#[test]
#[ignore = "run by the test below, in a process with a number of threads of its own"]
fn one_run_prints_its_hash() {
    for case in cases() {
        let threads = rayon::current_num_threads();
        println!("\nthreads: {threads} {} {:016x}", case.name, hash(&bits(&case)));
    }
}

#[test]
fn losses_gradients_and_weights_have_the_same_bits_on_one_two_and_three_threads() {
    let run = |threads: &str| -> Vec<String> {
        let printed =
            rerun(&["threads::one_run_prints_its_hash"], &[("RAYON_NUM_THREADS", threads)]);
        let prefix = format!("threads: {threads} ");
        let hashes: Vec<String> = printed
            .lines()
            .filter_map(|line| line.strip_prefix(&prefix))
            .map(str::to_owned)
            .collect();
        assert_eq!(hashes.len(), cases().len(), "{printed}");
        hashes
    };
    let one = run("1");
    let different: BTreeSet<_> = one.iter().map(|line| line.split(' ').next_back()).collect();
    assert_eq!(different.len(), one.len(), "{one:?}");
    for threads in ["2", "3"] {
        assert_eq!(run(threads), one, "{threads} threads");
    }
}
