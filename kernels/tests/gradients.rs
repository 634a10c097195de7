//! Every op's value and gradients against f64 references: the formula evaluated in f64, differentiated by
//! central differences.

use burn::tensor::{DType, Device, Tensor};
use hearth_kernels as kernels;
use hearth_kernels::{Activation, AttentionSpec, PackedMatrix, RotaryTable};
use std::sync::Arc;

fn values(n: usize, seed: u32) -> Vec<f32> {
    let mut s = seed.wrapping_mul(2_654_435_761);
    (0..n)
        .map(|_| {
            s = s.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (s >> 8) as f32 / (1 << 23) as f32 - 1.0
        })
        .collect()
}

fn tracked<const D: usize>(x: &[f32], shape: [usize; D]) -> Tensor<D> {
    Tensor::<1>::from_floats(x, &Device::flex()).reshape(shape).autodiff().require_grad()
}

fn floats<const D: usize>(x: Tensor<D>) -> Vec<f32> {
    x.into_data().try_into_vec::<f32>().unwrap()
}

/// A formula in f64: inputs → value.
type Formula<'a> = &'a dyn Fn(&[Vec<f64>]) -> Vec<f64>;
/// The op: inputs and upstream gradient → value and gradients.
type Op<'a> = &'a dyn Fn(&[Vec<f32>], &[f32]) -> (Vec<f32>, Vec<Vec<f32>>);

/// Central differences of `f(x)·c` with respect to each element of `x[which]`.
fn numeric(f: Formula, x: &[Vec<f64>], which: usize, c: &[f64]) -> Vec<f64> {
    let h = 1e-5;
    (0..x[which].len())
        .map(|i| {
            let at = |delta: f64| -> f64 {
                let mut x = x.to_vec();
                x[which][i] += delta;
                f(&x).iter().zip(c).map(|(a, b)| a * b).sum()
            };
            (at(h) - at(-h)) / (2.0 * h)
        })
        .collect()
}

fn assert_close(what: &str, got: &[f32], want: &[f64], tolerance: f64) {
    assert_eq!(got.len(), want.len(), "{what}: length");
    let norm = want.iter().map(|v| v * v).sum::<f64>().sqrt().max(1e-3);
    let error = got.iter().zip(want).map(|(a, b)| (*a as f64 - b).powi(2)).sum::<f64>().sqrt();
    assert!(error <= tolerance * norm, "{what}: relative error {:e}", error / norm);
}

/// Checks value and gradients of an op with inputs of the given sizes. `run` gets the inputs and the upstream
/// gradient and returns the value and the gradients.
fn check(name: &str, sizes: &[usize], reference: Formula, run: Op) {
    let inputs: Vec<Vec<f32>> = sizes.iter().enumerate().map(|(i, &n)| values(n, i as u32 + 1)).collect();
    let wide: Vec<Vec<f64>> = inputs.iter().map(|x| x.iter().map(|v| *v as f64).collect()).collect();
    let want = reference(&wide);
    let upstream = values(want.len(), 99);
    let upstream_wide: Vec<f64> = upstream.iter().map(|v| *v as f64).collect();
    let (value, gradients) = run(&inputs, &upstream);
    assert_close(name, &value, &want, 2e-6);
    for (i, gradient) in gradients.iter().enumerate() {
        let want = numeric(reference, &wide, i, &upstream_wide);
        assert_close(&format!("{name}: gradient of input {i}"), gradient, &want, 1e-5);
    }
}

/// Backward pass of `y` for an upstream gradient.
fn backward<const D: usize>(y: Tensor<D>, upstream: &[f32]) -> (Vec<f32>, burn::tensor::Gradients) {
    let shape = y.dims();
    let c = Tensor::<1>::from_floats(upstream, &Device::flex()).reshape(shape);
    (floats(y.clone().inner()), (y * Tensor::from_inner(c)).sum().backward())
}

