//! A transformer block on 8-bit activations, computed in one piece for inference.
//!
//! Op by op ([`crate`]) every result becomes a tensor of its own; while a sequence generates, that takes as long as a
//! third of the products. Here the same arithmetic, bit for bit, runs in a few parallel loops over memory that stays from
//! block to block: products with the same input share its rounding and one loop, the gate is applied and the residual
//! stream added to where a product's outputs are written.

use super::activation::{Activation, gated_in_place};
use super::attention::AttentionSpec;
use super::packed::{PackedMatrix, Walk, each_panel, store};
use super::pointwise::{rms_norm_in_place, rms_norm_into};
use super::pool;
use super::quant::activations::Int8Rows;
use super::resize;
use super::rope::{RotaryTable, rope_in_place};
use super::shared::Shared;
use super::simd::LANES;
use std::ops::Range;
use std::sync::Arc;

/// Fewest floats worth sharing out between threads.
const PARALLEL: usize = 1 << 13;

/// A pre-norm block of rotary grouped-query attention and a gated MLP.
#[derive(Debug)]
pub struct BlockWeights {
    /// Before the attention.
    pub attention_norm: Gain,
    /// `d_model` → `heads · head_dim`.
    pub q: Projection,
    /// `d_model` → `kv_heads · head_dim`.
    pub k: Projection,
    /// As `k`.
    pub v: Projection,
    /// `heads · head_dim` → `d_model`.
    pub o: Projection,
    /// Of each head of q and of k, where a model has them.
    pub qk_norm: Option<[Gain; 2]>,
    /// Before the MLP.
    pub mlp_norm: Gain,
    /// `d_model` → inner width.
    pub gate: Projection,
    /// As `gate`.
    pub up: Projection,
    /// Inner width → `d_model`.
    pub down: Projection,
    /// What the gate goes through.
    pub activation: Activation,
    /// Query heads.
    pub heads: usize,
    /// Heads of keys and values.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Scale and window.
    pub spec: AttentionSpec,
}

/// A norm's gain and what is added to the mean square.
#[derive(Clone, Debug)]
pub struct Gain {
    /// `[width]`.
    pub gain: Vec<f32>,
    /// Added to the mean square.
    pub eps: f32,
}

/// A matrix that multiplies 8-bit activations, and perhaps a bias.
#[derive(Clone, Debug)]
pub struct Projection {
    matrix: Arc<PackedMatrix>,
    bias: Option<Vec<f32>>,
}

impl Projection {
    /// `None` if the matrix multiplies floats.
    pub fn new(matrix: Arc<PackedMatrix>, bias: Option<Vec<f32>>) -> Option<Self> {
        assert!(bias.as_ref().is_none_or(|b| b.len() == matrix.rows()), "a bias per output");
        matrix.is_int8().then_some(Self { matrix, bias })
    }

    fn outputs(&self) -> usize {
        self.matrix.rows()
    }

    /// A panel's outputs for some rows: `put(row, first output, outputs)`.
    fn panel(
        &self,
        panel: usize,
        x: &Int8Rows,
        rows: Range<usize>,
        mut put: impl FnMut(usize, usize, &[f32]),
    ) {
        self.matrix.multiply_panel(panel, x, rows, &mut |row, column, sums| match &self.bias {
            None => put(row, column, sums),
            Some(bias) => {
                let mut biased = [0.0; LANES];
                for (y, (sum, bias)) in biased.iter_mut().zip(sums.iter().zip(&bias[column..])) {
                    *y = sum + bias;
                }
                put(row, column, &biased[..sums.len()]);
            }
        });
    }
}

/// Memory that a pass needs besides the residual stream; it grows to the largest pass.
#[derive(Debug, Default)]
pub struct Workspace {
    normed: Vec<f32>,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    attended: Vec<f32>,
    gated: Vec<f32>,
    rounded: Int8Rows,
}

/// What attention is computed from: the rows' rotated queries and keys, and their values.
#[derive(Clone, Copy, Debug)]
pub struct Projected<'a> {
    /// `[rows, heads, head_dim]`.
    pub q: &'a [f32],
    /// `[rows, kv_heads, head_dim]`.
    pub k: &'a [f32],
    /// As `k`.
    pub v: &'a [f32],
}

