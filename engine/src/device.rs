//! Where a model computes: the CPU, or one CUDA GPU.

use std::fmt;

use crate::error::EngineError;

/// A device that is known to be there.
///
/// The CPU takes the hand-written forms of `ops` (burn's Flex backend, run-time detected SIMD);
/// a GPU takes the portable forms.
#[derive(Clone, PartialEq)]
pub struct Device {
    burn: burn::tensor::Device,
    kind: Kind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Cpu,
    #[cfg(feature = "cuda")]
    Cuda(usize),
}

impl Device {
    /// The CPU.
    #[must_use]
    pub fn cpu() -> Self {
        Self { burn: burn::tensor::Device::flex(), kind: Kind::Cpu }
    }

    /// Finds the device that `name` asks for: `auto` (the first GPU, or else the CPU), `cpu`,
    /// `cuda` (the first GPU) or `cuda:N`.
    ///
    /// # Errors
    /// [`EngineError::Device`] when the name is none of these, when no such GPU is there, or when
    /// this build has no CUDA.
    pub fn parse(name: &str) -> Result<Self, EngineError> {
        match name {
            "auto" => Ok(Self::cuda(0).unwrap_or_else(|_| Self::cpu())),
            "cpu" => Ok(Self::cpu()),
            "cuda" => Self::cuda(0),
            _ => name
                .strip_prefix("cuda:")
                .and_then(|index| index.parse().ok())
                .map(Self::cuda)
                .unwrap_or_else(|| {
                    Err(EngineError::Device(format!(
                        "device {name:?} is unknown: use auto, cpu, cuda or cuda:N"
                    )))
                }),
        }
    }

    #[cfg(feature = "cuda")]
    fn cuda(index: usize) -> Result<Self, EngineError> {
        use burn::tensor::DeviceType;

        // Listing is the probe: a machine without a driver lists none, while forcing a device
        // that is not there panics in a thread of the runtime.
        let count = burn::tensor::Device::enumerate(DeviceType::Cuda).into_vec().len();
        if index >= count {
            return Err(EngineError::Device(format!(
                "device cuda:{index} was asked for, but {count} CUDA devices were found: \
                 check the NVIDIA driver, or use cpu"
            )));
        }
        Ok(Self { burn: burn::tensor::Device::cuda(index), kind: Kind::Cuda(index) })
    }

    #[cfg(not(feature = "cuda"))]
    fn cuda(index: usize) -> Result<Self, EngineError> {
        Err(EngineError::Device(format!(
            "device cuda:{index} was asked for, but this build has no CUDA support: \
             build with `--features cuda`, or use cpu"
        )))
    }

    /// burn's device, without autodiff.
    pub(crate) fn burn(&self) -> &burn::tensor::Device {
        &self.burn
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.kind {
            Kind::Cpu => f.write_str("cpu"),
            #[cfg(feature = "cuda")]
            Kind::Cuda(index) => write!(f, "cuda:{index}"),
        }
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