#[test]
fn rms_norm_matches_f64() {
    for (rows, d) in [(1, 8), (5, 17), (3, 64)] {
        let reference = move |x: &[Vec<f64>]| -> Vec<f64> {
            x[0].chunks(d)
                .flat_map(|row| {
                    let r = 1.0 / (row.iter().map(|v| v * v).sum::<f64>() / d as f64 + 1e-5).sqrt();
                    row.iter().zip(&x[1]).map(move |(v, w)| v * r * w).collect::<Vec<_>>()
                })
                .collect()
        };
        check("rms_norm", &[rows * d, d], &reference, &|x, c| {
            let (a, w) = (tracked(&x[0], [rows, d]), tracked(&x[1], [d]));
            let (y, mut g) = backward(kernels::rms_norm(a.clone(), w.clone(), 1e-5), c);
            (y, vec![floats(a.grad_remove(&mut g).unwrap()), floats(w.grad_remove(&mut g).unwrap())])
        });
    }
}

#[test]
fn layer_norm_matches_f64() {
    for (rows, d) in [(1, 8), (5, 17), (3, 64)] {
        let reference = move |x: &[Vec<f64>]| -> Vec<f64> {
            x[0].chunks(d)
                .flat_map(|row| {
                    let mean = row.iter().sum::<f64>() / d as f64;
                    let variance = row.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / d as f64;
                    let r = 1.0 / (variance + 1e-5).sqrt();
                    row.iter().enumerate().map(move |(i, v)| (v - mean) * r * x[1][i] + x[2][i])
                })
                .collect()
        };
        check("layer_norm", &[rows * d, d, d], &reference, &|x, c| {
            let (a, w, b) = (tracked(&x[0], [rows, d]), tracked(&x[1], [d]), tracked(&x[2], [d]));
            let y = kernels::layer_norm(a.clone(), w.clone(), b.clone(), 1e-5);
            let (y, mut g) = backward(y, c);
            let vectors = [w, b].map(|x| floats(x.grad_remove(&mut g).unwrap()));
            (y, [vec![floats(a.grad_remove(&mut g).unwrap())], vectors.into()].concat())
        });
    }
}

fn product(x: &[f64], w: &[f64], k: usize) -> Vec<f64> {
    x.chunks(k).flat_map(|x| w.chunks(k).map(move |w| x.iter().zip(w).map(|(a, b)| a * b).sum())).collect()
}

#[test]
fn linear_matches_f64() {
    for (m, n, k) in [(1, 3, 5), (7, 19, 33)] {
        check("linear", &[m * k, n * k], &|x| product(&x[0], &x[1], k), &|x, c| {
            let (a, w) = (tracked(&x[0], [m, k]), tracked(&x[1], [n, k]));
            let (y, mut g) = backward(kernels::linear(a.clone(), w.clone()), c);
            (y, vec![floats(a.grad_remove(&mut g).unwrap()), floats(w.grad_remove(&mut g).unwrap())])
        });
    }
}

#[test]
fn packed_linear_matches_f64_and_equals_linear_bit_for_bit() {
    let (m, n, k) = (5, 21, 40);
    let w = values(n * k, 2);
    let wide: Vec<f64> = w.iter().map(|v| *v as f64).collect();
    check("linear_packed", &[m * k], &|x| product(&x[0], &wide, k), &|x, c| {
        let packed = Arc::new(PackedMatrix::from_f32(n, k, &w));
        let run = |f: &dyn Fn(Tensor<2>) -> Tensor<2>| {
            let a = tracked(&x[0], [m, k]);
            let (y, mut g) = backward(f(a.clone()), c);
            (y, vec![floats(a.grad_remove(&mut g).unwrap())])
        };
        let dense = Tensor::<1>::from_floats(w.as_slice(), &Device::flex()).reshape([n, k]);
        let got = run(&|a| kernels::linear_packed(a, packed.clone()));
        assert_eq!(got, run(&|a| kernels::linear(a, Tensor::from_inner(dense.clone()))));
        got
    });
}

