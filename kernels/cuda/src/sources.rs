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
    source!("add.cu"),
    source!("attention.cu"),
    source!("attention_paged.cu"),
    source!("cast.cu"),
    source!("cross_entropy.cu"),
    source!("dequantize.cu"),
    source!("dropout.cu"),
    source!("embedding.cu"),
    source!("gemm.cu"),
    source!("quant_gemm.cu"),
    source!("quant_gemv.cu"),
    source!("quantize_rows.cu"),
    source!("rms_norm.cu"),
    source!("rope.cu"),
    source!("sampling.cu"),
    source!("squares.cu"),
    source!("swiglu.cu"),
];

/// Files that those include.
pub static HEADERS: &[Source] =
    &[source!("formats.cuh"), source!("prelude.cuh"), source!("tensor.cuh"), source!("tile.cuh")];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_file_is_carried() {
        let folder = std::fs::read_dir(env!("CARGO_MANIFEST_DIR")).expect("this crate's folder");
        let mut found: Vec<String> =
            folder.flatten().map(|e| e.file_name().to_string_lossy().into_owned()).collect();
        found.retain(|name| name.ends_with(".cu") || name.ends_with(".cuh"));
        found.sort();
        let mut carried: Vec<&str> = SOURCES.iter().chain(HEADERS).map(|source| source.name).collect();
        carried.sort_unstable();
        assert_eq!(found, carried);
    }
}
