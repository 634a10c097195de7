//! Transformer blocks that pass through the device: two pipelines, disk → ring and ring → device.
//!
//! - here: the pipelines, and what they count.
//! - [`plan`]: what is resident and what is streamed.
//!
//! The first is io_uring past the page cache ([`Prefetcher`]); it needs no thread. The second is one thread that turns
//! a block's stored bytes, from the ring or from host memory, into layers while the model computes with the one
//! before. It hands them over one by one, in the order of the block loop, for ever: after the last block of a pass comes
//! the first of the next. So at most [`SLOTS`](crate::placement::SLOTS) of them exist, and their bytes are charged
//! once, at the start. Every row of a step uses a block while it is there: one fetch serves the whole batch.

mod plan;

pub(crate) use plan::{Prepared, may_stream};
pub use plan::{WeightPlan, link_bytes_per_second};

use crate::error::Error;
use crate::loader::{Held, Part};
use hearth_kernels::Activations;
use hearth_memory::stream::{Ahead, Lease, Prefetcher};
use hearth_memory::{AlignedBuffer, Charge, Kind, Ledger, NvmeFile, Tier};
use hearth_model::{Architecture, Block};
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
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
    /// Bytes of weights read from disk, as stored.
    pub nvme_bytes: u64,
    /// Bytes of weights read from host memory, as stored.
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
    /// Its parameters, each with its place in the file.
    pub parts: Vec<(Part, Range<u64>)>,
}

impl StreamedBlock {
    /// Bytes of a buffer that holds it.
    pub fn stored_bytes(&self) -> u64 {
        AlignedBuffer::capacity_for((self.range.end - self.range.start) as usize) as u64
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
    Ok(ahead.clamp(2, MOST_AHEAD))
}

/// Hands out streamed blocks in the order of the block loop.
pub(crate) struct Stream {
    inner: Mutex<Inner>,
    counters: Arc<Counters>,
    /// The slots, and what stays on disk.
    _charges: [Charge; 2],
}

struct Inner {
    blocks: Option<Receiver<Delivery>>,
    thread: Option<JoinHandle<()>>,
}

struct Delivery {
    index: usize,
    block: Result<Box<dyn Block>, Error>,
}

impl Stream {
    /// Reads what host memory is to hold, makes the ring and starts the thread. The bytes of slots, host memory and
    /// ring are charged.
    ///
    /// # Errors
    /// When a budget does not hold them, the file cannot be read, or the system gives no thread.
    pub(crate) fn start(
        arch: Box<dyn Architecture>,
        file: NvmeFile,
        blocks: Vec<StreamedBlock>,
        activations: Activations,
        slot_bytes: u64,
        look_ahead: usize,
        ledger: &Ledger,
    ) -> Result<Self, Error> {
        let on_disk = blocks.iter().filter(|b| b.tier == Tier::Nvme).map(StreamedBlock::stored_bytes).sum();
        let charges = [
            ledger.charge(Tier::Device, Kind::Staging, slot_bytes)?,
            ledger.charge(Tier::Nvme, Kind::Weights, on_disk)?,
        ];
        let counters = Arc::new(Counters::default());
        let file = Arc::new(file);
        let held = blocks.iter().map(|b| in_host_memory(b, &file, ledger)).collect::<Result<Vec<_>, _>>()?;
        let ring = ring(&blocks, &file, look_ahead, ledger)?;
        let feed = Feed { arch, blocks, held, ring, activations, counters: counters.clone() };
        let (sender, receiver) = sync_channel(0);
        let thread =
            std::thread::Builder::new().name("hearth-stream".into()).spawn(move || feed.run(&sender));
        let inner = Inner { blocks: Some(receiver), thread: Some(thread.map_err(Error::Thread)?) };
        Ok(Self { inner: Mutex::new(inner), counters, _charges: charges })
    }

    pub(crate) fn counters(&self) -> &Arc<Counters> {
        &self.counters
    }

    /// Begins a pass. Passes of several users take turns.
    pub(crate) fn pass(&self) -> Pass<'_> {
        let inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        Pass { inner, counters: &self.counters, begun: Instant::now() }
    }
}

/// One walk through the streamed blocks.
pub(crate) struct Pass<'a> {
    inner: MutexGuard<'a, Inner>,
    counters: &'a Counters,
    begun: Instant,
}

