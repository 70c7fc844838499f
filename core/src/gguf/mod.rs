//! GGUF, the file format of llama.cpp and of what is built on it: a Hugging Face model directory as
//! one file with metadata, tokenizer and tensors.
//!
//! A [`Plan`] is made from the small files and the tensors' shapes alone. It has the file's head,
//! byte for byte, and says for each tensor where its rows come from and how they are stored, so that
//! a model of any size is written piece by piece. Names, keys and layouts are those of llama.cpp's
//! own converter; what a GGUF cannot say exactly is refused by name.

mod architecture;
mod blocks;
mod header;
mod modelfile;
mod plan;
mod pretokenizer;
mod rope;
mod storage;
mod tokenizer;

#[cfg(test)]
mod tests;

pub use plan::{ModelFiles, Plan, PlannedTensor, Source};
pub use pretokenizer::{Pretokenizer, byte_level};
pub use storage::{StorageType, TensorType};

/// Why a model cannot become a GGUF.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the model cannot be written as GGUF: {0}")]
pub struct GgufError(String);

impl GgufError {
    fn new(reason: impl Into<String>) -> Self {
        Self(reason.into())
    }
}
