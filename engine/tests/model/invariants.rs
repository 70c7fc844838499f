//! What must hold of any model in training, on a tiny one with random weights.

use serde_json::json;
use tunesmith_core::dataset::TokenizedRow;
use tunesmith_core::hyperparameters::{AdapterConfig, TARGET_MODULES};
use tunesmith_engine::data::batching::Batching;
use tunesmith_engine::{AdamWParams, Batch, DropoutKey, EngineError, NamedTensor, TrainableModel};

use crate::device::test_device;
use crate::support::{
    model_dir, pack, stir_adapter, tiny_config, tiny_ids, tiny_model, tiny_tensors,
};

const KEY: DropoutKey = DropoutKey { seed: 3, step: 0, micro_batch: 0 };

fn lora() -> AdapterConfig {
    AdapterConfig { r: 3, alpha: 6.0, ..AdapterConfig::default() }
}

fn lora_with_dropout() -> AdapterConfig {
    AdapterConfig { dropout: 0.2, ..lora() }
}

fn stirred_model(adapter: &AdapterConfig) -> TrainableModel {
    let mut model = tiny_model(adapter);
    if *adapter != AdapterConfig::full() {
        stir_adapter(&mut model);
    }
    model
}

type Row = (Vec<u32>, Vec<f32>);

/// Three rows with target weights 0, 0.1 and 1; the middle one is a single token.
fn rows() -> [Row; 3] {
    let row = |length, seed| {
        let weights = (0..length).map(|i| [0.1, 1.0, 0.0, 1.0][i % 4]).collect();
        (tiny_ids(length, seed), weights)
    };
    [row(9, 1), row(1, 2), row(14, 3)]
}

fn learning_rate(learning_rate: f64) -> AdamWParams {
    AdamWParams { learning_rate, ..AdamWParams::default() }
}

/// The accumulated gradients of all trainable tensors, which are cleared. They are read from the
/// first moments after a first update without any step size, which are 0.1 times the gradients.
fn gradients(mut model: TrainableModel) -> Vec<NamedTensor> {
    model.optimizer_step(&learning_rate(0.0), None).unwrap();
    let mut tensors = model.optimizer_tensors().unwrap().tensors;
    tensors.retain(|tensor| tensor.name.starts_with("exp_avg."));
    for tensor in &mut tensors {
        tensor.data.iter_mut().for_each(|value| *value *= 10.0);
    }
    tensors
}

fn assert_close(a: &[NamedTensor], b: &[NamedTensor]) {
    assert_eq!(a.len(), b.len());
    for (a, b) in a.iter().zip(b) {
        assert_eq!((&a.name, &a.shape), (&b.name, &b.shape));
        let greatest = b.data.iter().fold(0f32, |m, x| m.max(x.abs()));
        assert!(greatest > 0.0, "{} has no gradient", a.name);
        for (x, y) in a.data.iter().zip(&b.data) {
            assert!((x - y).abs() <= 2e-5 * greatest, "{}: {x} {y}", a.name);
        }
    }
}

#[test]
fn packed_loss_of_each_document_equals_its_loss_alone() {
    let model = stirred_model(&lora());
    let rows = rows();
    for target in [0, 2] {
        let alone = model.evaluate(&pack(&rows[target..=target])).unwrap();
        // All three, but only one with loss.
        let mut packed = rows.clone();
        for (i, (_, weights)) in packed.iter_mut().enumerate() {
            if i != target {
                weights.fill(0.0);
            }
        }
        for order in [[0, 1, 2], [2, 0, 1], [1, 2, 0]] {
            let outcome = model.evaluate(&pack(&order.map(|i| packed[i].clone()))).unwrap();
            assert_eq!(outcome.weight, alone.weight);
            let difference = outcome.weighted_nll - alone.weighted_nll;
            assert!(difference.abs() < 1e-5, "row {target} in {order:?}: {difference:e}");
        }
    }
}

#[test]
fn first_weight_of_a_segment_counts_for_nothing() {
    let model = stirred_model(&lora());
    let outcome = model.evaluate(&pack(&rows())).unwrap();
    let mut rows = rows();
    rows.iter_mut().for_each(|(_, weights)| weights[0] = 1e6);
    assert_eq!(model.evaluate(&pack(&rows)).unwrap(), outcome);
}

