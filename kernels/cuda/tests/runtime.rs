//! Memory, streams, code and faults of a card, through the driver that runs kernels on the CPU.

use hearth_cuda::ops::gemm::{Shape, gemm_nt};
use hearth_cuda::ops::norm::rms_norm;
use hearth_cuda::ops::pointwise::swiglu;
use hearth_cuda::runtime::{Device, DeviceBuffer, Error, Libraries, PinnedBuffer, Ring, Stream};
use hearth_cuda_stand_in::StandIn;
use hearth_memory::{Budget, Kind, Ledger, Tier};
use std::sync::Arc;

/// What happens late: see `policy` in the stand-in.
const POLICIES: [(&str, i64); 4] =
    [("at once", 0), ("copies late", 1), ("kernels late", 2), ("everything late", 3)];

fn device(driver: &StandIn, budget: Budget) -> Arc<Device> {
    open(driver, 0, budget).expect("a card")
}

fn open(driver: &StandIn, ordinal: usize, budget: Budget) -> Result<Arc<Device>, Error> {
    Device::open_with(ordinal, &Ledger::new(budget), &Libraries::from(driver.path()))
}

fn numbers(n: usize) -> Vec<f32> {
    (0..n).map(|i| ((i * 37 + 11) % 101) as f32 / 50.0 - 1.0).collect()
}

fn upload(stream: &Stream, values: &[f32]) -> DeviceBuffer<f32> {
    DeviceBuffer::from_host(stream, Kind::Activations, values).expect("it fits")
}

#[test]
fn a_kernel_is_compiled_loaded_launched_and_right() {
    let driver = StandIn::new();
    let card = device(&driver, Budget::UNLIMITED);
    let stream = card.stream().expect("a stream");
    let (rows, d) = (5, 67);
    let (x, w) = (numbers(rows * d), numbers(d));
    let (on_x, on_w) = (upload(&stream, &x), upload(&stream, &w));
    let mut y = DeviceBuffer::new(&card, Kind::Activations, rows * d).expect("it fits");
    rms_norm(&stream, on_x.all(), on_w.all(), 1e-5, y.all_mut()).expect("sent");
    let got = y.to_host(&stream).expect("it comes back");
    for (row, got) in x.chunks(d).zip(got.chunks(d)) {
        let mean = row.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / d as f64;
        for i in 0..d {
            let want = f64::from(row[i]) / (mean + 1e-5).sqrt() * f64::from(w[i]);
            assert!((f64::from(got[i]) - want).abs() < 1e-5, "{} instead of {want}", got[i]);
        }
    }
}

#[test]
fn everything_is_given_back() {
    let driver = StandIn::new();
    let card = device(&driver, Budget::UNLIMITED);
    {
        let stream = card.stream().expect("a stream");
        let x = upload(&stream, &[1.0; 8]);
        let mut y = DeviceBuffer::new(&card, Kind::Activations, 8).expect("it fits");
        swiglu(&stream, x.all(), x.all(), y.all_mut()).expect("sent");
        let graph = stream.record(|| swiglu(&stream, x.all(), x.all(), y.all_mut())).expect("recorded");
        stream.replay(&graph).expect("sent");
        let _ring = Ring::new(&card, 2, 64).expect("it fits");
        assert!(driver.count("used") > 0 && driver.count("held") > 0);
    }
    drop(card);
    assert_eq!(["used", "held", "contexts"].map(|what| driver.count(what)), [0; 3]);
}

#[test]
fn the_budget_is_hard_and_a_full_card_is_another_sentence() {
    let driver = StandIn::new();
    let card = device(&driver, Budget::device(1000));
    let held = DeviceBuffer::<f32>::new(&card, Kind::Weights, 200).expect("800 bytes fit");
    let refused = DeviceBuffer::<f32>::new(&card, Kind::KvCache, 51).err().expect("204 do not");
    assert_eq!(refused.to_string(), "device tier: needs 204 bytes, 200 free of 1000");
    drop(held);
    assert_eq!(card.ledger().used(Tier::Device), 0);
    driver.set("total_bytes", 100);
    let full = DeviceBuffer::<f32>::new(&card, Kind::Weights, 200).err().expect("others hold the rest");
    assert_eq!(
        full.to_string(),
        "the card has no 800 bytes, 100 are free: another program may hold the rest"
    );
    assert_eq!(card.ledger().used(Tier::Device), 0, "what was not allocated is not charged");
}

