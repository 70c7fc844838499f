//! A model that trains: its tensors, its adapter and its optimiser behind one face.

use std::path::Path;
use std::sync::Arc;

use burn::tensor::Tensor;
use tunesmith_core::hyperparameters::{
    AdapterConfig, InitLoraWeights, MuonLearningRate, Optimizer as OptimizerKind, Precision,
};

use crate::adapters::pissa;
use crate::batch::{Batch, BatchOutcome};
use crate::device::Device;
use crate::error::EngineError;
use crate::models::config::ModelConfig;
use crate::models::decoder::Decoder;
use crate::models::load;
use crate::ops::dropout::DropoutKey;
use crate::ops::head::HeadLoss;
use crate::optim::adamw::AdamWParams;
use crate::optim::gradient_norm::{clip_factor, global_norm};
use crate::optim::optimizer::Optimizer;
use crate::parameter::{NamedSource, NamedTensor, Parameters, read};

/// The optimiser's memory, as a checkpoint keeps it.
#[derive(Debug, Clone, PartialEq)]
pub struct OptimizerState {
    /// Updates done so far.
    pub step: u64,
    /// What the optimiser remembers of each trainable tensor, by its name behind the name that
    /// PyTorch's optimiser has for it: `exp_avg.{name}` and `exp_avg_sq.{name}` for AdamW. Empty
    /// before the first update.
    pub tensors: Vec<NamedTensor>,
}

/// A decoder with what training needs: gradients, an optimiser, and names for the outside.
///
/// All numbers are f32, except sums of losses and of squared gradients, which are f64, and what
/// [`TrainableModel::load_with_precision`] keeps in bf16. The same calls on the same device give
/// bit-equal results, whatever the number of threads.
#[derive(Debug)]
pub struct TrainableModel {
    decoder: Arc<Decoder>,
    parameters: Parameters,
    optimizer: Optimizer,
    gradient_checkpointing: bool,
    /// A₀ and B₀ of PiSSA, without which the adapter would not go on the original base model.
    start: Option<Arc<[NamedTensor]>>,
}

impl TrainableModel {
    /// Reads a Hugging Face model directory (`config.json` and safetensors) and prepares it for
    /// what `adapter` trains, in f32. `seed` draws the A matrices of LoRA.
    ///
    /// # Errors
    /// [`EngineError::Model`] for an architecture this engine does not know, or for a weight that
    /// is missing, unused or misshapen; [`EngineError::Adapter`] for an adapter that does not fit;
    /// [`EngineError::Io`] for a file that cannot be read.
    pub fn load(
        dir: &Path,
        adapter: &AdapterConfig,
        seed: u64,
        device: &Device,
    ) -> Result<Self, EngineError> {
        Self::load_with_precision(dir, adapter, seed, device, Precision::Fp32)
    }

    /// As [`TrainableModel::load`], in the precision that `device` makes of `precision`.
    ///
    /// In bf16, products multiply bf16 and add in f32, on the CPU attention's too; the matrices
    /// beside an adapter are stored in bf16, and so are the inputs that projections keep for the
    /// backward pass. What trains, its gradients and the optimiser's memory stay f32.
    ///
    /// # Errors
    /// As [`TrainableModel::load`].
    pub fn load_with_precision(
        dir: &Path,
        adapter: &AdapterConfig,
        seed: u64,
        device: &Device,
        precision: Precision,
    ) -> Result<Self, EngineError> {
        Self::load_to_go_on(dir, adapter, seed, device, precision, None)
    }

    /// As [`TrainableModel::load_with_precision`], for a run that goes on from a checkpoint, whose
    /// [`TrainableModel::exported_tensors`] are `exported`: what the adapter once started with is
    /// taken from these where it belongs to the weights (PiSSA). They still are to be loaded.
    ///
    /// # Errors
    /// As [`TrainableModel::load`]; [`EngineError::Checkpoint`] when `exported` does not fit.
    pub fn load_to_go_on(
        dir: &Path,
        adapter: &AdapterConfig,
        seed: u64,
        device: &Device,
        precision: Precision,
        exported: Option<&[NamedTensor]>,
    ) -> Result<Self, EngineError> {
        let bf16 = device.precision(precision) == Precision::Bf16;
        let start = match exported {
            Some(tensors) if adapter.init_lora_weights == InitLoraWeights::Pissa => {
                Some(NamedSource::new(pissa::without_initial(tensors.to_vec())?.1)?)
            }
            _ => None,
        };
        let (decoder, parameters) = load::load(dir, adapter, seed, device, bf16, start)?;
        let start = decoder.starts_with_pissa().then(|| parameters.named()).transpose()?;
        Ok(Self {
            decoder: Arc::new(decoder),
            parameters,
            optimizer: Optimizer::default(),
            gradient_checkpointing: false,
            start: start.map(Arc::from),
        })
    }

