//! Files of rows: which files a path means, and where each row stands.

use crate::error::Error;
use crate::format::{Format, Row};
use serde_json::value::RawValue;
use serde_json::{Map, Value};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A row and where it stands.
#[derive(Clone, Debug, PartialEq)]
pub struct SourceRow {
    /// The file.
    pub path: Arc<Path>,
    /// 1-based line on which the row begins.
    pub line: usize,
    /// What it holds.
    pub row: Row,
}

/// Reads every row that `path` leads to: a file, a folder (its `.jsonl`, `.json` and, for formats that take them,
/// `.txt` files, not its sub-folders) or a glob pattern. Files are read in the order of their names.
///
/// A file that begins with `[` is one JSON array of rows; any other `.json` or `.jsonl` file has a row on each line.
///
/// # Errors
/// When nothing is found, a file cannot be read, or a row is malformed: file, line, and what is expected.
pub fn read(path: &Path, format: &Format) -> Result<Vec<SourceRow>, Error> {
    let mut rows = Vec::new();
    for file in files(path, format)? {
        read_file(&file, format, &mut rows)?;
    }
    Ok(rows)
}

/// The files that `path` means.
fn files(path: &Path, format: &Format) -> Result<Vec<PathBuf>, Error> {
    let none = |reason: String| Err(Error::NoFiles { path: path.to_path_buf(), reason });
    if path.is_dir() {
        let files = folder(path, format)?;
        let kinds = if format.plain_files { ".jsonl, .json or .txt" } else { ".jsonl or .json" };
        return if files.is_empty() { none(format!("the folder holds no {kinds} file")) } else { Ok(files) };
    }
    let pattern = path.to_str().filter(|p| p.contains(['*', '?', '[']));
    match pattern {
        Some(pattern) if !path.exists() => {
            let found = match glob::glob(pattern) {
                Ok(found) => found,
                Err(error) => return none(format!("not a valid pattern: {error}")),
            };
            let files: Vec<PathBuf> = found.filter_map(Result::ok).filter(|p| p.is_file()).collect();
            if files.is_empty() { none("no file matches the pattern".into()) } else { Ok(files) }
        }
        _ if path.exists() => Ok(vec![path.to_path_buf()]),
        _ => none("no such file or folder".into()),
    }
}

fn folder(path: &Path, format: &Format) -> Result<Vec<PathBuf>, Error> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(path).map_err(Error::io(path))? {
        let file = entry.map_err(Error::io(path))?.path();
        let wanted = holds_json(&file) || (format.plain_files && extension(&file) == "txt");
        if wanted && file.is_file() {
            files.push(file);
        }
    }
    files.sort();
    Ok(files)
}

fn extension(path: &Path) -> String {
    path.extension().map(|e| e.to_string_lossy().to_lowercase()).unwrap_or_default()
}

fn holds_json(path: &Path) -> bool {
    matches!(extension(path).as_str(), "json" | "jsonl" | "ndjson")
}

fn read_file(path: &Path, format: &Format, rows: &mut Vec<SourceRow>) -> Result<(), Error> {
    let bytes = std::fs::read(path).map_err(Error::io(path))?;
    let text = std::str::from_utf8(&bytes).map_err(|e| {
        let line = 1 + bytes[..e.valid_up_to()].iter().filter(|&&b| b == b'\n').count();
        Error::row(path, line, "is not UTF-8 text")
    })?;
    let text = text.strip_prefix('\u{FEFF}').unwrap_or(text);
    let file: Arc<Path> = path.into();
    if format.plain_files && !holds_json(path) {
        if !text.trim().is_empty() {
            rows.push(SourceRow { path: file, line: 1, row: Row::Text(text.to_owned()) });
        }
        return Ok(());
    }
    let place = |line: usize, object: Map<String, Value>| {
        let row =
            (format.parse)(&object).map_err(|reason| Error::row(path, line, describe(format, &reason)))?;
        Ok(SourceRow { path: file.clone(), line, row })
    };
    for (line, object) in objects(path, text)? {
        rows.push(place(line, object)?);
    }
    Ok(())
}

fn describe(format: &Format, reason: &str) -> String {
    format!("{reason} (format {:?} expects {})", format.name, format.about)
}

/// The line on which a JSON object begins, and the object.
type Placed = (usize, Map<String, Value>);

/// The JSON objects of a file with the lines they begin on.
fn objects(path: &Path, text: &str) -> Result<Vec<Placed>, Error> {
    if text.trim_start().starts_with('[') {
        return array(path, text);
    }
    match lines(path, text) {
        // A `.json` file may be one object spread over many lines.
        Err(error) => match serde_json::from_str(text) {
            Ok(object) => Ok(vec![(1, object)]),
            Err(_) => Err(error),
        },
        rows => rows,
    }
}

fn lines(path: &Path, text: &str) -> Result<Vec<Placed>, Error> {
    let parse =
        |(i, line): (usize, &str)| object(line).map(|o| (i + 1, o)).map_err(|r| Error::row(path, i + 1, r));
    text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()).map(parse).collect()
}

