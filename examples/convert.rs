//! Quantizes a model to a bundle from Rust: `cargo run --release --example convert -- MODEL BUNDLE`

use hearth::commands::convert::{ConvertArgs, Target, run};
use hearth::ui::{Report, Ui};

fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [model, bundle] = &arguments[..] else { anyhow::bail!("give MODEL and BUNDLE") };
    let args = ConvertArgs {
        source: model.into(),
        output: bundle.into(),
        to: Target::Bundle,
        quant: "q4_0".into(),
        adapter: None,
    };
    print!("{}", run(&args, &Ui::silent())?.text());
    Ok(())
}
