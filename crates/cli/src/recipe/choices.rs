//! Recipe values that are one of a few names.

use serde::de::{Error as _, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// The most similar of `known`, if any is similar enough to be what was meant.
pub(crate) fn nearest<'a>(typed: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let lower = typed.to_lowercase();
    known
        .into_iter()
        .map(|name| (strsim::jaro_winkler(&lower, name), name))
        .filter(|(similarity, _)| *similarity > 0.75)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, name)| name)
}

/// An enum whose variants are written as names; a wrong name is answered with all of them and the nearest.
macro_rules! choices {
    ($(#[$meta:meta])* $name:ident { $($(#[$about:meta])* $variant:ident = $text:literal,)+ }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum $name { $($(#[$about])* $variant,)+ }

        impl $name {
            /// Every name, as written in recipes.
            pub const NAMES: &'static [&'static str] = &[$($text),+];

            /// The name, as written in recipes.
            pub fn name(self) -> &'static str {
                match self { $(Self::$variant => $text,)+ }
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = String::deserialize(deserializer)?;
                match text.as_str() {
                    $($text => Ok(Self::$variant),)+
                    _ => Err(D::Error::custom(not_a_choice(&text, Self::NAMES))),
                }
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(self.name())
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(self.name())
            }
        }
    };
}

fn not_a_choice(text: &str, names: &[&str]) -> String {
    let hint =
        nearest(text, names.iter().copied()).map(|n| format!(", did you mean {n:?}?")).unwrap_or_default();
    format!("{text:?} is not one of {}{hint}", names.join(", "))
}

choices! {
    /// What is trained beside, or instead of, the model's own weights.
    AdapterKind {
        /// Every weight of the model.
        None = "none",
        /// Low-rank matrices beside frozen weights.
        Lora = "lora",
        /// The same over quantized weights.
        Qlora = "qlora",
    }
}
choices! {
    /// Number type of the optimizer's states.
    StateKind {
        /// Single precision.
        F32 = "f32",
        /// bfloat16.
        Bf16 = "bf16",
        /// 8 bits with a common exponent for every 64, rounded by chance.
        F8 = "f8",
    }
}
choices! {
    /// How the frozen linear layers of a QLoRA run are stored; blocks of 32 as in GGUF.
    QuantKind {
        /// 4 bits and a scale.
        Q4_0 = "q4_0",
        /// 4 bits, a scale and a minimum.
        Q4_1 = "q4_1",
        /// 8 bits and a scale.
        Q8_0 = "q8_0",
    }
}
choices! {
    /// How a dataset's rows are written.
    DataFormat {
        /// `{"messages": [{"role": …, "content": …}]}`.
        Chat = "chat",
        /// `{"instruction", "input", "output"}`.
        Alpaca = "alpaca",
        /// `{"conversations": [{"from": …, "value": …}]}`.
        Sharegpt = "sharegpt",
        /// Plain text files, or `{"text": …}`.
        Text = "text",
        /// `{"input_ids": […], "labels": […]}`.
        Tokens = "tokens",
        /// `{"prompt": …, "chosen": …, "rejected": …}`.
        Preference = "preference",
    }
}
choices! {
    /// What a dataset is for.
    Split {
        /// Trained on.
        Train = "train",
        /// Only evaluated.
        Val = "val",
    }
}
choices! {
    /// Which tokens of a conversation carry loss.
    TrainOn {
        /// What the assistant says.
        Assistant = "assistant",
        /// Everything.
        All = "all",
    }
}
choices! {
    /// What the loss is made of.
    MethodKind {
        /// Supervised fine-tuning on conversations.
        Sft = "sft",
        /// Next-token prediction on every token.
        Pretrain = "pretrain",
        /// Direct preference optimisation.
        Dpo = "dpo",
    }
}
choices! {
    /// Optimizer.
    OptimKind {
        /// AdamW (arXiv 1711.05101).
        Adamw = "adamw",
        /// SGD with momentum.
        Sgd = "sgd",
        /// Lion (arXiv 2302.06675).
        Lion = "lion",
        /// Adafactor (arXiv 1804.04235).
        Adafactor = "adafactor",
    }
}
choices! {
    /// Learning rate over the steps, after warm-up.
    SchedKind {
        /// Stays.
        Constant = "constant",
        /// Falls in a straight line to `min_lr`.
        Linear = "linear",
        /// Falls along half a cosine to `min_lr`.
        Cosine = "cosine",
        /// Stays, then falls over the last `decay` steps (warm-up, stable, decay).
        Wsd = "wsd",
    }
}
choices! {
    /// A number type.
    Dtype {
        /// 32 bits.
        F32 = "f32",
        /// Upper half of an f32.
        Bf16 = "bf16",
        /// IEEE half precision.
        F16 = "f16",
    }
}
choices! {
    /// Where a share of the training state lives.
    Place {
        /// Beside the compute.
        Device = "device",
        /// In host memory.
        Cpu = "cpu",
        /// On a disk.
        Nvme = "nvme",
    }
}
choices! {
    /// What the backward pass computes again instead of keeping.
    Recompute {
        /// Nothing.
        None = "none",
        /// Every transformer block from its input.
        Full = "full",
    }
}

/// What the loss is multiplied by before the backward pass, so that small gradients survive in f16.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum LossScale {
    /// Halved when gradients overflow, doubled when they long did not.
    Dynamic,
    /// Always this.
    Fixed(f64),
}

impl<'de> Deserialize<'de> for LossScale {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Either;

        impl Visitor<'_> for Either {
            type Value = LossScale;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("\"dynamic\" or a number")
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<LossScale, E> {
                match text {
                    "dynamic" => Ok(LossScale::Dynamic),
                    _ => Err(E::invalid_value(serde::de::Unexpected::Str(text), &self)),
                }
            }

            fn visit_f64<E>(self, scale: f64) -> Result<LossScale, E> {
                Ok(LossScale::Fixed(scale))
            }

            fn visit_i64<E>(self, scale: i64) -> Result<LossScale, E> {
                Ok(LossScale::Fixed(scale as f64))
            }

            fn visit_u64<E>(self, scale: u64) -> Result<LossScale, E> {
                Ok(LossScale::Fixed(scale as f64))
            }
        }

        deserializer.deserialize_any(Either)
    }
}

impl Serialize for LossScale {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            LossScale::Dynamic => serializer.serialize_str("dynamic"),
            LossScale::Fixed(scale) => serializer.serialize_f64(*scale),
        }
    }
}
