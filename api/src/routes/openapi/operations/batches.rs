//! Files of requests.

use super::super::operation::Operation;
use super::super::requests;
use super::{AS_BEFORE, BATCHES, example, of};
use crate::page::Page;
use crate::routes::batches::{self, BatchObject};
use schemars::SchemaGenerator;
use serde_json::json;
use tunesmith_core::errors::ErrorCode;

pub(super) fn operations(generator: &mut SchemaGenerator) -> [Operation; 4] {
    let at = |operation: Operation| {
        operation.at("id", example::BATCH, "The batch's id.").errors([ErrorCode::BatchNotFound])
    };
    let batch = of::<BatchObject>(generator);
    [
        Operation::get("/v1/batches", (BATCHES, "listBatches"), "List batches, newest first")
            .page(batches::DEFAULT_LIST, batches::MAX_LIST)
            .reply(of::<Page<BatchObject>>(generator)),
        Operation::post("/v1/batches", (BATCHES, "createBatch"), "Create a batch")
            .once(AS_BEFORE)
            .body(
                requests::batch(),
                json!({
                    "input_file_id": example::BATCH_FILE,
                    "endpoint": batches::ENDPOINTS[0],
                    "completion_window": batches::WINDOW,
                }),
            )
            .errors([ErrorCode::FileNotFound])
            .reply(batch.clone()),
        at(Operation::get("/v1/batches/{id}", (BATCHES, "retrieveBatch"), "Retrieve a batch"))
            .reply(batch.clone()),
        at(Operation::post("/v1/batches/{id}/cancel", (BATCHES, "cancelBatch"), "Cancel a batch"))
            .errors([ErrorCode::InvalidBatchState])
            .reply(batch),
    ]
}
