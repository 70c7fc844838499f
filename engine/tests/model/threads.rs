//! One seed, one result, whatever the number of threads.

use serde_json::{Value, json};
use tunesmith_core::hyperparameters::AdapterConfig;
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

/// A few steps on rows of several lengths; all bits of losses, norms, weights and moments.
fn bits(adapter: &AdapterConfig) -> Vec<u64> {
    let config = config();
    let dir = model_dir(&config, &tiny_tensors(&config));
    let mut model = TrainableModel::load(dir.path(), adapter, 7, &test_device()).unwrap();
    let row = |length: usize, seed| (tiny_ids(length, seed), vec![1.0; length]);
    let batches = [pack(&[row(301, 1), row(1, 2), row(77, 3)]), pack(&[row(130, 4), row(129, 5)])];
    let mut bits = Vec::new();
    for step in 0..3 {
        for (micro_batch, batch) in batches.iter().enumerate() {
            let key = DropoutKey { seed: 3, step, micro_batch: micro_batch as u64 };
            let outcome = model.forward_backward(batch, 1e-3, key).unwrap();
            bits.push(outcome.weighted_nll.to_bits());
        }
        let params = AdamWParams { learning_rate: 1e-2, ..AdamWParams::default() };
        bits.push(model.optimizer_step(&params, Some(0.5)).unwrap().to_bits());
    }
    let moments = model.optimizer_tensors().unwrap().tensors;
    for tensor in model.trainable_tensors().unwrap().iter().chain(&moments) {
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
    let lora = AdapterConfig { r: 8, dropout: 0.1, ..AdapterConfig::default() };
    for (name, adapter) in [("lora", lora), ("full", AdapterConfig::full())] {
        println!(
            "\nthreads: {} {name} {:016x}",
            rayon::current_num_threads(),
            hash(&bits(&adapter))
        );
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
        assert_eq!(hashes.len(), 2, "{printed}");
        hashes
    };
    let one = run("1");
    assert_ne!(one[0].split(' ').next_back(), one[1].split(' ').next_back());
    for threads in ["2", "3"] {
        assert_eq!(run(threads), one, "{threads} threads");
    }
}
