//! The types that a model is computed in.

use crate::ops::gemm::{ResultOf, Shape, gemm_nt, gemm_tn};
use crate::runtime::{Error, Stream, View, ViewMut};
use half::bf16;
use hearth_kernels::cpu::update::CopyOut;

/// A type that forward and backward passes are computed in. Sums, gradients of weights and masters are f32 always.
pub trait Compute: ResultOf<Self> {
    /// Whether masters lie beside the weights; otherwise they are the weights.
    const APART: bool;

    /// `y = a·bᵀ`: logits.
    ///
    /// # Errors
    /// As [`gemm_nt`].
    fn logits(
        stream: &Stream,
        a: View<'_, Self>,
        b: View<'_, Self>,
        shape: Shape,
        y: ViewMut<'_, f32>,
    ) -> Result<(), Error>;

    /// `y += aᵀ·b`: gradients of weights.
    ///
    /// # Errors
    /// As [`gemm_tn`].
    fn weight_gradient(
        stream: &Stream,
        a: View<'_, Self>,
        b: View<'_, Self>,
        shape: Shape,
        y: ViewMut<'_, f32>,
    ) -> Result<(), Error>;

    /// The nearest number of this type.
    fn round(x: f32) -> Self;

    /// Where an update on the host writes weights.
    fn copy_out(weights: &mut [Self]) -> CopyOut<'_>;
}

macro_rules! products {
    () => {
        fn logits(
            stream: &Stream,
            a: View<'_, Self>,
            b: View<'_, Self>,
            shape: Shape,
            y: ViewMut<'_, f32>,
        ) -> Result<(), Error> {
            gemm_nt(stream, a, b, shape, false, y)
        }

        fn weight_gradient(
            stream: &Stream,
            a: View<'_, Self>,
            b: View<'_, Self>,
            shape: Shape,
            y: ViewMut<'_, f32>,
        ) -> Result<(), Error> {
            gemm_tn(stream, a, b, shape, true, y)
        }
    };
}

impl Compute for f32 {
    const APART: bool = false;
    products!();

    fn round(x: f32) -> f32 {
        x
    }

    fn copy_out(weights: &mut [f32]) -> CopyOut<'_> {
        CopyOut::F32(weights)
    }
}

impl Compute for bf16 {
    const APART: bool = true;
    products!();

    fn round(x: f32) -> bf16 {
        bf16::from_f32(x)
    }

    fn copy_out(weights: &mut [bf16]) -> CopyOut<'_> {
        CopyOut::Bf16(weights)
    }
}
