//! Where a model computes: the CPU, or GPUs.

use std::fmt;

use tunesmith_core::hyperparameters::Precision;

use crate::error::EngineError;
use crate::ops;

/// A device that is known to be there.
///
/// The CPU takes the hand-written forms of `ops` (burn's Flex backend, run-time detected SIMD);
/// a GPU takes forms of its own where there are some, and else the portable ones.
#[derive(Clone, PartialEq)]
pub struct Device {
    burn: burn::tensor::Device,
    kind: Kind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Cpu,
    /// The CPU with a GPU's forms.
    Portable,
    #[cfg(feature = "cuda")]
    Cuda(usize),
    #[cfg(feature = "wgpu")]
    Wgpu(usize),
}

impl Device {
    /// The CPU.
    #[must_use]
    pub fn cpu() -> Self {
        Self { burn: burn::tensor::Device::flex(), kind: Kind::Cpu }
    }

    /// The CPU with the portable forms of `ops`, which are a GPU's: slow, and for testing these
    /// where there is no GPU. From here on all models of the process take them.
    fn portable() -> Self {
        crate::ops::take_portable_forms();
        Self { burn: burn::tensor::Device::flex(), kind: Kind::Portable }
    }

    /// Finds the device that `name` asks for: `auto` (the first GPU, or else the CPU), `cpu`,
    /// `cuda` (the first GPU) or `cuda:N`; for tests also `portable`, the CPU with portable forms,
    /// and `wgpu` or `wgpu:N`, whatever computes with a GPU's forms.
    ///
    /// # Errors
    /// [`EngineError::Device`] when the name is none of these, when no such GPU is there, or when
    /// this build has no CUDA.
    pub fn parse(name: &str) -> Result<Self, EngineError> {
        match name {
            "auto" => Ok(Self::cuda(0).unwrap_or_else(|_| Self::cpu())),
            "cpu" => Ok(Self::cpu()),
            "portable" => Ok(Self::portable()),
            _ => {
                let (api, index) = name.split_once(':').unwrap_or((name, "0"));
                match (api, index.parse()) {
                    ("cuda", Ok(index)) => Self::cuda(index),
                    ("wgpu", Ok(index)) => Self::wgpu(index),
                    _ => Err(EngineError::Device(format!(
                        "device {name:?} is unknown: use auto, cpu, cuda or cuda:N"
                    ))),
                }
            }
        }
    }

    /// Finds the devices of a list such as `cuda:0,cuda:1`: one replica of the model each. A
    /// single name is a list of one.
    ///
    /// # Errors
    /// As [`Device::parse`]; and when a GPU is named twice, as its two replicas would only share
    /// its memory.
    pub fn parse_list(names: &str) -> Result<Vec<Self>, EngineError> {
        let devices: Vec<Self> = names.split(',').map(Self::parse).collect::<Result<_, _>>()?;
        let twice = devices
            .iter()
            .enumerate()
            .find(|(index, device)| !device.is_cpu() && devices[..*index].contains(device));
        match twice {
            Some((_, device)) => Err(EngineError::Device(format!(
                "device {device} is named twice in {names:?}: name each GPU once"
            ))),
            None => Ok(devices),
        }
    }

    #[cfg(feature = "cuda")]
    fn cuda(index: usize) -> Result<Self, EngineError> {
        let driver = "check the NVIDIA driver";
        Self::gpu(burn::tensor::DeviceType::Cuda, index, Kind::Cuda(index), "CUDA devices", driver)
    }

    #[cfg(not(feature = "cuda"))]
    fn cuda(index: usize) -> Result<Self, EngineError> {
        Err(not_built("cuda", "CUDA", index))
    }

    #[cfg(feature = "wgpu")]
    fn wgpu(index: usize) -> Result<Self, EngineError> {
        let driver = "check the GPU's driver";
        Self::gpu(burn::tensor::DeviceType::Wgpu, index, Kind::Wgpu(index), "GPUs", driver)
    }

    #[cfg(not(feature = "wgpu"))]
    fn wgpu(index: usize) -> Result<Self, EngineError> {
        Err(not_built("wgpu", "wgpu", index))
    }

