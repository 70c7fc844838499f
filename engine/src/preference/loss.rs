//! The loss of one pair of answers, and its slope.
//!
//! With πᵂ and πᴸ for Σ log p of the preferred and the other answer's tokens, ρ for the same under
//! the reference, and n for their number:
//!
//! ```text
//! DPO    −log σ(β·((πᵂ − ρᵂ) − (πᴸ − ρᴸ)))                        (Rafailov et al. 2023, eq. 7)
//! SimPO  −log σ(β·(πᵂ/nᵂ − πᴸ/nᴸ) − γ)                            (Meng et al. 2024, eq. 6)
//! ORPO   −β·log σ(log odds(e^(πᵂ/nᵂ)) − log odds(e^(πᴸ/nᴸ)))      (Hong et al. 2024, eq. 7)
//!        where odds(p) = p / (1 − p); the preferred answer's own loss comes beside it
//! ```
//!
//! A step's loss is the mean over its pairs.

use tunesmith_core::hyperparameters::{PreferenceLoss, ResolvedHyperparameters};

/// What is minimised.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Objective {
    /// Which of the losses.
    pub loss: PreferenceLoss,
    /// β.
    pub beta: f64,
    /// γ of SimPO.
    pub simpo_gamma: f64,
    /// Weight of a prompt token's loss beside the preferred answer's, for ORPO.
    pub prompt_loss_weight: f32,
}

impl From<&ResolvedHyperparameters> for Objective {
    fn from(hyperparameters: &ResolvedHyperparameters) -> Self {
        Self {
            loss: hyperparameters.preference_loss,
            beta: hyperparameters.beta,
            simpo_gamma: hyperparameters.simpo_gamma,
            prompt_loss_weight: hyperparameters.prompt_loss_weight as f32,
        }
    }
}

/// An answer under the model.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Answer {
    /// Σ log p of its tokens.
    pub logp: f64,
    /// Their number.
    pub tokens: usize,
}

impl Answer {
    fn mean(self) -> f64 {
        self.logp / self.tokens as f64
    }
}

/// Σ log p of both answers of a pair.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct PairLogps {
    /// The preferred one's.
    pub chosen: f64,
    /// The other one's.
    pub rejected: f64,
}

/// A pair's loss.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PairLoss {
    /// It, without ORPO's loss of the preferred answer.
    pub loss: f64,
    /// d loss / d Σ log p of the preferred answer.
    pub d_chosen: f64,
    /// d loss / d Σ log p of the other one.
    pub d_rejected: f64,
    /// The implicit reward of the preferred answer over that of the other, as TRL logs it: β times
    /// the difference of the log-probabilities, against the reference for DPO, of means over
    /// tokens for SimPO and ORPO.
    pub reward_margin: f64,
}

impl Objective {
    /// Whether the loss of the preferred answers' tokens is learned beside.
    #[must_use]
    pub fn learns_chosen(&self) -> bool {
        self.loss == PreferenceLoss::Orpo
    }

    /// The loss of a pair. `reference` counts for DPO alone.
    #[must_use]
    pub fn pair(&self, chosen: Answer, rejected: Answer, reference: PairLogps) -> PairLoss {
        let beta = self.beta;
        match self.loss {
            PreferenceLoss::Dpo => {
                let gain = chosen.logp - reference.chosen;
                let margin = beta * (gain - (rejected.logp - reference.rejected));
                let slope = beta * sigmoid(-margin);
                PairLoss {
                    loss: softplus(-margin),
                    d_chosen: -slope,
                    d_rejected: slope,
                    reward_margin: margin,
                }
            }
            PreferenceLoss::Simpo => {
                let reward_margin = beta * (chosen.mean() - rejected.mean());
                let margin = reward_margin - self.simpo_gamma;
                let slope = beta * sigmoid(-margin);
                PairLoss {
                    loss: softplus(-margin),
                    d_chosen: -slope / chosen.tokens as f64,
                    d_rejected: slope / rejected.tokens as f64,
                    reward_margin,
                }
            }
            PreferenceLoss::Orpo => {
                let (a, b) = (chosen.mean(), rejected.mean());
                // 1 − p without cancellation where p is near 1.
                let (left, right) = (-a.exp_m1(), -b.exp_m1());
                let log_odds_ratio = (a - b) - (left.ln() - right.ln());
                // σ(−ratio) = left·e / (right + left·e), and d ratio/da = 1/left: where p of the
                // preferred answer reaches 1 the one is 0 and the other infinite, their product
                // finite.
                let e = (b - a).exp();
                let slope = beta / (right + left * e);
                PairLoss {
                    loss: beta * softplus(-log_odds_ratio),
                    d_chosen: -slope * e / chosen.tokens as f64,
                    d_rejected: slope * e * left / right / rejected.tokens as f64,
                    reward_margin: beta * (a - b),
                }
            }
        }
    }
}

