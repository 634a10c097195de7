//! Transformer blocks that the device does not hold.
//!
//! - here: the stream of blocks through a ring, and what it counts.
//! - [`plan`]: what is resident and what is streamed.
//! - [`table`]: the embedding where it stays on disk.
//!
//! A bundle stores matrices as the kernels compute with them, so a block is ready as soon as its bytes are read: disk →
//! ring past the page cache ([`Prefetcher`], io_uring), each buffer a whole block, computed with where it lies. Reading
//! goes on by itself, in the order of the block loop and for ever: after the last block of a pass comes the first of the
//! next. Blocks that host memory holds are read once, at the start; device and host are one memory here, and nothing is
//! copied. Every row of a step uses a block while it is there: one fetch serves the whole batch.

mod plan;
mod table;

pub use plan::WeightPlan;
pub(crate) use plan::{Prepared, may_stream};
pub use table::TableBytes;
pub(crate) use table::{Table, TablePart};

use crate::error::Error;
use crate::loader::{Held, Part};
use hearth_kernels::Activations;
use hearth_memory::stream::{Ahead, Lease, Prefetcher};
use hearth_memory::{AlignedBuffer, Charge, Kind, Ledger, NvmeFile, Tier};
use hearth_model::{Architecture, Block};
use std::collections::HashMap;
use std::ops::{Deref, Range};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Ranges that a [`Prefetcher`] is given at a time: passes follow one another without a pause.
const RANGES: usize = 1 << 14;
/// Deepest reading ahead.
const MOST_AHEAD: usize = 8;

/// What streaming moved so far.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Streamed {
    /// Passes over the model.
    pub passes: u64,
    /// Bytes of weights read from disk.
    pub nvme_bytes: u64,
    /// Bytes of weights computed with in host memory.
    pub host_bytes: u64,
    /// Seconds that passes took, from their first block to their last.
    pub pass_s: f64,
    /// Seconds of these in which the model waited for a block.
    pub wait_s: f64,
}

impl Streamed {
    /// 10⁹ bytes per second of passes, from both tiers.
    pub fn gb_s(&self) -> f64 {
        if self.pass_s > 0.0 { (self.nvme_bytes + self.host_bytes) as f64 / self.pass_s / 1e9 } else { 0.0 }
    }
}

/// The same, counted.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    passes: AtomicU64,
    nvme_bytes: AtomicU64,
    host_bytes: AtomicU64,
    pass_ns: AtomicU64,
    wait_ns: AtomicU64,
}

impl Counters {
    pub(crate) fn read(&self) -> Streamed {
        let get = |n: &AtomicU64| n.load(Ordering::Relaxed);
        Streamed {
            passes: get(&self.passes),
            nvme_bytes: get(&self.nvme_bytes),
            host_bytes: get(&self.host_bytes),
            pass_s: get(&self.pass_ns) as f64 / 1e9,
            wait_s: get(&self.wait_ns) as f64 / 1e9,
        }
    }
}

fn add(counter: &AtomicU64, value: u64) {
    counter.fetch_add(value, Ordering::Relaxed);
}

fn add_time(counter: &AtomicU64, time: Duration) {
    add(counter, u64::try_from(time.as_nanos()).unwrap_or(u64::MAX));
}

/// A streamed block: where it lies in the file, and what it consists of.
pub(crate) struct StreamedBlock {
    pub index: usize,
    pub tier: Tier,
    /// Its bytes in the file, from its first tensor to its last.
    pub range: Range<u64>,
    /// Its parameters, each with its place in the file: matrices in panels, vectors as they are.
    pub parts: Vec<(Part, Range<u64>)>,
}

impl StreamedBlock {
    fn len(&self) -> usize {
        (self.range.end - self.range.start) as usize
    }

    /// Bytes of a buffer that holds it.
    pub fn stored_bytes(&self) -> u64 {
        AlignedBuffer::capacity_for(self.len()) as u64
    }

