//! Holds values against the part of JSON Schema that the OpenAPI document uses. A whole validator would bring a dozen
//! crates whose features change how the numerical stack is built.

use serde_json::Value;

/// What is wrong with `value`, with the place; empty when nothing is.
pub fn errors(document: &Value, schema: &Value, value: &Value) -> Vec<String> {
    let mut errors = Vec::new();
    Check { document, errors: &mut errors }.value(schema, value, "");
    errors
}

/// Keywords that say nothing about validity, or whose check is part of another's.
const IGNORED: [&str; 3] = ["description", "default", "pattern"];

struct Check<'a> {
    document: &'a Value,
    errors: &'a mut Vec<String>,
}

impl Check<'_> {
    fn value(&mut self, schema: &Value, value: &Value, at: &str) {
        let Some(keywords) = schema.as_object() else { panic!("{at}: {schema} is no schema") };
        for (keyword, limit) in keywords {
            let fine = match keyword.as_str() {
                "$ref" => {
                    let target = limit.as_str().unwrap().strip_prefix('#').unwrap();
                    let target =
                        self.document.pointer(target).unwrap_or_else(|| panic!("{limit} is nowhere"));
                    self.value(target, value, at);
                    true
                }
                "type" => match limit {
                    Value::Array(types) => types.iter().any(|t| is(t.as_str().unwrap(), value)),
                    one => is(one.as_str().unwrap(), value),
                },
                "const" => value == limit,
                "enum" => limit.as_array().unwrap().contains(value),
                "anyOf" => {
                    let document = self.document;
                    limit.as_array().unwrap().iter().any(|schema| errors(document, schema, value).is_empty())
                }
                "minimum" => value.as_f64().is_none_or(|v| v >= limit.as_f64().unwrap()),
                "maximum" => value.as_f64().is_none_or(|v| v <= limit.as_f64().unwrap()),
                "minItems" => value.as_array().is_none_or(|v| v.len() as u64 >= limit.as_u64().unwrap()),
                "maxItems" => value.as_array().is_none_or(|v| v.len() as u64 <= limit.as_u64().unwrap()),
                "required" => value.as_object().is_none_or(|v| {
                    limit.as_array().unwrap().iter().all(|name| v.contains_key(name.as_str().unwrap()))
                }),
                "items" => {
                    for (i, item) in value.as_array().into_iter().flatten().enumerate() {
                        self.value(limit, item, &format!("{at}[{i}]"));
                    }
                    true
                }
                "properties" | "additionalProperties" => {
                    self.members(keyword, keywords, limit, value, at);
                    true
                }
                word => {
                    assert!(IGNORED.contains(&word), "{word} is not checked");
                    true
                }
            };
            if !fine {
                self.errors.push(format!("{at}: {value} does not keep to {keyword} {limit}"));
            }
        }
    }

    fn members(
        &mut self,
        keyword: &str,
        keywords: &serde_json::Map<String, Value>,
        limit: &Value,
        value: &Value,
        at: &str,
    ) {
        let described = keywords.get("properties").and_then(Value::as_object);
        for (name, member) in value.as_object().into_iter().flatten() {
            let at = format!("{at}.{name}");
            let schema = described.and_then(|properties| properties.get(name));
            match (keyword, schema) {
                ("properties", Some(schema)) => self.value(schema, member, &at),
                ("additionalProperties", None) if *limit == false => {
                    self.errors.push(format!("{at} is not described"));
                }
                ("additionalProperties", None) if limit.is_object() => self.value(limit, member, &at),
                _ => {}
            }
        }
    }
}

fn is(kind: &str, value: &Value) -> bool {
    match kind {
        "null" => value.is_null(),
        "boolean" => value.is_boolean(),
        "string" => value.is_string(),
        "number" => value.is_number(),
        "integer" => value.is_i64() || value.is_u64(),
        "array" => value.is_array(),
        "object" => value.is_object(),
        other => panic!("{other} is no type"),
    }
}

#[test]
fn differences_from_a_schema_are_found() {
    let document = serde_json::json!({"a": {"type": "object", "required": ["x"], "additionalProperties": false,
        "properties": {"x": {"type": "array", "items": {"anyOf": [{"type": "null"}, {"enum": [1, 2]}]}, "maxItems": 2}}}});
    let schema = serde_json::json!({"$ref": "#/a"});
    for (value, count) in [
        (serde_json::json!({"x": [1, null]}), 0),
        (serde_json::json!({"x": [3]}), 1),
        (serde_json::json!({"x": [1, 1, 1]}), 1),
        (serde_json::json!({}), 1),
        (serde_json::json!({"x": [], "y": 1}), 1),
        (serde_json::json!([]), 1),
    ] {
        assert_eq!(errors(&document, &schema, &value).len(), count, "{value}");
    }
}