#[test]
fn loss_of_each_row_of_a_pass_equals_its_loss_alone_shared_beginning_or_not() {
    let beginning = tiny_ids(20, 9);
    let own = [tiny_ids(7, 1), tiny_ids(1, 2), tiny_ids(12, 3)];
    let alike = own.into_iter().map(|own| [beginning.clone(), own].concat());
    let rows: Vec<TokenizedRow> = alike
        .chain([tiny_ids(9, 4), tiny_ids(14, 5)])
        .enumerate()
        .map(|(line, ids)| {
            let weights = (0..ids.len()).map(|i| [0.1, 1.0, 0.0][(i + line) % 3]).collect();
            TokenizedRow { line, ids, weights, starts: vec![0], truncated: false }
        })
        .collect();
    let order = [3, 0, 2, 4, 1];
    for (share_prefixes, gradient_checkpointing) in [(true, false), (false, false), (true, true)] {
        let mut model = stirred_model(&lora());
        model.set_gradient_checkpointing(gradient_checkpointing);
        let batching =
            Batching { batch_size: 8, packing: true, share_prefixes, tokens_per_pass: 1000 };
        let [batch] = &batching.micro_batches(&rows, &order)[..] else { panic!("one pass") };
        let (outcome, nll) = model.forward_backward_with_nll(batch, 1.0, KEY).unwrap();
        let sums = batch.row_sums(&nll, |row, ids| rows[row].weights_of(ids));
        assert_eq!(sums.len(), rows.len());
        let mut sum = 0.0;
        for (row, weighted_nll, weight) in sums {
            let loss = weighted_nll / weight;
            let TokenizedRow { ids, weights, .. } = rows[row].clone();
            let alone = model.evaluate(&pack(&[(ids, weights)])).unwrap();
            let expected = alone.weighted_nll / alone.weight;
            assert!((loss - expected).abs() < 1e-5 * expected, "row {row}: {loss} {expected}");
            sum += weighted_nll;
        }
        assert!((sum - outcome.weighted_nll).abs() < 1e-5 * sum, "{sum} {}", outcome.weighted_nll);
    }
}

#[test]
fn rows_that_share_their_beginning_have_the_loss_and_gradient_of_rows_apart() {
    let beginning = tiny_ids(20, 9);
    let row = |(line, own): (usize, Vec<u32>)| {
        let ids = [beginning.clone(), own].concat();
        let weights = (0..ids.len()).map(|i| [0.1, 1.0, 0.0][(i + line) % 3]).collect();
        TokenizedRow { line, ids, weights, starts: vec![0], truncated: false }
    };
    let own = [tiny_ids(7, 1), tiny_ids(1, 2), tiny_ids(12, 3)];
    let rows: Vec<TokenizedRow> = own.into_iter().enumerate().map(row).collect();
    let batches = |share_prefixes| {
        let batching =
            Batching { batch_size: 8, packing: true, share_prefixes, tokens_per_pass: 1000 };
        batching.micro_batches(&rows, &[0, 1, 2])
    };
    let (shared, apart) = (batches(true), batches(false));
    assert_eq!((shared[0].tokens(), apart[0].tokens()), (40, 80));
    let scale = 1.0 / apart[0].total_weight();
    for adapter in [lora(), AdapterConfig::full()] {
        let mut together = stirred_model(&adapter);
        let a = together.forward_backward(&shared[0], scale, KEY).unwrap();
        let mut one_by_one = stirred_model(&adapter);
        let b = one_by_one.forward_backward(&apart[0], scale, KEY).unwrap();
        for (a, b) in [
            (a.weighted_nll, b.weighted_nll),
            (a.weight, b.weight),
            (a.weighted_correct, b.weighted_correct),
        ] {
            assert!((a - b).abs() < 1e-6 * b.abs() + 1e-5, "{a} {b}");
        }
        assert_close(&gradients(together), &gradients(one_by_one));
    }
}

#[test]
fn layers_computed_again_give_the_same_bits() {
    let [a, b, c] = rows();
    let batches = [pack(&[a, b]), pack(&[c])];
    let last_layer = |adapter| AdapterConfig { trainable_layers: 1, ..adapter };
    for adapter in [
        lora(),
        lora_with_dropout(),
        AdapterConfig { use_dora: true, ..lora_with_dropout() },
        AdapterConfig::full(),
        last_layer(lora_with_dropout()),
        last_layer(AdapterConfig::full()),
    ] {
        let gradients = [false, true].map(|recompute| {
            let mut model = stirred_model(&adapter);
            model.set_gradient_checkpointing(recompute);
            let outcomes =
                batches.each_ref().map(|batch| model.forward_backward(batch, 0.1, KEY).unwrap());
            (outcomes, gradients(model))
        });
        assert_eq!(gradients[0], gradients[1], "{adapter:?}");
    }
}