    /// The block, computing with its bytes where they lie.
    fn build(
        &self,
        arch: &dyn Architecture,
        bytes: &Shared,
        activations: Activations,
    ) -> Result<Box<dyn Block>, Error> {
        let mut held = Held::default();
        for (part, place) in &self.parts {
            let start = (place.start - self.range.start) as usize;
            let range = start..start + (place.end - place.start) as usize;
            held.keep(part.spec.name.clone(), part.borrow(bytes, range, activations));
        }
        Ok(arch.block(self.index, &mut held)?)
    }
}

/// How deep to read ahead: as many ranges of `len` bytes as the disk moves in the time that one takes to begin, and
/// one more (`1 + ⌈B·latency/ℓ⌉`). Measured on the file itself.
///
/// # Errors
/// When it cannot be read.
pub(crate) fn look_ahead(file: &NvmeFile, range: &Range<u64>) -> Result<usize, Error> {
    let len = (range.end - range.start).max(1);
    let mut buffer = AlignedBuffer::new(len.min(4 << 20) as usize);
    let time = |buffer: &mut [u8]| -> Result<f64, Error> {
        let begun = Instant::now();
        file.read_at(range.start, buffer)?;
        Ok(begun.elapsed().as_secs_f64())
    };
    let bulk = time(&mut buffer)?;
    let page = buffer.len().min(4096);
    let mut latency = f64::MAX;
    for _ in 0..4 {
        latency = latency.min(time(&mut buffer[..page])?);
    }
    let bandwidth = buffer.len() as f64 / bulk.max(1e-9);
    let ahead = 1 + (bandwidth * latency / len as f64).ceil() as usize;
    Ok(ahead.min(MOST_AHEAD))
}

/// The blocks that the device does not hold.
pub(crate) struct Stream {
    arch: Box<dyn Architecture>,
    activations: Activations,
    /// Those in host memory, with their bytes.
    hosted: HashMap<usize, (Box<dyn Block>, u64)>,
    on_disk: Mutex<OnDisk>,
    counters: Arc<Counters>,
    /// What stays on disk.
    _charge: Charge,
}

/// The blocks on disk, in the order of the block loop.
struct OnDisk {
    blocks: Vec<StreamedBlock>,
    /// `None` without blocks.
    ring: Option<Prefetcher>,
    /// Which of the blocks the ring gives next.
    next: usize,
    /// Whether a read failed: what was read ahead by then may have failed for the same reason.
    stale: bool,
}

impl Stream {
    /// Reads what host memory is to hold, makes the ring and begins to read. The bytes of host memory and ring are
    /// charged.
    ///
    /// # Errors
    /// When a budget does not hold them, or the file cannot be read.
    pub(crate) fn start(
        arch: Box<dyn Architecture>,
        file: NvmeFile,
        blocks: Vec<StreamedBlock>,
        activations: Activations,
        look_ahead: usize,
        ledger: &Ledger,
    ) -> Result<Self, Error> {
        let (on_disk, in_memory): (Vec<_>, Vec<_>) = blocks.into_iter().partition(|b| b.tier == Tier::Nvme);
        let disk_bytes = on_disk.iter().map(StreamedBlock::stored_bytes).sum();
        let charge = ledger.charge(Tier::Nvme, Kind::Weights, disk_bytes)?;
        let mut hosted = HashMap::new();
        for block in in_memory {
            let bytes = block.len() as u64;
            let buffer = read_to_host(&block, &file, ledger)?;
            hosted.insert(block.index, (block.build(arch.as_ref(), &buffer, activations)?, bytes));
        }
        let ring = ring(&on_disk, file, look_ahead, ledger)?;
        let on_disk = Mutex::new(OnDisk { blocks: on_disk, ring, next: 0, stale: false });
        Ok(Self { arch, activations, hosted, on_disk, counters: Arc::default(), _charge: charge })
    }

    pub(crate) fn counters(&self) -> &Arc<Counters> {
        &self.counters
    }

    /// Begins a pass. Passes of several users take turns.
    pub(crate) fn pass(&self) -> Pass<'_> {
        let mut on_disk = self.on_disk.lock().unwrap_or_else(PoisonError::into_inner);
        on_disk.begin();
        Pass { stream: self, on_disk, begun: Instant::now() }
    }
}