fn array(path: &Path, text: &str) -> Result<Vec<Placed>, Error> {
    let raw: Vec<&RawValue> = serde_json::from_str(text)
        .map_err(|e| Error::row(path, e.line(), format!("not a valid JSON array: {e}")))?;
    let mut line = 1;
    let mut reached = 0;
    let mut out = Vec::with_capacity(raw.len());
    for value in raw {
        // A borrowed value is a slice of `text`: the distance between the two is its offset.
        let offset = value.get().as_ptr() as usize - text.as_ptr() as usize;
        line += text[reached..offset].bytes().filter(|&b| b == b'\n').count();
        reached = offset;
        out.push((line, object(value.get()).map_err(|reason| Error::row(path, line, reason))?));
    }
    Ok(out)
}

fn object(text: &str) -> Result<Map<String, Value>, String> {
    match serde_json::from_str(text) {
        Ok(Value::Object(object)) => Ok(object),
        Ok(_) => Err("a JSON object is expected".into()),
        Err(error) => Err(format!("not valid JSON ({error}); one JSON object on each line is expected")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format;

    fn read_text(name: &str, contents: &str, format: &str) -> Result<Vec<SourceRow>, Error> {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join(name);
        std::fs::write(&path, contents).expect("written");
        read(&path, format::find(format).expect("known"))
    }

    #[test]
    fn lines_and_arrays_give_the_same_rows_and_know_their_lines() {
        let lines =
            read_text("a.jsonl", "{\"text\": \"a\"}\n\n{\"text\": \"b\"}\r\n", "text").expect("reads");
        let array =
            read_text("a.json", "[\n{\"text\": \"a\"},\n{\n\"text\": \"b\"}]", "text").expect("reads");
        let rows = |rows: &[SourceRow]| rows.iter().map(|r| (r.line, r.row.clone())).collect::<Vec<_>>();
        let expected = [(1, Row::Text("a".into())), (3, Row::Text("b".into()))];
        assert_eq!(rows(&lines), expected);
        assert_eq!(rows(&array), [(2, Row::Text("a".into())), (3, Row::Text("b".into()))]);
    }

    #[test]
    fn one_object_over_many_lines_is_one_row() {
        let rows = read_text("a.json", "{\n\"text\":\n\"a\"\n}\n", "text").expect("reads");
        assert_eq!(rows.len(), 1);
    }

    #[test]
    fn a_plain_file_is_one_text_without_its_byte_order_mark() {
        let rows = read_text("a.txt", "\u{FEFF}line 1\nline 2\n", "text").expect("reads");
        assert_eq!(rows[0].row, Row::Text("line 1\nline 2\n".into()));
    }

    #[test]
    fn malformed_files_name_the_line() {
        let cases = [
            ("a.jsonl", "{\"text\": \"a\"}\n{\"text\": \n", ":2: not valid JSON"),
            ("a.jsonl", "{\"text\": \"a\"}\n[1]\n", ":2: a JSON object is expected"),
            ("a.jsonl", "\n\n{\"txt\": \"a\"}\n", ":3: missing key \"text\""),
            ("a.json", "[{\"text\": \"a\"},\n{\"txt\": 1}]", ":2: missing key"),
            ("a.json", "[{\"text\": \"a\"},\n 7]", ":2: a JSON object is expected"),
            ("a.json", "[{\"text\": \"a\"},\n", "not a valid JSON array"),
        ];
        for (name, contents, expected) in cases {
            let error = read_text(name, contents, "text").expect_err(contents).to_string();
            assert!(error.contains(expected), "{contents:?}: {error}");
        }
        let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
        assert!(read_text("a.json", &deep, "text").is_err());
    }

    #[test]
    fn bytes_that_are_not_text_name_the_line() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("a.jsonl");
        std::fs::write(&path, b"{}\n\xff\xfe").expect("written");
        let error = read(&path, format::find("chat").expect("known")).expect_err("binary").to_string();
        assert!(error.contains("a.jsonl:2: is not UTF-8"), "{error}");
    }

    #[test]
    fn folders_and_patterns_are_read_in_the_order_of_names() {
        let folder = tempfile::tempdir().expect("a folder");
        for name in ["b.jsonl", "a.jsonl", "c.md"] {
            std::fs::write(folder.path().join(name), format!("{{\"text\": \"{name}\"}}")).expect("written");
        }
        let text = format::find("text").expect("known");
        let texts = |path: PathBuf| -> Vec<String> {
            let rows = read(&path, text).expect("reads");
            rows.into_iter()
                .map(|r| r.path.file_name().expect("a name").to_string_lossy().into_owned())
                .collect()
        };
        assert_eq!(texts(folder.path().to_path_buf()), ["a.jsonl", "b.jsonl"]);
        assert_eq!(texts(folder.path().join("*.jsonl")), ["a.jsonl", "b.jsonl"]);
        for (missing, reason) in [("*.parquet", "no file matches"), ("none.jsonl", "no such file")] {
            let error = read(&folder.path().join(missing), text).expect_err(missing).to_string();
            assert!(error.contains(reason), "{error}");
        }
    }
}