#[test]
fn two_micro_batches_have_the_gradient_of_one_batch() {
    for adapter in [lora(), AdapterConfig::full()] {
        let [a, b, c] = rows();
        let whole = pack(&[a.clone(), b.clone(), c.clone()]);
        let scale = 1.0 / whole.total_weight();
        let mut at_once = stirred_model(&adapter);
        at_once.forward_backward(&whole, scale, KEY).unwrap();
        let mut in_parts = stirred_model(&adapter);
        in_parts.forward_backward(&pack(&[a, b]), scale, KEY).unwrap();
        in_parts.forward_backward(&pack(&[c]), scale, KEY).unwrap();
        assert_close(&gradients(in_parts), &gradients(at_once));
    }
}

/// Along its own gradient g, a loss changes at the rate |g|².
fn assert_gradient_is_the_slope(adapter: &AdapterConfig, key: DropoutKey) {
    let batch = pack(&rows());
    let scale = 1.0 / batch.total_weight();
    let mut model = stirred_model(adapter);
    let start = model.trainable_tensors().unwrap();
    model.forward_backward(&batch, scale, key).unwrap();
    let gradients = gradients(model);
    let squares: f64 = gradients.iter().flat_map(|g| &g.data).map(|&g| f64::from(g).powi(2)).sum();

    let step = 2e-3 / squares.sqrt();
    let loss_at = |distance: f64| {
        let moved = start
            .iter()
            .zip(&gradients)
            .map(|(tensor, gradient)| {
                let moved = tensor.data.iter().zip(&gradient.data);
                let data = moved.map(|(x, g)| x + (distance * f64::from(*g)) as f32).collect();
                NamedTensor { data, ..tensor.clone() }
            })
            .collect();
        let mut model = stirred_model(adapter);
        model.load_trainable_tensors(moved).unwrap();
        // The forward pass of training, so that dropout is in it.
        model.forward_backward(&batch, scale, key).unwrap().weighted_nll * scale
    };
    let slope = (loss_at(step) - loss_at(-step)) / (2.0 * step);
    assert!((slope / squares - 1.0).abs() < 2e-3, "slope {slope}, |g|² {squares}");
}

#[test]
fn gradient_with_weights_0_and_a_tenth_and_1_is_the_slope_of_the_loss() {
    assert_gradient_is_the_slope(&lora(), KEY);
}

#[test]
fn gradient_under_dropout_is_the_slope_of_the_loss() {
    assert_gradient_is_the_slope(&lora_with_dropout(), KEY);
}

#[test]
fn gradient_of_all_weights_with_a_tied_head_is_the_slope_of_the_loss() {
    assert_gradient_is_the_slope(&AdapterConfig::full(), KEY);
}

/// `steps` updates of two micro-batches each, from step `first` on; the losses.
fn train(model: &mut TrainableModel, first: u64, steps: u64) -> Vec<f64> {
    let rows = rows();
    let mut losses = Vec::new();
    for step in first..first + steps {
        for (micro_batch, rows) in [&rows[..2], &rows[2..]].into_iter().enumerate() {
            let key = DropoutKey { seed: 3, step, micro_batch: micro_batch as u64 };
            let outcome = model.forward_backward(&pack(rows), 0.05, key).unwrap();
            losses.push(outcome.weighted_nll);
        }
        let params = AdamWParams { weight_decay: 0.1, ..learning_rate(1e-2) };
        losses.push(model.optimizer_step(&params, Some(0.5)).unwrap());
    }
    losses
}

#[test]
fn two_equal_runs_are_equal_bit_for_bit() {
    for adapter in [lora_with_dropout(), AdapterConfig::full()] {
        let (mut a, mut b) = (tiny_model(&adapter), tiny_model(&adapter));
        assert_eq!(train(&mut a, 0, 4), train(&mut b, 0, 4));
        assert_eq!(a.trainable_tensors().unwrap(), b.trainable_tensors().unwrap());
    }
}

#[test]
fn resumed_run_equals_the_straight_one_bit_for_bit() {
    for adapter in [lora_with_dropout(), AdapterConfig::full()] {
        let mut straight = tiny_model(&adapter);
        let mut losses = train(&mut straight, 0, 5);

        let mut before = tiny_model(&adapter);
        train(&mut before, 0, 2);
        let mut after = tiny_model(&adapter);
        after.load_trainable_tensors(before.trainable_tensors().unwrap()).unwrap();
        after.load_optimizer_tensors(before.optimizer_tensors().unwrap()).unwrap();
        assert_eq!(train(&mut after, 2, 3), losses.split_off(2 * 3));
        assert_eq!(after.trainable_tensors().unwrap(), straight.trainable_tensors().unwrap());
        assert_eq!(after.optimizer_tensors().unwrap(), straight.optimizer_tensors().unwrap());
    }
}