/// One walk through the streamed blocks.
pub(crate) struct Pass<'a> {
    stream: &'a Stream,
    on_disk: MutexGuard<'a, OnDisk>,
    begun: Instant,
}

impl Pass<'_> {
    /// Lends block `index`, which must come after those asked for before.
    ///
    /// # Errors
    /// When its bytes could not be read.
    pub(crate) fn with(&mut self, index: usize, each: &mut dyn FnMut(&dyn Block)) -> Result<(), Error> {
        let Stream { arch, activations, hosted, counters, .. } = self.stream;
        if let Some((block, bytes)) = hosted.get(&index) {
            add(&counters.host_bytes, *bytes);
            each(block.as_ref());
            return Ok(());
        }
        let begun = Instant::now();
        let lease = self.on_disk.read(index, &counters.nvme_bytes);
        add_time(&counters.wait_ns, begun.elapsed());
        let (block, lease) = lease?;
        // The block ends here, and its buffer goes back to be read into.
        each(block.build(arch.as_ref(), &lease, *activations)?.as_ref());
        Ok(())
    }
}

impl Drop for Pass<'_> {
    fn drop(&mut self) {
        // The last block's buffer is free: the next pass's blocks come while the head computes and tokens are drawn.
        if let Some(ring) = &mut self.on_disk.ring {
            ring.read_ahead();
        }
        add(&self.stream.counters.passes, 1);
        add_time(&self.stream.counters.pass_ns, self.begun.elapsed());
    }
}

/// Bytes that are given back to their owner when the last matrix made of them is gone.
type Shared = Arc<dyn Deref<Target = [u8]> + Send + Sync>;

impl OnDisk {
    /// Begins a pass: anew where the one before it broke off.
    fn begin(&mut self) {
        if let Some(ring) = self.ring.as_mut().filter(|_| self.next > 0 || self.stale) {
            ring.restart();
            (self.next, self.stale) = (0, false);
        }
    }

    /// The bytes of block `index`.
    fn read(&mut self, index: usize, counter: &AtomicU64) -> Result<(&StreamedBlock, Shared), Error> {
        loop {
            let ring = self.ring.as_mut().expect("a block that is nowhere else is on disk");
            let at = self.next;
            self.stale = true;
            let lease = next(ring)?;
            self.stale = false;
            self.next = (at + 1) % self.blocks.len();
            add(counter, lease.len() as u64);
            if self.blocks[at].index == index {
                return Ok((&self.blocks[at], Arc::new(lease)));
            }
        }
    }
}

/// The bytes of a block, read into host memory to stay there.
fn read_to_host(block: &StreamedBlock, file: &NvmeFile, ledger: &Ledger) -> Result<Shared, Error> {
    let mut buffer = AlignedBuffer::charged(ledger, Tier::Host, Kind::Weights, block.len())?;
    file.read_at(block.range.start, &mut buffer)?;
    Ok(Arc::new(buffer))
}

/// The ring for the blocks on disk, if there are some.
fn ring(
    on_disk: &[StreamedBlock],
    file: NvmeFile,
    look_ahead: usize,
    ledger: &Ledger,
) -> Result<Option<Prefetcher>, Error> {
    if on_disk.is_empty() {
        return Ok(None);
    }
    let passes = (RANGES / on_disk.len()).max(1);
    let ranges = on_disk.iter().map(|b| b.range.clone()).cycle();
    let sequence = ranges.take(passes * on_disk.len()).collect();
    let ahead = Ahead { look_ahead, leases: 1 };
    Ok(Some(Prefetcher::new(Arc::new(file), sequence, ahead, ledger, Tier::Host)?))
}

/// The next range of the endless sequence.
fn next(ring: &mut Prefetcher) -> Result<Lease, Error> {
    loop {
        match ring.next()? {
            Some(lease) => return Ok(lease),
            None => ring.restart(),
        }
    }
}
