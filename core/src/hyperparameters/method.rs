//! The training methods, and what only some of them have.

use super::{Auto, Hyperparameters};
use crate::errors::{ApiError, ErrorCode};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::fmt;

/// What a job learns from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Method {
    /// Examples of what to write.
    #[default]
    Supervised,
    /// Pairs of a preferred and a less preferred answer.
    Dpo,
}

impl Method {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::Supervised, Self::Dpo];

    /// The word on the wire and in the database.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Supervised => "supervised",
            Self::Dpo => "dpo",
        }
    }

    /// The method that `word` names.
    #[must_use]
    pub fn parse(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|method| method.as_str() == word)
    }
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What is minimised over pairs of answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum PreferenceLoss {
    /// Direct preference optimisation (Rafailov et al. 2023): against the base model.
    #[default]
    Dpo,
    /// Odds-ratio preference optimisation (Hong et al. 2024): beside the loss of the preferred
    /// answers, without a reference.
    Orpo,
    /// Simple preference optimisation (Meng et al. 2024): by mean log-probability, without a
    /// reference.
    Simpo,
}

impl PreferenceLoss {
    /// Whether it compares with the model as it was before training.
    #[must_use]
    pub fn has_reference(self) -> bool {
        self == Self::Dpo
    }

    /// `beta` by `"auto"`: OpenAI's and TRL's 0.1 for DPO and for ORPO (λ in the paper); for
    /// SimPO, whose log-probabilities are means over tokens and so much smaller, the paper's 2.
    #[must_use]
    pub fn default_beta(self) -> f64 {
        match self {
            Self::Dpo | Self::Orpo => 0.1,
            Self::Simpo => 2.0,
        }
    }
}

/// γ of SimPO by `"auto"`: TRL's.
pub(super) const DEFAULT_SIMPO_GAMMA: f64 = 0.5;

/// The hyperparameters that only preference pairs have.
pub(super) const PREFERENCE_NAMES: [&str; 3] = ["beta", "preference_loss", "simpo_gamma"];

/// Refuses what stands beside a preference loss and means nothing there.
pub(super) fn check(asked: &Hyperparameters, path: &str) -> Result<(), ApiError> {
    if asked.method == Method::Supervised {
        return Ok(());
    }
    let loss = asked.preference_loss.unwrap_or_else(PreferenceLoss::default);
    if let Auto::Value(gamma) = asked.simpo_gamma
        && loss != PreferenceLoss::Simpo
    {
        let rule = format!("{gamma}. Only preference_loss \"simpo\" has it: leave it out.");
        return Err(refused(path, "simpo_gamma", rule));
    }
    if let Auto::Value(weight) = asked.prompt_loss_weight
        && weight > 0.0
        && loss != PreferenceLoss::Orpo
    {
        let rule = format!(
            "{weight}. Preference pairs are compared by their answers alone: leave it out. Only \
             preference_loss \"orpo\" can learn the prompt too."
        );
        return Err(refused(path, "prompt_loss_weight", rule));
    }
    Ok(())
}

fn refused(path: &str, name: &str, rule: String) -> ApiError {
    ApiError::new(ErrorCode::InvalidValue, format!("Invalid value for '{name}': {rule}"))
        .with_param(format!("{path}.{name}"))
}
