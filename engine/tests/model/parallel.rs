//! Replicas that share a step: what several devices compute is what one computes.

use tunesmith_core::hyperparameters::AdapterConfig;
use tunesmith_engine::parallel::Replicas;
use tunesmith_engine::{AdamWParams, Batch, BatchOutcome, Device, DropoutKey, NamedTensor};

use crate::device::test_device;
use crate::support::{pack, stir_adapter, tiny_ids, tiny_model};

fn replicas(adapter: &AdapterConfig, count: usize) -> Replicas {
    let mut lead = tiny_model(adapter);
    if *adapter != AdapterConfig::full() {
        stir_adapter(&mut lead);
    }
    let devices: Vec<Device> = std::iter::repeat_with(test_device).take(count).collect();
    Replicas::new(lead, &devices)
}

/// A row with `targets` tokens of loss at its end, of weight 1.
fn row(length: usize, targets: usize, seed: u64) -> (Vec<u32>, Vec<f32>) {
    let weights = (0..length).map(|i| f32::from(i + targets >= length)).collect();
    (tiny_ids(length, seed), weights)
}

/// The outcome of one step on `batches`, and the norm of its gradient.
fn step(replicas: &mut Replicas, batches: &[Batch], step: u64) -> (BatchOutcome, f64) {
    let scale = 1.0 / batches.iter().map(Batch::total_weight).sum::<f64>();
    // In turn, so that each replica has one.
    let owners: Vec<usize> = (0..batches.len()).map(|index| index % replicas.count()).collect();
    let outcomes = replicas.accumulate(&owners, |model, micro_batch| {
        let key = DropoutKey { seed: 3, step, micro_batch: micro_batch as u64 };
        model.forward_backward(&batches[micro_batch], scale, key)
    });
    let mut sum = BatchOutcome::default();
    outcomes.unwrap().into_iter().for_each(|outcome| sum += outcome);
    let params = AdamWParams { learning_rate: 1e-2, ..AdamWParams::default() };
    let norm = replicas.update(|model| model.optimizer_step(&params, Some(1.0))).unwrap();
    (sum, norm)
}

fn adapters() -> [AdapterConfig; 2] {
    let lora = AdapterConfig { r: 3, alpha: 6.0, dropout: 0.1, ..AdapterConfig::default() };
    [lora, AdapterConfig::full()]
}

fn tensors(replicas: &Replicas) -> Vec<NamedTensor> {
    replicas.trainable_tensors().unwrap()
}

#[test]
fn shards_of_3_and_of_30_target_tokens_equal_one_device() {
    for adapter in adapters() {
        let batches = [pack(&[row(40, 3, 1)]), pack(&[row(40, 30, 2)])];
        let (mut one, mut two) = (replicas(&adapter, 1), replicas(&adapter, 2));
        for number in 0..4 {
            let (alone, norm_alone) = step(&mut one, &batches, number);
            let (shared, norm_shared) = step(&mut two, &batches, number);
            assert_eq!(alone.weight, 33.0);
            let loss = |outcome: BatchOutcome| outcome.weighted_nll / outcome.weight;
            assert!((loss(alone) - loss(shared)).abs() < 1e-6, "{alone:?} {shared:?}");
            assert!((norm_alone / norm_shared - 1.0).abs() < 1e-5, "{norm_alone} {norm_shared}");
        }
    }
}

#[test]
fn three_replicas_of_five_micro_batches_equal_one_device() {
    for adapter in adapters() {
        let rows = [row(9, 4, 1), row(30, 2, 2), row(5, 4, 3), row(17, 16, 4), row(2, 1, 5)];
        let batches: Vec<Batch> = rows.iter().map(|row| pack(std::slice::from_ref(row))).collect();
        let (mut one, mut three) = (replicas(&adapter, 1), replicas(&adapter, 3));
        for number in 0..3 {
            let (alone, _) = step(&mut one, &batches, number);
            let (shared, _) = step(&mut three, &batches, number);
            assert!((alone.weighted_nll - shared.weighted_nll).abs() < 1e-5, "step {number}");
            assert_eq!(alone.weight, shared.weight);
        }
    }
}

#[test]
fn replicas_stay_equal_bit_for_bit_and_two_equal_runs_are_equal() {
    for adapter in adapters() {
        let batches = [pack(&[row(9, 4, 1), row(5, 4, 3)]), pack(&[row(30, 2, 2)])];
        let (mut a, mut b) = (replicas(&adapter, 2), replicas(&adapter, 2));
        let start = tensors(&a);
        for number in 0..3 {
            assert_eq!(step(&mut a, &batches, number), step(&mut b, &batches, number));
        }
        assert_ne!(tensors(&a), start);
        assert_eq!(tensors(&a), tensors(&b));
        for replica in a.each() {
            assert_eq!(replica.trainable_tensors().unwrap(), tensors(&a));
        }
    }
}

#[test]
fn a_share_that_fails_names_its_micro_batch_and_the_others_keep_their_gradients() {
    let mut replicas = replicas(&AdapterConfig::full(), 2);
    let batches = [pack(&[row(9, 4, 1)]), pack(&[row(5, 0, 2)])];
    let result = replicas.accumulate(&[0, 1], |model, micro_batch| {
        model.forward_backward(&batches[micro_batch], 1.0, DropoutKey::default())
    });
    let (micro_batch, error) = result.unwrap_err();
    assert_eq!(micro_batch, 1);
    assert!(error.to_string().contains("no token with loss"), "{error}");
    // What the other replica computed is with the lead.
    assert!(replicas.update(|model| model.optimizer_step(&AdamWParams::default(), None)).is_ok());
}
