//! Which keys a recipe may have, and the nearest one to a key it may not have.
//!
//! The list is taken from the structs themselves, so it cannot disagree with them.

use super::choices::nearest;
use super::tables::*;
use serde::de::value::Error as Nothing;
use serde::de::{Deserialize, Deserializer, Error as _, Visitor};
use toml::{Table, Value};

/// What other trainers call some keys.
const ELSEWHERE_CALLED: [(&str, &str); 12] = [
    ("learning_rate", "lr"),
    ("num_epochs", "epochs"),
    ("num_train_epochs", "epochs"),
    ("max_steps", "steps"),
    ("batch_size", "global_batch"),
    ("micro_batch_size", "micro_batch"),
    ("max_length", "max_seq_len"),
    ("sequence_len", "max_seq_len"),
    ("max_grad_norm", "clip_norm"),
    ("warmup_steps", "warmup"),
    ("target_modules", "targets"),
    ("output_dir", "dir"),
];

/// Tables with their keys.
fn known() -> [(&'static str, &'static [&'static str]); 16] {
    [
        ("model", fields::<ModelTable>()),
        ("adapter", fields::<AdapterTable>()),
        ("data", fields::<DataEntry>()),
        ("data_opts", fields::<DataOptsTable>()),
        ("method", fields::<MethodTable>()),
        ("train", fields::<TrainTable>()),
        ("optim", fields::<OptimTable>()),
        ("sched", fields::<SchedTable>()),
        ("precision", fields::<PrecisionTable>()),
        ("eval", fields::<EvalTable>()),
        ("parallel", fields::<ParallelTable>()),
        ("offload", fields::<OffloadTable>()),
        ("memory", fields::<MemoryTable>()),
        ("activation", fields::<ActivationTable>()),
        ("checkpoint", fields::<CheckpointTable>()),
        ("log", fields::<LogTable>()),
    ]
}

/// The sentence about the first key that does not belong, if there is one.
pub(super) fn first_unknown(recipe: &Table) -> Option<String> {
    for (name, value) in recipe {
        let Some((table, keys)) = known().into_iter().find(|(table, _)| table == name) else {
            return Some(unknown_table(name, value));
        };
        let rows: Vec<&Table> = match value {
            Value::Table(row) => vec![row],
            Value::Array(rows) => rows.iter().filter_map(Value::as_table).collect(),
            _ => continue, // serde says what is wrong with it
        };
        let stray = rows.iter().flat_map(|row| row.keys()).find(|key| !keys.contains(&key.as_str()));
        if let Some(key) = stray {
            return Some(unknown_key(table, keys, key));
        }
    }
    None
}

fn unknown_key(table: &str, keys: &[&'static str], key: &str) -> String {
    let ours = ELSEWHERE_CALLED.iter().find(|(theirs, _)| *theirs == key).map(|(_, ours)| *ours);
    let here = ours.filter(|ours| keys.contains(ours)).or_else(|| nearest(key, keys.iter().copied()));
    let hint = match (here, elsewhere(ours.unwrap_or(key))) {
        (_, Some((other, same))) if here.is_none() || same == key => {
            format!("did you mean `{same}` of {}?", header(other))
        }
        (Some(near), _) => format!("did you mean `{near}`?"),
        _ => format!("its keys are {}", keys.join(", ")),
    };
    format!("unknown key `{key}` in {}; {hint}", header(table))
}

/// A name at the top level: a misspelt table, or a key that lost its table.
fn unknown_table(name: &str, value: &Value) -> String {
    let is_table = value.is_table() || value.is_array();
    let tables = known().map(|(table, _)| table);
    let near_table = nearest(name, tables);
    let hint = match (is_table, near_table, elsewhere(name)) {
        (true, Some(table), _) => format!("did you mean {}?", header(table)),
        (_, _, Some((table, key))) => format!("did you mean `{key}` of {}?", header(table)),
        (_, Some(table), _) => format!("did you mean {}?", header(table)),
        _ => format!("the tables are {}", tables.map(header).join(", ")),
    };
    let what = if is_table { "table" } else { "key" };
    format!("unknown {what} `{name}`; {hint}")
}

/// The table that has this key, or one much like it.
fn elsewhere(key: &str) -> Option<(&'static str, &'static str)> {
    let all = || known().into_iter().flat_map(|(table, keys)| keys.iter().map(move |k| (table, *k)));
    all().find(|(_, k)| *k == key).or_else(|| {
        let near = nearest(key, all().map(|(_, k)| k))?;
        all().find(|(_, k)| *k == near)
    })
}

fn header(table: &str) -> String {
    if table == "data" { "[[data]]".into() } else { format!("[{table}]") }
}

/// The field names a struct tells serde.
fn fields<T: for<'de> Deserialize<'de>>() -> &'static [&'static str] {
    struct Ask<'a>(&'a mut &'static [&'static str]);

    impl<'de> Deserializer<'de> for Ask<'_> {
        type Error = Nothing;

        fn deserialize_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, Nothing> {
            Err(Nothing::custom("only asked for names"))
        }

        fn deserialize_struct<V: Visitor<'de>>(
            self,
            _: &'static str,
            fields: &'static [&'static str],
            visitor: V,
        ) -> Result<V::Value, Nothing> {
            *self.0 = fields;
            self.deserialize_any(visitor)
        }

        serde::forward_to_deserialize_any! {
            bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit
            unit_struct newtype_struct seq tuple tuple_struct map enum identifier ignored_any
        }
    }

    let mut names: &'static [&'static str] = &[];
    // Always an error: the names were all that was wanted.
    let _ = T::deserialize(Ask(&mut names));
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_table_of_the_recipe_is_known() {
        let tables: Vec<&str> = known().iter().map(|(table, _)| *table).collect();
        assert_eq!(tables, fields::<Recipe>());
        assert!(known().iter().all(|(_, keys)| !keys.is_empty()));
    }

    #[test]
    fn an_unknown_key_is_answered_with_the_nearest_and_its_table() {
        let cases = [
            ("optim.learning_rate = 1", "unknown key `learning_rate` in [optim]; did you mean `lr`?"),
            ("train.learning_rate = 1", "in [train]; did you mean `lr` of [optim]?"),
            ("train.max_seq_length = 1", "in [train]; did you mean `max_seq_len`?"),
            ("train.lr = 1", "in [train]; did you mean `lr` of [optim]?"),
            ("optimm.lr = 1", "unknown table `optimm`; did you mean [optim]?"),
            ("lr = 1", "unknown key `lr`; did you mean `lr` of [optim]?"),
            ("[[data]]\npth = 'x'", "unknown key `pth` in [[data]]; did you mean `path`?"),
            ("xyzzy = 1", "the tables are [model], "),
        ];
        for (text, expected) in cases {
            let table: Table = text.parse().expect(text);
            let sentence = first_unknown(&table).expect(text);
            assert!(sentence.contains(expected), "{text}: {sentence}");
        }
    }
}
