//! A number of bytes as users write it.

use crate::Error;
use std::fmt;
use std::str::FromStr;

/// A number of bytes. Reads `4096`, `600MiB`, `1.5 GiB`, `2GB`; prints the largest binary unit that divides it.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize,
)]
#[serde(try_from = "String", into = "String")]
pub struct Size(pub u64);

/// Units by lower-case name. `KB` and its like are powers of 1000, `K` and `KiB` of 1024.
const UNITS: &[(&str, u64)] = &[
    ("", 1),
    ("b", 1),
    ("k", 1 << 10),
    ("kib", 1 << 10),
    ("kb", 1_000),
    ("m", 1 << 20),
    ("mib", 1 << 20),
    ("mb", 1_000_000),
    ("g", 1 << 30),
    ("gib", 1 << 30),
    ("gb", 1_000_000_000),
    ("t", 1 << 40),
    ("tib", 1 << 40),
    ("tb", 1_000_000_000_000),
];

/// Digits kept after the point; more are an error rather than a silent rounding.
const MAX_DECIMALS: usize = 9;

impl Size {
    /// The number of bytes.
    pub fn bytes(self) -> u64 {
        self.0
    }
}

impl FromStr for Size {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        parse(text).map(Size).map_err(|why| Error::Size { text: text.into(), why })
    }
}

fn parse(text: &str) -> Result<u64, &'static str> {
    let text = text.trim();
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = (&text[..end], text[end..].trim_start().to_ascii_lowercase());
    let &(_, unit) = UNITS.iter().find(|(name, _)| *name == unit).ok_or("unknown unit")?;
    let (whole, decimals) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() || decimals.contains('.') || number.ends_with('.') {
        return Err("not a number");
    }
    if decimals.len() > MAX_DECIMALS {
        return Err("too many decimals");
    }
    const TOO_LARGE: &str = "too large";
    let digits: u128 = format!("{whole}{decimals}").parse().map_err(|_| TOO_LARGE)?;
    let bytes = digits.checked_mul(u128::from(unit)).ok_or(TOO_LARGE)? / 10u128.pow(decimals.len() as u32);
    u64::try_from(bytes).map_err(|_| TOO_LARGE)
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let units = [("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)];
        match units.iter().find(|(_, shift)| self.0 != 0 && self.0.trailing_zeros() >= *shift) {
            Some((name, shift)) => write!(f, "{}{name}", self.0 >> shift),
            None => write!(f, "{}", self.0),
        }
    }
}

impl TryFrom<String> for Size {
    type Error = Error;

    fn try_from(text: String) -> Result<Self, Error> {
        text.parse()
    }
}

impl From<Size> for String {
    fn from(size: Size) -> Self {
        size.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_users_write_them() {
        let cases = [
            ("0", 0),
            ("4096", 4096),
            ("600MiB", 600 << 20),
            ("2GiB", 2 << 30),
            ("2 gib", 2 << 30),
            (" 1.5GiB ", 3 << 29),
            ("1K", 1024),
            ("2GB", 2_000_000_000),
            ("3b", 3),
            ("0.5KiB", 512),
            ("18446744073709551615", u64::MAX),
        ];
        for (text, bytes) in cases {
            assert_eq!(text.parse(), Ok(Size(bytes)), "{text}");
        }
    }

    #[test]
    fn what_is_not_a_size_is_refused_with_its_text() {
        let cases = [
            "",
            "MiB",
            "-1",
            "1e9",
            "1..5GiB",
            "1.GiB",
            ".5GiB",
            "5 bananas",
            "18446744073709551616",
            "16777216TiB",
            "1.0000000001GiB",
            "９MiB",
            "99999999999999999999999999999999999999999999",
        ];
        for text in cases {
            let error = text.parse::<Size>().expect_err(text).to_string();
            assert!(error.contains(&format!("`{text}`")), "{error}");
        }
    }

    #[test]
    fn a_printed_size_reads_back_as_itself() {
        for bytes in [0, 1, 1023, 1024, 600 << 20, (2 << 30) + 1, 1 << 40, u64::MAX] {
            assert_eq!(Size(bytes).to_string().parse(), Ok(Size(bytes)));
        }
    }
}
