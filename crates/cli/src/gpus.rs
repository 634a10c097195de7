//! The machine's NVIDIA cards and what it takes to use them.

use crate::ui::bytes;
use hearth_cuda::driver::{self, Card, Driver};
use hearth_cuda::nvrtc::{self, Nvrtc};
use hearth_cuda::runtime::Device;
use hearth_gpu::bench::{self, Copies};
use hearth_memory::Ledger;
use serde::Serialize;

/// NVIDIA cards and what it takes to use them.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Gpus {
    /// The cards.
    pub cards: Vec<Gpu>,
    /// The CUDA that the driver is made for, if there is a driver.
    pub driver: Option<String>,
    /// Version of the run-time compiler, if there is one.
    pub nvrtc: Option<String>,
    /// A sentence for each thing that is missing or too old.
    pub missing: Vec<String>,
    /// Whether this build can use them.
    pub built_with_cuda: bool,
}

/// A card.
#[derive(Clone, Debug, Serialize)]
pub struct Gpu {
    /// Its name.
    pub name: String,
    /// Compute capability: `9.0`.
    pub compute_capability: String,
    /// Memory.
    pub total_bytes: u64,
    /// Memory nobody holds; nothing if the card lets us not in.
    pub free_bytes: Option<u64>,
    /// Copies as measured, bytes per second; nothing if the card is too old, too full or not ours to use.
    pub copies: Option<Copies>,
}

/// Looks for cards. Without any the CPU does everything.
pub fn look() -> Gpus {
    let mut gpus = Gpus { built_with_cuda: cfg!(feature = "cuda"), ..Gpus::default() };
    if let Err(error) = cards(&mut gpus) {
        gpus.missing.push(error.to_string());
    }
    match Nvrtc::open().and_then(|nvrtc| nvrtc.version()) {
        Ok((major, minor)) => gpus.nvrtc = Some(format!("{major}.{minor}")),
        // Where there is no card nobody misses the compiler.
        Err(error @ nvrtc::Error::Missing(_)) if !gpus.cards.is_empty() => {
            gpus.missing.push(error.to_string())
        }
        Err(nvrtc::Error::Missing(_)) => {}
        Err(error) => gpus.missing.push(error.to_string()),
    }
    gpus
}

fn cards(gpus: &mut Gpus) -> Result<(), driver::Error> {
    let driver = Driver::open()?;
    let (major, minor) = driver.version()?;
    gpus.driver = Some(format!("CUDA {major}.{minor}"));
    for (ordinal, card) in driver.cards()?.into_iter().enumerate() {
        if !card.is_supported() {
            let ((major, minor), (least, _)) = (card.capability, driver::OLDEST_CARD);
            let name = &card.name;
            gpus.missing
                .push(format!("{name} has compute capability {major}.{minor}, {least}.0 or newer is needed"));
        }
        gpus.cards.push(gpu(card, measure(ordinal)));
    }
    Ok(())
}

/// Whatever is wrong with a card is said elsewhere: here there is just no figure.
fn measure(ordinal: usize) -> Option<Copies> {
    let card = Device::open(ordinal, &Ledger::default()).ok()?;
    bench::copies(&card).ok()
}

fn gpu(card: Card, copies: Option<Copies>) -> Gpu {
    let (major, minor) = card.capability;
    Gpu {
        name: card.name,
        compute_capability: format!("{major}.{minor}"),
        total_bytes: card.total_bytes,
        free_bytes: card.free_bytes,
        copies,
    }
}

impl Gpus {
    /// One line: the cards, or why there are none.
    pub fn line(&self) -> String {
        let card = |gpu: &Gpu| {
            let free =
                gpu.free_bytes.map_or("in exclusive use".into(), |free| format!("{} free", bytes(free)));
            let speeds = gpu.copies.map_or(String::new(), |c| {
                let gb_s = [c.within, c.to_card, c.to_host].map(|speed| speed / 1e9);
                format!(
                    ", copies at {:.0} GB/s within it, {:.1} to it, {:.1} from it",
                    gb_s[0], gb_s[1], gb_s[2]
                )
            });
            format!("{} ({}, {}, {free}{speeds})", gpu.name, gpu.compute_capability, bytes(gpu.total_bytes))
        };
        let cards = self.cards.iter().map(card);
        let line = cards.chain(self.missing.iter().cloned()).collect::<Vec<_>>().join("; ");
        if self.cards.is_empty() { format!("none ({line})") } else { line }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cards_and_what_is_missing_share_a_line() {
        let mut gpus = Gpus { missing: vec!["no driver".into()], ..Gpus::default() };
        assert_eq!(gpus.line(), "none (no driver)");
        let card =
            Card { name: "Card".into(), capability: (9, 0), total_bytes: 2 << 30, free_bytes: Some(1 << 30) };
        let copies = Copies { within: 2e12, to_card: 5e10, to_host: 4e10 };
        gpus.cards.push(gpu(card, Some(copies)));
        let line = gpus.line();
        assert!(line.contains(", copies at 2000 GB/s within it, 50.0 to it, 40.0 from it)"), "{line}");
        assert!(line.starts_with("Card (9.0, ") && line.ends_with("no driver"), "{line}");
    }

    #[test]
    fn a_machine_has_cards_or_a_reason() {
        let gpus = look();
        assert!(!gpus.cards.is_empty() || !gpus.missing.is_empty(), "{gpus:?}");
    }
}
