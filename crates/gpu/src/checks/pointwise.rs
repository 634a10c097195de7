//! RMSNorm, RoPE, SwiGLU, sums, dropout, embeddings.

use super::values::{Number, agree, close, near, numbers, same, wide};
use super::{Failure, On};
use half::{bf16, f16};
use hearth_cuda::ops::embedding::{Groups, gather_rows, scatter_rows};
use hearth_cuda::ops::norm::{rms_norm, rms_norm_backward_parts, rms_norm_backward_w, rms_norm_backward_x};
use hearth_cuda::ops::pointwise as ops;
use hearth_kernels::cpu::{activation, pointwise as cpu, rope as cpu_rope};
use hearth_kernels::{Activation, RotaryTable};

const EPS: f32 = 1e-5;

/// A check for each type of numbers.
macro_rules! each_type {
    ($one:ident, $on:expr) => {
        $one::<f32>($on).and_then(|()| $one::<bf16>($on)).and_then(|()| $one::<f16>($on))
    };
}

pub fn norms(on: &On) -> Result<(), Failure> {
    each_type!(norm, on)
}

fn norm<T: Number>(on: &On) -> Result<(), Failure> {
    for (rows, d) in [(3, 67), (130, 64)] {
        let (x, w, dy) = (numbers::<T>(1, rows * d), numbers::<T>(2, d), numbers::<T>(3, rows * d));
        let (on_x, on_w, on_dy) = (on.up(&x)?, on.up(&w)?, on.up(&dy)?);
        let mut y = on.room::<T>(rows * d)?;
        rms_norm(&on.stream, on_x.all(), on_w.all(), EPS, y.all_mut())?;
        let (x, w) = (wide(&x), wide(&w));
        close("y", &on.down(&y)?, &cpu::rms_norm(&x, &w, EPS))?;
        let (mut dx, mut inverse) = (on.room::<T>(rows * d)?, on.room::<f32>(rows)?);
        let mut parts = on.room::<f32>(rms_norm_backward_parts(rows, d))?;
        let mut dw = on.up(&vec![1f32; d])?;
        let (x_view, dy_view) = (on_x.all(), on_dy.all());
        let out = (dx.all_mut(), inverse.all_mut());
        rms_norm_backward_x(&on.stream, x_view, on_w.all(), EPS, dy_view, out.0, out.1)?;
        rms_norm_backward_w(&on.stream, x_view, dy_view, inverse.all(), parts.all_mut(), dw.all_mut())?;
        let (want_dx, want_dw) = cpu::rms_norm_backward(&x, &w, EPS, &wide(&dy));
        close("dx", &on.down(&dx)?, &want_dx)?;
        let want_dw: Vec<f32> = want_dw.iter().map(|x| 1.0 + x).collect();
        near("dw, added to what was there", &on.down(&dw)?, &want_dw, 2e-5)?;
    }
    Ok(())
}

pub fn rope(on: &On) -> Result<(), Failure> {
    each_type!(rotated, on)
}

fn rotated<T: Number>(on: &On) -> Result<(), Failure> {
    for (rows, heads, half) in [(3, 5, 8), (2, 3, 7)] {
        let x = numbers::<T>(1, rows * heads * 2 * half);
        let angles = numbers::<f32>(2, rows * half);
        let cos: Vec<f32> = angles.iter().map(|a| a.cos()).collect();
        let sin: Vec<f32> = angles.iter().map(|a| a.sin()).collect();
        let (on_cos, on_sin) = (on.up(&cos)?, on.up(&sin)?);
        let table = RotaryTable::new(half, cos, sin);
        for inverse in [false, true] {
            let mut y = on.up(&x)?;
            let by = ops::Rotations { cos: on_cos.all(), sin: on_sin.all(), half };
            ops::rope(&on.stream, y.all_mut(), heads, by, inverse)?;
            agree("y", &on.down(&y)?, &cpu_rope::rope(&wide(&x), heads, &table, inverse))?;
        }
    }
    Ok(())
}

pub fn swiglu(on: &On) -> Result<(), Failure> {
    each_type!(gated, on)
}

