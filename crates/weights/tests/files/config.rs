//! `config.json`: understood as transformers understands it, and refused with a sentence where it cannot be.

use crate::common::{fixture, tiny_config};
use hearth_weights::config::Activation;
use hearth_weights::{ModelConfig, RopeScaling};
use serde_json::{Map, Value, json};

fn object(value: Value) -> Map<String, Value> {
    value.as_object().unwrap().clone()
}

fn check(config: &ModelConfig, expected: &Value, case: &Value) {
    let size = |key: &str| expected[key].as_u64().unwrap() as usize;
    assert_eq!(config.vocab_size, size("vocab_size"), "{case}");
    assert_eq!(config.hidden_size, size("hidden_size"), "{case}");
    assert_eq!(config.intermediate_size, size("intermediate_size"), "{case}");
    assert_eq!(config.num_layers, size("num_layers"), "{case}");
    assert_eq!(config.num_heads, size("num_heads"), "{case}");
    assert_eq!(config.num_kv_heads, size("num_kv_heads"), "{case}");
    assert_eq!(config.head_dim, size("head_dim"), "{case}");
    assert_eq!(config.max_position_embeddings, size("max_position_embeddings"), "{case}");
    assert_eq!(config.rms_norm_eps, expected["rms_norm_eps"].as_f64().unwrap() as f32, "{case}");
    let flags = [
        ("tie_word_embeddings", config.tie_word_embeddings),
        ("qkv_bias", config.qkv_bias),
        ("attention_out_bias", config.attention_out_bias),
        ("mlp_bias", config.mlp_bias),
        ("qk_norm", config.qk_norm),
    ];
    let activation = match config.activation {
        Activation::Silu => "silu",
        Activation::Gelu => "gelu",
        Activation::GeluTanh => "gelu_pytorch_tanh",
    };
    assert_eq!(activation, expected["activation"], "{case}");
    for (key, flag) in flags {
        assert_eq!(flag, expected[key].as_bool().unwrap(), "{key} of {case}");
    }
    check_windows(config, &expected["windows"], case);
    check_tokens(config, expected, case);
    check_rope(config, expected, case);
}

fn check_windows(config: &ModelConfig, expected: &Value, case: &Value) {
    let expected = expected.as_array().unwrap();
    assert_eq!(config.sliding_window.len(), config.num_layers);
    for (i, window) in config.sliding_window.iter().enumerate() {
        // One entry stands for all when they are equal.
        let want = if expected.len() == 1 { &expected[0] } else { &expected[i] };
        assert_eq!(window.map(|w| w as u64), want.as_u64(), "block {i} of {case}");
    }
}

fn check_tokens(config: &ModelConfig, expected: &Value, case: &Value) {
    assert_eq!(config.bos_token_id.map(u64::from), expected["bos"].as_u64(), "{case}");
    assert_eq!(config.pad_token_id.map(u64::from), expected["pad"].as_u64(), "{case}");
    let eos = match &expected["eos"] {
        Value::Null => vec![],
        Value::Array(list) => list.iter().map(|v| v.as_u64().unwrap() as u32).collect(),
        one => vec![one.as_u64().unwrap() as u32],
    };
    assert_eq!(config.eos_token_ids, eos, "{case}");
}

fn check_rope(config: &ModelConfig, expected: &Value, case: &Value) {
    assert_eq!(config.rope.theta, expected["theta"].as_f64().unwrap(), "{case}");
    let number = |key: &str| expected[key].as_f64().unwrap();
    match (&config.rope.scaling, expected["rope_type"].as_str().unwrap()) {
        (RopeScaling::None, "default") => {}
        (RopeScaling::Linear { factor }, "linear") => assert_eq!(*factor, number("factor"), "{case}"),
        (RopeScaling::Dynamic { factor, original_max_position }, "dynamic") => {
            assert_eq!(*factor, number("factor"), "{case}");
            assert_eq!(*original_max_position, config.max_position_embeddings, "{case}");
        }
        (RopeScaling::Yarn { factor, original_max_position, attention_factor, .. }, "yarn") => {
            assert_eq!(*factor, number("factor"), "{case}");
            assert_eq!(*original_max_position as f64, number("original"), "{case}");
            let difference = (attention_factor - number("attention_factor")).abs();
            assert!(difference < 1e-15, "{case}: {difference}");
        }
        (RopeScaling::Llama3 { factor, original_max_position, .. }, "llama3") => {
            assert_eq!(*factor, number("factor"), "{case}");
            assert_eq!(*original_max_position as f64, number("original"), "{case}");
        }
        (other, name) => panic!("{case}: {other:?} for {name}"),
    }
}

#[test]
fn configurations_mean_what_transformers_takes_them_to_mean() {
    let rows: Value =
        serde_json::from_str(&std::fs::read_to_string(fixture("configs.json")).unwrap()).unwrap();
    for row in rows.as_array().unwrap() {
        let config = ModelConfig::from_hf(&object(row["config"].clone()))
            .unwrap_or_else(|e| panic!("{}: {e}", row["config"]));
        check(&config, &row["expected"], &row["config"]);
    }
}