fn sigmoid(x: f64) -> f64 {
    if x >= 0.0 { 1.0 / (1.0 + (-x).exp()) } else { x.exp() / (1.0 + x.exp()) }
}

/// log(1 + eˣ) = −log σ(−x).
fn softplus(x: f64) -> f64 {
    x.max(0.0) + (-x.abs()).exp().ln_1p()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn objective(loss: PreferenceLoss) -> Objective {
        Objective { loss, beta: 0.3, simpo_gamma: 0.7, prompt_loss_weight: 0.0 }
    }

    const ALL: [PreferenceLoss; 3] =
        [PreferenceLoss::Dpo, PreferenceLoss::Simpo, PreferenceLoss::Orpo];

    /// Pairs around 0 and far from it.
    const PAIRS: [(f64, f64); 6] =
        [(-3.0, -5.0), (-5.0, -3.0), (-0.01, -9.0), (-40.0, -0.2), (-300.0, -20.0), (-7.0, -7.0)];
    const REFERENCE: PairLogps = PairLogps { chosen: -6.0, rejected: -4.0 };

    fn answers((chosen, rejected): (f64, f64)) -> (Answer, Answer) {
        (Answer { logp: chosen, tokens: 4 }, Answer { logp: rejected, tokens: 7 })
    }

    fn close(a: f64, b: f64) -> bool {
        (a - b).abs() <= 1e-9 * a.abs().max(b.abs()).max(1e-3)
    }

    /// The losses as TRL writes them, with logsigmoid and log1p by their definitions.
    fn by_definition(loss: PreferenceLoss, pair: (f64, f64)) -> f64 {
        let (beta, gamma) = (0.3, 0.7);
        let log_sigmoid = |x: f64| (1.0 / (1.0 + (-x).exp())).ln();
        let (mean_chosen, mean_rejected) = (pair.0 / 4.0, pair.1 / 7.0);
        match loss {
            PreferenceLoss::Dpo => {
                let logratios = pair.0 - pair.1;
                let ref_logratios = REFERENCE.chosen - REFERENCE.rejected;
                -log_sigmoid(beta * (logratios - ref_logratios))
            }
            PreferenceLoss::Simpo => {
                let logits = (mean_chosen - mean_rejected) - gamma / beta;
                -log_sigmoid(beta * logits)
            }
            PreferenceLoss::Orpo => {
                let log_odds = (mean_chosen - mean_rejected)
                    - ((-mean_chosen.exp()).ln_1p() - (-mean_rejected.exp()).ln_1p());
                -beta * log_sigmoid(log_odds)
            }
        }
    }

    #[test]
    fn each_loss_is_that_of_its_definition() {
        for loss in ALL {
            for pair in PAIRS {
                let (chosen, rejected) = answers(pair);
                let found = objective(loss).pair(chosen, rejected, REFERENCE).loss;
                let expected = by_definition(loss, pair);
                assert!(close(found, expected), "{loss:?} {pair:?}: {found} {expected}");
            }
        }
    }

    #[test]
    fn slopes_equal_central_differences() {
        let step = 1e-6;
        for loss in ALL {
            for pair in PAIRS {
                let objective = objective(loss);
                let at = |chosen: f64, rejected: f64| {
                    let (chosen, rejected) = answers((chosen, rejected));
                    objective.pair(chosen, rejected, REFERENCE)
                };
                let (a, b) = pair;
                let found = at(a, b);
                let d_chosen = (at(a + step, b).loss - at(a - step, b).loss) / (2.0 * step);
                let d_rejected = (at(a, b + step).loss - at(a, b - step).loss) / (2.0 * step);
                for (found, expected) in
                    [(found.d_chosen, d_chosen), (found.d_rejected, d_rejected)]
                {
                    assert!(
                        (found - expected).abs() < 1e-6,
                        "{loss:?} {pair:?}: {found} {expected}"
                    );
                }
            }
        }
    }

    #[test]
    fn a_model_that_is_its_reference_has_log_2_as_dpo_loss() {
        let (chosen, rejected) = answers((REFERENCE.chosen, REFERENCE.rejected));
        let found = objective(PreferenceLoss::Dpo).pair(chosen, rejected, REFERENCE);
        assert_eq!((found.loss, found.reward_margin), (std::f64::consts::LN_2, 0.0));
        assert_eq!((found.d_chosen, found.d_rejected), (-0.15, 0.15));
    }

    #[test]
    fn an_answer_that_is_certain_leaves_orpos_slope_finite() {
        let certain = Answer { logp: 0.0, tokens: 3 };
        let other = Answer { logp: -2.0, tokens: 3 };
        let found = objective(PreferenceLoss::Orpo).pair(certain, other, REFERENCE);
        assert_eq!(found.loss, 0.0);
        assert!(found.d_chosen.is_finite() && found.d_chosen < 0.0, "{found:?}");
        assert_eq!(found.d_rejected, 0.0);
    }
}
