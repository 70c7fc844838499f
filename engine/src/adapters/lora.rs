//! LoRA as PEFT has it: names, shapes, initialisation and scale.

use std::ops::Range;

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tunesmith_core::hyperparameters::{AdapterConfig, InitLoraWeights, TARGET_MODULES};

use super::pissa::{Start, principal};
use crate::device::Device;
use crate::error::EngineError;

/// A LoRA configuration that was checked.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Lora {
    /// r.
    pub(crate) rank: usize,
    /// s in y = W·x + s·B·A·x.
    pub(crate) scale: f32,
    /// Probability that an element of A's input is dropped in training.
    pub(crate) dropout: f64,
    /// What the learning rate of B is multiplied by (LoRA+, Hayou et al. 2024).
    pub(crate) learning_rate_ratio: f64,
    /// Whether each adapted row has a magnitude of its own (DoRA).
    pub(crate) dora: bool,
    /// Whether A and B start as the principal part of their weight (PiSSA).
    pub(crate) pissa: bool,
    /// For each of [`TARGET_MODULES`], whether it is adapted.
    targets: [bool; TARGET_MODULES.len()],
    seed: u64,
}

impl Lora {
    /// Checks `config`; `seed` draws the A matrices.
    ///
    /// # Errors
    /// [`EngineError::Adapter`] naming what does not fit: among others, a target that is no
    /// projection of the model, as an adapter of nothing would train nothing.
    pub(crate) fn new(config: &AdapterConfig, seed: u64) -> Result<Self, EngineError> {
        let refuse = |what: String| Err(EngineError::Adapter(what));
        if config.r == 0 {
            return refuse("the adapter's rank r is 0: use 1 or more".to_owned());
        }
        if !config.scale().is_finite() || config.scale() <= 0.0 {
            return refuse(format!("the adapter's alpha is {}: use more than 0", config.alpha));
        }
        if !(0.0..1.0).contains(&config.dropout) {
            return refuse(format!(
                "the adapter's dropout is {}: use 0 or more and less than 1",
                config.dropout
            ));
        }
        let ratio = config.loraplus_lr_ratio;
        if !ratio.is_finite() || ratio <= 0.0 {
            return refuse(format!("loraplus_lr_ratio is {ratio}: use 1 or more"));
        }
        if config.target_modules.is_empty() {
            return refuse(format!(
                "the adapter has no target_modules: choose among {}",
                TARGET_MODULES.join(", ")
            ));
        }
        let mut targets = [false; TARGET_MODULES.len()];
        for target in &config.target_modules {
            match TARGET_MODULES.iter().position(|module| module == target) {
                Some(module) => targets[module] = true,
                None => {
                    return refuse(format!(
                        "target module {target:?} matches no projection of the model: \
                         choose among {}",
                        TARGET_MODULES.join(", ")
                    ));
                }
            }
        }
        Ok(Self {
            rank: config.r,
            scale: config.scale() as f32,
            dropout: config.dropout,
            learning_rate_ratio: ratio,
            dora: config.use_dora,
            pissa: config.init_lora_weights == InitLoraWeights::Pissa,
            targets,
            seed,
        })
    }

    /// Whether the module `name` of a model is adapted, which is the projections at the positions
    /// `modules` of [`TARGET_MODULES`].
    ///
    /// # Errors
    /// [`EngineError::Adapter`] when it is several of which only some are targets.
    pub(crate) fn adapts_all(
        &self,
        modules: Range<usize>,
        name: &str,
    ) -> Result<bool, EngineError> {
        let targets = &self.targets[modules.clone()];
        if targets.iter().all(|&target| target == targets[0]) {
            return Ok(targets[0]);
        }
        Err(EngineError::Adapter(format!(
            "the model stores {} as one {name}: name all of them in target_modules, or none",
            TARGET_MODULES[modules].join(", ")
        )))
    }

    /// Where the adapter of a module starts with PiSSA.
    ///
    /// # Errors
    /// [`EngineError::Device`] when the device fails.
    pub(crate) fn principal(
        &self,
        weight: &[f32],
        shape: [usize; 2],
        (layer, module): (usize, usize),
        device: &Device,
    ) -> Result<Start, EngineError> {
        let draw = (self.seed, stream(layer, module));
        principal(weight, shape, self.rank, self.scale, draw, device.burn())
    }

    /// A new A `[r, inputs]`: Kaiming uniform with a = √5, which is U(−1/√in, 1/√in). B starts at
    /// 0, so that the adapted model starts as the base model. Each module draws from a stream of
    /// its own: its A does not depend on which others are adapted.
    pub(crate) fn initial_a(&self, layer: usize, module: usize, inputs: usize) -> Vec<f32> {
        let mut generator = ChaCha8Rng::seed_from_u64(self.seed);
        generator.set_stream(stream(layer, module));
        let bound = 1.0 / (inputs as f32).sqrt();
        (0..self.rank * inputs).map(|_| generator.random_range(-bound..bound)).collect()
    }
}

