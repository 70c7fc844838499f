//! Models and their weights.

use super::super::operation::Operation;
use super::super::requests::{self, deleted};
use super::{AS_BEFORE, MODELS, example, expires_in, of};
use crate::exports::Wanted;
use crate::page::Page;
use crate::routes::models::ModelObject;
use crate::routes::weights::{ADAPTER, DTYPES, GGUF, MERGED};
use schemars::SchemaGenerator;
use serde_json::json;
use tunesmith_core::errors::ErrorCode;
use tunesmith_core::gguf::StorageType;

pub(super) fn operations(generator: &mut SchemaGenerator) -> [Operation; 5] {
    let at = |operation: Operation| {
        operation
            .at("name", example::TUNED, "The model's name, or a checkpoint's.")
            .errors([ErrorCode::NoSuchModel])
    };
    [
        Operation::get("/v1/models", (MODELS, "listModels"), "List base models and tuned ones")
            .reply(of::<Page<ModelObject>>(generator)),
        Operation::post("/v1/models", (MODELS, "importAdapter"), "Import a LoRA adapter")
            .text(
                "An adapter that PEFT or another program has saved becomes a tuned model: it answers, \
                 it can be downloaded, and jobs can start from it.",
            )
            .once(AS_BEFORE)
            .form(requests::adapter())
            .errors([ErrorCode::ModelNotFound, ErrorCode::InsufficientQuota])
            .reply(of::<ModelObject>(generator)),
        at(Operation::get("/v1/models/{name}", (MODELS, "retrieveModel"), "Retrieve a model"))
            .reply(of::<ModelObject>(generator)),
        at(Operation::delete("/v1/models/{name}", (MODELS, "deleteModel"), "Delete a tuned model"))
            .errors([ErrorCode::InvalidValue])
            .reply(deleted("model")),
        at(Operation::get(
            "/v1/models/{name}/weights",
            (MODELS, "downloadWeights"),
            "Download a tuned model's weights",
        ))
        .text("A tar archive with a manifest of the files' SHA-256 sums.")
        .query(
            "format",
            json!({ "type": "string", "enum": [ADAPTER, MERGED, GGUF], "default": ADAPTER }),
            "The adapter alone, or the base model with it merged in: as a Hugging Face directory, \
             or as one GGUF file for llama.cpp and Ollama.",
        )
        .query(
            "type",
            json!({
                "type": "string",
                "enum": StorageType::ALL.map(StorageType::name),
                "default": StorageType::F16.name(),
            }),
            "How the matrices of a GGUF are stored; only with `format=gguf`.",
        )
        .query(
            "dtype",
            json!({ "type": "string", "enum": DTYPES, "default": DTYPES[0] }),
            "The type of a merged model's numbers; only with `format=merged`. `auto` is that of the \
             base model, and `f32` of a model that was trained in full.",
        )
        .query(
            "max_shard_size",
            json!({
                "type": "string",
                // Empty is as left out.
                "pattern": "^([1-9][0-9]{0,8}([KMGkmg][Ii]?[Bb])?)?$",
                "default": "5GB",
            }),
            "Bytes of tensors in each file of a merged model, at most, as in transformers' \
             `save_pretrained`: a number, alone or with KB, MB or GB. Several files come with \
             `model.safetensors.index.json`. Only with `format=merged`.",
        )
        .query(
            "check",
            json!({ "type": "string", "enum": Wanted::WORDS, "default": Wanted::WORDS[0] }),
            "Whether the export is reloaded and compared with the served model before it is given \
             out: where a sampler can do it, or not given out otherwise, or not. It is done once; \
             the manifest has the error and its bound, or why there is none.",
        )
        .query(
            "redirect",
            json!({ "type": "string" }),
            "One of the files of an adapter, or of a model that was trained in full: answers with 307 \
             and its address at the object store, where it signs such. What is made while it is sent \
             has none.",
        )
        .query("expires_in", expires_in(), "Seconds until the address of `redirect` runs out.")
        .parts("application/x-tar")
        .errors([
            ErrorCode::WeightsNotAvailable,
            ErrorCode::ExportCheckFailed,
            ErrorCode::ExportBeingChecked,
            ErrorCode::ExportNotChecked,
            ErrorCode::UnsupportedParameter,
        ]),
    ]
}