    /// Whether backward passes compute each layer again in place of keeping its activations: less
    /// memory, more time, the same bits.
    pub fn set_gradient_checkpointing(&mut self, recompute: bool) {
        self.gradient_checkpointing = recompute;
    }

    /// Chooses the optimiser in place of AdamW. What the old one remembered is forgotten.
    pub fn set_optimizer(&mut self, kind: OptimizerKind, muon_learning_rate: MuonLearningRate) {
        self.optimizer = Optimizer::new(kind, muon_learning_rate);
    }

    /// Adds NEFTune's noise of this α to the embeddings in training; 0, the default, for none.
    ///
    /// # Panics
    /// When there are replicas of this model already: they would be without.
    pub fn set_neftune_noise_alpha(&mut self, alpha: f64) {
        let decoder = Arc::get_mut(&mut self.decoder).expect("no replica shares the decoder yet");
        decoder.set_neftune_noise_alpha(alpha);
    }

    /// The architecture.
    #[must_use]
    pub fn config(&self) -> &ModelConfig {
        self.decoder.config()
    }

    /// One forward and one backward pass: adds d(`scale`·Σw·NLL) to the accumulated gradients.
    ///
    /// `scale` is 1 / (the step's total weight over all its micro-batches), so that a step's
    /// gradient is that of the weighted token mean, however the step was cut. `dropout_key` names
    /// the LoRA dropout masks.
    ///
    /// # Errors
    /// [`EngineError::Data`] for a batch that is malformed or has no target;
    /// [`EngineError::Numeric`] for a loss that is not finite: the gradients are then as before.
    pub fn forward_backward(
        &mut self,
        batch: &Batch,
        scale: f64,
        dropout_key: DropoutKey,
    ) -> Result<BatchOutcome, EngineError> {
        self.forward_backward_with_nll(batch, scale, dropout_key).map(|(outcome, _)| outcome)
    }

    /// The same, and beside it −log p of each of the batch's targets, in their order.
    ///
    /// # Errors
    /// As [`TrainableModel::forward_backward`].
    pub fn forward_backward_with_nll(
        &mut self,
        batch: &Batch,
        scale: f64,
        dropout_key: DropoutKey,
    ) -> Result<(BatchOutcome, Vec<f64>), EngineError> {
        self.check(batch)?;
        self.backward(batch, dropout_key, |decoder, parameters, hidden| {
            let head = decoder.head_loss(parameters, hidden, batch)?;
            let outcome = outcome(&head, batch)?;
            Ok((head.loss.mul_scalar(scale), (outcome, head.nll)))
        })
    }

    /// Adds the gradients of a batch's loss, which `loss` makes of the final hidden states, to the
    /// accumulated ones; where it fails, they are as before.
    pub(crate) fn backward<T>(
        &mut self,
        batch: &Batch,
        dropout: DropoutKey,
        loss: impl FnOnce(&Decoder, &Parameters, Tensor<2>) -> Result<(Tensor<1>, T), EngineError>,
    ) -> Result<T, EngineError> {
        let Self { decoder, parameters, gradient_checkpointing: recompute, .. } = self;
        let loss = |parameters: &Parameters, hidden| loss(decoder, parameters, hidden);
        decoder.backward(parameters, batch, dropout, *recompute, loss)
    }

    /// The batch's loss and accuracy, without gradients and without dropout.
    ///
    /// # Errors
    /// As [`TrainableModel::forward_backward`].
    pub fn evaluate(&self, batch: &Batch) -> Result<BatchOutcome, EngineError> {
        self.check(batch)?;
        let head = self.decoder.loss(&self.parameters.frozen(), batch, None)?;
        outcome(&head, batch)
    }

