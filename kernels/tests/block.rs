//! A transformer block in one piece has the bits of the ops one by one.

use burn::tensor::{Device, Tensor, TensorData};
use half::f16;
use hearth_kernels::cpu::block::{BlockWeights, Gain, Projection};
use hearth_kernels::paged::{KV_BLOCK, KvCache, KvType, SequenceRows, Workspace, attention_paged, block};
use hearth_kernels::{
    Activation, Activations, AttentionSpec, PackedMatrix, RotaryTable, gated, linear_packed, rms_norm, rope,
};
use std::sync::Arc;

/// A block's dimensions and what it has besides.
#[derive(Clone, Copy)]
struct Case {
    d: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    inner: usize,
    activation: Activation,
    bias: bool,
    qk_norm: bool,
    window: Option<usize>,
    kv: KvType,
}

/// The same weights in both forms.
struct Layer {
    matrix: Arc<PackedMatrix>,
    bias: Option<Vec<f32>>,
}

impl Layer {
    fn new(outputs: usize, inputs: usize, bias: bool, seed: u32) -> Self {
        let block = |b: usize| {
            let scale = f16::from_f32(0.002 + 0.001 * (b % 5) as f32).to_le_bytes();
            let codes = values(32, seed + b as u32).into_iter().map(|v| (v * 100.0) as i8 as u8);
            scale.into_iter().chain(codes).collect::<Vec<u8>>()
        };
        let bytes: Vec<u8> = (0..outputs * inputs / 32).flat_map(block).collect();
        let matrix = PackedMatrix::from_format(outputs, inputs, "q8_0", &bytes).expect("whole blocks");
        let matrix = Arc::new(matrix.with_activations(Activations::Int8));
        Self { matrix, bias: bias.then(|| values(outputs, seed + 7)) }
    }

    fn projection(&self) -> Projection {
        Projection::new(self.matrix.clone(), self.bias.clone()).expect("quantized")
    }

    fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        let y = linear_packed(x, self.matrix.clone());
        match &self.bias {
            Some(bias) => y + vector(bias).unsqueeze::<2>(),
            None => y,
        }
    }
}

struct Weights {
    case: Case,
    layers: [Layer; 7],
    gains: [Vec<f32>; 4],
}

const EPS: f32 = 1e-5;

impl Weights {
    fn new(case: Case) -> Self {
        let Case { d, heads, kv_heads, head_dim, inner, bias, .. } = case;
        let (q, kv) = (heads * head_dim, kv_heads * head_dim);
        let shapes = [(q, d), (kv, d), (kv, d), (d, q), (inner, d), (inner, d), (d, inner)];
        let mut seed = 0;
        let layers = shapes.map(|(outputs, inputs)| {
            seed += 1000;
            Layer::new(outputs, inputs, bias, seed)
        });
        let gains = [d, d, head_dim, head_dim].map(|n| values(n, n as u32));
        Self { case, layers, gains }
    }

    fn spec(&self) -> AttentionSpec {
        AttentionSpec { scale: (self.case.head_dim as f32).powf(-0.5), window: self.case.window }
    }

    fn cache(&self, blocks: usize) -> KvCache {
        KvCache::new(1, blocks, self.case.kv_heads, self.case.head_dim, self.case.kv)
    }

    fn fused(&self) -> BlockWeights {
        let [q, k, v, o, gate, up, down] = self.layers.each_ref().map(Layer::projection);
        let gain = |i: usize| Gain { gain: self.gains[i].clone(), eps: EPS };
        BlockWeights {
            attention_norm: gain(0),
            q,
            k,
            v,
            o,
            qk_norm: self.case.qk_norm.then(|| [gain(2), gain(3)]),
            mlp_norm: gain(1),
            gate,
            up,
            down,
            activation: self.case.activation,
            heads: self.case.heads,
            kv_heads: self.case.kv_heads,
            head_dim: self.case.head_dim,
            spec: self.spec(),
        }
    }

    fn op_by_op(
        &self,
        x: Tensor<2>,
        cache: &mut KvCache,
        rows: &[SequenceRows],
        table: &Arc<RotaryTable>,
    ) -> Tensor<2> {
        let Case { heads, kv_heads, head_dim, qk_norm, .. } = self.case;
        let [q, k, v, o, gate, up, down] = &self.layers;
        let n = x.dims()[0];
        let h = rms_norm(x.clone(), vector(&self.gains[0]), EPS);
        let split = |y: Tensor<2>, heads: usize| y.reshape([n, heads, head_dim]);
        let normed = |y: Tensor<3>, heads: usize, gain: usize| match qk_norm {
            true => rms_norm(y.reshape([n * heads, head_dim]), vector(&self.gains[gain]), EPS)
                .reshape([n, heads, head_dim]),
            false => y,
        };
        let query = rope(normed(split(q.forward(h.clone()), heads), heads, 2), table.clone());
        let key = rope(normed(split(k.forward(h.clone()), kv_heads), kv_heads, 3), table.clone());
        let value = split(v.forward(h), kv_heads);
        let y = attention_paged(query, key, value, cache, 0, rows, self.spec());
        let x = x + o.forward(y.reshape([n, heads * head_dim]));
        let h = rms_norm(x.clone(), vector(&self.gains[1]), EPS);
        x + down.forward(gated(gate.forward(h.clone()), up.forward(h), self.case.activation))
    }
}

