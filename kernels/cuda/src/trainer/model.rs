//! What a model is made of: its parameters by name, each in its place in the flat vector of its unit.

use crate::decoder::Shape;
use crate::ops::attention;
use crate::runtime::Error;
use std::ops::Range;

/// Every parameter begins at a multiple of so many elements: 16 bytes in any type that is trained.
const ALIGN: usize = 8;

/// A Llama-shaped model.
#[derive(Clone, Debug, PartialEq)]
pub struct Model {
    /// Its dimensions.
    pub shape: Shape,
    /// Whether the output matrix is the embedding.
    pub tied: bool,
    /// Whether queries, keys and values have biases.
    pub qkv_bias: bool,
    /// Whether attention's output has one.
    pub out_bias: bool,
    /// Whether the MLP's matrices have them.
    pub mlp_bias: bool,
    /// Whether queries and keys are normed head by head.
    pub qk_norm: bool,
}

impl Model {
    /// Transformer blocks.
    pub fn num_blocks(&self) -> usize {
        self.shape.windows.len()
    }

    pub(super) fn q_width(&self) -> usize {
        self.shape.heads * self.shape.head_dim
    }

    pub(super) fn kv_width(&self) -> usize {
        self.shape.kv_heads * self.shape.head_dim
    }

    pub(super) fn attention(&self, block: usize, rows: usize) -> attention::Shape {
        let Shape { heads, kv_heads, head_dim, .. } = self.shape;
        let scale = (head_dim as f32).powf(-0.5);
        attention::Shape { rows, heads, kv_heads, d: head_dim, scale, window: self.shape.windows[block] }
    }
}

/// Elements of a unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Span {
    at: usize,
    len: usize,
}

impl Span {
    pub fn range(self) -> Range<usize> {
        self.at..self.at + self.len
    }
}

/// A linear layer's parameters within a unit.
#[derive(Clone, Copy, Debug)]
pub(super) struct Linear {
    pub weight: Span,
    pub bias: Option<Span>,
    pub rows: usize,
    pub columns: usize,
}

/// What a parameter is to its source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    Matrix([usize; 2]),
    Norm,
    Bias,
}

/// A parameter of a unit.
#[derive(Clone, Debug)]
pub(super) struct Parameter {
    /// As in files, without `.weight` or `.bias`.
    pub name: String,
    pub role: Role,
    pub span: Span,
}

impl Parameter {
    /// As in files.
    pub fn full_name(&self) -> String {
        let end = if self.role == Role::Bias { "bias" } else { "weight" };
        format!("{}.{end}", self.name)
    }
}

/// What is brought, differentiated and updated together: the embedding, a transformer block, the head.
#[derive(Clone, Debug, Default)]
pub(super) struct Unit {
    pub parameters: Vec<Parameter>,
    /// Elements, those between parameters among them: they are zero and stay so.
    pub len: usize,
}

impl Unit {
    fn span(&mut self, name: String, role: Role, len: usize) -> Span {
        let span = Span { at: self.len, len };
        self.parameters.push(Parameter { name, role, span });
        self.len = (self.len + len).next_multiple_of(ALIGN);
        span
    }

    fn linear(&mut self, name: String, [rows, columns]: [usize; 2], bias: bool) -> Linear {
        let weight = self.span(name.clone(), Role::Matrix([rows, columns]), rows * columns);
        let bias = bias.then(|| self.span(name, Role::Bias, rows));
        Linear { weight, bias, rows, columns }
    }
}

/// Where a transformer block's parameters are: the same places in every block.
#[derive(Clone, Copy, Debug)]
pub(super) struct BlockParts {
    pub attention_norm: Span,
    pub q: Linear,
    pub k: Linear,
    pub v: Linear,
    pub o: Linear,
    pub qk_norm: Option<(Span, Span)>,
    pub mlp_norm: Span,
    pub gate: Linear,
    pub up: Linear,
    pub down: Linear,
}

impl BlockParts {
    fn of(model: &Model, i: usize, unit: &mut Unit) -> Self {
        let at = |part: &str| format!("model.layers.{i}.{part}");
        let Shape { hidden, inner, head_dim, .. } = model.shape;
        let (q, kv) = (model.q_width(), model.kv_width());
        let mut linear = |part: &str, shape, bias| unit.linear(at(part), shape, bias);
        let [q, k, v] = [("q", q), ("k", kv), ("v", kv)]
            .map(|(name, rows)| linear(&format!("self_attn.{name}_proj"), [rows, hidden], model.qkv_bias));
        let o = linear("self_attn.o_proj", [hidden, q.rows], model.out_bias);
        let [gate, up] =
            ["gate", "up"].map(|name| linear(&format!("mlp.{name}_proj"), [inner, hidden], model.mlp_bias));
        let down = linear("mlp.down_proj", [hidden, inner], model.mlp_bias);
        let mut norm = |part: &str, len| unit.span(at(part), Role::Norm, len);
        let qk_norm =
            model.qk_norm.then(|| (norm("self_attn.q_norm", head_dim), norm("self_attn.k_norm", head_dim)));
        let attention_norm = norm("input_layernorm", hidden);
        let mlp_norm = norm("post_attention_layernorm", hidden);
        Self { attention_norm, q, k, v, o, qk_norm, mlp_norm, gate, up, down }
    }
}

/// Every unit, and where the parts of each are.
#[derive(Clone, Debug)]
pub(super) struct Layout {
    /// Embedding, blocks, head.
    pub units: Vec<Unit>,
    pub block: BlockParts,
    pub embedding: Span,
    pub final_norm: Span,
    /// The output matrix, in the head's unit or, when tied, in the embedding's.
    pub output: Span,
}

impl Layout {
    /// # Errors
    /// [`Error::Value`] for a model without blocks.
    pub fn new(model: &Model) -> Result<Self, Error> {
        let Shape { hidden, vocab, .. } = model.shape;
        let mut first = Unit::default();
        let matrix = Role::Matrix([vocab, hidden]);
        let embedding = first.span("model.embed_tokens".into(), matrix, vocab * hidden);
        let (mut units, mut block) = (vec![first], None);
        for i in 0..model.num_blocks() {
            let mut unit = Unit::default();
            block = Some(BlockParts::of(model, i, &mut unit));
            units.push(unit);
        }
        let mut head = Unit::default();
        let final_norm = head.span("model.norm".into(), Role::Norm, hidden);
        let output = match model.tied {
            true => embedding,
            false => head.span("lm_head".into(), matrix, vocab * hidden),
        };
        units.push(head);
        let block = block.ok_or_else(|| super::wrong("transformer blocks", 0, "at least 1"))?;
        Ok(Self { units, block, embedding, final_norm, output })
    }

    /// The unit of a block.
    pub fn of_block(&self, block: usize) -> usize {
        1 + block
    }

    /// The head's unit.
    pub fn head(&self) -> usize {
        self.units.len() - 1
    }

    /// The unit that holds the output matrix.
    pub fn of_output(&self, model: &Model) -> usize {
        if model.tied { EMBEDDING } else { self.head() }
    }

    /// Elements of all units.
    pub fn len(&self) -> usize {
        self.units.iter().map(|unit| unit.len).sum()
    }
}

/// The embedding's unit.
pub(super) const EMBEDDING: usize = 0;
