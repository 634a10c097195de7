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

/// A conversation's reply, marked: what follows its prompt.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Reply {
    pub(crate) marked: MarkedText,
    /// The template rewrites earlier turns, so that of several in the reply only the later ones are marked.
    pub(crate) rewrites: bool,
    /// As in [`Turns`].
    pub(crate) prompt_differs: bool,
}

/// Marks the assistant's turns among the messages from `first` on. The conversation stays one text.
pub(crate) fn find_reply(
    template: &ChatTemplate,
    messages: &[Message],
    first: usize,
    variables: &Map<String, Value>,
) -> Result<Reply, Error> {
    if template.has_generation_blocks() {
        let before = template.render_marked(&messages[..first], variables)?.assistant.len();
        let marked = template.render_marked(messages, variables)?;
        let trained = marked.assistant.into_iter().skip(before).collect();
        let marked = MarkedText { text: marked.text, trained };
        return Ok(Reply { marked, rewrites: false, prompt_differs: false });
    }
    let whole = template.render(messages, false, variables)?;
    let mut reply = Reply {
        marked: MarkedText { text: whole, trained: Vec::new() },
        rewrites: false,
        prompt_differs: false,
    };
    for i in (first..messages.len()).filter(|&i| messages[i].is_assistant()) {
        let text = template.render(&messages[..=i], false, variables)?;
        if !reply.marked.text.starts_with(&text) {
            reply.rewrites = true;
            continue;
        }
        let (start, exact) = turn_start(template, messages, i, &text, variables)?;
        reply.prompt_differs |= !exact;
        reply.marked.trained.push(start..text.len());
    }
    Ok(reply)
}

/// The whole conversation, with everything from message `first` on marked, whoever says it.
pub(crate) fn everything_from(
    template: &ChatTemplate,
    messages: &[Message],
    first: usize,
    variables: &Map<String, Value>,
) -> Result<Reply, Error> {
    let text = template.render(messages, false, variables)?;
    let (start, exact) = turn_start(template, messages, first, &text, variables)?;
    let end = text.len();
    let trained = vec![Range { start, end }];
    Ok(Reply { marked: MarkedText { text, trained }, rewrites: false, prompt_differs: !exact })
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

    fn reply(source: &str, first: usize) -> (Vec<String>, Reply) {
        let template = ChatTemplate::new(source, None, None).expect("compiles");
        let reply = find_reply(&template, &conversation(), first, &Map::new()).expect("found");
        let text = &reply.marked.text;
        (reply.marked.trained.iter().map(|r| text[r.clone()].to_owned()).collect(), reply)
    }

    #[test]
    fn a_reply_is_what_the_assistant_says_after_the_prompt() {
        assert_eq!(reply(CHATML, 3).0, ["a2<|im_end|>\n"]);
        assert_eq!(reply(CHATML, 1).0, ["a1<|im_end|>\n", "a2<|im_end|>\n"]);
        let blocks = "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}\
            {% endgeneration %}{% else %}{{ m.content }}{% endif %};{% endfor %}";
        assert_eq!(reply(blocks, 3).0, ["a2"]);
    }

    #[test]
    fn of_a_reply_that_is_rewritten_the_last_turn_is_marked() {
        let (texts, found) = reply(
            "{% for m in messages %}{{ m.role[0] }}:{% if m.role == 'assistant' and loop.last %}<think>{% endif %}\
             {{ m.content }};{% endfor %}{% if add_generation_prompt %}a:{% endif %}",
            1,
        );
        assert_eq!(texts, ["<think>a2;"]);
        assert!(found.rewrites);
    }

    #[test]
    fn everything_after_the_prompt_has_its_users_too() {
        let template = ChatTemplate::new(CHATML, None, None).expect("compiles");
        let found = everything_from(&template, &conversation(), 1, &Map::new()).expect("found");
        let text = &found.marked.text[found.marked.trained[0].clone()];
        assert!(text.starts_with("a1<|im_end|>\n<|im_start|>user\nu2"), "{text}");
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
