//! Copies between pinned memory and the card, alone and while kernels compute with what arrives.

use super::{Against, Bench, Speed};
use crate::Error;
use hearth_cuda::ops::quant::{Format, Matrix, PIECE, Quantized, product};
use hearth_cuda::runtime::{DeviceBuffer, Error as CardError, Event, PinnedBuffer, Ring};
use hearth_memory::Kind;

/// Both directions alone, then a model's worth of matrices through a ring.
pub fn run(bench: &Bench, found: &mut dyn FnMut(Speed)) -> Result<(), Error> {
    let len = bench.extent.pick(1 << 28, 1 << 12);
    let (to_card, to_host) = copy_seconds(bench, len)?;
    let plain = |what: &str, seconds| Speed {
        what: what.to_owned(),
        bytes: len as u64,
        seconds,
        against: Against::PinnedCopy,
        share: to_card / seconds,
        goal: None,
    };
    found(plain("pinned memory to the card", to_card));
    found(plain("the card to pinned memory", to_host));
    found(while_computing(bench, len as f64 / to_card)?);
    Ok(())
}

/// What so many bytes take to the card and back.
pub fn copy_seconds(bench: &Bench, len: usize) -> Result<(f64, f64), Error> {
    let mut host = PinnedBuffer::new(bench.card(), Kind::Staging, len)?;
    let mut card = DeviceBuffer::<u8>::zeros(&bench.stream, Kind::Staging, len)?;
    let to_card = bench.time(|| Ok(host.send(&bench.stream, len, &mut card, 0)?))?;
    Ok((to_card, bench.time(|| Ok(host.fetch(&bench.stream, len, &card, 0)?))?))
}

/// Blocks of a quantized matrix that lie in pinned memory, each multiplied with a row as it arrives.
fn while_computing(bench: &Bench, base: f64) -> Result<Speed, Error> {
    let format = Format::by_name("q8_0").expect("a format of ours");
    let (rows, columns, blocks) =
        (bench.extent.pick(8192, 32), bench.extent.pick(8192, 64), bench.extent.pick(48, 4));
    let len = format.bytes_of(rows, columns).expect("whole blocks");
    let mut ring = Ring::new(bench.card(), 3, len)?;
    let mut quants = DeviceBuffer::<i8>::zeros(&bench.stream, Kind::Activations, columns)?;
    let mut scales = DeviceBuffer::<f32>::zeros(&bench.stream, Kind::Activations, columns / PIECE)?;
    let mut sums = DeviceBuffer::<u32>::zeros(&bench.stream, Kind::Activations, columns / PIECE)?;
    let mut y = DeviceBuffer::<f32>::new(bench.card(), Kind::Activations, rows)?;
    let x = Quantized { quants: quants.all_mut(), scales: scales.all_mut(), sums: sums.all_mut() };
    // Its weights are in the slots already: the link is measured, not the host's copies.
    let filled = |_: &mut [u8]| Ok::<(), CardError>(());
    let mut pass = |blocks: usize| -> Result<(), Error> {
        let (mut sent, mut taken) = (0, 0);
        while taken < blocks {
            while sent < blocks && ring.has_room() {
                ring.send(len, filled)?;
                sent += 1;
            }
            ring.take(&bench.stream, |bytes, _| {
                let w = Matrix { bytes: bytes.all(), format, rows, columns };
                product(&bench.stream, w, &x, 1, y.all_mut())
            })?;
            taken += 1;
        }
        Ok(())
    };
    // Kernels are compiled and every slot was used before time is taken.
    pass(bench.extent.pick(6, 3))?;
    bench.stream.synchronize()?;
    let (start, end) = (Event::timed(bench.card())?, Event::timed(bench.card())?);
    start.record(&bench.stream)?;
    pass(blocks)?;
    end.record(&bench.stream)?;
    let (seconds, bytes) = (start.seconds_to(&end)?.max(1e-9), blocks * len);
    let share = bytes as f64 / seconds / base;
    let what = "weights streamed while computing".to_owned();
    Ok(Speed { what, bytes: bytes as u64, seconds, against: Against::PinnedCopy, share, goal: Some(0.9) })
}