#[test]
fn rope_matches_f64() {
    let (rows, heads, half) = (4, 3, 5);
    let angles = values(rows * half, 50);
    let table = |f: fn(f64) -> f64| angles.iter().map(|a| f(*a as f64) as f32).collect::<Vec<_>>();
    let rotary = Arc::new(RotaryTable::new(half, table(f64::cos), table(f64::sin)));
    let reference = |x: &[Vec<f64>]| -> Vec<f64> {
        let mut y = x[0].clone();
        for (i, (y, x)) in y.chunks_mut(2 * half).zip(x[0].chunks(2 * half)).enumerate() {
            for j in 0..half {
                let angle = i / heads * half + j;
                let (c, s) = (rotary.cos()[angle] as f64, rotary.sin()[angle] as f64);
                y[j] = x[j] * c - x[j + half] * s;
                y[j + half] = x[j + half] * c + x[j] * s;
            }
        }
        y
    };
    check("rope", &[rows * heads * half * 2], &reference, &|x, c| {
        let a = tracked(&x[0], [rows, heads, 2 * half]);
        let (y, mut g) = backward(kernels::rope(a.clone(), rotary.clone()), c);
        (y, vec![floats(a.grad_remove(&mut g).unwrap())])
    });
}

/// An activation in f64.
fn curve(activation: Activation, x: f64) -> f64 {
    match activation {
        Activation::Silu => x / (1.0 + (-x).exp()),
        Activation::Gelu => x * (0.5 + normal_from_0(x)),
        Activation::GeluTanh => {
            0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x)).tanh())
        }
    }
}

/// The normal density's integral from 0 to `x`, as its power series `Σ (−1)ⁿ x²ⁿ⁺¹ / (2ⁿ n! (2n+1)) / √(2π)`.
fn normal_from_0(x: f64) -> f64 {
    let (mut power, mut sum) = (x, 0.0);
    for n in 0..80 {
        sum += power / (2 * n + 1) as f64;
        power *= -x * x / (2.0 * (n + 1) as f64);
    }
    sum / (2.0 * std::f64::consts::PI).sqrt()
}

#[test]
fn activations_match_f64_alone_and_as_gates() {
    for activation in Activation::ALL {
        let f = move |x: f64| curve(activation, 3.0 * x);
        let reference = move |x: &[Vec<f64>]| -> Vec<f64> { x[0].iter().map(|x| f(*x)).collect() };
        check(&format!("{activation:?}"), &[6 * 11], &reference, &|x, c| {
            let a = tracked(&x[0], [6, 11]);
            let (y, mut g) = backward(kernels::activate(a.clone() * 3.0, activation), c);
            (y, vec![floats(a.grad_remove(&mut g).unwrap())])
        });
        let reference =
            move |x: &[Vec<f64>]| -> Vec<f64> { x[0].iter().zip(&x[1]).map(|(g, u)| f(*g) * u).collect() };
        check(&format!("{activation:?} gate"), &[6 * 11, 6 * 11], &reference, &|x, c| {
            let (g0, u) = (tracked(&x[0], [6, 11]), tracked(&x[1], [6, 11]));
            let (y, mut g) = backward(kernels::gated(g0.clone() * 3.0, u.clone(), activation), c);
            (y, vec![floats(g0.grad_remove(&mut g).unwrap()), floats(u.grad_remove(&mut g).unwrap())])
        });
    }
}

#[test]
fn gated_linear_matches_f64_and_has_the_bits_of_its_two_ops() {
    let (rows, inner, out) = (6, 11, 5);
    for activation in Activation::ALL {
        let reference = |x: &[Vec<f64>]| -> Vec<f64> {
            let gated = |i: usize| curve(activation, x[0][i]) * x[1][i];
            let product =
                |r: usize, o: usize| (0..inner).map(|k| gated(r * inner + k) * x[2][o * inner + k]).sum();
            (0..rows).flat_map(|r| (0..out).map(move |o| product(r, o))).collect()
        };
        let sizes = [rows * inner, rows * inner, out * inner];
        let run = |op: &dyn Fn(Tensor<2>, Tensor<2>, Tensor<2>) -> Tensor<2>, x: &[Vec<f32>], c: &[f32]| {
            let shapes = [[rows, inner], [rows, inner], [out, inner]];
            let x: Vec<_> = x.iter().zip(shapes).map(|(x, shape)| tracked(x, shape)).collect();
            let (y, mut g) = backward(op(x[0].clone(), x[1].clone(), x[2].clone()), c);
            (y, x.iter().map(|x| floats(x.grad_remove(&mut g).unwrap())).collect::<Vec<_>>())
        };
        check(&format!("{activation:?} gated_linear"), &sizes, &reference, &|x, c| {
            let fused = run(&|gate, up, w| kernels::gated_linear(gate, up, w, activation), x, c);
            let gated = |gate, up| kernels::gated(gate, up, activation);
            assert_eq!(fused, run(&|gate, up, w| kernels::linear(gated(gate, up), w), x, c));
            fused
        });
    }
}

