//! How weights lie on disk and in the object store: manifests, PEFT's adapter format, merging.

mod config_dtype;
mod float;
mod lora_tensors;
mod manifest;
mod merge;
mod peft;
mod place;
mod shards;

pub use config_dtype::set_dtype;
pub use float::{BeyondType, FloatType};
pub use lora_tensors::{
    LoraMatrix, LoraPair, base_tensor_name, lora_tensor_name, pair_lora_tensors,
    projection_tensor_name,
};
pub use manifest::{CONFIG_NAME, MANIFEST_NAME, Manifest, ManifestFile};
pub use merge::{LoraFactors, MergeError, merge_lora_rows};
pub use peft::{ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME, PeftConfig, PeftError};
pub use place::{CheckpointPlace, WeightsPlace};
pub use shards::{INDEX_NAME, MAX_SHARD_SIZE, Shard, Shards, TensorLayout, parse_shard_size};
