//! The kernels' sources. A new file is one line here.

/// A file of kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Source {
    /// File name.
    pub name: &'static str,
    /// CUDA C++.
    pub text: &'static str,
}

macro_rules! source {
    ($name:literal) => {
        Source { name: $name, text: include_str!(concat!("../", $name)) }
    };
}

/// Files with kernels.
pub static SOURCES: &[Source] = &[source!("rms_norm.cu")];

/// Files that those include.
pub static HEADERS: &[Source] = &[source!("prelude.cuh")];