#[test]
fn every_reason_against_a_card_is_one_sentence() {
    let sentence = |settings: &[(&str, i64)], ordinal| {
        let driver = StandIn::new();
        settings.iter().for_each(|&(name, value)| driver.set(name, value));
        open(&driver, ordinal, Budget::UNLIMITED).err().expect("no card").to_string()
    };
    assert_eq!(
        sentence(&[("version", 11080)], 0),
        "the NVIDIA driver is made for CUDA 11.8, 12.0 or newer is needed: update the driver"
    );
    assert_eq!(sentence(&[("count", 0)], 0), "the NVIDIA driver finds no card");
    assert_eq!(sentence(&[], 1), "there is no card cuda:1: the driver lists 1");
    assert_eq!(
        sentence(&[("major", 7), ("minor", 5)], 0),
        "stand-in has compute capability 7.5, 8.0 or newer is needed"
    );
}

#[test]
fn a_missing_compiler_is_one_sentence_and_the_card_stays_usable() {
    let driver = StandIn::new();
    let libraries =
        Libraries { nvrtc: Some("/nowhere/libnvrtc.so".into()), ..Libraries::from(driver.path()) };
    let card = Device::open_with(0, &Ledger::default(), &libraries).expect("a card");
    let stream = card.stream().expect("a stream");
    let x = upload(&stream, &[1.0; 4]);
    let mut y = DeviceBuffer::new(&card, Kind::Activations, 4).expect("it fits");
    let error = swiglu(&stream, x.all(), x.all(), y.all_mut()).expect_err("nothing compiles");
    assert!(error.to_string().starts_with("NVRTC, CUDA's run-time compiler, cannot be loaded"), "{error}");
    assert_eq!(x.to_host(&stream).expect("memory still works"), [1.0; 4]);
}

#[test]
fn a_driver_that_refuses_images_gets_ptx() {
    let driver = StandIn::new();
    driver.set("cubins", 0);
    let card = device(&driver, Budget::UNLIMITED);
    let stream = card.stream().expect("a stream");
    let x = upload(&stream, &[0.0; 4]);
    let mut y = DeviceBuffer::new(&card, Kind::Activations, 4).expect("it fits");
    swiglu(&stream, x.all(), x.all(), y.all_mut()).expect("PTX is taken");
    assert_eq!(y.to_host(&stream).expect("it comes back"), [0.0; 4]);
}

#[test]
fn a_lost_card_is_said_once_and_for_all_and_nothing_hangs() {
    for (code, launches) in [(719, 0), (719, 3), (46, 1), (700, 2)] {
        let driver = StandIn::new();
        driver.set("lost_code", code);
        driver.set("launches", launches);
        let card = device(&driver, Budget::UNLIMITED);
        let stream = card.stream().expect("a stream");
        let x = upload(&stream, &[1.0; 4]);
        let mut y = DeviceBuffer::new(&card, Kind::Activations, 4).expect("it fits");
        let mut send = || swiglu(&stream, x.all(), x.all(), y.all_mut());
        for _ in 0..launches {
            send().expect("still there");
        }
        let error = send().expect_err("now it is gone");
        assert!(error.is_lost(), "{error}");
        assert!(
            error.to_string().starts_with(&format!("the card was lost at cuLaunchKernel: code {code} (")),
            "{error}"
        );
        for later in [send().err(), y.to_host(&stream).err(), stream.synchronize().err(), card.stream().err()]
        {
            let later = later.expect("nothing works any more");
            assert!(later.is_lost(), "{later}");
        }
    }
}