/// Plain attention in f64; `x` = q, k, v.
fn attention_f64(
    x: &[Vec<f64>],
    heads: usize,
    kv_heads: usize,
    d: usize,
    documents: &[usize],
    spec: AttentionSpec,
) -> Vec<f64> {
    let mut y = vec![0.0; x[0].len()];
    let mut start = 0;
    for &len in documents {
        for i in 0..len {
            for h in 0..heads {
                let q = &x[0][((start + i) * heads + h) * d..][..d];
                let kv = |j: usize| ((start + j) * kv_heads + h * kv_heads / heads) * d;
                let seen = spec.keys(i);
                let scores: Vec<f64> = seen
                    .clone()
                    .map(|j| {
                        q.iter().zip(&x[1][kv(j)..]).map(|(a, b)| a * b).sum::<f64>() * spec.scale as f64
                    })
                    .collect();
                let max = scores.iter().copied().fold(f64::MIN, f64::max);
                let sum: f64 = scores.iter().map(|s| (s - max).exp()).sum();
                for (j, s) in seen.zip(&scores) {
                    let p = (s - max).exp() / sum;
                    for c in 0..d {
                        y[((start + i) * heads + h) * d + c] += p * x[2][kv(j) + c];
                    }
                }
            }
        }
        start += len;
    }
    y
}

