//! The hard limit of each tier.

use crate::{Error, Size, Tier};
use std::fmt;
use std::str::FromStr;

/// Most bytes that may be held in each tier; `None` = no limit of ours.
///
/// Reads `2GiB` (the device's) and `device=600MiB,host=1GiB`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Budget {
    /// Memory the arithmetic reads.
    pub device: Option<Size>,
    /// Main memory beside the device.
    pub host: Option<Size>,
    /// A fast disk.
    pub nvme: Option<Size>,
}

impl Budget {
    /// No limits.
    pub const UNLIMITED: Budget = Budget { device: None, host: None, nvme: None };

    /// A limit on the device alone.
    pub fn device(bytes: u64) -> Self {
        Budget { device: Some(Size(bytes)), ..Budget::UNLIMITED }
    }

    /// The limit of a tier in bytes; `None` = none.
    pub fn limit(&self, tier: Tier) -> Option<u64> {
        let size = match tier {
            Tier::Device => self.device,
            Tier::Host => self.host,
            Tier::Nvme => self.nvme,
        };
        size.map(Size::bytes)
    }

    fn limit_mut(&mut self, tier: Tier) -> &mut Option<Size> {
        match tier {
            Tier::Device => &mut self.device,
            Tier::Host => &mut self.host,
            Tier::Nvme => &mut self.nvme,
        }
    }

    fn add(&mut self, part: &str) -> Result<(), String> {
        let (name, size) = part.split_once('=').ok_or_else(|| format!("`{part}` has no `=`"))?;
        let name = name.trim();
        let tier = Tier::ALL.into_iter().find(|t| t.name() == name);
        let tier = tier.ok_or_else(|| format!("there is no tier `{name}` (tiers: device, host, nvme)"))?;
        let size = size.parse().map_err(|e: Error| e.to_string())?;
        match self.limit_mut(tier).replace(size) {
            Some(_) => Err(format!("{tier} is given twice")),
            None => Ok(()),
        }
    }
}

impl FromStr for Budget {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        if !text.contains('=') && !text.contains(',') {
            return Ok(Budget { device: Some(text.parse()?), ..Budget::UNLIMITED });
        }
        let mut budget = Budget::UNLIMITED;
        for part in text.split(',') {
            budget.add(part).map_err(|why| Error::Budget { text: text.into(), why })?;
        }
        Ok(budget)
    }
}

impl fmt::Display for Budget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let limits = Tier::ALL.iter().filter_map(|&tier| Some((tier, self.limit(tier)?)));
        let parts: Vec<String> = limits.map(|(tier, bytes)| format!("{tier}={}", Size(bytes))).collect();
        f.write_str(if parts.is_empty() { "unlimited".into() } else { parts.join(",") }.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plain_size_is_the_devices() {
        assert_eq!("2GiB".parse(), Ok(Budget::device(2 << 30)));
    }

    #[test]
    fn tiers_are_given_by_name_in_any_order() {
        let budget: Budget = "host=1GiB, device=600MiB".parse().expect("well formed");
        assert_eq!(budget, Budget { device: Some(Size(600 << 20)), host: Some(Size(1 << 30)), nvme: None });
        assert_eq!(budget.to_string().parse(), Ok(budget));
    }

    #[test]
    fn what_is_not_a_budget_is_refused_with_a_sentence() {
        let cases = [
            ("", "not a number"),
            ("device=", "not a number"),
            ("gpu=1GiB", "no tier `gpu`"),
            ("device=1GiB,device=2GiB", "twice"),
            ("device=1GiB,", "has no `=`"),
            ("1GiB,2GiB", "has no `=`"),
            ("device=1GiB host=2GiB", "unknown unit"),
            ("host=-1", "host=-1"),
        ];
        for (text, expected) in cases {
            let error = text.parse::<Budget>().expect_err(text).to_string();
            assert!(error.contains(expected), "{text}: {error}");
        }
    }
}
