//! Chat templates against what transformers renders.

use hearth_data::{ChatTemplate, Content, Message};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use std::path::Path;

#[derive(Deserialize)]
struct Case {
    template: String,
    conversation: String,
    messages: Vec<Message>,
    extra: Map<String, Value>,
    add_generation_prompt: bool,
    text: Option<String>,
}

fn fixture(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name);
    std::fs::read_to_string(path).expect(name)
}

fn template(name: &str) -> ChatTemplate {
    ChatTemplate::new(&fixture(&format!("templates/{name}.jinja")), Some("<s>"), Some("</s>")).expect(name)
}

#[test]
fn templates_render_as_in_transformers() {
    let cases: Vec<Case> = serde_json::from_str(&fixture("templates.json")).expect("parses");
    assert_eq!(cases.len(), 50);
    for case in cases {
        let text = template(&case.template).render(&case.messages, case.add_generation_prompt, &case.extra);
        assert_eq!(text.ok(), case.text, "{} {}", case.template, case.conversation);
    }
}

#[test]
fn an_exception_of_the_template_is_passed_on_in_its_own_words() {
    let turns = [Message::new("assistant", "x"), Message::new("assistant", "y")];
    let error = template("mistral-nemo").render(&turns, true, &Map::new()).expect_err("refused").to_string();
    assert!(error.contains("conversation roles must alternate user/assistant"), "{error}");
}

#[test]
fn typed_parts_become_text_where_the_template_knows_only_text() {
    let parts = json!([{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]);
    let content = Content::Parts(parts.as_array().expect("a list").clone());
    let message = Message { content: Some(content), ..Message::new("user", "") };
    let text =
        template("smollm2").render(std::slice::from_ref(&message), false, &Map::new()).expect("renders");
    assert!(text.ends_with("<|im_start|>user\none\ntwo<|im_end|>\n"), "{text}");

    let source = "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}\
        {% for part in m.content %}[{{ part.text }}]{% endfor %}{% endif %}{% endfor %}";
    let template = ChatTemplate::new(source, None, None).expect("compiles");
    assert_eq!(template.render(&[message], false, &Map::new()).expect("renders"), "[one][two]");
}

#[test]
fn a_template_that_is_no_jinja_is_refused_with_its_line() {
    let error = ChatTemplate::new("fine\n{% if %}", None, None).err().expect("refused").to_string();
    assert!(error.contains("line 2"), "{error}");
}
