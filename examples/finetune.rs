//! Fine-tunes a LoRA adapter from Rust: `cargo run --release --example finetune -- MODEL DATA.jsonl RUN_DIR`

use hearth::commands::train::Prepared;
use hearth::open::Model;
use hearth::recipe::Recipe;
use hearth::ui::Ui;
use std::sync::atomic::AtomicBool;

fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [model, data, dir] = &arguments[..] else { anyhow::bail!("give MODEL, DATA.jsonl and RUN_DIR") };

    let mut recipe =
        Recipe::parse("[adapter]\nkind = 'lora'\n[train]\nsteps = 5\nglobal_batch = 2\n", "example")?;
    recipe.model.path = model.clone();
    recipe.data.push(hearth::recipe::tables::DataEntry { path: data.clone(), ..Default::default() });
    recipe.checkpoint.dir = dir.clone();
    let recipe = recipe.checked("example")?;

    let ui = Ui::new(false);
    let model = Model::open(model.as_ref(), &ui)?;
    let trained = Prepared::new(&recipe, model, false, &ui)?.run(&ui, &AtomicBool::new(false))?;
    println!("loss {:.4} after {} steps, saved in {:?}", trained.loss, trained.steps, trained.checkpoint);
    Ok(())
}
