//! Which linear layers an adapter adapts, and what it starts from.

use crate::Error;
use crate::checkpoint::Companion;
use crate::config::LoraConfig;
use crate::random::{key, uniform, word};
use hearth_model::ParamSpec;
use serde_json::json;
use std::collections::{BTreeSet, HashMap};

/// Prefix PEFT puts before a module's name in `adapter_model.safetensors`.
pub(crate) const PEFT_PREFIX: &str = "base_model.model.";

/// Refuses targets that name no linear layer.
pub(crate) fn check_targets(specs: &[ParamSpec], config: &LoraConfig) -> Result<(), Error> {
    let linear = specs.iter().filter(|spec| spec.linear);
    let known: BTreeSet<&str> = linear.map(|spec| last_component(&spec.name)).collect();
    for target in &config.targets {
        if target != "all-linear" && !known.contains(target.as_str()) {
            let known: Vec<&str> = known.into_iter().collect();
            return Err(Error::Config(format!(
                "adapter.targets: the model has no linear layer {target:?}; it has {}, or use \"all-linear\"",
                known.join(", ")
            )));
        }
    }
    Ok(())
}

/// Linear layers that `config.targets` name by the last component of their path.
pub(crate) fn targets<'a>(specs: &'a [ParamSpec], config: &LoraConfig) -> Vec<&'a ParamSpec> {
    let wanted = |spec: &&ParamSpec| {
        config.targets.iter().any(|target| target == "all-linear" || target == last_component(&spec.name))
    };
    specs.iter().filter(|spec| spec.linear).filter(wanted).collect()
}

/// `q_proj` of `model.layers.0.self_attn.q_proj.weight`.
fn last_component(weight: &str) -> &str {
    module(weight).rsplit('.').next().unwrap_or(weight)
}

fn module(weight: &str) -> &str {
    weight.strip_suffix(".weight").unwrap_or(weight)
}

/// Names and shapes of the factors beside a linear layer: A `[rank, in]`, B `[out, rank]`.
pub(crate) fn factor_shapes(spec: &ParamSpec, rank: usize) -> [(String, Vec<usize>); 2] {
    let ([out, inner], module) = ([spec.shape[0], spec.shape[1]], module(&spec.name));
    [
        (format!("{module}.lora_A.weight"), vec![rank, inner]),
        (format!("{module}.lora_B.weight"), vec![out, rank]),
    ]
}

/// A fresh factor. A: uniform in ±1/√in (PyTorch's `kaiming_uniform_(a = √5)`, as PEFT), B: zero. Each value depends
/// on seed, name and place alone.
pub(crate) fn factor(specs: &HashMap<&str, &ParamSpec>, name: &str, rank: usize, seed: u64) -> Vec<f32> {
    let (module, a) = match name.strip_suffix(".lora_A.weight") {
        Some(module) => (module, true),
        None => (name.trim_end_matches(".lora_B.weight"), false),
    };
    let spec = specs[format!("{module}.weight").as_str()];
    let (out, inner) = (spec.shape[0], spec.shape[1]);
    if !a {
        return vec![0.0; out * rank];
    }
    let (key, bound) = (key(&[seed, word(name)]), 1.0 / (inner as f32).sqrt());
    (0..(rank * inner) as u64).map(|i| (2.0 * uniform(key, i) - 1.0) * bound).collect()
}

/// PEFT's `adapter_config.json`.
pub(crate) fn adapter_config(config: &LoraConfig) -> Companion {
    let targets = match config.targets.iter().any(|t| t == "all-linear") {
        true => json!("all-linear"),
        false => json!(config.targets),
    };
    let alpha = if config.alpha.fract() == 0.0 { json!(config.alpha as i64) } else { json!(config.alpha) };
    let json = json!({
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": config.base_model,
        "r": config.rank,
        "lora_alpha": alpha,
        "lora_dropout": config.dropout,
        "target_modules": targets,
        "use_rslora": config.rslora,
        "use_dora": false,
        "bias": "none",
        "fan_in_fan_out": false,
        "init_lora_weights": true,
        "inference_mode": true,
        "modules_to_save": null,
        "rank_pattern": {},
        "alpha_pattern": {},
    });
    let mut bytes = serde_json::to_vec_pretty(&json).expect("a JSON value serialises");
    bytes.push(b'\n');
    Companion { name: "adapter_config.json".into(), bytes }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hearth_model::Group;

    fn specs() -> Vec<ParamSpec> {
        let spec = |name: &str, shape: &[usize], linear| ParamSpec {
            name: name.into(),
            shape: shape.to_vec(),
            group: Group::Block(0),
            linear,
        };
        vec![
            spec("model.embed_tokens.weight", &[9, 4], false),
            spec("model.layers.0.self_attn.q_proj.weight", &[8, 4], true),
            spec("model.layers.0.self_attn.q_proj.bias", &[8], false),
            spec("model.layers.0.mlp.down_proj.weight", &[4, 16], true),
        ]
    }

    fn chosen(targets: &[&str]) -> Result<Vec<String>, String> {
        let config =
            LoraConfig { targets: targets.iter().map(|t| t.to_string()).collect(), ..LoraConfig::default() };
        let specs = specs();
        check_targets(&specs, &config).map_err(|e| e.to_string())?;
        let found = super::targets(&specs, &config);
        Ok(found.iter().map(|s| s.name.clone()).collect())
    }

    #[test]
    fn targets_match_the_last_component_of_linear_layers() {
        assert_eq!(chosen(&["q_proj"]).unwrap(), ["model.layers.0.self_attn.q_proj.weight"]);
        assert_eq!(chosen(&["all-linear"]).unwrap().len(), 2);
        let error = chosen(&["q_proj", "embed_tokens"]).unwrap_err();
        assert!(error.contains("\"embed_tokens\"") && error.contains("down_proj, q_proj"), "{error}");
    }

    #[test]
    fn factors_start_at_zero_product_with_kaiming_spread() {
        let spec = ParamSpec { shape: vec![8, 1024], ..specs()[1].clone() };
        let [(name, shape), (b_name, b_shape)] = factor_shapes(&spec, 16);
        let specs = HashMap::from([(spec.name.as_str(), &spec)]);
        let (a, b) = (factor(&specs, &name, 16, 3), factor(&specs, &b_name, 16, 3));
        assert_eq!((name.as_str(), shape), ("model.layers.0.self_attn.q_proj.lora_A.weight", vec![16, 1024]));
        assert_eq!((b_shape, b), (vec![8, 16], vec![0.0; 128]));
        let square = a.iter().map(|x| x * x).sum::<f32>() / a.len() as f32;
        assert!(
            (square * 3.0 * 1024.0 - 1.0).abs() < 0.05 && a.iter().all(|x| x.abs() <= 1.0 / 32.0),
            "{square}"
        );
        assert_ne!(a, factor(&specs, &name, 16, 4));
    }
}
