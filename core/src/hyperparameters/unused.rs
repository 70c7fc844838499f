//! Values that are allowed and change nothing beside the others.

use super::{AdapterConfig, AdapterType, Auto, Hyperparameters, LrScheduler, Optimizer};

/// A sentence for each.
pub(super) fn warnings(asked: &Hyperparameters) -> Vec<String> {
    let scheduler = asked.lr_scheduler.unwrap_or_else(LrScheduler::default);
    let optimizer = asked.optimizer.unwrap_or_else(Optimizer::default);
    let of_adamw = "adafactor has no such number, only adamw and muon do";
    let named = [
        (
            "decay_ratio",
            is_given(asked.decay_ratio) && scheduler != LrScheduler::Wsd,
            "only lr_scheduler \"wsd\" has it",
        ),
        (
            "min_lr_ratio",
            matches!(asked.min_lr_ratio, Auto::Value(ratio) if ratio > 0.0)
                && scheduler == LrScheduler::Constant,
            "lr_scheduler \"constant\" does not fall",
        ),
        (
            "muon_adjust_lr_fn",
            is_given(asked.muon_adjust_lr_fn) && optimizer != Optimizer::Muon,
            "only optimizer \"muon\" has it",
        ),
        ("adam_beta1", is_given(asked.adam_beta1) && optimizer == Optimizer::Adafactor, of_adamw),
        ("adam_beta2", is_given(asked.adam_beta2) && optimizer == Optimizer::Adafactor, of_adamw),
        (
            "adam_epsilon",
            is_given(asked.adam_epsilon) && optimizer == Optimizer::Adafactor,
            of_adamw,
        ),
        (
            "early_stopping_threshold",
            matches!(asked.early_stopping_threshold, Auto::Value(least) if least > 0.0)
                && asked.early_stopping_patience.unwrap_or_else(|| 0) == 0,
            "without early_stopping_patience no run stops early",
        ),
    ];
    let of_the_run = named.into_iter().filter(|(_, is_unused, _)| *is_unused);
    of_the_run
        .map(|(name, _, reason)| (name.to_owned(), reason))
        .chain(of_an_adapter(&asked.adapter))
        .map(|(name, reason)| format!("The hyperparameter '{name}' has no effect: {reason}."))
        .collect()
}

/// What stands beside full fine-tuning and shapes an adapter. Values that are as by default may not
/// have been given.
fn of_an_adapter(asked: &AdapterConfig) -> Vec<(String, &'static str)> {
    if asked.kind != AdapterType::Full {
        return Vec::new();
    }
    let usual = AdapterConfig::full();
    let differing = [
        ("r", asked.r != usual.r),
        ("alpha", asked.alpha != usual.alpha),
        ("dropout", asked.dropout != usual.dropout),
        ("target_modules", asked.target_modules != usual.target_modules),
        ("use_rslora", asked.use_rslora),
    ];
    let differing = differing.into_iter().filter(|(_, differs)| *differs);
    differing
        .map(|(name, _)| (format!("adapter.{name}"), "\"type\": \"full\" has no adapter"))
        .collect()
}

fn is_given<T>(value: Auto<T>) -> bool {
    matches!(value, Auto::Value(_))
}