#[test]
fn wrong_shapes_are_sentences_and_send_nothing() {
    let driver = StandIn::new();
    let card = device(&driver, Budget::UNLIMITED);
    let stream = card.stream().expect("a stream");
    let (x, w) = (upload(&stream, &[1.0; 12]), upload(&stream, &[1.0; 4]));
    let mut y = DeviceBuffer::new(&card, Kind::Activations, 11).expect("it fits");
    let norm = rms_norm(&stream, x.all(), w.all(), 1e-5, y.all_mut()).expect_err("y is short");
    assert_eq!(norm.to_string(), "rms_norm: y has 11 elements, 12 are needed");
    let part = x.part(1..9).expect("within");
    let odd =
        rms_norm(&stream, part, w.all(), 1e-5, y.part_mut(0..8).expect("within")).expect_err("odd start");
    assert_eq!(odd.to_string(), "rms_norm: x begins at byte 4, not at a multiple of 16");
    let w3 = w.part(0..3).expect("within");
    let rows = rms_norm(&stream, x.part(0..8).expect("within"), w3, 1e-5, y.part_mut(0..8).expect("within"));
    assert_eq!(
        rows.expect_err("8 is no multiple").to_string(),
        "rms_norm: x is 8, a multiple of 3, above 0, is needed"
    );
    let shape = Shape { m: 3, n: 1, k: 4 };
    let gemm = gemm_nt(&stream, x.all(), w.all(), shape, false, y.all_mut()).expect_err("y is long");
    assert_eq!(gemm.to_string(), "linear: y has 11 elements, 3 are needed");
    assert_eq!(y.part(5..12).err().expect("outside").to_string(), "elements 5..12 of a buffer of 11");
    assert_eq!(driver.count("launches"), 0);
}

#[test]
fn no_rows_are_no_launch() {
    let driver = StandIn::new();
    let card = device(&driver, Budget::UNLIMITED);
    let stream = card.stream().expect("a stream");
    let w = upload(&stream, &[1.0; 4]);
    let mut none = DeviceBuffer::new(&card, Kind::Activations, 0).expect("nothing fits");
    let empty = upload(&stream, &[]);
    rms_norm(&stream, empty.all(), w.all(), 1e-5, none.all_mut()).expect("nothing to do");
    swiglu(&stream, empty.all(), empty.all(), none.all_mut()).expect("nothing to do");
    assert_eq!(driver.count("launches"), 0);
}

#[test]
fn copies_from_pinned_memory_are_waited_for_before_it_is_lent_out() {
    for (policy, number) in POLICIES {
        let driver = StandIn::new();
        driver.set("policy", number);
        let card = device(&driver, Budget::UNLIMITED);
        let stream = card.stream().expect("a stream");
        let mut host = PinnedBuffer::new(&card, Kind::Staging, 16).expect("it fits");
        let mut first = DeviceBuffer::<u8>::new(&card, Kind::Staging, 16).expect("it fits");
        let mut second = DeviceBuffer::<u8>::new(&card, Kind::Staging, 16).expect("it fits");
        assert_eq!(host.refusal(), None);
        host.bytes().expect("ours").fill(1);
        host.send(&stream, 16, &mut first, 0).expect("sent");
        host.bytes().expect("ours again").fill(2);
        host.send(&stream, 8, &mut second, 8).expect("sent");
        host.send(&stream, 8, &mut second, 0).expect("sent");
        host.fetch(&stream, 16, &first, 0).expect("sent");
        assert_eq!(host.bytes().expect("ours again"), [1; 16], "{policy}");
        assert_eq!(second.to_host(&stream).expect("it comes back"), [2; 16], "{policy}");
    }
}

#[test]
fn where_pinning_is_refused_the_same_bytes_arrive_and_a_sentence_says_why() {
    let driver = StandIn::new();
    driver.set("pinnings", 1);
    let card = device(&driver, Budget::UNLIMITED);
    let ring = Ring::new(&card, 3, 64).expect("it works all the same");
    let refusal = ring.refusal().expect("two slots are not pinned");
    assert_eq!(
        refusal,
        "64 bytes of host memory cannot be pinned (the NVIDIA driver: cuMemHostAlloc failed with code 800 \
         (operation not permitted)): copies to the card will be slower"
    );
    drop(ring);
    assert_streams_in_order(&card, "not pinned");
}

