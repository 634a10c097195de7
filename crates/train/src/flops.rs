//! Model FLOPs: what the mathematics needs, whatever is computed again.
//!
//! For `n` tokens and a linear weight of `p` elements: `2np` forward, `2np` for the input's gradient, `2np` for the
//! weight's — the last only if it is trained. The output head counts as a linear weight, the embedding's look-up as
//! nothing. Attention takes 4 FLOPs per query–key pair, head and head dimension forward and twice that backward, a
//! document of `l` tokens having `l(l+1)/2` pairs (fewer with a window).

use crate::config::TrainConfig;
use crate::layout::Layout;
use crate::params::ParamStore;
use hearth_model::{Architecture, Group, params};

/// FLOPs of a training step, split by what they grow with.
#[derive(Clone, Debug)]
pub struct ModelFlops {
    per_token: f64,
    forward_per_token: f64,
    per_pair: f64,
    /// One window per transformer block.
    windows: Vec<Option<usize>>,
}

impl ModelFlops {
    /// For a model and what is trained of it.
    pub fn new(arch: &dyn Architecture, store: &ParamStore) -> Self {
        Self::of_layout(arch, store.layout(), store.lora().is_some())
    }

    /// For a run that has not loaded anything.
    pub fn planned(arch: &dyn Architecture, config: &TrainConfig, layout: &Layout) -> Self {
        Self::of_layout(arch, layout, config.adapter.is_some())
    }

    fn of_layout(arch: &dyn Architecture, layout: &Layout, adapter: bool) -> Self {
        let config = arch.config();
        let matmul = |elements: usize, trained: bool| elements as f64 * if trained { 6.0 } else { 4.0 };
        let (mut per_token, mut elements) = (0.0, 0);
        for spec in params(arch).iter().filter(|s| s.shape.len() == 2) {
            let head =
                spec.group == Group::Head || spec.group == Group::Embedding && config.tie_word_embeddings;
            if spec.linear || head {
                per_token += matmul(spec.len(), !adapter);
                elements += spec.len();
            }
        }
        if adapter {
            per_token += matmul(layout.len(), true);
            elements += layout.len();
        }
        let per_pair = 3.0 * 4.0 * (config.num_heads * config.head_dim) as f64;
        Self {
            per_token,
            forward_per_token: 2.0 * elements as f64,
            per_pair,
            windows: config.sliding_window.clone(),
        }
    }

    /// FLOPs of a forward pass alone over documents of these lengths.
    pub fn forward(&self, documents: impl IntoIterator<Item = usize>) -> f64 {
        let forward =
            Self { per_token: self.forward_per_token, per_pair: self.per_pair / 3.0, ..self.clone() };
        forward.of(documents)
    }

    /// FLOPs of a forward and backward pass over documents of these lengths.
    pub fn of(&self, documents: impl IntoIterator<Item = usize>) -> f64 {
        let mut flops = 0.0;
        for len in documents {
            let pairs: f64 = self.windows.iter().map(|w| pairs(len, *w)).sum();
            flops += self.per_token * len as f64 + self.per_pair * pairs;
        }
        flops
    }
}

/// Query–key pairs of a causal document in which a query sees at most `window` keys.
fn pairs(len: usize, window: Option<usize>) -> f64 {
    let (len, window) = (len as f64, window.unwrap_or(len).min(len) as f64);
    window * (window + 1.0) / 2.0 + (len - window) * window
}

#[cfg(test)]
mod tests {
    #[test]
    fn pairs_are_counted_exactly() {
        for len in 0..20usize {
            for window in [None, Some(1), Some(3), Some(100)] {
                let want: usize = (0..len).map(|i| (i + 1).min(window.unwrap_or(usize::MAX))).sum();
                assert_eq!(super::pairs(len, window), want as f64, "{len} {window:?}");
            }
        }
    }
}
