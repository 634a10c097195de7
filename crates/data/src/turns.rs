//! Which part of a rendered conversation the assistant wrote.

use crate::error::Error;
use crate::message::Message;
use crate::template::ChatTemplate;
use serde_json::{Map, Value};
use std::ops::Range;

/// A text and the byte ranges of it that are to be trained.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct MarkedText {
    pub(crate) text: String,
    pub(crate) trained: Vec<Range<usize>>,
}

/// A conversation as one text, or, where its template rewrites earlier turns when later ones come (Qwen3 drops
/// their reasoning), as one text for each assistant turn: each as it stands when that turn is generated.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Turns {
    pub(crate) texts: Vec<MarkedText>,
    /// The template rewrites earlier turns.
    pub(crate) rewrites: bool,
    /// The generation prompt says more than the conversation does (it opens a `<think>` block, say).
    pub(crate) prompt_differs: bool,
}

/// Finds the assistant's turns: by the template's `{% generation %}` blocks where it has them, else by rendering the
/// conversation up to each assistant turn with and without it. What the second has beyond the first is the turn.
pub(crate) fn find(
    template: &ChatTemplate,
    messages: &[Message],
    variables: &Map<String, Value>,
) -> Result<Turns, Error> {
    if template.has_generation_blocks() {
        let marked = template.render_marked(messages, variables)?;
        let text = MarkedText { text: marked.text, trained: marked.assistant };
        return Ok(Turns { texts: vec![text], rewrites: false, prompt_differs: false });
    }
    let whole = template.render(messages, false, variables)?;
    let mut prompt_differs = false;
    let mut turns = Vec::new();
    for i in (0..messages.len()).filter(|&i| messages[i].is_assistant()) {
        let text = if i + 1 == messages.len() {
            whole.clone()
        } else {
            template.render(&messages[..=i], false, variables)?
        };
        let (start, exact) = turn_start(template, messages, i, &text, variables)?;
        prompt_differs |= !exact;
        let trained = start..text.len();
        turns.push(MarkedText { text, trained: vec![trained] });
    }
    let rewrites = !turns.iter().all(|turn| whole.starts_with(&turn.text));
    if !rewrites {
        let trained = turns.into_iter().flat_map(|turn| turn.trained).collect();
        turns = vec![MarkedText { text: whole, trained }];
    }
    Ok(Turns { texts: turns, rewrites, prompt_differs })
}

/// Where turn `i`, the last one of `text`, begins; and whether the prompt before it is exactly what stands there.
fn turn_start(
    template: &ChatTemplate,
    messages: &[Message],
    i: usize,
    text: &str,
    variables: &Map<String, Value>,
) -> Result<(usize, bool), Error> {
    let prompt = template.render(&messages[..i], true, variables)?;
    if text.starts_with(&prompt) {
        return Ok((prompt.len(), true));
    }
    let history = template.render(&messages[..i], false, variables)?;
    let common = common_prefix(&prompt, text);
    if common < history.len() || !text.starts_with(&history) {
        return Err(Error::TemplatePrefix { turn: i });
    }
    Ok((common, false))
}

/// Bytes that two texts share at their beginning, in whole characters.
fn common_prefix(a: &str, b: &str) -> usize {
    a.char_indices().zip(b.chars()).find(|((_, x), y)| x != y).map_or(a.len().min(b.len()), |((at, _), _)| at)
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHATML: &str = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}\
        {% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

    fn conversation() -> Vec<Message> {
        [("user", "u1"), ("assistant", "a1"), ("user", "u2"), ("assistant", "a2")]
            .map(|(role, text)| Message::new(role, text))
            .to_vec()
    }

    fn trained(source: &str) -> (Vec<Vec<String>>, Turns) {
        let template = ChatTemplate::new(source, None, None).expect("compiles");
        let turns = find(&template, &conversation(), &Map::new()).expect("found");
        let cut = |t: &MarkedText| t.trained.iter().map(|r| t.text[r.clone()].to_owned()).collect();
        (turns.texts.iter().map(cut).collect(), turns)
    }

    #[test]
    fn turns_are_what_the_conversation_has_beyond_the_prompt() {
        let (texts, turns) = trained(CHATML);
        assert_eq!(texts, [["a1<|im_end|>\n", "a2<|im_end|>\n"]]);
        assert!(!turns.rewrites && !turns.prompt_differs);
    }

    #[test]
    fn generation_blocks_rule_where_the_template_has_them() {
        let (texts, _) = trained(
            "{% for m in messages %}{% if m.role == 'assistant' %}A:{% generation %}\n{{ m.content }}!\
             {% endgeneration %}{% else %}U:{{ m.content }}{% endif %};{% endfor %}",
        );
        assert_eq!(texts, [["a1!", "a2!"]]);
    }

    #[test]
    fn a_template_that_rewrites_earlier_turns_gives_one_text_for_each() {
        let (texts, turns) = trained(
            "{% for m in messages %}{{ m.role[0] }}:{% if m.role == 'assistant' and loop.last %}<think>{% endif %}\
             {{ m.content }};{% endfor %}{% if add_generation_prompt %}a:{% endif %}",
        );
        assert_eq!(texts, [["<think>a1;"], ["<think>a2;"]]);
        assert!(turns.rewrites);
        assert_eq!(turns.texts[1].text, "u:u1;a:a1;u:u2;a:<think>a2;");
    }

    #[test]
    fn a_prompt_that_says_more_than_the_conversation_trains_from_where_they_part() {
        let (texts, turns) = trained(
            "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}\
             {% if add_generation_prompt %}a:<think>\n{% endif %}",
        );
        assert_eq!(texts, [["a1;", "a2;"]]);
        assert!(turns.prompt_differs && !turns.rewrites);
    }

    #[test]
    fn a_template_that_reorders_is_refused() {
        let template =
            ChatTemplate::new("{% for m in messages | reverse %}{{ m.content }};{% endfor %}", None, None)
                .expect("compiles");
        let error = find(&template, &conversation(), &Map::new()).expect_err("reordered").to_string();
        assert!(error.contains("assistant turn 1") && error.contains("train_on"), "{error}");
    }
}
