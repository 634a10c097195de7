//! How fast the matrix product runs: `cargo bench --package hearth-benches --bench gemm`.
use hearth_kernels::cpu::gemm::{Elems, View, gemm};
use std::time::Instant;

fn main() {
    for (m, n, k) in [(1024, 1536, 576), (1024, 576, 1536), (2048, 2048, 2048), (1024, 8192, 576)] {
        let (a, b) = (vec![0.5; m * k], vec![0.25; n * k]);
        let mut c = vec![0.0; m * n];
        let mut times: Vec<f64> = (0..7)
            .map(|_| {
                let start = Instant::now();
                gemm(
                    m,
                    n,
                    k,
                    View::rows(Elems::F32(&a), k),
                    View::transposed(Elems::F32(&b), k),
                    &mut c,
                    false,
                );
                start.elapsed().as_secs_f64()
            })
            .collect();
        times.sort_by(f64::total_cmp);
        let gflops = 2.0 * (m * n * k) as f64 / times[3] / 1e9;
        println!("{m}x{n}x{k}: {gflops:.0} GFLOP/s on {} threads", rayon::current_num_threads());
    }
}
