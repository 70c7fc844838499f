//! The check of an export: reloaded as a stranger would load it, it must say what the served model
//! says.
//!
//! A front-end makes the export and sends it to a sampler ([`CHECK_PATH`]), whose child loads the
//! served model and then the export, and compares their logits at every position of a few texts.
//! What came out stands in the export's manifest.

use crate::gguf::StorageType;
use crate::ids::BaseModelId;
use crate::serving::TunedWeights;
use crate::weights::{FloatType, MAX_SHARD_SIZE, ManifestFile};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::path::PathBuf;

/// Where a sampler takes exports to check: the [`CheckOrder`] in JSON on the first line, and behind
/// it the tar archive.
pub const CHECK_PATH: &str = "/v1/check";

/// What an export is, and so how it is loaded and what its numbers may lose.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ExportForm {
    /// A PEFT directory, for the base model.
    Adapter,
    /// A Hugging Face directory of a model that was trained in full, as it is stored.
    Model,
    /// The same of a model whose files are made for the export: an adapter is merged, or numbers
    /// are of another type or in files of another size than what is stored.
    Merged(MergedForm),
    /// A GGUF file of the whole model.
    Gguf(StorageType),
}

/// What is asked of a model whose files are made for the export.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct MergedForm {
    /// The type of all numbers; each tensor has that of the weights that it is made from without it.
    pub dtype: Option<FloatType>,
    /// Bytes of tensors in a file, at most.
    pub max_shard_size: u64,
}

impl Default for MergedForm {
    fn default() -> Self {
        Self { dtype: None, max_shard_size: MAX_SHARD_SIZE }
    }
}

impl fmt::Display for MergedForm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("merged")?;
        if let Some(dtype) = self.dtype {
            write!(f, " {dtype}")?;
        }
        if self.max_shard_size != MAX_SHARD_SIZE {
            write!(f, " in files of {} bytes", self.max_shard_size)?;
        }
        Ok(())
    }
}

impl fmt::Display for ExportForm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Adapter => f.write_str("adapter"),
            Self::Model => f.write_str("model"),
            Self::Merged(form) => form.fmt(f),
            Self::Gguf(storage) => write!(f, "gguf {}", storage.name()),
        }
    }
}

/// An export to check.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CheckOrder {
    /// The base model.
    pub base_model: BaseModelId,
    /// What was made of it.
    pub tuned: TunedWeights,
    /// What the archive holds.
    pub form: ExportForm,
    /// Texts as token ids, each at least one and no longer than the model's context.
    pub prompts: Vec<Vec<u32>>,
}

/// The same for a sampler's child.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CheckFiles {
    /// The served model, or the base model of the served adapter.
    pub model_dir: PathBuf,
    /// The served adapter.
    pub adapter_dir: Option<PathBuf>,
    /// The export, unpacked.
    pub export_dir: PathBuf,
    /// What it is.
    pub form: ExportForm,
    /// Where the child may write; there is no such directory as yet.
    pub scratch_dir: PathBuf,
    /// As in the order.
    pub prompts: Vec<Vec<u32>>,
}

/// What came of a check.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum CheckReply {
    /// Both were loaded and compared.
    Compared(Comparison),
    /// The export cannot be used, or what it was made from: it is not to be offered.
    Unfit {
        /// Why, as the end of a sentence.
        reason: String,
    },
    /// It could not be checked for a reason that says nothing about the export.
    NotMade {
        /// Why, as the end of a sentence.
        reason: String,
    },
}

/// How far the logits of an export lie from those of the served model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Comparison {
    /// Texts that were read.
    pub texts: usize,
    /// Positions of all texts, at each of which the whole vocabulary was compared.
    pub positions: usize,
    /// max |e − s| over the export's logits e and the served model's s.
    pub max_abs_error: f64,
    /// ‖e − s‖ / ‖s‖, both around the mean of each position, which says nothing.
    pub relative_error: f64,
    /// Share of the positions at which both hold the same token to be the most likely.
    pub argmax_agreement: f64,
    /// Mean over the positions of KL(softmax s ‖ softmax e), in nats.
    pub mean_kl: f64,
    /// The narrowest floats among the export's tensors, where these are not blocks.
    pub numbers: Option<FloatType>,
}

/// What an export may lose.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Bound {
    /// Of [`Comparison::max_abs_error`]: where nothing is rounded.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_abs_error: Option<f64>,
    /// Of [`Comparison::relative_error`]: where the weights are rounded.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub relative_error: Option<f64>,
}

impl Bound {
    /// That of an export of this form, whose narrowest floats are `numbers`. docs/exports.md has
    /// what they were seen to lose.
    #[must_use]
    pub fn of(form: ExportForm, numbers: Option<FloatType>) -> Self {
        let relative = |bound| Self { max_abs_error: None, relative_error: Some(bound) };
        match (form, numbers) {
            (ExportForm::Gguf(StorageType::Q4_K_M), _) => relative(0.5),
            (ExportForm::Gguf(StorageType::Q8_0), _) => relative(0.1),
            // Each weight is rounded to 8 bits, and to 11 where it is f16: up to 1 part in 256 and
            // in 2048.
            (ExportForm::Model | ExportForm::Merged(_), Some(FloatType::Bf16)) => relative(0.05),
            (ExportForm::Model | ExportForm::Merged(_), Some(FloatType::F16))
            | (ExportForm::Gguf(StorageType::F16), _) => relative(0.01),
            // What an adapter has is added to the same numbers whatever it is stored as.
            (ExportForm::Adapter | ExportForm::Model | ExportForm::Merged(_), _) => {
                Self { max_abs_error: Some(1e-3), relative_error: None }
            }
        }
    }

