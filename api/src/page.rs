//! Lists on the wire.

use schemars::JsonSchema;
use serde::Serialize;

/// One page of a list, in OpenAI's envelope.
#[derive(Debug, Serialize, JsonSchema)]
#[schemars(rename = "ListOf{T}")]
pub(crate) struct Page<T> {
    object: &'static str,
    data: Vec<T>,
    first_id: Option<String>,
    last_id: Option<String>,
    /// Always sent: without it the SDKs fetch until a page is empty.
    has_more: bool,
}

impl<T> Page<T> {
    /// `data` in the order of the list; `id` gives the cursor of an item.
    pub(crate) fn new(data: Vec<T>, has_more: bool, id: impl Fn(&T) -> &str) -> Self {
        Self {
            object: "list",
            first_id: data.first().map(|item| id(item).to_owned()),
            last_id: data.last().map(|item| id(item).to_owned()),
            data,
            has_more,
        }
    }
}
