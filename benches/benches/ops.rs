//! How long the fused ops take at the shapes of a training step (4 × 256 tokens of SmolLM2-135M), at every instruction
//! set this CPU has: `cargo bench --package hearth-benches --bench ops`.
use hearth_kernels::cpu::activation::{Activation, activate, activate_backward, gated, gated_backward};
use hearth_kernels::cpu::attention::AttentionSpec;
use hearth_kernels::cpu::attention_backward::{Gradients, Inputs, Shape, attend_backward};
use hearth_kernels::cpu::attention_paged::{Blocks, Scratch, attend};
use hearth_kernels::cpu::gemm::Elems;
use hearth_kernels::cpu::kv::KvLayout;
use hearth_kernels::cpu::layer_norm::{layer_norm, layer_norm_backward};
use hearth_kernels::cpu::loss::{HeadWeights, Problem, cross_entropy};
use hearth_kernels::cpu::pointwise;
use hearth_kernels::cpu::rope::{RotaryTable, rope};
use hearth_kernels::cpu::simd::{Level, limit};
use hearth_kernels::paged::SequenceRows;
use std::hint::black_box;
use std::time::Instant;

const ROUNDS: usize = 5;
const ROWS: usize = 1024;
const DOCUMENTS: [usize; 4] = [256; 4];
const D_MODEL: usize = 576;
const INNER: usize = 1536;
const VOCAB: usize = 49152;
const HEADS: usize = 9;
const LAYOUT: KvLayout = KvLayout { kv_heads: 3, head_dim: 64 };

fn main() {
    let width = HEADS * LAYOUT.head_dim;
    let kv_width = LAYOUT.kv_heads * LAYOUT.head_dim;
    let (x, dy, w) = (wave(ROWS * D_MODEL), wave(ROWS * D_MODEL), wave(D_MODEL));
    let (gate, up) = (wave(ROWS * INNER), wave(ROWS * INNER));
    let (q, k, v) = (wave(ROWS * width), wave(ROWS * kv_width), wave(ROWS * kv_width));
    let spec = AttentionSpec { scale: 0.125, window: None };
    let half = LAYOUT.head_dim / 2;
    let table = RotaryTable::new(half, wave(ROWS * half), wave(ROWS * half));
    let (sequences, cache) = cached(&k, &v);
    let (head, targets) = (wave(VOCAB * D_MODEL), vec![7; ROWS]);
    let ids: Vec<u32> = (0..ROWS as u32).map(|i| i * 31 % VOCAB as u32).collect();
    for level in Level::present() {
        limit(Some(level));
        let report = |name: &str, work: &mut dyn FnMut()| {
            println!("{}: {name}: {:.2} ms", level.name(), median_ms(work))
        };
        report("rms_norm", &mut || drop(black_box(pointwise::rms_norm(&x, &w, 1e-5))));
        report("rms_norm backward", &mut || drop(black_box(pointwise::rms_norm_backward(&x, &w, 1e-5, &dy))));
        report("layer_norm", &mut || drop(black_box(layer_norm(&x, &w, &w, 1e-5))));
        report("layer_norm backward", &mut || drop(black_box(layer_norm_backward(&x, &w, 1e-5, &dy))));
        for (name, activation) in
            [("silu", Activation::Silu), ("gelu", Activation::Gelu), ("gelu tanh", Activation::GeluTanh)]
        {
            report(name, &mut || drop(black_box(activate(activation, &gate))));
            report(&format!("{name} backward"), &mut || {
                drop(black_box(activate_backward(activation, &gate, &up)));
            });
            report(&format!("{name} gate"), &mut || drop(black_box(gated(activation, &gate, &up))));
            report(&format!("{name} gate backward"), &mut || {
                drop(black_box(gated_backward(activation, &gate, &up, &gate)));
            });
        }
        report("rope", &mut || drop(black_box(rope(&q, HEADS, &table, false))));
        report("attention", &mut || {
            let mut y = vec![0.0; q.len()];
            let kv = Blocks { layout: LAYOUT, data: &cache, scales: &[] };
            attend(kv, &sequences, &q, HEADS, spec, &mut Scratch::default(), &mut y);
            black_box(y);
        });
        report("attention backward", &mut || {
            let (mut dq, mut dk, mut dv) = (vec![0.0; q.len()], vec![0.0; k.len()], vec![0.0; v.len()]);
            let inputs = Inputs { q: &q, k: &k, v: &v, dy: &q };
            let gradients = Gradients { dq: &mut dq, dk: &mut dk, dv: &mut dv };
            attend_backward(Shape { heads: HEADS, layout: LAYOUT }, &DOCUMENTS, spec, inputs, gradients);
            black_box((dq, dk, dv));
        });
        report("embedding gradient", &mut || {
            let mut dw = vec![0.0; VOCAB * D_MODEL];
            pointwise::embedding_backward(&dy, &ids, D_MODEL, &mut dw);
            black_box(dw);
        });
        report("cross-entropy with gradients", &mut || {
            let weights = HeadWeights::Dense(Elems::F32(&head));
            let problem = Problem { h: &x, w: weights, vocab: VOCAB, d: D_MODEL, targets: &targets };
            let (mut dh, mut dw) = (vec![0.0; x.len()], Vec::new());
            black_box(cross_entropy(problem, Some(&mut dh), Some(&mut dw)));
        });
    }
}

/// The documents' keys and values in KV blocks.
fn cached(k: &[f32], v: &[f32]) -> (Vec<SequenceRows>, Vec<f32>) {
    let width = LAYOUT.kv_heads * LAYOUT.head_dim;
    let mut cache = vec![0.0; ROWS / 16 * LAYOUT.block_len()];
    let mut first = 0;
    let sequences = DOCUMENTS.map(|len| {
        let rows = first..first + len;
        let table = (first as u32 / 16..(first + len) as u32 / 16).collect();
        let range = rows.start * width..rows.end * width;
        let sequence = SequenceRows { rows, first_position: 0, table };
        LAYOUT.write(&mut cache, &sequence.table, 0, &k[range.clone()], &v[range]);
        first += len;
        sequence
    });
    (sequences.into(), cache)
}

fn wave(n: usize) -> Vec<f32> {
    (0..n).map(|i| (i as f32 * 0.37).sin()).collect()
}

/// Milliseconds of the median round.
fn median_ms(work: &mut dyn FnMut()) -> f64 {
    let mut times: Vec<f64> = (0..ROUNDS)
        .map(|_| {
            let start = Instant::now();
            work();
            start.elapsed().as_secs_f64() * 1e3
        })
        .collect();
    times.sort_by(f64::total_cmp);
    times[ROUNDS / 2]
}
