//! The global gradient norm, and clipping to it (Pascanu et al. 2013).

use crate::error::EngineError;
use crate::ops::squares::sums_of_squares;
use crate::parameter::Parameters;

/// Added to the norm before dividing by it, as in `torch.nn.utils.clip_grad_norm_`.
const EPSILON: f64 = 1e-6;

/// L2 norm over the accumulated gradients of all trainable parameters, in their order.
///
/// # Errors
/// [`EngineError::Numeric`] when there is no gradient at all; [`EngineError::Device`] when the
/// device fails.
pub(crate) fn global_norm(parameters: &Parameters) -> Result<f64, EngineError> {
    let gradients: Vec<_> =
        parameters.trainable().filter_map(|parameter| parameter.gradient()).collect();
    if gradients.is_empty() {
        return Err(EngineError::Numeric(
            "there is no gradient to step on: no batch was seen since the last update".to_owned(),
        ));
    }
    Ok(sums_of_squares(&gradients)?.into_iter().sum::<f64>().sqrt())
}

/// The factor that brings gradients of norm `norm` down to `max_norm`: 1 when they are below it,
/// or when there is no limit.
pub(crate) fn clip_factor(norm: f64, max_norm: Option<f64>) -> f64 {
    max_norm.map_or(1.0, |max_norm| (max_norm / (norm + EPSILON)).min(1.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_norms_above_the_limit_are_scaled_down() {
        assert_eq!(clip_factor(5.0, None), 1.0);
        assert_eq!(clip_factor(0.5, Some(1.0)), 1.0);
        assert!((clip_factor(4.0, Some(1.0)) - 0.25).abs() < 1e-6);
    }

    #[test]
    fn norm_without_any_gradient_is_an_error() {
        assert!(global_norm(&Parameters::default()).is_err());
    }
}
