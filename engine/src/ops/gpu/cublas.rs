//! Large products by NVIDIA's cuBLAS, where its library is installed: a few times as fast as kernels
//! that are made for any GPU.
//!
//! cuBLAS works on a stream of its own, and burn does not give its own away. So a product waits until
//! the device has done what came before it, and is itself waited for: tens of microseconds, for
//! products of hundreds. Smaller ones stay on burn's stream.

#![expect(unsafe_code, reason = "cuBLAS takes pointers to the device's memory")]

use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};

use burn::tensor::DType;
use burn_cubecl::CubeDevice;
use burn_cubecl::cubecl::cuda::CudaRuntime;
use burn_cubecl::tensor::CubeTensor;
use cubecl_runtime::runtime::Runtime;
use cudarc::cublas::result::{create_handle, gemm_ex, set_stream};
use cudarc::cublas::sys;
use cudarc::driver::{CudaContext, CudaStream};

/// Multiplications of a product from which on waiting is worth it.
const LARGE: usize = 1 << 33;

/// A device's library.
struct Library {
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    handle: sys::cublasHandle_t,
}

// SAFETY: a handle may move between threads, as long as one at a time uses it: it is behind a lock.
unsafe impl Send for Library {}

/// By the device's number; None where there is no library.
static LIBRARIES: LazyLock<Mutex<HashMap<usize, Option<Library>>>> = LazyLock::new(Mutex::default);

impl Library {
    fn load(device: usize) -> Option<Self> {
        // SAFETY: looks for the library and loads it.
        if !unsafe { sys::is_culib_present() } {
            tracing::info!("cuBLAS is not installed: products take kernels that any GPU runs");
            return None;
        }
        let context = CudaContext::new(device).ok()?;
        let stream = context.new_stream().ok()?;
        let handle = create_handle().ok()?;
        // SAFETY: both were just made, for this context.
        unsafe { set_stream(handle, stream.cu_stream().cast()) }.ok()?;
        Some(Self { context, stream, handle })
    }
}

/// How an operand lies in memory, as cuBLAS names it for the transposed product: it knows columns.
struct Operand {
    operation: sys::cublasOperation_t,
    /// Elements from one row, or else one column, to the next.
    stride: i32,
    kind: sys::cudaDataType,
}

impl Operand {
    fn of(x: &CubeTensor) -> Option<Self> {
        let (operation, stride) = match x.meta.strides()[..] {
            [stride, 1] => (sys::cublasOperation_t::CUBLAS_OP_N, stride),
            [1, stride] => (sys::cublasOperation_t::CUBLAS_OP_T, stride),
            _ => return None,
        };
        let kind = match x.dtype {
            DType::F32 => sys::cudaDataType::CUDA_R_32F,
            DType::BF16 => sys::cudaDataType::CUDA_R_16BF,
            _ => return None,
        };
        Some(Self { operation, stride: i32::try_from(stride).ok()?, kind })
    }
}

/// Writes a·b to `y`, `[m, k]` by `[k, n]`; false where this is not for cuBLAS, or where it fails.
pub(super) fn multiply(a: &CubeTensor, b: &CubeTensor, y: &CubeTensor) -> bool {
    multiplied(a, b, y).is_some()
}

fn multiplied(a: &CubeTensor, b: &CubeTensor, y: &CubeTensor) -> Option<()> {
    let ([m, k], [_, n]) = (matrix(a)?, matrix(b)?);
    let CubeDevice::Cuda(device) = &y.device else { return None };
    if m * n * k < LARGE {
        return None;
    }
    let [of_a, of_b, of_y] = [Operand::of(a)?, Operand::of(b)?, Operand::of(y)?];
    let mut libraries = LIBRARIES.lock().unwrap_or_else(PoisonError::into_inner);
    let library = libraries.entry(device.index).or_insert_with(|| Library::load(device.index));
    let library = library.as_ref()?;

    // Memory that is not given to others while this is there; what writes it is on burn's stream.
    let memory = |x: &CubeTensor| {
        x.client.get_resource::<<CudaRuntime as Runtime>::Server>(x.handle.clone()).ok()
    };
    let [a_memory, b_memory, y_memory] = [memory(a)?, memory(b)?, memory(y)?];
    library.context.synchronize().ok()?;
    let [alpha, beta] = [1f32, 0f32];
    let pointer = |scalar: &f32| std::ptr::from_ref(scalar).cast::<c_void>();
    // SAFETY: the operands' memory holds their elements as the strides say, and is kept until the
    // product is done; the device has written it. The scalars are on the host, as f32.
    let asked = unsafe {
        gemm_ex(
            library.handle,
            of_b.operation,
            of_a.operation,
            i32::try_from(n).ok()?,
            i32::try_from(m).ok()?,
            i32::try_from(k).ok()?,
            pointer(&alpha),
            b_memory.resource().ptr as *const c_void,
            of_b.kind,
            of_b.stride,
            a_memory.resource().ptr as *const c_void,
            of_a.kind,
            of_a.stride,
            pointer(&beta),
            y_memory.resource().ptr as *mut c_void,
            of_y.kind,
            of_y.stride,
            // f32 is multiplied as f32: tf32 is another of these.
            sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
            sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
        )
    };
    library.stream.synchronize().ok()?;
    asked.ok()
}

/// Rows and columns, of a matrix.
fn matrix(x: &CubeTensor) -> Option<[usize; 2]> {
    x.meta.shape().as_slice().try_into().ok()
}
