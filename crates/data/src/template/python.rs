//! What chat templates expect of Jinja in Python that minijinja does differently.

use minijinja::value::{Kwargs, Value, ValueKind};
use minijinja::{Environment, Error, ErrorKind, State};
use serde::Serialize;
use serde_json::ser::Formatter;
use std::fmt::Write as _;
use std::io;

/// Instructions after which a template is stopped, about two seconds of work: templates come from files of strangers.
const FUEL: u64 = 40_000_000;

/// An environment with the functions and filters that `transformers` provides.
pub(super) fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    environment.set_fuel(Some(FUEL));
    environment.set_unknown_method_callback(unknown_method);
    environment.add_function("raise_exception", raise_exception);
    environment.add_function("strftime_now", strftime_now);
    environment.add_filter("tojson", tojson);
    environment.add_test("iterable", is_iterable);
    environment.add_test("sequence", is_sequence);
    environment
}

fn raise_exception(message: String) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message))
}

/// The local time, in a format of C's `strftime`.
fn strftime_now(format: &str) -> Result<String, Error> {
    let mut text = String::new();
    write!(text, "{}", chrono::Local::now().format(format)).map_err(|_| {
        Error::new(ErrorKind::InvalidOperation, format!("strftime_now: {format:?} is not a valid format"))
    })?;
    Ok(text)
}

/// String methods that `minijinja_contrib::pycompat` lacks, then its own.
fn unknown_method(state: &mut State, value: &Value, method: &str, args: &[Value]) -> Result<Value, Error> {
    if let (Some(text), Some(part)) = (value.as_str(), args.first().and_then(Value::as_str)) {
        match method {
            "removeprefix" => return Ok(text.strip_prefix(part).unwrap_or(text).into()),
            "removesuffix" => return Ok(text.strip_suffix(part).unwrap_or(text).into()),
            _ => {}
        }
    }
    minijinja_contrib::pycompat::unknown_method_callback(state, value, method, args)
}

/// Python's `None` is not iterable; minijinja's is.
fn is_iterable(value: &Value) -> bool {
    !value.is_none() && value.try_iter().is_ok()
}

/// What has a length and can be indexed: in Python also strings and dictionaries.
fn is_sequence(value: &Value) -> bool {
    matches!(value.kind(), ValueKind::Seq | ValueKind::String | ValueKind::Map)
}

/// `json.dumps(value, ensure_ascii=False, indent=…)`: no HTML escapes, and Python's spaces.
fn tojson(value: &Value, options: Kwargs) -> Result<String, Error> {
    let indent: Option<usize> = options.get("indent")?;
    let ensure_ascii: Option<bool> = options.get("ensure_ascii")?;
    let sort_keys: Option<bool> = options.get("sort_keys")?;
    let separators: Option<Value> = options.get("separators")?;
    options.assert_all_used()?;
    let failed = |e: serde_json::Error| Error::new(ErrorKind::InvalidOperation, format!("tojson: {e}"));
    let mut value = serde_json::to_value(value).map_err(failed)?;
    if sort_keys == Some(true) {
        value.sort_all_objects();
    }
    let mut out = Vec::new();
    let style = PythonStyle::new(indent, separators)?;
    value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, style)).map_err(failed)?;
    let text = String::from_utf8(out).map_err(|e| Error::new(ErrorKind::InvalidOperation, e.to_string()))?;
    Ok(if ensure_ascii == Some(true) { escape_to_ascii(&text) } else { text })
}

/// JSON with every character beyond ASCII as `\uXXXX`. In JSON such characters stand in strings only.
fn escape_to_ascii(json: &str) -> String {
    let mut out = String::with_capacity(json.len());
    for c in json.chars() {
        if c.is_ascii() {
            out.push(c);
        } else {
            out.extend(c.encode_utf16(&mut [0; 2]).iter().map(|unit| format!("\\u{unit:04x}")));
        }
    }
    out
}

/// Python's way of spacing JSON.
struct PythonStyle {
    indent: Option<usize>,
    depth: usize,
    item_separator: String,
    key_separator: String,
    is_empty: bool,
}

