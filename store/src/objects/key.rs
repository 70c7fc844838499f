//! Where objects lie. No other place in tunesmith makes an object's path.

use object_store::path::Path;
use std::fmt;
use tunesmith_core::ids::{BaseModelId, FileId, ImportedAdapterId, UploadId};
use tunesmith_core::weights::{CheckpointPlace, WeightsPlace};

/// A set of objects.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum ObjectPrefix {
    /// A base model: a Hugging Face directory.
    BaseModel(BaseModelId),
    /// What people download of a checkpoint: a PEFT adapter or a Hugging Face directory.
    CheckpointWeights(CheckpointPlace),
    /// An adapter that was made elsewhere.
    ImportedAdapter(ImportedAdapterId),
    /// Parts of a file that is still coming.
    UploadParts(UploadId),
    /// What a run resumes from: optimiser, schedule and sampler position.
    CheckpointState(CheckpointPlace),
}

impl ObjectPrefix {
    /// The object `name` in this set.
    #[must_use]
    pub fn file(&self, name: impl Into<String>) -> ObjectKey {
        ObjectKey::In(self.clone(), name.into())
    }

    pub(crate) fn path(&self) -> Path {
        match self {
            Self::BaseModel(id) => Path::from_iter(["models", id.as_str()]),
            Self::UploadParts(id) => Path::from_iter(["uploads", id.as_str()]),
            Self::ImportedAdapter(id) => Path::from_iter(["adapters", id.as_str()]),
            Self::CheckpointWeights(place) => checkpoint_path(place, "weights"),
            Self::CheckpointState(place) => checkpoint_path(place, "state"),
        }
    }
}

/// Where the weights of a tuned model lie.
impl From<WeightsPlace> for ObjectPrefix {
    fn from(place: WeightsPlace) -> Self {
        match place {
            WeightsPlace::Checkpoint(place) => Self::CheckpointWeights(place),
            WeightsPlace::Imported(id) => Self::ImportedAdapter(id),
        }
    }
}

fn checkpoint_path(place: &CheckpointPlace, part: &str) -> Path {
    let CheckpointPlace { job, attempt, step } = place;
    Path::from_iter([
        "jobs",
        job.as_str(),
        &format!("attempt-{attempt}"),
        &format!("step-{step}"),
        part,
    ])
}

/// One object.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum ObjectKey {
    /// An uploaded or produced file.
    File(FileId),
    /// A named object of a set.
    In(ObjectPrefix, String),
}

impl ObjectKey {
    pub(crate) fn path(&self) -> Path {
        match self {
            Self::File(id) => Path::from_iter(["files", id.as_str()]),
            // A slash in the name separates directories, as in a Hugging Face repository; other
            // characters, `..` among them, are encoded and cannot leave the set.
            Self::In(prefix, name) => {
                prefix.path().parts().chain(Path::from(name.as_str()).parts()).collect()
            }
        }
    }
}

impl fmt::Display for ObjectKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.path().fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_lie_under_job_attempt_and_step() {
        let place = CheckpointPlace { job: "ftjob-a".into(), attempt: 2, step: 10 };
        let key = ObjectPrefix::CheckpointWeights(place).file("adapter_model.safetensors");
        assert_eq!(
            key.to_string(),
            "jobs/ftjob-a/attempt-2/step-10/weights/adapter_model.safetensors"
        );
    }

    #[test]
    fn a_name_cannot_leave_its_set() {
        let prefix = ObjectPrefix::BaseModel("m".into());
        for name in ["../../files/x", "/etc/passwd", "a/../../b"] {
            let path = prefix.file(name).path();
            assert!(path.as_ref().starts_with("models/m/"), "{path}");
            assert!(path.parts().all(|part| part.as_ref() != ".."), "{path}");
        }
        assert_eq!(prefix.file("onnx/model.onnx").to_string(), "models/m/onnx/model.onnx");
    }

    #[test]
    fn an_id_cannot_leave_its_place() {
        let path = ObjectKey::File("../jobs/x".into()).path();
        assert_eq!(path.parts_count(), 2, "{path}");
    }
}
