//! Values that a backward pass computes again, instead of keeping them since the forward pass.

use std::fmt;
use std::sync::Arc;

use burn_flex::FlexTensor;

/// How a tensor is computed again, bit by bit, from others that are kept anyway.
#[derive(Clone)]
pub(in crate::ops) struct Again(Arc<dyn Fn() -> FlexTensor + Send + Sync>);

impl Again {
    pub(super) fn new(compute: impl Fn() -> FlexTensor + Send + Sync + 'static) -> Self {
        Self(Arc::new(compute))
    }

    pub(super) fn compute(&self) -> FlexTensor {
        (self.0)()
    }
}

impl fmt::Debug for Again {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Again")
    }
}
