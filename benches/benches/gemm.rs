//! How fast the matrix product runs at training shapes, with operands stored as f32, bf16 and f16:
//! `cargo bench --package hearth-benches --bench gemm`. The formats take turns, so that they see the same machine.
use half::{bf16, f16};
use hearth_kernels::cpu::gemm::{Elems, View, gemm};
use std::time::Instant;

const ROUNDS: usize = 9;

fn main() {
    println!("{} threads; x·wᵀ as forward, then x·w as backward", rayon::current_num_threads());
    for (m, n, k) in [(1024, 1536, 576), (1024, 576, 1536), (2048, 2048, 2048), (1024, 8192, 576)] {
        let (a, b) = (vec![0.5f32; m * k], vec![0.25f32; n * k]);
        let (a_bf16, b_bf16) = (vec![bf16::ONE; m * k], vec![bf16::ONE; n * k]);
        let (a_f16, b_f16) = (vec![f16::ONE; m * k], vec![f16::ONE; n * k]);
        let formats = [
            ("f32", Elems::F32(&a), Elems::F32(&b)),
            ("bf16", Elems::Bf16(&a_bf16), Elems::Bf16(&b_bf16)),
            ("f16", Elems::F16(&a_f16), Elems::F16(&b_f16)),
        ];
        let mut c = vec![0.0; m * n];
        let mut times = vec![[const { Vec::new() }; 2]; formats.len()];
        for _ in 0..ROUNDS {
            for ((_, a, b), [forward, backward]) in formats.iter().zip(&mut times) {
                let product = |b: View, c: &mut [f32]| {
                    let start = Instant::now();
                    gemm(m, n, k, View::rows(*a, k), b, c, false);
                    start.elapsed().as_secs_f64()
                };
                forward.push(product(View::transposed(*b, k), &mut c));
                backward.push(product(View::rows(*b, n), &mut c));
            }
        }
        let gflops = |times: &mut Vec<f64>| {
            times.sort_by(f64::total_cmp);
            2.0 * (m * n * k) as f64 / times[ROUNDS / 2] / 1e9
        };
        for ((name, ..), [forward, backward]) in formats.iter().zip(&mut times) {
            println!("{m}x{n}x{k} {name}: {:.0} and {:.0} GFLOP/s", gflops(forward), gflops(backward));
        }
    }
}
