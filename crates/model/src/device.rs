//! The one place that opens a device.

use crate::Error;
use burn::tensor::Device;

/// Opens `cpu` or, in builds with the `cuda` feature, `cuda` / `cuda:N`.
///
/// # Errors
/// [`Error::Device`] for an unknown name, a build without CUDA, or a machine without its driver.
pub fn open(name: &str) -> Result<Device, Error> {
    let refuse = |why: &str| Err(Error::Device { name: name.into(), why: why.into() });
    match name.split_once(':').unwrap_or((name, "0")) {
        ("cpu", "0") => Ok(Device::flex()),
        ("cuda", index) => match index.parse::<usize>() {
            Ok(index) => open_cuda(name, index),
            Err(_) => refuse("the card's number must be a whole number, as in `cuda:0`"),
        },
        _ => refuse("unknown; use `cpu`, or `cuda:0` in a build with `--features cuda`"),
    }
}

#[cfg(feature = "cuda")]
fn open_cuda(name: &str, index: usize) -> Result<Device, Error> {
    // A missing driver would panic inside the bindings: ask first.
    if !hearth_kernels::cuda::driver_present() {
        let why = "no NVIDIA driver (libcuda.so) on this machine; use `cpu`".into();
        return Err(Error::Device { name: name.into(), why });
    }
    Ok(Device::cuda(index))
}

#[cfg(not(feature = "cuda"))]
fn open_cuda(name: &str, _: usize) -> Result<Device, Error> {
    let why = "this build has no CUDA; build with `--features cuda`, or use `cpu`".into();
    Err(Error::Device { name: name.into(), why })
}

#[cfg(test)]
mod tests {
    #[test]
    fn unknown_devices_are_refused_with_a_sentence() {
        for name in ["", "tpu", "cpu:1", "cuda:x", "cuda:-1"] {
            let error = super::open(name).expect_err(name).to_string();
            assert!(error.starts_with(&format!("device `{name}`")), "{error}");
        }
    }
}
