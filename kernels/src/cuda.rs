//! CUDA at run time.

/// Whether the NVIDIA driver library can be loaded. Ask before opening a CUDA device: the bindings panic without.
pub fn driver_present() -> bool {
    // SAFETY: only looks the library up; it calls nothing in it.
    unsafe { cudarc::driver::sys::is_culib_present() }
}
