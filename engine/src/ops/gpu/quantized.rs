//! GPU form of [`crate::ops::quantized`]: codes and scales lie in the device's memory, and a matrix is
//! decoded anew for each product, which ends with it.

use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use burn_cubecl::Cube;

use super::{contiguous, element, kernels, like_of, plain, thread_an_element};
use crate::ops::quantized::{BLOCK, BlockFormat, NF4, QuantizedMatrix};

/// A matrix's blocks on a device.
#[derive(Debug, Clone)]
pub(in crate::ops) struct Blocks {
    device: Device,
    /// Four bytes in each, the first in the lowest bits.
    codes: Tensor<1, Int>,
    scales: Tensor<1>,
    /// The numbers of NF4's codes.
    values: Tensor<1>,
}

impl Blocks {
    pub(in crate::ops) fn new(codes: &[u8], scales: &[f32], device: &Device) -> Self {
        let word = |bytes: &[u8]| {
            bytes.iter().rev().fold(0u32, |word, &byte| word << 8 | u32::from(byte)) as i32
        };
        let codes: Vec<i32> = codes.chunks(4).map(word).collect();
        let count = codes.len();
        let codes = Tensor::from_data(TensorData::new(codes, [count]), (device, DType::I32));
        let floats = |values: &[f32]| {
            Tensor::from_data(TensorData::new(values.to_vec(), [values.len()]), device)
        };
        Self { device: device.clone(), codes, scales: floats(scales), values: floats(&NF4) }
    }

    pub(in crate::ops) fn is_on(&self, device: &Device) -> bool {
        self.device == *device
    }
}

/// The whole matrix on a device, as `dtype`.
pub(super) fn decoded(matrix: &QuantizedMatrix, dtype: DType, device: &Device) -> Tensor<2> {
    let Blocks { codes, scales, values, .. } = matrix.on_gpu(device);
    let [rows, columns] = matrix.dims();
    let scales = contiguous(scales);
    let y = like_of(&scales, &[rows, columns], dtype);
    let (count, threads) = thread_an_element(rows * columns);
    kernels::decode_blocks::launch(
        &y.client,
        count,
        threads,
        codes.try_into_primitive::<Cube>().expect("a tensor on a GPU").into_buffer_arg(),
        scales.into_buffer_arg(),
        contiguous(values).into_buffer_arg(),
        y.clone().into_buffer_arg(),
        columns as u32,
        matrix.format().row_bytes(columns) as u32,
        columns.div_ceil(BLOCK) as u32,
        matrix.format() == BlockFormat::Nf4,
        element(&y),
    );
    plain(y)
}