    /// What `comparison` shows beyond the bound, in words and numbers; `None` within it.
    #[must_use]
    pub fn passed_by(&self, comparison: &Comparison) -> Option<String> {
        let beyond = |bound: Option<f64>, found: f64| bound.filter(|bound| found > *bound);
        if let Some(bound) = beyond(self.max_abs_error, comparison.max_abs_error) {
            let found = comparison.max_abs_error;
            return Some(format!("logits differ by up to {found:.3e}, and {bound:e} is allowed"));
        }
        if let Some(bound) = beyond(self.relative_error, comparison.relative_error) {
            let found = comparison.relative_error;
            return Some(format!(
                "logits differ by {found:.3e} of their spread, and {bound:e} is allowed"
            ));
        }
        None
    }
}

/// What an export's manifest says of its check.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum ExportCheck {
    /// It was made, and the export passed.
    Passed(PassedCheck),
    /// It was not made.
    NotMade {
        /// False.
        checked: bool,
        /// Why, in a sentence.
        reason: String,
    },
}

/// A check that an export passed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PassedCheck {
    /// True.
    pub checked: bool,
    /// When, in seconds since 1970.
    pub checked_at: i64,
    /// What was found.
    #[serde(flatten)]
    pub comparison: Comparison,
    /// What was allowed.
    pub bound: Bound,
}

impl ExportCheck {
    /// One that was not made.
    pub fn not_made(reason: impl Into<String>) -> Self {
        Self::NotMade { checked: false, reason: reason.into() }
    }
}

/// The manifest of an archive: of its files, and of the check.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ExportManifest {
    /// As in a [`Manifest`](crate::weights::Manifest).
    pub files: Vec<ManifestFile>,
    /// The base model's name here, which is that of a tuned model (`ft:…`) where an adapter goes on
    /// one. Archives of earlier versions say nothing of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base_model: Option<String>,
    /// Whether the export was compared with the served model, and how far it lies from it.
    pub check: ExportCheck,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn comparison() -> Comparison {
        Comparison {
            texts: 1,
            positions: 10,
            max_abs_error: 2e-3,
            relative_error: 3e-4,
            argmax_agreement: 0.9,
            mean_kl: 1e-7,
            numbers: None,
        }
    }

    #[test]
    fn an_export_beyond_its_bound_is_told_with_the_numbers() {
        let mut comparison = comparison();
        let bound = Bound::of(ExportForm::Model, Some(FloatType::F32));
        let said = bound.passed_by(&comparison).expect("beyond");
        assert_eq!(said, "logits differ by up to 2.000e-3, and 1e-3 is allowed");
        comparison.max_abs_error = 1e-3;
        assert_eq!(bound.passed_by(&comparison), None);
        comparison.relative_error = 0.3;
        let bound = Bound::of(ExportForm::Gguf(StorageType::Q8_0), None);
        let said = bound.passed_by(&comparison).expect("beyond");
        assert!(said.contains("3.000e-1 of their spread"), "{said}");
    }

    #[test]
    fn fewer_bits_may_lose_more() {
        let relative = |form, numbers| Bound::of(form, numbers).relative_error.expect("relative");
        let gguf = |storage| relative(ExportForm::Gguf(storage), None);
        let [f16, q8_0, q4_k_m] = StorageType::ALL.map(gguf);
        let bf16 = relative(ExportForm::Model, Some(FloatType::Bf16));
        assert!(f16 < bf16 && bf16 < q8_0 && q8_0 < q4_k_m);
        let merged = ExportForm::Merged(MergedForm::default());
        assert_eq!(relative(merged, Some(FloatType::Bf16)), bf16);
        assert_eq!(Bound::of(merged, Some(FloatType::F32)), Bound::of(ExportForm::Adapter, None));
    }

    #[test]
    fn each_form_has_a_name_of_its_own() {
        let merged = |dtype, max_shard_size| MergedForm { dtype, max_shard_size }.to_string();
        assert_eq!(merged(None, MAX_SHARD_SIZE), "merged");
        assert_eq!(merged(Some(FloatType::Bf16), MAX_SHARD_SIZE), "merged bf16");
        assert_eq!(merged(Some(FloatType::F32), 1000), "merged f32 in files of 1000 bytes");
    }

    #[test]
    fn a_check_comes_back_from_json_as_it_was() {
        let bound = Bound::of(ExportForm::Adapter, None);
        let passed = PassedCheck { checked: true, checked_at: 7, comparison: comparison(), bound };
        let checks = [ExportCheck::Passed(passed), ExportCheck::not_made("No sampler runs.")];
        for check in checks {
            let base_model = Some("tiny".to_owned());
            let manifest = ExportManifest { files: Vec::new(), base_model, check };
            let json = serde_json::to_string(&manifest).expect("json");
            assert_eq!(serde_json::from_str::<ExportManifest>(&json).expect("back"), manifest);
            let earlier = json.replace(r#""base_model":"tiny","#, "");
            let earlier: ExportManifest = serde_json::from_str(&earlier).expect("back");
            assert_eq!(earlier, ExportManifest { base_model: None, ..manifest });
        }
    }
}
