//! Gradient checkpointing: the backward pass computes each layer again (Chen et al. 2016).
//!
//! A forward pass keeps only the input of each layer. Going back, one layer at a time is computed
//! again, this time with its graph, and left behind: the memory of one layer's activations in place
//! of all, for one more forward pass through the layers. The gradients are the same bits, since the
//! same operations run on the same numbers; so whether a job recomputes may be chosen by memory.
//! The way back ends at the first layer that trains.

use burn::tensor::{Gradients, Tensor};

use super::decoder::{Decoder, Pass};
use crate::batch::Batch;
use crate::error::EngineError;
use crate::ops::dropout::DropoutKey;
use crate::parameter::Parameters;

impl Decoder {
    /// Adds the gradients of a batch's loss to the accumulated ones. `loss` makes it of the final
    /// hidden states, with what else is then known; where it fails, the gradients are as before.
    pub(crate) fn backward<T>(
        &self,
        parameters: &mut Parameters,
        batch: &Batch,
        dropout: DropoutKey,
        recompute: bool,
        loss: impl FnOnce(&Parameters, Tensor<2>) -> Result<(Tensor<1>, T), EngineError>,
    ) -> Result<T, EngineError> {
        if recompute {
            return self.backward_recomputed(parameters, batch, dropout, loss);
        }
        let hidden = self.hidden(parameters, batch, Some(dropout), |_| {});
        let (loss, found) = loss(parameters, hidden)?;
        parameters.accumulate(&mut loss.backward());
        Ok(found)
    }

    fn backward_recomputed<T>(
        &self,
        parameters: &mut Parameters,
        batch: &Batch,
        dropout: DropoutKey,
        loss: impl FnOnce(&Parameters, Tensor<2>) -> Result<(Tensor<1>, T), EngineError>,
    ) -> Result<T, EngineError> {
        let pass = Pass::new(self, batch, Some(dropout));
        let constants = parameters.frozen();
        let mut x = pass.embedded(&constants);
        let first = self.first_trained_layer();
        let mut inputs = Vec::with_capacity(self.num_layers() - first);
        for layer in 0..self.num_layers() {
            if layer >= first {
                inputs.push(x.clone());
            }
            x = pass.layer(&constants, layer, x);
        }
        drop(constants);

        let output = leaf(x);
        let hidden = self.final_norm(parameters, output.clone());
        let (loss, found) = loss(parameters, hidden)?;
        // The head's part waits for the embedding's, which may be the same matrix: that the two are
        // added first and then to what was accumulated is part of the bits.
        let mut head_gradients = loss.backward();
        let mut gradient = take(&output, &mut head_gradients);
        for (layer, input) in (first..self.num_layers()).zip(inputs).rev() {
            let input = leaf(input);
            let output = pass.layer(parameters, layer, input.clone());
            let mut gradients = backward_from(output, gradient);
            gradient = take(&input, &mut gradients);
            parameters.accumulate(&mut gradients);
        }
        let embedded = pass.embedded(parameters);
        if embedded.is_tracked() {
            let mut gradients = backward_from(embedded, gradient);
            parameters.accumulate_parts(&mut [&mut head_gradients, &mut gradients]);
        } else {
            parameters.accumulate(&mut head_gradients);
        }
        Ok(found)
    }
}

/// The same values as the start of a graph of their own.
fn leaf(x: Tensor<2>) -> Tensor<2> {
    x.inner().autodiff().require_grad()
}

/// The backward pass from `output`, whose gradient is known: that of Σ output∘gradient.
fn backward_from(output: Tensor<2>, gradient: Tensor<2>) -> Gradients {
    (output * gradient.autodiff()).sum().backward()
}

/// The gradient of a layer's input.
fn take(input: &Tensor<2>, gradients: &mut Gradients) -> Tensor<2> {
    input.grad_remove(gradients).expect("a loss depends on each layer's input")
}