impl Pass<'_> {
    /// Block `index`, which must come after those asked for before. What a pass that broke off left behind is passed
    /// over.
    ///
    /// # Errors
    /// When its bytes could not be read.
    pub(crate) fn next(&mut self, index: usize) -> Result<Box<dyn Block>, Error> {
        let begun = Instant::now();
        let receiver = self.inner.blocks.as_ref().expect("the stream lives");
        let block = loop {
            match receiver.recv() {
                Ok(delivery) if delivery.index == index => break delivery.block,
                Ok(_) => {}
                Err(_) => break Err(Error::Config("the thread that streams weights has ended".into())),
            }
        };
        add_time(&self.counters.wait_ns, begun.elapsed());
        block
    }
}

impl Drop for Pass<'_> {
    fn drop(&mut self) {
        add(&self.counters.passes, 1);
        add_time(&self.counters.pass_ns, self.begun.elapsed());
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        let inner = self.inner.get_mut().unwrap_or_else(PoisonError::into_inner);
        // The thread ends when nobody takes its blocks any more.
        inner.blocks = None;
        if let Some(thread) = inner.thread.take() {
            thread.join().ok();
        }
    }
}

/// The bytes of a block that lies in host memory.
fn in_host_memory(
    block: &StreamedBlock,
    file: &NvmeFile,
    ledger: &Ledger,
) -> Result<Option<AlignedBuffer>, Error> {
    if block.tier != Tier::Host {
        return Ok(None);
    }
    let len = (block.range.end - block.range.start) as usize;
    let mut buffer = AlignedBuffer::charged(ledger, Tier::Host, Kind::Weights, len)?;
    file.read_at(block.range.start, &mut buffer)?;
    Ok(Some(buffer))
}

/// The ring for the blocks on disk, if there are some.
fn ring(
    blocks: &[StreamedBlock],
    file: &Arc<NvmeFile>,
    look_ahead: usize,
    ledger: &Ledger,
) -> Result<Option<Prefetcher>, Error> {
    let on_disk: Vec<Range<u64>> =
        blocks.iter().filter(|b| b.tier == Tier::Nvme).map(|b| b.range.clone()).collect();
    if on_disk.is_empty() {
        return Ok(None);
    }
    let passes = (RANGES / on_disk.len()).max(1);
    let sequence = on_disk.iter().cycle().take(passes * on_disk.len()).cloned().collect();
    let ahead = Ahead { look_ahead, leases: 1 };
    Ok(Some(Prefetcher::new(file.clone(), sequence, ahead, ledger, Tier::Host)?))
}

/// The thread's side.
struct Feed {
    arch: Box<dyn Architecture>,
    blocks: Vec<StreamedBlock>,
    /// Beside `blocks`.
    held: Vec<Option<AlignedBuffer>>,
    ring: Option<Prefetcher>,
    activations: Activations,
    counters: Arc<Counters>,
}

impl Feed {
    fn run(mut self, sender: &SyncSender<Delivery>) {
        for i in (0..self.blocks.len()).cycle() {
            let delivery = Delivery { index: self.blocks[i].index, block: self.build(i) };
            if sender.send(delivery).is_err() {
                return;
            }
        }
    }

    fn build(&mut self, i: usize) -> Result<Box<dyn Block>, Error> {
        let lease = match (&self.held[i], &mut self.ring) {
            (None, Some(ring)) => Some(read(ring)?),
            _ => None,
        };
        let (bytes, counter): (&[u8], _) = match (&lease, &self.held[i]) {
            (Some(lease), _) => (lease, &self.counters.nvme_bytes),
            (None, held) => (held.as_deref().unwrap_or_default(), &self.counters.host_bytes),
        };
        add(counter, bytes.len() as u64);
        let block = &self.blocks[i];
        let mut held = Held::default();
        for (part, place) in &block.parts {
            let start = (place.start - block.range.start) as usize;
            let stored = &bytes[start..start + (place.end - place.start) as usize];
            held.keep(part.spec.name.clone(), part.unpack(stored, self.activations, None));
        }
        drop(lease);
        Ok(self.arch.block(block.index, &mut held)?)
    }
}

/// The next range of the endless sequence.
fn read(ring: &mut Prefetcher) -> Result<Lease, Error> {
    loop {
        match ring.next()? {
            Some(lease) => return Ok(lease),
            None => ring.restart(),
        }
    }
}