impl BlockWeights {
    /// Adds to the residual stream `x`, `[rows, d_model]`, what the block makes of it. The table has a line per row;
    /// `attend` writes attention's output, `[rows, heads, head_dim]`.
    pub fn forward(
        &self,
        x: &mut [f32],
        rotary: &RotaryTable,
        space: &mut Workspace,
        attend: impl FnOnce(Projected, &mut [f32]),
    ) {
        let rows = x.len() / self.o.outputs();
        assert_eq!(rows, rotary.rows(), "block: rows of x and of the rotary table");
        self.project_qkv(x, rows, space);
        self.rotate(rotary, space);
        resize(&mut space.attended, space.q.len());
        attend(Projected { q: &space.q, k: &space.k, v: &space.v }, &mut space.attended);
        add(&self.o, &space.attended, &mut space.rounded, x);
        self.project_gated(x, space);
        add(&self.down, &space.gated, &mut space.rounded, x);
    }

    fn project_qkv(&self, x: &[f32], rows: usize, space: &mut Workspace) {
        self.attention_norm.apply(x, &mut space.normed);
        space.rounded.fill(&space.normed, self.attention_norm.gain.len());
        let (projections, x) = ([&self.q, &self.k, &self.v], &space.rounded);
        let mut outputs = [&mut space.q, &mut space.k, &mut space.v];
        for (y, projection) in outputs.iter_mut().zip(projections) {
            resize(y, rows * projection.outputs());
        }
        let outputs = outputs.map(|y| Shared::new(y));
        let panels = projections.map(|p| p.matrix.panels());
        each_panel(Walk::InTurn(&projections.map(|p| &*p.matrix)), x, |number, rows| {
            let (mut which, mut panel) = (0, number);
            while panel >= panels[which] {
                (which, panel) = (which + 1, panel - panels[which]);
            }
            let (projection, y) = (projections[which], outputs[which]);
            projection.panel(panel, x, rows, |row, column, sums| {
                // SAFETY: row `row`, columns of this unit's own panel.
                let y = unsafe { y.part(row * projection.outputs() + column, sums.len()) };
                store(y, sums);
            });
        });
    }

    /// Norms and rotates the heads of q and k.
    fn rotate(&self, table: &RotaryTable, space: &mut Workspace) {
        let Workspace { q, k, .. } = space;
        for (x, heads, gain) in [(q, self.heads, 0), (k, self.kv_heads, 1)] {
            let width = heads * self.head_dim;
            each_rows(x, width, |first, x| {
                if let Some(norms) = &self.qk_norm {
                    rms_norm_in_place(x, &norms[gain].gain, norms[gain].eps);
                }
                rope_in_place(x, heads, table, first);
            });
        }
    }

    fn project_gated(&self, x: &[f32], space: &mut Workspace) {
        self.mlp_norm.apply(x, &mut space.normed);
        space.rounded.fill(&space.normed, self.mlp_norm.gain.len());
        let (inner, x) = (self.gate.outputs(), &space.rounded);
        resize(&mut space.gated, x.rows * inner);
        let y = Shared::new(&mut space.gated);
        each_panel(Walk::Abreast(&[&self.gate.matrix, &self.up.matrix]), x, |panel, rows| {
            // SAFETY: row `row`, columns of this unit's own panel.
            let place = |row: usize, column: usize, len: usize| unsafe { y.part(row * inner + column, len) };
            self.gate.panel(panel, x, rows.clone(), |row, column, gate| {
                store(place(row, column, gate.len()), gate);
            });
            self.up.panel(panel, x, rows, |row, column, up| {
                gated_in_place(self.activation, place(row, column, up.len()), up);
            });
        });
    }
}

/// `y += projection(x)`.
fn add(projection: &Projection, x: &[f32], rounded: &mut Int8Rows, y: &mut [f32]) {
    rounded.fill(x, projection.matrix.columns());
    let (x, y) = (&*rounded, Shared::new(y));
    each_panel(Walk::InTurn(&[&projection.matrix]), x, |panel, rows| {
        projection.panel(panel, x, rows, |row, column, sums| {
            // SAFETY: row `row`, columns of this unit's own panel.
            let y = unsafe { y.part(row * projection.outputs() + column, sums.len()) };
            for (y, sum) in y.iter_mut().zip(sums) {
                *y += sum;
            }
        });
    });
}

impl Gain {
    /// Norms the rows of `x` into `y`.
    fn apply(&self, x: &[f32], y: &mut Vec<f32>) {
        resize(y, x.len());
        each_rows(y, self.gain.len(), |first, y| {
            rms_norm_into(&x[first * self.gain.len()..][..y.len()], &self.gain, self.eps, y);
        });
    }
}

/// Calls `each(first row, some rows)`, in parallel where there is enough to do.
fn each_rows(x: &mut [f32], width: usize, each: impl Fn(usize, &mut [f32]) + Sync) {
    let rows = (PARALLEL / width.max(1)).clamp(1, x.len().max(1));
    if x.len() <= PARALLEL {
        return each(0, x);
    }
    pool::for_each_chunk(x, rows * width, |i, x| each(i * rows, x));
}
