//! What stands between the matrices of an MLP: SiLU and GELU, by themselves or as a gate.

use super::simd::{exp, sigmoid};
use super::{rows_per_task, written};
use crate::multiversion;
use rayon::prelude::*;
use std::mem::MaybeUninit;

/// A smooth step times its input.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Activation {
    /// `x / (1 + e^−x)`.
    Silu,
    /// `x · Φ(x)` with the normal distribution's Φ (arXiv 1606.08415).
    Gelu,
    /// The same paper's approximation, `x/2 · (1 + tanh(√(2/π)·(x + 0.044715 x³)))`.
    GeluTanh,
}

impl Activation {
    /// Every one of them.
    pub const ALL: [Activation; 3] = [Activation::Silu, Activation::Gelu, Activation::GeluTanh];
}

/// Runs an expression for the curve of an activation, compiled for each.
macro_rules! by_curve {
    ($activation:expr, |$curve:ident| $body:expr) => {
        match $activation {
            Activation::Silu => {
                let $curve = Silu;
                $body
            }
            Activation::Gelu => {
                let $curve = Gelu;
                $body
            }
            Activation::GeluTanh => {
                let $curve = GeluTanh;
                $body
            }
        }
    };
}

/// `f(x)`, elementwise.
pub fn activate(activation: Activation, x: &[f32]) -> Vec<f32> {
    let task = rows_per_task(x.len(), 1);
    // SAFETY: every chunk is written.
    unsafe {
        written(x.len(), |y| {
            y.par_chunks_mut(task)
                .zip(x.par_chunks(task))
                .for_each(|(y, x)| by_curve!(activation, |curve| activate_chunk(curve, x, y)));
        })
    }
}

multiversion! {
    fn activate_chunk<C: Curve>(curve: C, x: &[f32], y: &mut [MaybeUninit<f32>]) {
        for (y, x) in y.iter_mut().zip(x) {
            y.write(curve.value(*x));
        }
    }
}

/// Gradient of [`activate`].
pub fn activate_backward(activation: Activation, x: &[f32], dy: &[f32]) -> Vec<f32> {
    assert_eq!(x.len(), dy.len(), "activation: lengths");
    let task = rows_per_task(x.len(), 1);
    // SAFETY: every chunk is written.
    unsafe {
        written(x.len(), |dx| {
            dx.par_chunks_mut(task)
                .zip(x.par_chunks(task).zip(dy.par_chunks(task)))
                .for_each(|(dx, (x, dy))| by_curve!(activation, |curve| activate_dx(curve, x, dy, dx)));
        })
    }
}

multiversion! {
    fn activate_dx<C: Curve>(curve: C, x: &[f32], dy: &[f32], dx: &mut [MaybeUninit<f32>]) {
        for i in 0..dy.len() {
            dx[i].write(dy[i] * curve.value_and_slope(x[i]).1);
        }
    }
}

/// `y = f(gate) · up`.
pub fn gated(activation: Activation, gate: &[f32], up: &[f32]) -> Vec<f32> {
    assert_eq!(gate.len(), up.len(), "gate: lengths");
    let task = rows_per_task(gate.len(), 1);
    // SAFETY: every chunk is written.
    unsafe {
        written(gate.len(), |y| {
            y.par_chunks_mut(task)
                .zip(gate.par_chunks(task).zip(up.par_chunks(task)))
                .for_each(|(y, (gate, up))| by_curve!(activation, |curve| gated_chunk(curve, gate, up, y)));
        })
    }
}

multiversion! {
    fn gated_chunk<C: Curve>(curve: C, gate: &[f32], up: &[f32], y: &mut [MaybeUninit<f32>]) {
        for ((y, g), u) in y.iter_mut().zip(gate).zip(up) {
            y.write(curve.value(*g) * u);
        }
    }
}

/// [`gated`] in place of `gate`, on the calling thread.
pub fn gated_in_place(activation: Activation, gate: &mut [f32], up: &[f32]) {
    by_curve!(activation, |curve| gated_over(curve, gate, up));
}