    /// Number `index` of the `devices` that an API lists.
    #[cfg(feature = "gpu")]
    fn gpu(
        api: burn::tensor::DeviceType,
        index: usize,
        kind: Kind,
        devices: &str,
        advice: &str,
    ) -> Result<Self, EngineError> {
        use cubecl_environment::stream::{StreamPolicy, set_policy};

        // One stream for all threads of the process. By itself each thread has its own, and a
        // tensor that one changes in place may be read by another before that is done.
        set_policy(StreamPolicy::Single);
        // Listing is the probe: a machine without a driver lists none, while forcing a device
        // that is not there panics in a thread of the runtime.
        let mut found = burn::tensor::Device::enumerate(api).into_vec();
        if index >= found.len() {
            return Err(EngineError::Device(format!(
                "device {kind} was asked for, but {} {devices} were found: {advice}, or use cpu",
                found.len()
            )));
        }
        Ok(Self { burn: found.swap_remove(index), kind })
    }

    /// Whether this is the CPU, whichever forms it takes.
    pub(crate) fn is_cpu(&self) -> bool {
        matches!(self.kind, Kind::Cpu | Kind::Portable)
    }

    /// What `asked` means here, never `Auto`: by itself, bf16 where the device multiplies bf16.
    #[must_use]
    pub fn precision(&self, asked: Precision) -> Precision {
        let multiplies_bf16 = match self.kind {
            Kind::Cpu | Kind::Portable => ops::cpu_multiplies_bf16(),
            #[cfg(feature = "cuda")]
            Kind::Cuda(_) => true,
            #[cfg(feature = "wgpu")]
            Kind::Wgpu(_) => false,
        };
        match asked {
            Precision::Auto if multiplies_bf16 => Precision::Bf16,
            Precision::Auto => Precision::Fp32,
            asked => asked,
        }
    }

    /// Bytes that are free on a GPU; None where it does not say, and on the CPU.
    #[must_use]
    pub(crate) fn free_memory(&self) -> Option<u64> {
        match self.kind {
            Kind::Cpu | Kind::Portable => None,
            #[cfg(feature = "wgpu")]
            Kind::Wgpu(_) => None,
            #[cfg(feature = "cuda")]
            Kind::Cuda(index) => {
                let context = cudarc::driver::CudaContext::new(index).ok()?;
                context.bind_to_thread().ok()?;
                let (free, _) = cudarc::driver::result::mem_get_info().ok()?;
                Some(free as u64)
            }
        }
    }

    /// burn's device, without autodiff.
    pub(crate) fn burn(&self) -> &burn::tensor::Device {
        &self.burn
    }
}

#[cfg(not(all(feature = "cuda", feature = "wgpu")))]
fn not_built(feature: &str, name: &str, index: usize) -> EngineError {
    EngineError::Device(format!(
        "device {feature}:{index} was asked for, but this build has no {name} support: build with \
         `--features {feature}`, or use cpu"
    ))
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Portable => f.write_str("portable"),
            #[cfg(feature = "cuda")]
            Self::Cuda(index) => write!(f, "cuda:{index}"),
            #[cfg(feature = "wgpu")]
            Self::Wgpu(index) => write!(f, "wgpu:{index}"),
        }
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.kind.fmt(f)
    }
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Device({self})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_and_auto_are_found_everywhere() {
        assert_eq!(Device::parse("cpu").unwrap().to_string(), "cpu");
        assert!(Device::parse("auto").is_ok());
    }

    #[test]
    fn list_of_devices_is_read_in_order_and_refused_as_a_whole() {
        assert_eq!(Device::parse_list("cpu,cpu").unwrap(), [Device::cpu(), Device::cpu()]);
        assert_eq!(Device::parse_list("cpu").unwrap().len(), 1);
        for names in ["", "cpu,", "cpu,tpu"] {
            assert!(Device::parse_list(names).is_err(), "{names:?}");
        }
    }

    #[test]
    fn precision_is_what_was_asked_for_or_the_devices_own_choice() {
        let cpu = Device::cpu();
        assert_eq!(cpu.precision(Precision::Fp32), Precision::Fp32);
        assert_eq!(cpu.precision(Precision::Bf16), Precision::Bf16);
        let own = if ops::cpu_multiplies_bf16() { Precision::Bf16 } else { Precision::Fp32 };
        assert_eq!(cpu.precision(Precision::Auto), own);
    }

    #[test]
    fn unknown_name_is_refused_with_the_choices() {
        let message = Device::parse("tpu").unwrap_err().to_string();
        assert!(message.contains("\"tpu\"") && message.contains("cuda:N"), "{message}");
    }

    #[test]
    fn gpu_that_is_not_there_is_refused_by_number() {
        let message = Device::parse("cuda:63").unwrap_err().to_string();
        assert!(message.contains("cuda:63"), "{message}");
    }
}
