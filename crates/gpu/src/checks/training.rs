//! An optimizer step, and sampling.

use super::values::{Number, numbers, same, wide};
use super::{Failure, On};
use half::{bf16, f16};
use hearth_cuda::ops::optimizer::{self as ops, CastTo, State};
use hearth_cuda::ops::sampling::{Sampling, sample};
use hearth_kernels::cpu::adamw::{self, AdamWRule};
use hearth_kernels::cpu::update::{CopyOut, Span, Values};

/// A type of state, on the CPU.
trait Held: State + Number {
    fn values(of: &mut [Self]) -> Values<'_>;
}
impl Held for f32 {
    fn values(of: &mut [Self]) -> Values<'_> {
        Values::F32(of)
    }
}
impl Held for bf16 {
    fn values(of: &mut [Self]) -> Values<'_> {
        Values::Bf16(of)
    }
}

/// A type of copy, on the CPU.
trait Copied: Number {
    fn copy(of: &mut [Self]) -> CopyOut<'_>;
}
impl Copied for f32 {
    fn copy(of: &mut [Self]) -> CopyOut<'_> {
        CopyOut::F32(of)
    }
}
impl Copied for bf16 {
    fn copy(of: &mut [Self]) -> CopyOut<'_> {
        CopyOut::Bf16(of)
    }
}
impl Copied for f16 {
    fn copy(of: &mut [Self]) -> CopyOut<'_> {
        CopyOut::F16(of)
    }
}

pub fn adamw(on: &On) -> Result<(), Failure> {
    fn copies<M: Held, V: Held>(on: &On) -> Result<(), Failure> {
        updated::<M, V, f32>(on, true)?;
        updated::<M, V, bf16>(on, true)?;
        updated::<M, V, f16>(on, true)?;
        updated::<M, V, f32>(on, false)
    }
    copies::<f32, f32>(on)?;
    copies::<f32, bf16>(on)?;
    copies::<bf16, f32>(on)?;
    copies::<bf16, bf16>(on)
}

fn updated<M: Held, V: Held, C: Copied>(on: &On, with_copy: bool) -> Result<(), Failure> {
    let n = 1037;
    let (mut p, g) = (numbers::<f32>(1, n), numbers::<f32>(2, n));
    let mut m = numbers::<M>(3, n);
    let mut v: Vec<V> = wide(&numbers::<V>(4, n)).iter().map(|x| V::of(x.abs())).collect();
    let mut copy = vec![C::UNWRITTEN; n];
    let rule = AdamWRule {
        keep: 0.999,
        one_minus_beta1: 0.1,
        beta2: 0.95,
        one_minus_beta2: 0.05,
        step_size: 3e-3,
        root_correction2: 0.7,
        eps: 1e-8,
        gradient_scale: 0.25,
    };
    let (mut on_p, mut on_m, mut on_v, on_g) = (on.up(&p)?, on.up(&m)?, on.up(&v)?, on.up(&g)?);
    let mut on_copy = on.up(&copy)?;
    let states = (on_m.all_mut(), on_v.all_mut());
    let out = with_copy.then(|| on_copy.all_mut());
    ops::adamw(&on.stream, rule, on_p.all_mut(), states, on_g.all(), out)?;
    let states = vec![M::values(&mut m), V::values(&mut v)];
    let out = with_copy.then(|| C::copy(&mut copy));
    adamw::adamw(rule, Span { master: &mut p, states, gradient: &g, copy: out });
    same("master", &on.down(&on_p)?, &p)?;
    same("m", &wide(&on.down(&on_m)?), &wide(&m))?;
    same("v", &wide(&on.down(&on_v)?), &wide(&v))?;
    same("copy", &wide(&on.down(&on_copy)?), &wide(&copy))
}

