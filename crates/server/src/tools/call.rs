//! One call's JSON, character by character: the name as soon as it is known, the arguments as they are written.

/// What a character led to.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Step {
    /// Nothing to tell.
    Nothing,
    /// The name is known.
    Name(String),
    /// More of the arguments, in the model's own spelling.
    Arguments(String),
    /// The object is complete.
    Done,
    /// This is no call.
    Bad,
}

/// Reads `{"name": "…", "arguments": …}`, keys in any order, others ignored.
#[derive(Debug)]
pub(crate) struct CallScanner {
    arguments_key: &'static str,
    at: At,
    key: String,
    named: bool,
    /// Arguments that came before the name.
    early: String,
    seen_arguments: bool,
    value: Value,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum At {
    Start,
    /// Before a key or the end; a comma may come.
    BeforeKey,
    Key,
    Colon,
    Value,
    Done,
}

/// The value being read.
#[derive(Debug, Default)]
struct Value {
    text: String,
    /// Brackets open within it.
    depth: usize,
    in_string: bool,
    escaped: bool,
}

impl Value {
    /// Takes a character; `Some(true)` when the value is complete with it, `Some(false)` when it was complete before.
    fn push(&mut self, c: char) -> Option<bool> {
        if self.in_string {
            self.text.push(c);
            match c {
                _ if self.escaped => self.escaped = false,
                '\\' => self.escaped = true,
                '"' => self.in_string = false,
                _ => {}
            }
            return (!self.in_string && self.depth == 0).then_some(true);
        }
        if self.depth == 0 && matches!(c, ',' | '}' | ']') {
            return Some(false);
        }
        self.text.push(c);
        match c {
            '"' => self.in_string = true,
            '{' | '[' => self.depth += 1,
            '}' | ']' => {
                self.depth -= 1;
                return (self.depth == 0).then_some(true);
            }
            _ => {}
        }
        None
    }
}

impl CallScanner {
    pub(crate) fn new(arguments_key: &'static str) -> Self {
        Self {
            arguments_key,
            at: At::Start,
            key: String::new(),
            named: false,
            early: String::new(),
            seen_arguments: false,
            value: Value::default(),
        }
    }

    /// Takes the next character.
    pub(crate) fn push(&mut self, c: char) -> Step {
        match self.at {
            At::Start => self.expect(c, '{', At::BeforeKey),
            At::BeforeKey => match c {
                '"' => {
                    self.key.clear();
                    self.at = At::Key;
                    Step::Nothing
                }
                '}' => self.done(),
                ',' => Step::Nothing,
                c if c.is_whitespace() => Step::Nothing,
                _ => Step::Bad,
            },
            At::Key if c == '"' => {
                self.at = At::Colon;
                Step::Nothing
            }
            At::Key => {
                self.key.push(c);
                Step::Nothing
            }
            At::Colon => {
                self.value = Value::default();
                self.expect(c, ':', At::Value)
            }
            At::Value => self.value(c),
            At::Done => Step::Bad,
        }
    }

    fn expect(&mut self, c: char, expected: char, then: At) -> Step {
        match c {
            c if c == expected => {
                self.at = then;
                Step::Nothing
            }
            c if c.is_whitespace() => Step::Nothing,
            _ => Step::Bad,
        }
    }

    fn value(&mut self, c: char) -> Step {
        if self.value.text.is_empty() && c.is_whitespace() {
            return Step::Nothing;
        }
        let end = self.value.push(c);
        let arguments = self.key == self.arguments_key;
        // Arguments that are a string hold JSON in its spelling: they are told when the string is whole.
        let streams = arguments && !self.value.text.starts_with('"');
        match end {
            None if streams => self.arguments(c.to_string()),
            None => Step::Nothing,
            Some(inside) => {
                self.at = At::BeforeKey;
                let step = match (self.key.as_str(), streams) {
                    ("name", _) => self.name(),
                    (_, true) if inside => self.arguments(c.to_string()),
                    (_, false) if arguments => match serde_json::from_str::<String>(&self.value.text) {
                        Ok(text) => self.arguments(text),
                        Err(_) => Step::Bad,
                    },
                    _ => Step::Nothing,
                };
                match (inside, &step) {
                    // The character belongs to the object around.
                    (false, Step::Nothing) => self.push(c),
                    _ => step,
                }
            }
        }
    }

    fn name(&mut self) -> Step {
        match serde_json::from_str::<String>(&self.value.text) {
            Ok(name) if !name.is_empty() && !self.named => {
                self.named = true;
                Step::Name(name)
            }
            _ => Step::Bad,
        }
    }

    fn arguments(&mut self, text: String) -> Step {
        self.seen_arguments = true;
        match self.named {
            true => Step::Arguments(text),
            false => {
                self.early.push_str(&text);
                Step::Nothing
            }
        }
    }

    fn done(&mut self) -> Step {
        self.at = At::Done;
        if self.named { Step::Done } else { Step::Bad }
    }

    /// What is to be told once the name is known: arguments that came before it.
    pub(crate) fn take_early(&mut self) -> String {
        std::mem::take(&mut self.early)
    }

    /// What stands for arguments that never came.
    pub(crate) fn missing_arguments(&self) -> Option<&'static str> {
        (!self.seen_arguments).then_some("{}")
    }
}
