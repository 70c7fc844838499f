//! The device that tests compute on, for the tests in here and those beside the code.

use tunesmith_engine::Device;

/// The device that `TUNESMITH_TEST_DEVICE` names, `cpu` unless it is set. `cuda` or `cuda:N` runs
/// the suite on a GPU; `portable` runs the portable forms on the CPU, and `wgpu` a GPU's kernels where
/// there is any driver for them.
pub(crate) fn test_device() -> Device {
    Device::parse(&test_device_name()).unwrap()
}

/// Its name, as a request has it.
pub(crate) fn test_device_name() -> String {
    std::env::var("TUNESMITH_TEST_DEVICE").unwrap_or_else(|_| "cpu".to_owned())
}
