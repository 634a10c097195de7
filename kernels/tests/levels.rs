//! Every instruction set computes the same bits. One test: the level is the process's.

use hearth_kernels::RotaryTable;
use hearth_kernels::cpu::activation::{Activation, activate, activate_backward, gated, gated_backward};
use hearth_kernels::cpu::attention::AttentionSpec;
use hearth_kernels::cpu::attention_backward::{Gradients, Inputs, Shape, attend_backward};
use hearth_kernels::cpu::gemm::Elems;
use hearth_kernels::cpu::kv::KvLayout;
use hearth_kernels::cpu::layer_norm::{layer_norm, layer_norm_backward};
use hearth_kernels::cpu::loss::{HeadWeights, Problem, cross_entropy};
use hearth_kernels::cpu::simd::{Level, limit};
use hearth_kernels::cpu::{pointwise, rope::rope};

fn values(n: usize, seed: u32) -> Vec<f32> {
    let mut s = seed;
    (0..n)
        .map(|_| {
            s = s.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (s >> 8) as f32 / (1 << 23) as f32 - 1.0
        })
        .collect()
}

/// Results of all kernels, by name.
fn results() -> Vec<(&'static str, Vec<f32>)> {
    let (rows, d) = (37, 50);
    let [x, y, z] = [1, 2, 3].map(|seed| values(rows * d, seed));
    let w = values(d, 4);
    let (dx, dw) = pointwise::rms_norm_backward(&x, &w, 1e-5, &y);
    let (layer_dx, layer_dw, layer_db) = layer_norm_backward(&x, &w, 1e-5, &y);
    let table = RotaryTable::new(5, values(rows * 5, 5), values(rows * 5, 6));
    let mut all = vec![
        ("rms_norm", pointwise::rms_norm(&x, &w, 1e-5)),
        ("rms_norm dx", dx),
        ("rms_norm dw", dw),
        ("layer_norm", layer_norm(&x, &w, &w, 1e-5)),
        ("layer_norm dx", layer_dx),
        ("layer_norm dw", layer_dw),
        ("layer_norm db", layer_db),
        ("rope", rope(&x, 5, &table, false)),
    ];
    for activation in Activation::ALL {
        let (dgate, dup) = gated_backward(activation, &x, &y, &z);
        all.push(("activation", activate(activation, &x)));
        all.push(("activation dx", activate_backward(activation, &x, &y)));
        all.push(("gated", gated(activation, &x, &y)));
        all.extend([("gated dgate", dgate), ("gated dup", dup)]);
    }
    all.extend(attention());
    all.extend(loss());
    all
}

fn attention() -> Vec<(&'static str, Vec<f32>)> {
    let (heads, kv_heads, d, documents) = (6, 2, 20, [37, 5, 18]);
    let rows: usize = documents.iter().sum();
    let [q, dy] = [7, 8].map(|seed| values(rows * heads * d, seed));
    let [k, v] = [9, 10].map(|seed| values(rows * kv_heads * d, seed));
    let [mut dk, mut dv] = [0.0; 2].map(|zero| vec![zero; k.len()]);
    let mut dq = vec![0.0; q.len()];
    attend_backward(
        Shape { heads, layout: KvLayout { kv_heads, head_dim: d } },
        &documents,
        AttentionSpec { scale: 0.2, window: Some(21) },
        Inputs { q: &q, k: &k, v: &v, dy: &dy },
        Gradients { dq: &mut dq, dk: &mut dk, dv: &mut dv },
    );
    vec![("attention dq", dq), ("attention dk", dk), ("attention dv", dv)]
}

fn loss() -> Vec<(&'static str, Vec<f32>)> {
    let (rows, vocab, d) = (9, 101, 30);
    let (h, w) = (values(rows * d, 11), values(vocab * d, 12));
    let targets: Vec<i32> = (0..rows as i32).map(|i| if i == 3 { -1 } else { i * 11 }).collect();
    let problem = Problem { h: &h, w: HeadWeights::Dense(Elems::F32(&w)), vocab, d, targets: &targets };
    let (mut dh, mut dw) = (vec![0.0; rows * d], Vec::new());
    let loss = cross_entropy(problem, Some(&mut dh), Some(&mut dw));
    vec![("loss", vec![loss as f32]), ("loss dh", dh), ("loss dw", dw)]
}

#[test]
fn every_instruction_set_computes_the_same_bits() {
    limit(Some(Level::Portable));
    let portable = results();
    for level in Level::present() {
        assert_eq!(limit(Some(level)), level);
        for ((name, got), (_, want)) in results().iter().zip(&portable) {
            let equal = got.iter().zip(want).all(|(a, b)| a.to_bits() == b.to_bits());
            assert!(equal && got.len() == want.len(), "{name} differs on {level:?}");
        }
    }
}