fn vector(values: &[f32]) -> Tensor<1> {
    Tensor::from_floats(values, &Device::flex())
}

/// Numbers in −1 … 1.
fn values(len: usize, seed: u32) -> Vec<f32> {
    let number = |i: usize| {
        let x = (i as u32).wrapping_mul(747_796_405).wrapping_add(seed.wrapping_mul(2_891_336_453));
        ((x ^ (x >> 15)).wrapping_mul(277_803_737) >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..len).map(number).collect()
}

/// Sequences of so many new tokens each behind so many in the cache, their table, and their blocks.
fn sequences(lens: &[(usize, usize)], half: usize) -> (Vec<SequenceRows>, Arc<RotaryTable>, usize) {
    let (mut row, mut block, mut angles) = (0, 0, Vec::new());
    let mut all = Vec::new();
    for &(before, len) in lens {
        let blocks = (before + len).div_ceil(KV_BLOCK);
        let table = (block as u32..(block + blocks) as u32).collect();
        all.push(SequenceRows { rows: row..row + len, first_position: before, table });
        angles.extend((0..len * half).map(|i| ((before + i / half) as f32) / (1 + i % half) as f32));
        (row, block) = (row + len, block + blocks);
    }
    let (cos, sin) = angles.iter().map(|a: &f32| (a.cos(), a.sin())).unzip();
    (all, Arc::new(RotaryTable::new(half, cos, sin)), block)
}

fn floats(x: Tensor<2>) -> Vec<u32> {
    x.into_data().try_into_vec::<f32>().expect("f32").into_iter().map(f32::to_bits).collect()
}

#[test]
fn a_block_in_one_piece_has_the_bits_of_the_ops_one_by_one() {
    let plain = Case {
        d: 64,
        heads: 4,
        kv_heads: 2,
        head_dim: 16,
        inner: 160,
        activation: Activation::Silu,
        bias: false,
        qk_norm: false,
        window: None,
        kv: KvType::F16,
    };
    let cases = [
        plain,
        Case { activation: Activation::GeluTanh, bias: true, kv: KvType::F32, ..plain },
        Case { qk_norm: true, heads: 8, head_dim: 8, kv_heads: 1, kv: KvType::Int8, ..plain },
        // Widths that are no whole panels, more dimensions in the heads than in the stream, a window.
        Case { d: 32, heads: 3, kv_heads: 3, head_dim: 32, inner: 96, bias: true, window: Some(9), ..plain },
    ];
    let passes: [&[(usize, usize)]; 4] =
        [&[(0, 1)], &[(0, 5), (0, 1), (0, 17)], &[(0, 40), (0, 33)], &[(0, 300)]];
    for case in cases {
        let weights = Weights::new(case);
        let (fused, mut space) = (weights.fused(), Workspace::default());
        for lens in passes {
            // The prompts, then a token for each of them.
            let next: Vec<_> = lens.iter().map(|(before, len)| (before + len, 1)).collect();
            let blocks = sequences(&next, 1).2;
            let (mut one, mut many) = (weights.cache(blocks), weights.cache(blocks));
            let tables: Vec<_> = sequences(&next, 1).0.into_iter().map(|s| s.table).collect();
            for lens in [lens, &next] {
                let (mut rows, rotary, _) = sequences(lens, case.head_dim / 2);
                rows.iter_mut().zip(&tables).for_each(|(s, table)| s.table = table.clone());
                let n = lens.iter().map(|(_, len)| len).sum();
                let x = || {
                    let data = TensorData::new(values(n * case.d, n as u32), [n, case.d]);
                    Tensor::<2>::from_data(data, &Device::flex())
                };
                let want = floats(weights.op_by_op(x(), &mut many, &rows, &rotary));
                assert!(want.iter().all(|bits| f32::from_bits(*bits).is_finite()), "{lens:?}");
                let got = block(x(), &fused, &mut one, 0, &rows, &rotary, &mut space);
                assert!(floats(got) == want, "{lens:?}, width {}", case.d);
            }
        }
    }
}

#[test]
fn matrices_that_multiply_floats_are_no_part_of_it() {
    let dense = PackedMatrix::from_f32(16, 32, &values(512, 1));
    assert!(Projection::new(Arc::new(dense.with_activations(Activations::Int8)), None).is_none());
}