multiversion! {
    fn gated_over<C: Curve>(curve: C, gate: &mut [f32], up: &[f32]) {
        for (g, u) in gate.iter_mut().zip(up) {
            *g = curve.value(*g) * u;
        }
    }
}

/// Gradients of [`gated`]: of `gate` and of `up`.
pub fn gated_backward(activation: Activation, gate: &[f32], up: &[f32], dy: &[f32]) -> (Vec<f32>, Vec<f32>) {
    assert!(gate.len() == up.len() && gate.len() == dy.len(), "gate: lengths");
    let task = rows_per_task(dy.len(), 1);
    let mut dup = Vec::new();
    // SAFETY: every chunk of both is written.
    let dgate = unsafe {
        written(dy.len(), |dgate| {
            dup = written(dy.len(), |dup| {
                dgate
                    .par_chunks_mut(task)
                    .zip(dup.par_chunks_mut(task))
                    .zip(gate.par_chunks(task).zip(up.par_chunks(task)).zip(dy.par_chunks(task)))
                    .for_each(|((dgate, dup), ((gate, up), dy))| {
                        by_curve!(activation, |curve| gated_gradients(curve, gate, up, dy, dgate, dup));
                    });
            });
        })
    };
    (dgate, dup)
}

multiversion! {
    fn gated_gradients<C: Curve>(curve: C, gate: &[f32], up: &[f32], dy: &[f32], dgate: &mut [MaybeUninit<f32>], dup: &mut [MaybeUninit<f32>]) {
        for i in 0..dy.len() {
            let (of_gate, of_up) = curve.gate_gradients(gate[i], up[i], dy[i]);
            dgate[i].write(of_gate);
            dup[i].write(of_up);
        }
    }
}

/// An activation as a type, so that loops are compiled for it.
trait Curve: Copy + Send + Sync {
    fn value(self, x: f32) -> f32;

    /// Value and derivative.
    fn value_and_slope(self, x: f32) -> (f32, f32);

    /// Gradients of `value(gate) · up`.
    #[inline(always)]
    fn gate_gradients(self, gate: f32, up: f32, dy: f32) -> (f32, f32) {
        let (value, slope) = self.value_and_slope(gate);
        (dy * up * slope, dy * value)
    }
}

#[derive(Clone, Copy)]
struct Silu;
#[derive(Clone, Copy)]
struct Gelu;
#[derive(Clone, Copy)]
struct GeluTanh;

impl Curve for Silu {
    #[inline(always)]
    fn value(self, x: f32) -> f32 {
        x * sigmoid(x)
    }

    #[inline(always)]
    fn value_and_slope(self, x: f32) -> (f32, f32) {
        let s = sigmoid(x);
        (x * s, s * (1.0 + x * (1.0 - s)))
    }

    /// In the order of the CUDA kernel, which has the same bits.
    #[inline(always)]
    fn gate_gradients(self, gate: f32, up: f32, dy: f32) -> (f32, f32) {
        let s = sigmoid(gate);
        (dy * up * s * (1.0 + gate * (1.0 - s)), dy * gate * s)
    }
}

impl Gelu {
    /// `Φ(x)` and `e^(−x²/2)`.
    ///
    /// `Φ(−a) = e^(−a²/2) · erfcx(a/√2) / 2`, and `erfcx` is a polynomial in `t = 1/(1 + 0.35 a)` without constant term,
    /// fitted for `0 ≤ a ≤ 13.2` to a relative error of 3e-8.
    #[inline(always)]
    fn distribution(x: f32) -> (f32, f32) {
        let a = x.abs();
        let e = exp(-0.5 * a * a);
        let t = 1.0 / 0.35_f32.mul_add(a, 1.0);
        let mut p = -0.058_217_987_f32;
        p = p.mul_add(t, 0.287_577_03);
        p = p.mul_add(t, -0.510_655_7);
        p = p.mul_add(t, 0.317_445_22);
        p = p.mul_add(t, -0.045_582_265);
        p = p.mul_add(t, 0.210_738_69);
        p = p.mul_add(t, 0.239_738_1);
        p = p.mul_add(t, 0.279_713_42);
        p = p.mul_add(t, 0.279_243_4);
        let below = 0.5 * e * (p * t);
        (if x > 0.0 { 1.0 - below } else { below }, e)
    }
}