    /// Logits over the vocabulary after each of `positions` in the one sequence `ids`.
    ///
    /// # Errors
    /// [`EngineError::Data`] for an unknown id, or a position outside of `ids`.
    pub fn logits(&self, ids: &[u32], positions: &[usize]) -> Result<Vec<Vec<f32>>, EngineError> {
        self.check_ids(ids)?;
        self.check_length(ids.len())?;
        if let Some(position) = positions.iter().find(|&&position| position >= ids.len()) {
            return Err(EngineError::Data(format!(
                "position {position} lies outside of a sequence of {} tokens",
                ids.len()
            )));
        }
        let parameters = self.parameters.frozen();
        let hidden = self.decoder.hidden(&parameters, &Batch::single(ids), None, |_| {});
        let logits = read(self.decoder.logits(&parameters, hidden, positions))?;
        Ok(logits.chunks_exact(self.config().vocab_size).map(<[f32]>::to_vec).collect())
    }

    /// L2 norm of the last position's hidden state: after the embedding, after every layer but
    /// the last, and after the final norm. This is the order of Hugging Face's `hidden_states`,
    /// and it tells in which layer two implementations part.
    ///
    /// # Errors
    /// [`EngineError::Data`] for an unknown id.
    pub fn hidden_norms(&self, ids: &[u32]) -> Result<Vec<f64>, EngineError> {
        self.check_ids(ids)?;
        self.check_length(ids.len())?;
        let mut last_rows = Vec::new();
        let last_row = |state: &Tensor<2>| {
            let [tokens, width] = state.dims();
            state.clone().slice([tokens - 1..tokens, 0..width])
        };
        let hidden =
            self.decoder.hidden(&self.parameters.frozen(), &Batch::single(ids), None, |state| {
                last_rows.push(last_row(state))
            });
        // The last layer's own output is seen only through the final norm.
        last_rows.pop();
        last_rows.push(last_row(&hidden));
        last_rows
            .into_iter()
            .map(|row| {
                let squares: f64 = read(row)?.iter().map(|&x| f64::from(x).powi(2)).sum();
                Ok(squares.sqrt())
            })
            .collect()
    }

    /// One update: clips the accumulated gradients to a global L2 norm of `max_grad_norm` (None
    /// leaves them), applies the optimiser, and clears them. Returns the norm before clipping.
    ///
    /// # Errors
    /// [`EngineError::Numeric`] when the norm is not finite, or when there is no gradient: nothing
    /// is changed then.
    pub fn optimizer_step(
        &mut self,
        params: &AdamWParams,
        max_grad_norm: Option<f64>,
    ) -> Result<f64, EngineError> {
        let norm = global_norm(&self.parameters)?;
        if !norm.is_finite() {
            return Err(EngineError::Numeric(format!(
                "the gradient norm is {norm}: lower the learning rate"
            )));
        }
        self.optimizer.update(&mut self.parameters, params, clip_factor(norm, max_grad_norm));
        Ok(norm)
    }

    /// Forgets the gradients since the last update.
    pub fn clear_gradients(&mut self) {
        for parameter in self.parameters.trainable_mut() {
            parameter.take_gradient();
        }
    }

    /// The tensors that train: PEFT's names for LoRA, Hugging Face's for full fine-tuning.
    ///
    /// # Errors
    /// [`EngineError::Device`] when the device fails.
    pub fn trainable_tensors(&self) -> Result<Vec<NamedTensor>, EngineError> {
        self.parameters.named()
    }

    /// What belongs into the weights that a job gives: for LoRA an adapter of the original base
    /// model, in the shape of [`AdapterConfig::exported`]; for full fine-tuning every tensor of the
    /// model, frozen ones among them.
    ///
    /// # Errors
    /// [`EngineError::Device`] when the device fails.
    pub fn exported_tensors(&self) -> Result<Vec<NamedTensor>, EngineError> {
        match &self.start {
            Some(start) => Ok(pissa::with_initial(self.parameters.named()?, start)),
            None if self.decoder.has_adapter() => self.parameters.named(),
            None => self.parameters.named_all(),
        }
    }

    /// Replaces the tensors that train by those inside of [`TrainableModel::exported_tensors`].
    ///
    /// # Errors
    /// [`EngineError::Checkpoint`] naming a tensor that is missing, unknown or misshapen, or when
    /// PiSSA started elsewhere: nothing is changed then.
    pub fn load_exported_tensors(
        &mut self,
        mut tensors: Vec<NamedTensor>,
    ) -> Result<(), EngineError> {
        if let Some(start) = &self.start {
            let (trained, mut found) = pissa::without_initial(tensors)?;
            let mut start = start.to_vec();
            for list in [&mut found, &mut start] {
                list.sort_by(|a, b| a.name.cmp(&b.name));
            }
            if found != start {
                return Err(EngineError::Checkpoint(
                    "the adapter started with PiSSA from other weights than these".to_owned(),
                ));
            }
            return self.load_trainable_tensors(trained);
        }
        tensors.retain(|tensor| !self.parameters.is_frozen(&tensor.name));
        self.load_trainable_tensors(tensors)
    }