fn gated<T: Number>(on: &On) -> Result<(), Failure> {
    for n in [1037, 4096] {
        let scaled =
            |seed| -> Vec<T> { wide(&numbers::<T>(seed, n)).iter().map(|x| T::of(4.0 * x)).collect() };
        let (gate, up, dy) = (scaled(1), scaled(2), scaled(3));
        let (on_gate, on_up, on_dy) = (on.up(&gate)?, on.up(&up)?, on.up(&dy)?);
        let (mut y, mut dgate, mut dup) = (on.room::<T>(n)?, on.room::<T>(n)?, on.room::<T>(n)?);
        ops::swiglu(&on.stream, on_gate.all(), on_up.all(), y.all_mut())?;
        let out = (dgate.all_mut(), dup.all_mut());
        ops::swiglu_backward(&on.stream, on_gate.all(), on_up.all(), on_dy.all(), out.0, out.1)?;
        let (gate, up) = (wide(&gate), wide(&up));
        agree("y", &on.down(&y)?, &activation::gated(Activation::Silu, &gate, &up))?;
        let (want_gate, want_up) = activation::gated_backward(Activation::Silu, &gate, &up, &wide(&dy));
        agree("dgate", &on.down(&dgate)?, &want_gate)?;
        agree("dup", &on.down(&dup)?, &want_up)?;
    }
    Ok(())
}

pub fn add(on: &On) -> Result<(), Failure> {
    each_type!(added, on)
}

fn added<T: Number>(on: &On) -> Result<(), Failure> {
    for (rows, period) in [(1, 67), (5, 24), (3, 7)] {
        let (x, y) = (numbers::<T>(1, period), numbers::<T>(2, rows * period));
        let (on_x, mut on_y) = (on.up(&x)?, on.up(&y)?);
        ops::add(&on.stream, on_x.all(), on_y.all_mut())?;
        let want: Vec<f32> = y.iter().zip(x.iter().cycle()).map(|(y, x)| y.wide() + x.wide()).collect();
        agree("y", &on.down(&on_y)?, &want)?;
    }
    Ok(())
}

pub fn dropout(on: &On) -> Result<(), Failure> {
    each_type!(dropped, on)
}

fn dropped<T: Number>(on: &On) -> Result<(), Failure> {
    let (n, p, key) = (1037, 0.3, 0x5eed);
    let x = numbers::<T>(1, n);
    let (on_x, mut y) = (on.up(&x)?, on.room::<T>(n)?);
    ops::dropout(&on.stream, on_x.all(), p, key, y.all_mut())?;
    let mut want = vec![0.0; n];
    cpu::dropout(&wide(&x), n, p, key, &mut want);
    agree("y", &on.down(&y)?, &want)
}

pub fn embedding(on: &On) -> Result<(), Failure> {
    each_type!(looked_up, on)
}

fn looked_up<T: Number>(on: &On) -> Result<(), Failure> {
    let (vocab, d, ids) = (11, 37, [3u32, 0, 3, 10, 0, 3]);
    let (w, dy) = (numbers::<T>(1, vocab * d), numbers::<T>(2, ids.len() * d));
    let (on_w, on_ids, on_dy) = (on.up(&w)?, on.up(&ids)?, on.up(&dy)?);
    let mut y = on.room::<T>(ids.len() * d)?;
    gather_rows(&on.stream, on_w.all(), d, on_ids.all(), y.all_mut())?;
    let want: Vec<f32> = ids.iter().flat_map(|&id| wide(&w[id as usize * d..][..d])).collect();
    same("y", &wide(&on.down(&y)?), &want)?;
    let (rows, starts, of) =
        (on.up(&[1u32, 4, 0, 2, 5, 3])?, on.up(&[0u32, 2, 5, 6])?, on.up(&[0u32, 3, 10])?);
    let mut dw = on.up(&vec![0f32; vocab * d])?;
    let groups = Groups { rows: rows.all(), starts: starts.all(), ids: of.all() };
    scatter_rows(&on.stream, on_dy.all(), d, groups, dw.all_mut())?;
    let mut want = vec![0.0; vocab * d];
    cpu::embedding_backward(&wide(&dy), &ids, d, &mut want);
    same("dw", &on.down(&dw)?, &want)
}