impl Curve for Gelu {
    #[inline(always)]
    fn value(self, x: f32) -> f32 {
        x * Self::distribution(x).0
    }

    #[inline(always)]
    fn value_and_slope(self, x: f32) -> (f32, f32) {
        /// `1/√(2π)`.
        const DENSITY_AT_0: f32 = 0.398_942_3;
        let (phi, e) = Self::distribution(x);
        (x * phi, (x * DENSITY_AT_0).mul_add(e, phi))
    }
}

/// The tanh form is `x · sigmoid(x·(SLOPE + CUBE·x²))`: `(1 + tanh z)/2 = sigmoid(2z)`. `2·√(2/π)`.
const SLOPE: f32 = 1.595_769_2;
/// `0.044715 · SLOPE`.
const CUBE: f32 = 0.071_354_814;
/// From here on the step is 0 or 1; larger cubes would overflow.
const SATURATED: f32 = 12.0;

impl Curve for GeluTanh {
    #[inline(always)]
    fn value(self, x: f32) -> f32 {
        let c = x.clamp(-SATURATED, SATURATED);
        x * sigmoid(c * CUBE.mul_add(c * c, SLOPE))
    }

    #[inline(always)]
    fn value_and_slope(self, x: f32) -> (f32, f32) {
        let c = x.clamp(-SATURATED, SATURATED);
        let s = sigmoid(c * CUBE.mul_add(c * c, SLOPE));
        let steepness = (3.0 * CUBE).mul_add(c * c, SLOPE);
        (x * s, s * (1.0 + x * (1.0 - s) * steepness))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Φ(x) by Simpson's rule over the density, in f64.
    fn phi(x: f64) -> f64 {
        let density = |t: f64| (-t * t / 2.0).exp() / (2.0 * std::f64::consts::PI).sqrt();
        let (n, a) = (2000, x.abs());
        let h = a / n as f64;
        let weight = |i: usize| if i == 0 || i == n { 1.0 } else { 2.0 + 2.0 * (i % 2) as f64 };
        let half: f64 = (0..=n).map(|i| weight(i) * density(i as f64 * h)).sum::<f64>() * h / 3.0;
        0.5 + half.copysign(x)
    }

    #[test]
    fn gelu_is_within_1e_7_of_f64() {
        for i in -800..=800 {
            let x = i as f32 / 100.0;
            let want = f64::from(x) * phi(f64::from(x));
            let got = f64::from(activate(Activation::Gelu, &[x])[0]);
            assert!((got - want).abs() <= 1e-7 * (1.0 + want.abs()), "gelu({x}) = {got}, want {want}");
        }
    }

    #[test]
    fn far_out_an_activation_is_its_input_or_nothing_and_its_slope_one_or_nothing() {
        for activation in Activation::ALL {
            for x in [90.0, 1e6, 1e19, 1e30] {
                assert_eq!(activate(activation, &[x]), [x], "{activation:?} {x}");
                assert_eq!(activate_backward(activation, &[x], &[1.0]), [1.0], "{activation:?} {x}");
                let below = [activate(activation, &[-x])[0], activate_backward(activation, &[-x], &[1.0])[0]];
                assert!(below.iter().all(|y| y.abs() < 1e-6), "{activation:?} {x}: {below:?}");
            }
            assert_eq!(activate(activation, &[0.0]), [0.0]);
            assert!(activate(activation, &[f32::NAN])[0].is_nan());
        }
    }
}
