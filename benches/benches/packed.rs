//! How fast packed products run at decode and prefill row counts, at every instruction set this CPU has:
//! `cargo bench --package hearth-benches --bench packed`.
use hearth_kernels::cpu::quant::format::FORMATS;
use hearth_kernels::cpu::simd::{Level, limit};
use hearth_kernels::{Activations, PackedMatrix};
use std::time::Instant;

const ROUNDS: usize = 9;

fn main() {
    // Four heads of SmolLM2: more than a last-level cache.
    let (rows, columns) = (4 * 49152, 512);
    let dense = [("f32", 32, 4 * 32), ("f16", 32, 2 * 32), ("bf16", 32, 2 * 32)];
    let quantized = FORMATS.iter().map(|f| (f.name, f.block, f.block_bytes));
    for (format, block, block_bytes) in dense.into_iter().chain(quantized) {
        let bytes = vec![0; rows * columns / block * block_bytes];
        let matrix = PackedMatrix::from_format(rows, columns, format, &bytes).expect("a panel format");
        let int8 = block_bytes < 2 * block;
        let matrix = matrix.with_activations(if int8 { Activations::Int8 } else { Activations::F32 });
        for level in Level::present() {
            limit(Some(level));
            measure(&format!("{format}, {}", level.name()), &matrix);
        }
        limit(None);
    }
}

fn measure(name: &str, matrix: &PackedMatrix) {
    for m in [1, 8, 64] {
        let x = vec![0.5; m * matrix.columns()];
        let mut y = vec![0.0; m * matrix.rows()];
        let mut times: Vec<f64> = (0..ROUNDS)
            .map(|_| {
                let start = Instant::now();
                matrix.multiply(&x, &mut y);
                start.elapsed().as_secs_f64()
            })
            .collect();
        times.sort_by(f64::total_cmp);
        let seconds = times[ROUNDS / 2];
        let gflop = 2.0 * (m * matrix.rows() * matrix.columns()) as f64 / 1e9;
        let gb = matrix.bytes() as f64 / 1e9;
        println!("{name} x {m}: {:.1} GB/s, {:.0} GFLOP/s", gb / seconds, gflop / seconds);
        if seconds > 1.0 {
            return; // the portable versions are for correctness
        }
    }
}