#[test]
fn what_is_written_is_read_back_the_same() {
    let rows: Value =
        serde_json::from_str(&std::fs::read_to_string(fixture("configs.json")).unwrap()).unwrap();
    for row in rows.as_array().unwrap() {
        let config = ModelConfig::from_hf(&object(row["config"].clone())).unwrap();
        assert_eq!(ModelConfig::from_hf(&config.to_hf()).unwrap(), config, "{}", row["config"]);
    }
    let mut config = tiny_config("llama");
    config.rope.scaling = RopeScaling::Divisors(vec![1.0, 1.5, 2.0, 4.0]);
    assert_eq!(ModelConfig::from_hf(&config.to_hf()).unwrap(), config);
}

#[test]
fn yarn_options_are_kept() {
    let json = json!({"model_type": "llama", "hidden_size": 32, "num_attention_heads": 4,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 16, "beta_slow": 0, "truncate": false}});
    match ModelConfig::from_hf(&object(json)).unwrap().rope.scaling {
        RopeScaling::Yarn { beta_fast, beta_slow, truncate, original_max_position, .. } => {
            assert_eq!((beta_fast, beta_slow, truncate, original_max_position), (16.0, 1.0, false, 2048));
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn contradictions_are_named_with_key_value_and_limit() {
    // Changes to a good configuration, and what the sentence must say.
    let rope = |rope: Value| json!({"rope_scaling": rope});
    let cases = [
        (json!({"model_type": null}), "model_type"),
        (json!({"model_type": "gpt2"}), "llama, mistral, qwen2, qwen3, gemma, starcoder2"),
        (json!({"vocab_size": 0}), "vocab_size is 0"),
        (json!({"hidden_size": -8}), "hidden_size is -8"),
        (json!({"hidden_size": "big"}), "hidden_size is \"big\""),
        (json!({"hidden_size": 1u64 << 60}), "hidden_size is"),
        (json!({"num_hidden_layers": 10_000_000}), "num_hidden_layers is 10000000"),
        (json!({"hidden_size": 33}), "multiple of num_attention_heads"),
        (json!({"num_attention_heads": 0}), "num_attention_heads"),
        (json!({"num_key_value_heads": 3}), "multiple of num_key_value_heads, which is 3"),
        (json!({"num_key_value_heads": 0}), "num_key_value_heads is 0"),
        (json!({"head_dim": 7}), "head_dim is 7"),
        (json!({"rms_norm_eps": "1e-5"}), "rms_norm_eps"),
        (json!({"rms_norm_eps": -1.0}), "rms_norm_eps is -1"),
        (json!({"hidden_act": "gelu"}), "hidden_act is \"gelu\", it must be \"silu\""),
        (
            json!({"model_type": "gemma", "hidden_activation": "gelu_quick"}),
            "hidden_activation is \"gelu_quick\"",
        ),
        (
            json!({"model_type": "gemma", "use_bidirectional_attention": true}),
            "use_bidirectional_attention is true",
        ),
        (json!({"model_type": "starcoder2", "hidden_act": ["gelu"]}), "\"gelu_pytorch_tanh\" or \"gelu\""),
        (json!({"model_type": "starcoder2", "norm_epsilon": 1}), "norm_epsilon is 1"),
        (json!({"eos_token_id": "</s>"}), "eos_token_id"),
        (json!({"eos_token_id": [1, 5_000_000_000u64]}), "eos_token_id"),
        (json!({"tie_word_embeddings": "yes"}), "tie_word_embeddings"),
        (json!({"partial_rotary_factor": 0.5}), "partial_rotary_factor is 0.5"),
        (json!({"quantization_config": {"quant_method": "gptq"}}), "gptq"),
        (json!({"rope_theta": 0}), "rope_theta is 0"),
        (json!({"rope_theta": "10000"}), "rope_theta"),
        (rope(json!("linear")), "rope_scaling is \"linear\""),
        (rope(json!({"type": "linear"})), "no factor"),
        (rope(json!({"type": "linear", "factor": 0})), "factor is 0"),
        (rope(json!({"type": "spiral", "factor": 2})), "\"spiral\""),
        (rope(json!({"rope_type": "longrope", "short_factor": [1, 1], "long_factor": [2, 2]})), "longrope"),
        (rope(json!({"rope_type": "llama3", "factor": 8.0})), "low_freq_factor"),
        (
            rope(json!({"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4})),
            "below high_freq_factor",
        ),
        (rope(json!({"rope_type": "yarn", "factor": 2, "beta_fast": 1, "beta_slow": 32})), "below beta_fast"),
        (rope(json!({"full_attention": {"rope_type": "default"}})), "per layer type"),
    ];
    for (change, wanted) in cases {
        let mut json = object(json!({"model_type": "llama", "vocab_size": 64, "hidden_size": 32,
            "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}));
        json.extend(object(change.clone()));
        let message = ModelConfig::from_hf(&json).expect_err(&change.to_string()).to_string();
        assert!(message.contains(wanted), "{change}: {message}");
        assert!(!message.contains('\n'), "{message}");
    }
}

#[test]
fn windows_of_unlike_length_are_refused() {
    let mut config = tiny_config("mistral");
    config.sliding_window.pop();
    assert!(config.validate().unwrap_err().to_string().contains("num_hidden_layers is 2"));
    config.sliding_window = vec![Some(0); 2];
    assert!(config.validate().unwrap_err().to_string().contains("sliding_window is 0"));
}
