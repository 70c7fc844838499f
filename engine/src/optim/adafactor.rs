//! Adafactor (Shazeer and Stern 2018), as transformers' `Adafactor` with a given learning rate:
//! `scale_parameter=False`, `relative_step=False`, no first moment.

use burn::tensor::{Tensor, TensorData};

use super::adamw::AdamWParams;
use crate::error::EngineError;
use crate::ops;
use crate::ops::adafactor::{Part, SecondMoment};
use crate::parameter::{NamedSource, NamedTensor, Parameter, read};

/// Prefixes of the second moments' names in a checkpoint; transformers' own keys.
const ROWS: &str = "exp_avg_sq_row.";
const COLUMNS: &str = "exp_avg_sq_col.";
const WHOLE: &str = "exp_avg_sq.";

/// The second moments of one parameter: factored for each public matrix that it holds, whole for
/// each vector.
#[derive(Debug)]
pub(super) struct SecondMoments(Vec<Part>);

impl SecondMoments {
    pub(super) fn new(parameter: &Parameter) -> Self {
        let device = parameter.value().device().inner();
        let columns = parameter.dims()[1];
        let zeros = |shape: [usize; 2]| Tensor::zeros(shape, &device);
        let parts = parameter.names().iter().map(|named| {
            let second = if named.shape.len() == 2 {
                SecondMoment::Factored {
                    rows: zeros([named.rows.len(), 1]),
                    columns: zeros([1, columns]),
                }
            } else {
                SecondMoment::Whole(zeros([named.rows.len(), columns]))
            };
            Part { rows: named.rows.clone(), second }
        });
        Self(parts.collect())
    }

    /// Update number `t`, from 1.
    pub(super) fn update(
        &mut self,
        parameter: &mut Parameter,
        gradient: Tensor<2>,
        params: &AdamWParams,
        t: u64,
        gradient_scale: f64,
    ) {
        let step =
            ops::adafactor::Step::new(params.learning_rate, params.weight_decay, t, gradient_scale);
        parameter.update(|value| ops::adafactor::adafactor(value, gradient, &mut self.0, &step));
    }

    pub(super) fn export(
        &self,
        parameter: &Parameter,
        tensors: &mut Vec<NamedTensor>,
    ) -> Result<(), EngineError> {
        for (named, part) in parameter.names().iter().zip(&self.0) {
            let mut push = |prefix: &str, tensor: &Tensor<2>, shape: Vec<usize>| {
                let data = read(tensor.clone())?;
                tensors.push(NamedTensor { name: format!("{prefix}{}", named.name), shape, data });
                Ok::<_, EngineError>(())
            };
            match &part.second {
                SecondMoment::Factored { rows, columns } => {
                    push(ROWS, rows, vec![rows.dims()[0]])?;
                    push(COLUMNS, columns, vec![columns.dims()[1]])?;
                }
                SecondMoment::Whole(second) => push(WHOLE, second, named.shape.clone())?,
            }
        }
        Ok(())
    }

    pub(super) fn import(
        parameter: &Parameter,
        source: &mut NamedSource,
    ) -> Result<Self, EngineError> {
        let mut moments = Self::new(parameter);
        let device = parameter.value().device().inner();
        for (named, part) in parameter.names().iter().zip(&mut moments.0) {
            let mut take = |prefix: &str, tensor: &mut Tensor<2>, shape: &[usize]| {
                let values = source.take(&format!("{prefix}{}", named.name), shape)?;
                *tensor = Tensor::from_data(TensorData::new(values, tensor.dims()), &device);
                Ok::<_, EngineError>(())
            };
            match &mut part.second {
                SecondMoment::Factored { rows, columns } => {
                    let shape = [rows.dims()[0]];
                    take(ROWS, rows, &shape)?;
                    let shape = [columns.dims()[1]];
                    take(COLUMNS, columns, &shape)?;
                }
                SecondMoment::Whole(second) => take(WHOLE, second, &named.shape)?,
            }
        }
        Ok(moments)
    }
}