impl PythonStyle {
    fn new(indent: Option<usize>, separators: Option<Value>) -> Result<Self, Error> {
        let item = if indent.is_some() { "," } else { ", " };
        let mut style = Self {
            indent,
            depth: 0,
            item_separator: item.into(),
            key_separator: ": ".into(),
            is_empty: true,
        };
        if let Some(pair) = separators.filter(|s| !s.is_none()) {
            style.item_separator = pair.get_item_by_index(0)?.to_string();
            style.key_separator = pair.get_item_by_index(1)?.to_string();
        }
        Ok(style)
    }

    fn new_line<W: ?Sized + io::Write>(&self, writer: &mut W) -> io::Result<()> {
        match self.indent {
            Some(width) => write!(writer, "\n{:1$}", "", width * self.depth),
            None => Ok(()),
        }
    }

    fn open<W: ?Sized + io::Write>(&mut self, writer: &mut W, bracket: &str) -> io::Result<()> {
        self.depth += 1;
        self.is_empty = true;
        writer.write_all(bracket.as_bytes())
    }

    fn item<W: ?Sized + io::Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        if !first {
            writer.write_all(self.item_separator.as_bytes())?;
        }
        self.new_line(writer)
    }

    fn close<W: ?Sized + io::Write>(&mut self, writer: &mut W, bracket: &str) -> io::Result<()> {
        self.depth -= 1;
        if !self.is_empty {
            self.new_line(writer)?;
        }
        self.is_empty = false;
        writer.write_all(bracket.as_bytes())
    }
}

impl Formatter for PythonStyle {
    fn begin_array<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.open(writer, "[")
    }

    fn end_array<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.close(writer, "]")
    }

    fn begin_array_value<W: ?Sized + io::Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        self.item(writer, first)
    }

    fn end_array_value<W: ?Sized + io::Write>(&mut self, _: &mut W) -> io::Result<()> {
        self.is_empty = false;
        Ok(())
    }

    fn begin_object<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.open(writer, "{")
    }

    fn end_object<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.close(writer, "}")
    }

    fn begin_object_key<W: ?Sized + io::Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        self.item(writer, first)
    }

    fn begin_object_value<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(self.key_separator.as_bytes())
    }

    fn end_object_value<W: ?Sized + io::Write>(&mut self, _: &mut W) -> io::Result<()> {
        self.is_empty = false;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn render(source: &str, context: serde_json::Value) -> String {
        environment().render_str(source, minijinja::value::Serde(context)).expect("renders")
    }

    #[test]
    fn tojson_writes_what_python_writes() {
        let x = json!({"x": {"b": [1, 2.5, null, true], "a": "<é\n>", "e": {}, "l": []}});
        let cases = [
            ("{{ x | tojson }}", r#"{"b": [1, 2.5, null, true], "a": "<é\n>", "e": {}, "l": []}"#),
            ("{{ x.b | tojson(indent=2) }}", "[\n  1,\n  2.5,\n  null,\n  true\n]"),
            ("{{ x.a[1] | tojson(ensure_ascii=true) }}", r#""\u00e9""#),
            ("{{ x.b | tojson(separators=(',', ':')) }}", "[1,2.5,null,true]"),
        ];
        for (source, expected) in cases {
            assert_eq!(render(source, x.clone()), expected, "{source}");
        }
    }

    #[test]
    fn values_print_and_test_as_in_python() {
        let context = json!({"none": null, "yes": true, "list": [1, "a"], "text": "x"});
        let source = "{{ none }} {{ yes }} {{ none is iterable }} {{ text is sequence }} {{ list is iterable }} \
            {{ missing is iterable }} {{ 'a-b'.removeprefix('a-') }} {{ text.strip().split('x') | length }}";
        assert_eq!(render(source, context), "None True False True True True b 2");
    }

    #[test]
    fn a_template_that_never_ends_is_stopped() {
        let source = "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}";
        let error = environment().render_str(source, ()).expect_err("stopped");
        assert!(error.to_string().contains("fuel"), "{error}");
    }

    #[test]
    fn a_bad_time_format_is_an_error() {
        assert!(strftime_now("%Y-%m-%d").is_ok_and(|t| t.len() == 10));
        assert!(strftime_now("%!").is_err());
    }
}
