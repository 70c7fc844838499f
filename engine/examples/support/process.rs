//! What the operating system knows of this process's memory; Linux only.

use std::io;

/// Peak resident memory in MiB since the process started, or since [`reset_peak`]: `VmHWM`.
pub(crate) fn peak_mib() -> io::Result<f64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let kib = status
        .lines()
        .find_map(|line| {
            line.strip_prefix("VmHWM:")?.split_whitespace().next()?.parse::<f64>().ok()
        })
        .ok_or_else(|| io::Error::other("/proc/self/status has no VmHWM"))?;
    Ok(kib / 1024.0)
}

/// Lets the peak count anew from what is resident now.
pub(crate) fn reset_peak() -> io::Result<()> {
    std::fs::write("/proc/self/clear_refs", "5")
}
