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
pub static SOURCES: &[Source] = &[
    source!("adamw.cu"),
    source!("cast.cu"),
    source!("dropout.cu"),
    source!("embedding.cu"),
    source!("rms_norm.cu"),
    source!("rope.cu"),
    source!("squares.cu"),
    source!("swiglu.cu"),
];

/// Files that those include.
pub static HEADERS: &[Source] = &[source!("prelude.cuh")];