#[test]
fn dropout_acts_in_training_only_and_differs_from_step_to_step() {
    let mut model = stirred_model(&lora_with_dropout());
    let batch = pack(&rows());
    let plain = stirred_model(&lora()).evaluate(&batch).unwrap();
    assert_eq!(model.evaluate(&batch).unwrap(), plain);
    let first = model.forward_backward(&batch, 1.0, KEY).unwrap();
    let second = model.forward_backward(&batch, 1.0, DropoutKey { step: 1, ..KEY }).unwrap();
    assert_ne!(first, plain);
    assert_ne!(first, second);
}

#[test]
fn clipping_scales_the_gradient_to_the_limit_and_reports_the_norm_before() {
    let batch = pack(&rows());
    let step = |limit| {
        let mut model = stirred_model(&lora());
        model.forward_backward(&batch, 1.0, KEY).unwrap();
        let norm = model.optimizer_step(&learning_rate(0.0), limit).unwrap();
        let moments = model.optimizer_tensors().unwrap().tensors;
        let squares: f64 = moments
            .iter()
            .filter(|tensor| tensor.name.starts_with("exp_avg."))
            .flat_map(|tensor| &tensor.data)
            .map(|&m| (10.0 * f64::from(m)).powi(2))
            .sum();
        (norm, squares.sqrt())
    };
    let (norm, used) = step(None);
    assert!((used / norm - 1.0).abs() < 1e-5, "{used} {norm}");
    let (reported, used) = step(Some(norm / 4.0));
    assert_eq!(reported, norm);
    assert!((used / (norm / 4.0) - 1.0).abs() < 1e-5, "{used} {norm}");
    assert_eq!(step(Some(norm * 2.0)), step(None));
}

#[test]
fn weight_decay_shrinks_every_trainable_tensor() {
    let mut model = tiny_model(&AdapterConfig::full());
    let before = model.trainable_tensors().unwrap();
    // Betas of 0 and a huge ε leave nothing of the gradient's own step.
    let params = AdamWParams {
        learning_rate: 0.1,
        epsilon: 1e12,
        weight_decay: 0.5,
        ..AdamWParams::default()
    };
    model.forward_backward(&pack(&rows()), 1.0, KEY).unwrap();
    model.optimizer_step(&params, None).unwrap();
    for (after, before) in model.trainable_tensors().unwrap().iter().zip(&before) {
        for (after, before) in after.data.iter().zip(&before.data) {
            assert!((after - before * 0.95).abs() < 1e-6);
        }
    }
}

#[test]
fn copy_task_is_learned_to_a_loss_of_0() {
    let mut model = tiny_model(&AdapterConfig::full());
    let ids: Vec<u32> = (0..24).map(|i| [5, 17, 60, 99, 2, 41, 33, 8][i % 8]).collect();
    let batch = Batch::single(&ids);
    let mut loss = f64::INFINITY;
    for step in 0..60 {
        let key = DropoutKey { step, ..KEY };
        let outcome = model.forward_backward(&batch, 1.0 / 23.0, key).unwrap();
        loss = outcome.weighted_nll / outcome.weight;
        model.optimizer_step(&learning_rate(1e-2), Some(1.0)).unwrap();
    }
    assert!(loss < 0.01, "{loss}");
    let outcome = model.evaluate(&batch).unwrap();
    assert_eq!(outcome.weighted_correct, outcome.weight);
    assert_eq!(model.generate_greedy(&ids[..8], 8, &[]).unwrap(), ids[..8]);
}

#[test]
fn adapter_starts_as_the_base_model() {
    let batch = pack(&rows());
    let base = tiny_model(&AdapterConfig::full()).evaluate(&batch).unwrap();
    assert_eq!(tiny_model(&lora()).evaluate(&batch).unwrap(), base);
}

#[test]
fn adapter_of_any_single_projection_trains() {
    for (module, target) in TARGET_MODULES.iter().enumerate() {
        let adapter = AdapterConfig { target_modules: vec![(*target).to_owned()], ..lora() };
        let mut model = stirred_model(&adapter);
        model.forward_backward(&pack(&rows()), 1.0, KEY).unwrap();
        let gradients = gradients(model);
        assert_eq!(gradients.len(), 4, "A and B in two layers");
        for gradient in gradients {
            let block = if module < 4 { "self_attn" } else { "mlp" };
            assert!(
                gradient.name.contains(&format!("{block}.{target}.lora_")),
                "{}",
                gradient.name
            );
            assert!(gradient.data.iter().any(|&g| g != 0.0), "{}", gradient.name);
        }
    }
}