/// Streams blocks of one number each through a ring and folds them on the card: y = 2y + x, where order shows.
fn assert_streams_in_order(card: &Arc<Device>, what: &str) {
    const BLOCKS: usize = 9;
    let compute = card.stream().expect("a stream");
    let mut ring = Ring::new(card, 3, 64).expect("it fits");
    let (one, two) = (upload(&compute, &[1.0]), upload(&compute, &[2.0]));
    let (mut y, mut doubled) = (upload(&compute, &[0.0]), upload(&compute, &[0.0]));
    let shape = Shape { m: 1, n: 1, k: 1 };
    let mut sent = 0;
    for block in 0..BLOCKS {
        while sent < BLOCKS && ring.has_room() {
            sent += 1;
            let value = (sent as f32).to_le_bytes();
            let fill = |bytes: &mut [u8]| -> Result<(), Error> {
                bytes.copy_from_slice(&value);
                Ok(())
            };
            ring.send(4, fill).expect("sent");
        }
        ring.take(&compute, |data, len| {
            assert_eq!(len, 4, "block {block}");
            let x = data.part(0..len)?.cast::<f32>()?;
            gemm_nt(&compute, y.all(), two.all(), shape, false, doubled.all_mut())?;
            y.copy_from(&compute, &doubled)?;
            gemm_nt(&compute, x, one.all(), shape, true, y.all_mut())
        })
        .expect("sent");
    }
    let want = (1..=BLOCKS).fold(0.0, |y, x| 2.0 * y + x as f32);
    assert_eq!(y.to_host(&compute).expect("it comes back"), [want], "{what}");
}

#[test]
fn a_ring_streams_in_order_however_late_copies_and_kernels_are() {
    for (policy, number) in POLICIES {
        let driver = StandIn::new();
        let card = device(&driver, Budget::UNLIMITED);
        driver.set("policy", number);
        assert_streams_in_order(&card, policy);
    }
}

#[test]
fn the_stand_in_shows_a_missing_wait() {
    let driver = StandIn::new();
    let card = device(&driver, Budget::UNLIMITED);
    let (copies, compute) = (card.stream().expect("a stream"), card.stream().expect("a stream"));
    let mut x = upload(&compute, &[1.0; 4]);
    let mut y = upload(&compute, &[0.0; 4]);
    let mut host = PinnedBuffer::new(&card, Kind::Staging, 16).expect("it fits");
    host.bytes().expect("ours").copy_from_slice(bytemuck::cast_slice(&[5.0f32; 4]));
    driver.set("policy", 1);
    for waits in [false, true] {
        host.send(&copies, 4, &mut x, 0).expect("sent");
        if waits {
            host.precede(&compute).expect("sent");
        }
        y.copy_from(&compute, &x).expect("sent");
        let got = y.to_host(&compute).expect("it comes back");
        assert_eq!(got, if waits { [5.0; 4] } else { [1.0; 4] });
    }
}

#[test]
fn recorded_work_runs_again_with_what_lies_in_memory_now() {
    for (policy, number) in POLICIES {
        let driver = StandIn::new();
        let card = device(&driver, Budget::UNLIMITED);
        let stream = card.stream().expect("a stream");
        let (mut x, w) = (upload(&stream, &[1.0; 4]), upload(&stream, &[1.0; 4]));
        let mut y = upload(&stream, &[0.0; 4]);
        let shape = Shape { m: 1, n: 1, k: 4 };
        let mut sum = upload(&stream, &[0.0]);
        gemm_nt(&stream, x.all(), w.all(), shape, false, sum.all_mut()).expect("sent");
        driver.set("policy", number);
        let recorded = stream.record(|| {
            y.copy_from(&stream, &x)?;
            gemm_nt(&stream, y.all(), w.all(), shape, false, sum.all_mut())
        });
        let recorded = recorded.expect("recorded");
        for value in [3.0, 7.0] {
            x.write(&stream, &[value; 4]).expect("written");
            stream.replay(&recorded).expect("sent");
            assert_eq!(sum.to_host(&stream).expect("it comes back"), [4.0 * value], "{policy}");
        }
        let refused = stream.record(|| x.write(&stream, &[0.0; 4])).err().expect("a copy from the host");
        assert_eq!(refused.to_string(), "a copy from the host cannot be part of recorded work");
        stream.replay(&recorded).expect("the stream still works");
        assert_eq!(sum.to_host(&stream).expect("it comes back"), [28.0]);
    }
}
