//! What a GPU computes, on the CPU: a part of this suite with the portable forms.

use crate::rerun::rerun;

const PART: [&str; 7] = [
    "training::training_lowers_the_loss",
    "training::accumulated_micro_batches_equal_one_batch_and_so_do_passes_of_any_size",
    "resume::lora_with_dropout_goes_on_bit_equal_in_the_middle_of_an_epoch",
    "resume::full_fine_tuning_goes_on_bit_equal_in_the_middle_of_an_epoch",
    "parallel::a_lora_run_on_two_devices_equals_one_on_one_device",
    "verdicts::a_run_that_goes_back_tells_of_it_and_takes_the_last_checkpoint_at_half_the_rate",
    "verdicts::a_run_that_diverges_whatever_the_rate_fails_after_three_times",
];

#[test]
fn the_portable_forms_pass_the_trainers_suite_on_the_cpu() {
    rerun(&PART, &[("TUNESMITH_TEST_DEVICE", "portable")]);
}