    /// Replaces the tensors that train by those of [`TrainableModel::trainable_tensors`].
    ///
    /// # Errors
    /// [`EngineError::Checkpoint`] naming a tensor that is missing, unknown or misshapen: nothing
    /// is changed then.
    pub fn load_trainable_tensors(&mut self, tensors: Vec<NamedTensor>) -> Result<(), EngineError> {
        self.parameters.assign(tensors)
    }

    /// The optimiser's memory; with the trainable tensors, all that a resumed run needs.
    ///
    /// # Errors
    /// [`EngineError::Device`] when the device fails.
    pub fn optimizer_tensors(&self) -> Result<OptimizerState, EngineError> {
        self.optimizer.export(&self.parameters)
    }

    /// Replaces the optimiser's memory by that of [`TrainableModel::optimizer_tensors`].
    ///
    /// # Errors
    /// [`EngineError::Checkpoint`] naming a tensor that is missing, unknown or misshapen: nothing
    /// is changed then.
    pub fn load_optimizer_tensors(&mut self, state: OptimizerState) -> Result<(), EngineError> {
        self.optimizer.import(&self.parameters, state)
    }

    /// The same model on `device`, without the optimiser's memory. On the same device it shares
    /// the memory of all tensors until they change.
    pub(crate) fn replica(&self, device: &Device) -> Self {
        Self {
            decoder: Arc::clone(&self.decoder),
            parameters: self.parameters.replica(device.burn()),
            optimizer: Optimizer::default(),
            gradient_checkpointing: self.gradient_checkpointing,
            start: self.start.clone(),
        }
    }

    /// Adds the accumulated gradients of `replica` to these, and clears them there.
    pub(crate) fn take_gradients_of(&mut self, replica: &mut Self) {
        self.parameters.take_gradients_of(&mut replica.parameters);
    }

    /// Replaces the tensors that train by those of `replica`.
    pub(crate) fn take_values_of(&mut self, replica: &Self) {
        self.parameters.take_values_of(&replica.parameters);
    }

    pub(crate) fn decoder(&self) -> &Decoder {
        &self.decoder
    }

    pub(crate) fn parameters(&self) -> &Parameters {
        &self.parameters
    }

    fn check(&self, batch: &Batch) -> Result<(), EngineError> {
        self.check_ids(&batch.ids)?;
        batch.check()?;
        self.check_length(batch.longest_context())?;
        if batch.total_weight() > 0.0 {
            Ok(())
        } else {
            Err(EngineError::Data(format!(
                "the batch of rows {:?} has no token with loss",
                batch.rows
            )))
        }
    }

    /// Refuses a sequence for which the model would turn its heads at other frequencies.
    pub(crate) fn check_length(&self, tokens: usize) -> Result<(), EngineError> {
        match self.config().rope.longest_sequence() {
            Some(longest) if tokens > longest => Err(EngineError::Data(format!(
                "a sequence of {tokens} tokens is longer than the {longest} within which the \
                 model's longrope has its short factors: lower max_seq_length to {longest}"
            ))),
            _ => Ok(()),
        }
    }

    pub(crate) fn check_ids(&self, ids: &[u32]) -> Result<(), EngineError> {
        if ids.is_empty() {
            return Err(EngineError::Data("a sequence has no token".to_owned()));
        }
        let vocabulary = self.config().vocab_size;
        match ids.iter().find(|&&id| id as usize >= vocabulary) {
            Some(id) => Err(EngineError::Data(format!(
                "token id {id} lies outside of the model's vocabulary of {vocabulary}: \
                 the tokenizer belongs to another model"
            ))),
            None => Ok(()),
        }
    }
}

/// The sums of a batch, once the loss is known to be a number.
fn outcome(head: &HeadLoss, batch: &Batch) -> Result<BatchOutcome, EngineError> {
    if !head.weighted_nll.is_finite() {
        return Err(EngineError::Numeric(format!(
            "the loss of rows {:?} is {}: lower the learning rate, or look at these rows",
            batch.rows, head.weighted_nll
        )));
    }
    Ok(BatchOutcome {
        weighted_nll: head.weighted_nll,
        weight: batch.total_weight(),
        weighted_correct: head.weighted_correct,
    })
}