pub fn casts(on: &On) -> Result<(), Failure> {
    fn both<T: Number + CastTo<f32>>(on: &On) -> Result<(), Failure>
    where
        f32: CastTo<T>,
    {
        let x: Vec<f32> = numbers::<f32>(1, 4099).iter().map(|x| 300.0 * x).collect();
        let (on_x, mut narrow, mut back) = (on.up(&x)?, on.room::<T>(x.len())?, on.room::<f32>(x.len())?);
        ops::cast(&on.stream, on_x.all(), narrow.all_mut())?;
        ops::cast(&on.stream, narrow.all(), back.all_mut())?;
        let want: Vec<f32> = x.iter().map(|&x| T::of(x).wide()).collect();
        same(&format!("through {}", T::NAME), &on.down(&back)?, &want)
    }
    fn unscaled<T: Number>(on: &On) -> Result<(), Failure> {
        for bad in [None, Some(f32::INFINITY), Some(f32::NAN)] {
            let mut x = numbers::<T>(1, 4099);
            if let Some(bad) = bad {
                x[4001] = T::of(bad);
            }
            let (on_x, mut y, mut flag) = (on.up(&x)?, on.room::<f32>(x.len())?, on.up(&[0u32])?);
            ops::unscale(&on.stream, on_x.all(), 0.125, y.all_mut(), flag.all_mut())?;
            same("the flag", &on.down(&flag)?, &[u32::from(bad.is_some())])?;
            let want: Vec<f32> = x.iter().map(|x| x.wide() * 0.125).collect();
            // Whatever bits a NaN has.
            same("unscaled", &on.down(&y)?[..4001], &want[..4001])?;
        }
        Ok(())
    }
    both::<bf16>(on)?;
    both::<f16>(on)?;
    unscaled::<f32>(on)?;
    unscaled::<bf16>(on)?;
    unscaled::<f16>(on)?;
    squares(on)
}

fn squares(on: &On) -> Result<(), Failure> {
    let x = numbers::<f32>(5, 2 * ops::CHUNK + 77);
    let (on_x, mut sums) = (on.up(&x)?, on.room::<f64>(3)?);
    ops::chunk_squares(&on.stream, on_x.all(), sums.all_mut())?;
    let chunk = |x: &[f32]| {
        let lane = |lane: usize| {
            x.iter().skip(lane).step_by(8).fold(0f64, |sum, &x| sum + f64::from(x) * f64::from(x))
        };
        (0..8).fold(0f64, |sum, i| sum + lane(i))
    };
    same("sums", &on.down(&sums)?, &x.chunks(ops::CHUNK).map(chunk).collect::<Vec<_>>())
}

pub fn sampling(on: &On) -> Result<(), Failure> {
    let vocab = 1003;
    let mut logits: Vec<f32> = numbers::<f32>(6, 6 * vocab).iter().map(|x| 5.0 * x).collect();
    logits[3 * vocab + 17] = f32::NAN;
    logits[4 * vocab..5 * vocab].fill(f32::NEG_INFINITY);
    let warm = Sampling { temperature: 0.8, seed: 7, position: 3, ..Sampling::GREEDY };
    let one = Sampling { top_k: 1, ..warm };
    let nucleus = Sampling { top_p: 0.9, min_p: 0.01, top_k: 40, ..warm };
    let samplings = [Sampling::GREEDY, one, nucleus, Sampling::GREEDY, Sampling::GREEDY, nucleus];
    let (on_logits, on_samplings) = (on.up(&logits)?, on.up(&samplings)?);
    let draw = || -> Result<(Vec<i32>, Vec<u32>), Failure> {
        let (mut tokens, mut wrong) = (on.room::<i32>(6)?, on.room::<u32>(6)?);
        sample(&on.stream, on_logits.all(), on_samplings.all(), tokens.all_mut(), wrong.all_mut())?;
        Ok((on.down(&tokens)?, on.down(&wrong)?))
    };
    let (tokens, wrong) = draw()?;
    let best = |row: usize| {
        let row = &logits[row * vocab..][..vocab];
        (0..vocab).fold(0, |best, i| if row[i] > row[best] { i } else { best }) as i32
    };
    same("greedy and top-k of 1", &tokens[..2], &[best(0), best(1)])?;
    same("what is no number, and nothing but −∞", &tokens[3..5], &[-1, -2])?;
    same("the first that is no number", &wrong[3..4], &[17])?;
    let likely = |row: usize, token: i32| {
        let most = logits[row * vocab + best(row) as usize];
        logits.get(row * vocab + token as usize).is_some_and(|x| (x - most) / 0.8 >= 0.01f32.ln())
    };
    if !(likely(2, tokens[2]) && likely(5, tokens[5])) {
        return Err(Failure::Differs(format!("min-p let {} and {} pass", tokens[2], tokens[5])));
    }
    same("drawn again", &draw()?.0, &tokens)
}
