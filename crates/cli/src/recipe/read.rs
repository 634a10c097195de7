//! A recipe from its file: what it extends, what the command line overrides, where its paths lead.

use super::tables::Recipe;
use super::{RecipeError, keys};
use std::path::{Path, PathBuf};
use toml::{Table, Value};

/// Longest chain of `extends`.
const MAX_DEPTH: usize = 16;

/// Reads the file, its bases and the overrides into one table, without checking keys.
pub(super) fn merged(path: &Path, overrides: &[String]) -> Result<Table, RecipeError> {
    let mut table = with_bases(path, 0)?;
    let folder = folder_of(path);
    for text in overrides {
        let mut layer = parse_override(text, &table)?;
        // A path on the command line means what the shell would make of it, then what the recipe would.
        place_paths(&mut layer, Path::new("."), &folder);
        overlay(&mut table, layer);
    }
    Ok(table)
}

/// A table as a [`Recipe`]; `origin` names it in messages.
pub(super) fn typed(table: Table, origin: &str) -> Result<Recipe, RecipeError> {
    if let Some(sentence) = keys::first_unknown(&table) {
        return Err(RecipeError::new(origin, sentence));
    }
    Value::Table(table).try_into().map_err(|e: toml::de::Error| {
        // toml writes the place on lines of its own; one sentence is enough.
        let text: Vec<String> =
            e.to_string().lines().map(|l| l.trim().to_owned()).filter(|l| !l.is_empty()).collect();
        RecipeError::new(origin, text.join(" "))
    })
}

fn with_bases(path: &Path, depth: usize) -> Result<Table, RecipeError> {
    let origin = path.display().to_string();
    if depth > MAX_DEPTH {
        return Err(RecipeError::new(
            &origin,
            format!("`extends` goes deeper than {MAX_DEPTH} files; is there a circle?"),
        ));
    }
    let text = std::fs::read_to_string(path)
        .map_err(|e| RecipeError::new(&origin, format!("cannot be read: {e}")))?;
    let mut own = parse_file(&text, &origin)?;
    let folder = folder_of(path);
    let base = match own.remove("extends") {
        None => None,
        Some(Value::String(base)) => Some(folder.join(base)),
        Some(other) => {
            let sentence = format!("`extends` is {other}, it must be the path of a recipe in quotes");
            return Err(RecipeError::new(&origin, sentence));
        }
    };
    place_paths(&mut own, &folder, Path::new("."));
    let Some(base) = base else { return Ok(own) };
    let mut table = with_bases(&base, depth + 1)?;
    overlay(&mut table, own);
    Ok(table)
}

fn parse_file(text: &str, origin: &str) -> Result<Table, RecipeError> {
    text.parse::<Table>().map_err(|e| {
        let line = e.span().map(|span| text[..span.start.min(text.len())].matches('\n').count() + 1);
        let origin = line.map_or(origin.to_owned(), |line| format!("{origin}:{line}"));
        RecipeError::new(&origin, format!("not valid TOML: {}", e.message().replace('\n', " ")))
    })
}

/// `train.steps=5` → the table `{train: {steps: 5}}`. The value is read as a TOML literal, else as a bare string.
/// `data.path=x` and `data.0.path=x` change an entry of the list that `current` has.
fn parse_override(text: &str, current: &Table) -> Result<Table, RecipeError> {
    let wrong = |why: &str| RecipeError::new(&format!("--set {text}"), why.to_owned());
    let (key, value) = text.split_once('=').ok_or_else(|| wrong("write it as table.key=value"))?;
    let parts: Vec<&str> = key.trim().split('.').collect();
    let value = literal(value.trim());
    match parts[..] {
        ["data", key] => {
            data_override(current, 0, key, value).ok_or_else(|| wrong("the recipe has no such entry"))
        }
        ["data", index, key] => {
            let index = index.parse().map_err(|_| wrong("write it as data.0.key=value"))?;
            data_override(current, index, key, value).ok_or_else(|| wrong("the recipe has no such entry"))
        }
        [table, key] if !table.is_empty() && !key.is_empty() => {
            Ok(single(table, Value::Table(single(key, value))))
        }
        _ => Err(wrong("write it as table.key=value")),
    }
}

/// The recipe's list of data with one key of one entry changed; a first entry is made if there is none.
fn data_override(current: &Table, index: usize, key: &str, value: Value) -> Option<Table> {
    let mut entries = match current.get("data") {
        Some(Value::Array(entries)) => entries.clone(),
        _ => Vec::new(),
    };
    if index == entries.len() {
        entries.push(Value::Table(Table::new()));
    }
    entries.get_mut(index)?.as_table_mut()?.insert(key.into(), value);
    Some(single("data", Value::Array(entries)))
}

fn single(key: &str, value: Value) -> Table {
    Table::from_iter([(key.to_owned(), value)])
}

fn literal(text: &str) -> Value {
    let parsed = format!("v = {text}").parse::<Table>().ok().filter(|t| t.len() == 1);
    match parsed.and_then(|mut t| t.remove("v")) {
        Some(Value::Datetime(_)) | None => Value::String(text.to_owned()),
        Some(value) => value,
    }
}

/// Puts `layer` over `base`, key by key; lists are replaced whole. `steps` in a later layer drops `epochs` of an
/// earlier one and the other way round: the later choice is the one meant.
fn overlay(base: &mut Table, layer: Table) {
    for (name, value) in layer {
        match (base.get_mut(&name), value) {
            (Some(Value::Table(old)), Value::Table(new)) => {
                if name == "train" && (new.contains_key("steps") || new.contains_key("epochs")) {
                    old.remove("steps");
                    old.remove("epochs");
                }
                old.extend(new);
            }
            (_, value) => {
                base.insert(name, value);
            }
        }
    }
}

/// Model and data paths: inside `first` if they lead somewhere there, else inside `second`.
fn place_paths(table: &mut Table, first: &Path, second: &Path) {
    for (name, value) in table.iter_mut() {
        let rows: &mut [Value] = match value {
            Value::Array(rows) if name == "data" => rows,
            table if name == "model" => std::slice::from_mut(table),
            _ => continue,
        };
        for row in rows.iter_mut().filter_map(Value::as_table_mut) {
            if let Some(Value::String(path)) = row.get_mut("path") {
                *path = place(path, first, second);
            }
        }
    }
}

fn place(path: &str, first: &Path, second: &Path) -> String {
    if path.is_empty() || Path::new(path).is_absolute() {
        return path.to_owned();
    }
    let leads_somewhere = |folder: &Path| fixed_part(&folder.join(path)).exists();
    let folder = [first, second].into_iter().find(|f| leads_somewhere(f)).unwrap_or(Path::new("."));
    if folder == Path::new(".") { path.to_owned() } else { folder.join(path).display().to_string() }
}

/// The part of a glob before its first wildcard.
fn fixed_part(path: &Path) -> PathBuf {
    path.components().take_while(|c| !c.as_os_str().to_string_lossy().contains(['*', '?', '['])).collect()
}

fn folder_of(path: &Path) -> PathBuf {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder.to_owned(),
        _ => PathBuf::from("."),
    }
}