#[test]
fn loss_that_is_not_finite_is_an_error_and_leaves_the_gradients() {
    let mut model = stirred_model(&lora());
    let batch = pack(&rows());
    model.forward_backward(&batch, 1.0, KEY).unwrap();
    let sound = model.trainable_tensors().unwrap();
    let mut broken = sound.clone();
    broken[0].data[0] = f32::NAN;
    model.load_trainable_tensors(broken).unwrap();
    let error = model.forward_backward(&batch, 1.0, KEY).unwrap_err();
    assert!(matches!(error, EngineError::Numeric(_)), "{error}");
    assert!(error.to_string().contains("[0, 1, 2]"), "names the rows: {error}");
    assert!(model.evaluate(&batch).is_err());
    model.load_trainable_tensors(sound).unwrap();
    let mut expected = stirred_model(&lora());
    expected.forward_backward(&batch, 1.0, KEY).unwrap();
    assert_eq!(gradients(model), gradients(expected));
}

#[test]
fn gradient_norm_that_is_not_finite_is_an_error_and_changes_nothing() {
    let mut model = stirred_model(&lora());
    let before = model.trainable_tensors().unwrap();
    model.forward_backward(&pack(&rows()), f64::MAX, KEY).unwrap();
    let error = model.optimizer_step(&learning_rate(1e-3), Some(1.0)).unwrap_err();
    assert!(matches!(error, EngineError::Numeric(_)), "{error}");
    assert_eq!(model.trainable_tensors().unwrap(), before);
}

#[test]
fn update_without_a_gradient_is_an_error() {
    let error = tiny_model(&lora()).optimizer_step(&learning_rate(1e-3), None).unwrap_err();
    assert!(error.to_string().contains("no gradient"), "{error}");
}

#[test]
fn batch_without_a_target_or_with_an_unknown_id_is_refused() {
    let mut model = tiny_model(&lora());
    let nothing = pack(&[(tiny_ids(5, 1), vec![0.0; 5])]);
    let unknown = pack(&[(vec![1, 101, 2], vec![1.0; 3])]);
    for (batch, word) in [(nothing, "no token with loss"), (unknown, "101")] {
        let error = model.forward_backward(&batch, 1.0, KEY).unwrap_err();
        assert!(matches!(error, EngineError::Data(_)));
        assert!(error.to_string().contains(word), "{error}");
        assert!(model.evaluate(&batch).is_err());
    }
}

#[test]
fn generation_with_a_cache_gives_the_logits_of_the_whole_sequence() {
    let model = stirred_model(&lora());
    let ids = tiny_ids(12, 9);
    let positions: Vec<usize> = (0..12).collect();
    let whole = model.logits(&ids, &positions).unwrap();
    let mut generation = model.generation();
    for part in [0..5, 5..6, 6..7, 7..12] {
        let last = part.end - 1;
        let logits = generation.advance(&ids[part]).unwrap();
        for (a, b) in logits.iter().zip(&whole[last]) {
            assert!((a - b).abs() < 1e-4, "{a} {b}");
        }
    }
}

#[test]
fn generation_ends_with_the_stop_token() {
    let model = stirred_model(&lora());
    let prompt = tiny_ids(6, 4);
    let free = model.generate_greedy(&prompt, 10, &[]).unwrap();
    assert_eq!(free.len(), 10);
    let stop = free[3];
    let first = free.iter().position(|&token| token == stop).unwrap();
    assert_eq!(model.generate_greedy(&prompt, 10, &[stop]).unwrap(), free[..=first]);
    assert!(model.generate_greedy(&[], 10, &[]).is_err());
}

#[test]
fn end_token_that_is_also_the_padding_token_is_still_learned() {
    let end = 17;
    let ids = [vec![3, 8, 60, end], vec![5, 41, end]];
    let batch = pack(&ids.map(|ids| (ids.clone(), vec![1.0; ids.len()])));
    let with_padding = |padding: Option<u32>| {
        let mut config = tiny_config();
        config["pad_token_id"] = json!(padding);
        let dir = model_dir(&config, &tiny_tensors(&config));
        TrainableModel::load(dir.path(), &lora(), 7, &test_device()).unwrap()
    };
    let outcome = with_padding(Some(end)).evaluate(&batch).unwrap();
    assert_eq!(outcome.weight, 5.0, "three targets and two, both ends among them");
    assert_eq!(outcome, with_padding(None).evaluate(&batch).unwrap());
}
