//! Serves a model from Rust and asks it something: `cargo run --release --example serve -- MODEL`

use hearth::commands::serve::{ServeArgs, Server};
use hearth::running::ModelArgs;
use hearth::ui::Ui;

fn main() -> anyhow::Result<()> {
    let model = std::env::args().nth(1).ok_or(anyhow::anyhow!("give MODEL"))?;
    let server = Server::start(&ServeArgs::local(ModelArgs::at(model)), &Ui::silent())?;
    println!("listening on {}", server.url());

    let request = serde_json::json!({"prompt": "What is the capital of", "max_tokens": 8, "temperature": 0});
    let mut response = ureq::post(format!("{}/v1/completions", server.url())).send_json(&request)?;
    let answer: serde_json::Value = response.body_mut().read_json()?;
    println!("{}", answer["choices"][0]["text"]);

    let report = server.stop()?;
    println!("{} tokens generated", report.generated_tokens);
    Ok(())
}