#[test]
fn attention_matches_f64_for_groups_windows_and_documents() {
    // heads, KV heads, head width, documents, window
    type Case = (usize, usize, usize, &'static [usize], Option<usize>);
    let cases: [Case; 6] = [
        (1, 1, 4, &[1], None),
        (2, 2, 8, &[19], None),
        (3, 1, 6, &[5, 18], None),
        (6, 2, 4, &[35], Some(7)),
        (5, 1, 20, &[17, 1, 3], Some(16)),
        (4, 4, 16, &[33], Some(1)),
    ];
    for (heads, kv_heads, d, documents, window) in cases {
        let rows: usize = documents.iter().sum();
        let spec = AttentionSpec { scale: 0.7, window };
        let reference = |x: &[Vec<f64>]| attention_f64(x, heads, kv_heads, d, documents, spec);
        let name =
            format!("attention {heads}/{kv_heads} heads of {d}, documents {documents:?}, window {window:?}");
        check(&name, &[rows * heads * d, rows * kv_heads * d, rows * kv_heads * d], &reference, &|x, c| {
            let q = tracked(&x[0], [rows, heads, d]);
            let (k, v) = (tracked(&x[1], [rows, kv_heads, d]), tracked(&x[2], [rows, kv_heads, d]));
            let y = kernels::attention(q.clone(), k.clone(), v.clone(), documents.into(), spec);
            let (y, mut g) = backward(y, c);
            let gradients = [q, k, v].map(|x| floats(x.grad_remove(&mut g).unwrap()));
            (y, gradients.into())
        });
    }
}

#[test]
fn cross_entropy_matches_f64_dense_and_packed() {
    let (rows, d, vocab) = (6, 10, 37);
    let targets: Vec<i32> = vec![3, -100, 36, 0, -1, 12];
    let reference = |x: &[Vec<f64>]| -> Vec<f64> {
        let logits = product(&x[0], &x[1], d);
        let nll = |(row, &t): (&[f64], &i32)| match t {
            0.. => row.iter().map(|v| v.exp()).sum::<f64>().ln() - row[t as usize],
            _ => 0.0,
        };
        vec![logits.chunks(vocab).zip(&targets).map(nll).sum()]
    };
    check("linear_cross_entropy", &[rows * d, vocab * d], &reference, &|x, c| {
        let (h, w) = (tracked(&x[0], [rows, d]), tracked(&x[1], [vocab, d]));
        let t: Arc<[i32]> = targets.clone().into();
        let (y, mut g) = backward(kernels::linear_cross_entropy(h.clone(), w.clone(), t.clone()), c);
        let dh = floats(h.grad_remove(&mut g).unwrap());
        let packed = Arc::new(PackedMatrix::from_f32(vocab, d, &x[1]));
        let h = tracked(&x[0], [rows, d]);
        let (y2, mut g2) = backward(kernels::linear_cross_entropy_packed(h.clone(), packed, t), c);
        assert_eq!((&y, &dh), (&y2, &floats(h.grad_remove(&mut g2).unwrap())), "packed equals dense");
        (y, vec![dh, floats(w.grad_remove(&mut g).unwrap())])
    });
}

#[test]
fn embedding_gathers_rows_and_adds_gradients_of_repeated_ids() {
    let ids: Arc<[u32]> = Arc::new([4, 0, 4, 2]);
    let reference = |x: &[Vec<f64>]| ids.iter().flat_map(|&i| x[0][i as usize * 3..][..3].to_vec()).collect();
    check("embedding", &[5 * 3], &reference, &|x, c| {
        let w = tracked(&x[0], [5, 3]);
        let (y, mut g) = backward(kernels::embedding(w.clone(), ids.clone()), c);
        (y, vec![floats(w.grad_remove(&mut g).unwrap())])
    });
}

#[test]
fn dropout_keeps_its_share_repeats_its_mask_and_passes_gradients_through_it() {
    let x = vec![1.0; 64 * 100];
    let a = tracked(&x, [64, 100]);
    let (y, mut g) = backward(kernels::dropout(a.clone(), 0.25, 7), &x);
    let kept = y.iter().filter(|v| **v != 0.0).count() as f64 / y.len() as f64;
    assert!((kept - 0.75).abs() < 0.03, "kept {kept}");
    assert!(y.iter().all(|v| *v == 0.0 || (*v - 1.0 / 0.75).abs() < 1e-6));
    assert_eq!(floats(a.grad_remove(&mut g).unwrap()), y);
    assert_eq!(floats(kernels::dropout(tracked(&x, [64, 100]), 0.25, 7).inner()), y);
    assert_ne!(floats(kernels::dropout(tracked(&x, [64, 100]), 0.25, 8).inner()), y);
}

/// Relative size of half a unit in the last place.
fn unit(dtype: DType) -> f32 {
    if dtype == DType::BF16 { 1.0 / 256.0 } else { 1.0 / 2048.0 }
}

/// `f` of 16-bit inputs is the rounded `f` of the same inputs in f32.
fn rounds_once<const D: usize>(what: &str, dtype: DType, f: impl Fn(DType) -> Tensor<D>) {
    let (got, exact) = (f(dtype), floats(f(DType::F32)));
    assert_eq!(got.dtype(), dtype, "{what}");
    for (got, want) in floats(got.cast(DType::F32)).iter().zip(&exact) {
        assert!((got - want).abs() <= want.abs() * unit(dtype) + 3e-8, "{what} {dtype:?}: {got} {want}");
    }
}

#[test]
fn sixteen_bit_inputs_give_results_of_one_rounding() {
    for dtype in [DType::BF16, DType::F16] {
        let input = |seed: u32, shape: [usize; 2]| {
            tracked(&values(shape[0] * shape[1], seed), shape).inner().cast(dtype)
        };
        let (x, w, g) = (input(1, [4, 32]), input(2, [6, 32]), input(3, [1, 32]).reshape([32]));
        rounds_once("linear", dtype, |t| kernels::linear(x.clone().cast(t), w.clone().cast(t)));
        rounds_once("rms_norm", dtype, |t| kernels::rms_norm(x.clone().cast(t), g.clone().cast(t), 1e-5));
        let norm = |t| kernels::layer_norm(x.clone().cast(t), g.clone().cast(t), g.clone().cast(t), 1e-5);
        rounds_once("layer_norm", dtype, norm);
        for f in Activation::ALL {
            rounds_once("activate", dtype, |t| kernels::activate(x.clone().cast(t), f));
            rounds_once("gated", dtype, |t| kernels::gated(x.clone().cast(t), x.clone().cast(t), f));
        }
        rounds_once("embedding", dtype, |t| kernels::embedding(w.clone().cast(t), Arc::new([5, 0, 5])));
        let heads = |seed, n: usize| input(seed, [4, 8 * n]).reshape([4, n, 8]);
        let (q, k, v) = (heads(4, 4), heads(5, 2), heads(6, 2));
        let spec = AttentionSpec { scale: 0.3, window: None };
        rounds_once("attention", dtype, |t| {
            let cast = |x: &Tensor<3>| x.clone().cast(t);
            kernels::attention(cast(&q), cast(&k), cast(&v), Arc::new([3, 1]), spec)
        });
        let packed = Arc::new(PackedMatrix::from_f32(6, 32, &values(192, 2)));
        rounds_once("linear_packed", dtype, |t| kernels::linear_packed(x.clone().cast(t), packed.clone()));
    }
}

#[test]
fn sixteen_bit_gradients_are_those_of_f32_rounded_once() {
    for dtype in [DType::BF16, DType::F16] {
        let (x, w) = (tracked(&values(128, 1), [4, 32]).inner(), tracked(&values(192, 2), [6, 32]).inner());
        for which in 0..2 {
            rounds_once("linear gradient", dtype, |t| {
                let leaf = |x: &Tensor<2>| x.clone().cast(dtype).cast(t).autodiff().require_grad();
                let (x, w) = (leaf(&x), leaf(&w));
                let y = kernels::linear(x.clone(), w.clone());
                let upstream =
                    Tensor::from_inner(tracked(&values(24, 9), [4, 6]).inner().cast(dtype).cast(t));
                let mut gradients = (y * upstream).sum().backward();
                [x, w][which].grad_remove(&mut gradients).unwrap()
            });
        }
    }
}

#[test]
fn a_product_too_large_for_f16_is_infinite() {
    let x = Tensor::<2>::full([1, 8], 200.0, &Device::flex()).cast(DType::F16);
    let y = floats(kernels::linear(x.clone(), x).cast(DType::F32));
    assert_eq!(y, [f32::INFINITY]);
}

#[test]
fn a_loss_scale_above_f16s_range_lifts_gradients_that_f16_would_lose() {
    // Weights of 1e-7 make gradients around f16's smallest number, 6e-8.
    let (h, w) = (values(2 * 8, 1), values(5 * 8, 2).iter().map(|v| v * 1e-7).collect::<Vec<_>>());
    let gradient = |scale: f32, dtype: DType| {
        let leaf = |x: &[f32], shape| tracked(x, shape).inner().cast(dtype);
        let h = leaf(&h, [2, 8]).autodiff().require_grad();
        let w = Arc::new(PackedMatrix::from_f32(5, 8, &w));
        let loss = kernels::linear_cross_entropy_packed(h.clone(), w, Arc::new([1, 3]));
        let mut gradients = (loss * scale).backward();
        floats(h.grad_remove(&mut gradients).unwrap().cast(DType::F32))
    };
    let scale = 131_072.0;
    let (scaled, exact) = (gradient(scale, DType::F16), gradient(1.0, DType::F32));
    for (got, want) in scaled.iter().zip(&exact) {
        assert!((got / scale - want).abs() <= want.abs() * 1e-3 + 1e-12, "{got} {want}");
    }
    assert!(gradient(1.0, DType::F16).contains(&0.0));
}
