//! How fast packed products run at decode and prefill row counts:
//! `cargo bench --package hearth-benches --bench packed`.
use hearth_kernels::PackedMatrix;
use std::time::Instant;

fn main() {
    let (rows, columns) = (49152, 576);
    let formats: [(&str, usize); 5] =
        [("f32", 4 * 32), ("bf16", 2 * 32), ("q8_0", 34), ("q4_0", 18), ("q4_1", 20)];
    for (format, block) in formats {
        let bytes = vec![0; rows * columns / 32 * block];
        let matrix = PackedMatrix::from_format(rows, columns, format, &bytes).expect("a panel format");
        for m in [1, 4, 8, 64] {
            let x = vec![0.5; m * columns];
            let mut y = vec![0.0; m * rows];
            let mut times: Vec<f64> = (0..9)
                .map(|_| {
                    let start = Instant::now();
                    matrix.multiply(&x, &mut y);
                    start.elapsed().as_secs_f64()
                })
                .collect();
            times.sort_by(f64::total_cmp);
            let (gb, gflop) = (matrix.bytes() as f64 / 1e9, 2.0 * (m * rows * columns) as f64 / 1e9);
            println!("{format} x {m}: {:.1} GB/s, {:.0} GFLOP/s", gb / times[4], gflop / times[4]);
        }
    }
}
