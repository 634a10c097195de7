//! A model of any size, of no meaning.

use hearth_weights::ModelFiles;
use hearth_weights::config::ModelConfig;
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use std::path::Path;

/// A Hugging Face directory of a Llama with weights of no meaning, large enough to be cut into many pieces.
pub fn synthetic(
    dir: &Path,
    hidden: usize,
    layers: usize,
    inner: usize,
    vocab: usize,
    tied: bool,
) -> ModelFiles {
    let config = serde_json::json!({
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": hidden,
        "num_hidden_layers": layers, "intermediate_size": inner, "vocab_size": vocab,
        "num_attention_heads": 8, "num_key_value_heads": 4, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "max_position_embeddings": 2048, "tie_word_embeddings": tied, "hidden_act": "silu",
    });
    std::fs::write(dir.join("config.json"), config.to_string()).expect("written");
    let config = ModelConfig::from_hf(config.as_object().expect("an object")).expect("a configuration");
    let arch = hearth_model::architecture(&config).expect("an architecture");
    let specs = hearth_model::params(&*arch);
    let values: Vec<Vec<u8>> = specs.iter().enumerate().map(|(i, spec)| noise(i, spec.len())).collect();
    let views = specs.iter().zip(&values).map(|(spec, values)| {
        let view = TensorView::new(Dtype::F32, spec.shape.clone(), values);
        (spec.name.clone(), view.expect("a view"))
    });
    safetensors::serialize_to_file(views, None, &dir.join("model.safetensors")).expect("written");
    hearth_weights::open(dir).expect("opens")
}

/// Norm gains near one, the rest small.
fn noise(seed: usize, len: usize) -> Vec<u8> {
    let mut state = seed as u64 * 0x9e37_79b9_7f4a_7c15 + 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1 << 24) as f32 - 0.5
    };
    (0..len).flat_map(|_| (next() * 0.1).to_le_bytes()).collect()
}
