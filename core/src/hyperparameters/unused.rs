//! Values that are allowed and change nothing beside the others.

use super::{AdapterConfig, AdapterType, Auto, Hyperparameters, LrScheduler, Optimizer};

/// A sentence for each. Of an adapter's values those that are as by default may not have been given.
pub(super) fn warnings(asked: &Hyperparameters) -> Vec<String> {
    let scheduler = asked.lr_scheduler.unwrap_or_else(LrScheduler::default);
    let optimizer = asked.optimizer.unwrap_or_else(Optimizer::default);
    let is_adafactor = optimizer == Optimizer::Adafactor;
    let of_adamw = "adafactor has no such number, only adamw and muon do";
    let (adapter, usual) = (&asked.adapter, AdapterConfig::full());
    let is_full = adapter.kind == AdapterType::Full;
    let no_adapter = "\"type\": \"full\" has no adapter";
    let unused = [
        (
            "decay_ratio",
            is_given(asked.decay_ratio) && scheduler != LrScheduler::Wsd,
            "only lr_scheduler \"wsd\" has it",
        ),
        (
            "min_lr_ratio",
            is_positive(asked.min_lr_ratio) && scheduler == LrScheduler::Constant,
            "lr_scheduler \"constant\" does not fall",
        ),
        (
            "muon_adjust_lr_fn",
            is_given(asked.muon_adjust_lr_fn) && optimizer != Optimizer::Muon,
            "only optimizer \"muon\" has it",
        ),
        ("adam_beta1", is_given(asked.adam_beta1) && is_adafactor, of_adamw),
        ("adam_beta2", is_given(asked.adam_beta2) && is_adafactor, of_adamw),
        ("adam_epsilon", is_given(asked.adam_epsilon) && is_adafactor, of_adamw),
        (
            "early_stopping_threshold",
            is_positive(asked.early_stopping_threshold)
                && asked.early_stopping_patience.unwrap_or_else(|| 0) == 0,
            "without early_stopping_patience no run stops early",
        ),
        ("adapter.r", is_full && adapter.r != usual.r, no_adapter),
        ("adapter.alpha", is_full && adapter.alpha != usual.alpha, no_adapter),
        ("adapter.dropout", is_full && adapter.dropout != usual.dropout, no_adapter),
        (
            "adapter.target_modules",
            is_full && adapter.target_modules != usual.target_modules,
            no_adapter,
        ),
        ("adapter.use_rslora", is_full && adapter.use_rslora, no_adapter),
    ];
    let unused = unused.into_iter().filter(|(_, is_unused, _)| *is_unused);
    unused
        .map(|(name, _, reason)| format!("The hyperparameter '{name}' has no effect: {reason}."))
        .collect()
}

fn is_given<T>(value: Auto<T>) -> bool {
    matches!(value, Auto::Value(_))
}

fn is_positive(value: Auto<f64>) -> bool {
    matches!(value, Auto::Value(number) if number > 0.0)
}
