//! What a GPU computes, on the CPU: a part of this suite with the portable forms.
//!
//! `TUNESMITH_TEST_DEVICE=portable` runs all of it; that takes minutes.

use crate::rerun::rerun;

/// Everything on tiny models that touches an operation, and SmolLM2 forwards.
const PART: [&str; 21] = [
    "adapters::pissa_starts_and_learns_as_in_peft",
    "adapters::dora_follows_peft_to_the_same_adapter",
    "adapters::last_layers_and_final_norm_alone_follow_pytorch",
    "invariants::packed_loss_of_each_document_equals_its_loss_alone",
    "invariants::two_micro_batches_have_the_gradient_of_one_batch",
    "invariants::gradient_with_weights_0_and_a_tenth_and_1_is_the_slope_of_the_loss",
    "invariants::gradient_under_dropout_is_the_slope_of_the_loss",
    "invariants::gradient_of_all_weights_with_a_tied_head_is_the_slope_of_the_loss",
    "invariants::two_equal_runs_are_equal_bit_for_bit",
    "invariants::resumed_run_equals_the_straight_one_bit_for_bit",
    "invariants::clipping_scales_the_gradient_to_the_limit_and_reports_the_norm_before",
    "invariants::weight_decay_shrinks_every_trainable_tensor",
    "invariants::copy_task_is_learned_to_a_loss_of_0",
    "invariants::adapter_of_any_single_projection_trains",
    "invariants::loss_that_is_not_finite_is_an_error_and_leaves_the_gradients",
    "invariants::gradient_norm_that_is_not_finite_is_an_error_and_changes_nothing",
    "invariants::generation_with_a_cache_gives_the_logits_of_the_whole_sequence",
    "invariants::generation_ends_with_the_stop_token",
    "parallel::shards_of_3_and_of_30_target_tokens_equal_one_device",
    "parallel::replicas_stay_equal_bit_for_bit_and_two_equal_runs_are_equal",
    "reference::logits_of_three_prompts_equal_pytorch",
];

#[test]
fn the_portable_forms_pass_the_models_suite_on_the_cpu() {
    rerun(&PART, &[("TUNESMITH_TEST_DEVICE", "portable")]);
}