/// The random stream of a module.
fn stream(layer: usize, module: usize) -> u64 {
    (layer * TARGET_MODULES.len() + module) as u64
}

/// PEFT's name of a module's matrix; `matrix` is `A` or `B`.
pub(crate) fn tensor_name(module_path: &str, matrix: char) -> String {
    format!("base_model.model.{module_path}.lora_{matrix}.weight")
}

/// PEFT's name of a module's magnitudes.
pub(crate) fn magnitude_name(module_path: &str) -> String {
    format!("base_model.model.{module_path}.lora_magnitude_vector")
}

/// L2 norm of each of the rows of `weight`, which are `inputs` wide: where magnitudes start.
///
/// # Errors
/// [`EngineError::Adapter`] for a row of zeros, by whose length DoRA would divide.
pub(crate) fn row_lengths(
    weight: &[f32],
    inputs: usize,
    name: &str,
) -> Result<Vec<f32>, EngineError> {
    let length = |row: &[f32]| row.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt() as f32;
    let lengths: Vec<f32> = weight.chunks_exact(inputs).map(length).collect();
    match lengths.iter().position(|&length| length == 0.0) {
        Some(row) => Err(EngineError::Adapter(format!(
            "row {row} of {name} is all zeros, and use_dora divides by its length: leave the \
             module out of target_modules, or use LoRA without use_dora"
        ))),
        None => Ok(lengths),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> AdapterConfig {
        AdapterConfig { r: 4, alpha: 8.0, ..AdapterConfig::default() }
    }

    #[test]
    fn scale_is_alpha_over_r_or_over_its_root() {
        assert_eq!(Lora::new(&config(), 0).unwrap().scale, 2.0);
        let rslora = AdapterConfig { use_rslora: true, ..config() };
        assert_eq!(Lora::new(&rslora, 0).unwrap().scale, 4.0);
    }

    #[test]
    fn initial_a_fills_its_range_and_repeats_for_its_seed() {
        let lora = Lora::new(&config(), 3).unwrap();
        let a = lora.initial_a(1, 2, 2500);
        let bound = 1.0 / 50.0;
        let (least, greatest) =
            a.iter().fold((0f32, 0f32), |(least, most), &x| (least.min(x), most.max(x)));
        assert!(least >= -bound && least < -0.99 * bound, "{least}");
        assert!(greatest < bound && greatest > 0.99 * bound, "{greatest}");
        let mean = a.iter().sum::<f32>() / a.len() as f32;
        assert!(mean.abs() < 0.03 * bound, "{mean}");
        assert_eq!(a, lora.initial_a(1, 2, 2500));
        assert_ne!(a, lora.initial_a(1, 3, 2500));
        assert_ne!(a, Lora::new(&config(), 4).unwrap().initial_a(1, 2, 2500));
    }

    #[test]
    fn initial_a_does_not_depend_on_the_other_targets() {
        let narrow = AdapterConfig { target_modules: vec!["v_proj".to_owned()], ..config() };
        let (all, narrow) = (Lora::new(&config(), 3).unwrap(), Lora::new(&narrow, 3).unwrap());
        assert_eq!(all.initial_a(0, 2, 8), narrow.initial_a(0, 2, 8));
    }

    #[test]
    fn fused_projections_are_adapted_together_or_not_at_all() {
        let targets = ["q_proj", "k_proj", "v_proj", "up_proj"].map(str::to_owned).to_vec();
        let lora = Lora::new(&AdapterConfig { target_modules: targets, ..config() }, 0).unwrap();
        assert!(lora.adapts_all(0..3, "qkv_proj").unwrap());
        assert!(!lora.adapts_all(6..7, "down_proj").unwrap());
        let message = lora.adapts_all(4..6, "gate_up_proj").unwrap_err().to_string();
        assert!(message.contains("gate_proj, up_proj as one gate_up_proj"), "{message}");
    }

    #[test]
    fn what_does_not_fit_is_refused_by_name() {
        let cases = [
            (AdapterConfig { r: 0, ..config() }, "rank"),
            (AdapterConfig { alpha: 0.0, ..config() }, "alpha"),
            (AdapterConfig { dropout: 1.0, ..config() }, "dropout"),
            (AdapterConfig { loraplus_lr_ratio: 0.0, ..config() }, "loraplus_lr_ratio"),
            (AdapterConfig { target_modules: Vec::new(), ..config() }, "target_modules"),
            (AdapterConfig { target_modules: vec!["wq".to_owned()], ..config() }, "\"wq\""),
        ];
        for (config, word) in cases {
            let message = Lora::new(&config, 0).unwrap_err().to_string();
            assert!(message.contains(word), "{message}");
        }
    }
}
