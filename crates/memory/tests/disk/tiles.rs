use crate::support::{best, pattern, with_every_backend};
use hearth_memory::stream::update_tiles;
use hearth_memory::{AlignedBuffer, Error, NvmeFile};
use proptest::prelude::*;
use std::fs;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};

fn ring(slots: usize, len: usize) -> Vec<AlignedBuffer> {
    (0..slots).map(|_| AlignedBuffer::new(len)).collect()
}

/// Adds the tile's number to each of its bytes.
fn add(file: &NvmeFile, tiles: &[Range<u64>], ring: &mut [AlignedBuffer]) -> Result<(), Error> {
    let mut calls = 0;
    let moved = update_tiles(file, tiles, ring, &mut |tile, bytes: &mut [u8]| {
        assert_eq!(tile, calls);
        calls += 1;
        assert_eq!(bytes.len() as u64, tiles[tile].end - tiles[tile].start);
        bytes.iter_mut().for_each(|byte| *byte = byte.wrapping_add(tile as u8 + 1));
        Ok::<_, Error>(())
    })?;
    let bytes = tiles.iter().map(|tile| tile.end - tile.start).sum();
    assert_eq!((moved.bytes_read, moved.bytes_written, calls), (bytes, bytes, tiles.len()));
    Ok(())
}

fn added(mut bytes: Vec<u8>, tiles: &[Range<u64>]) -> Vec<u8> {
    for (tile, range) in tiles.iter().enumerate() {
        for byte in &mut bytes[range.start as usize..range.end as usize] {
            *byte = byte.wrapping_add(tile as u8 + 1);
        }
    }
    bytes
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 8, ..ProptestConfig::default() })]

    /// Any cut of a file into tiles, aligned or not, with gaps or without, in any ring.
    #[test]
    fn every_tile_is_updated_exactly_once_and_nothing_else(
        cuts in prop::collection::vec((0..5000u64, 0..40_000u64), 0..12), pages: bool, slots in 3..6usize,
    ) {
        let unit = if pages { 4096 } else { 1 };
        let mut end = 0;
        let tiles: Vec<Range<u64>> = cuts.iter().map(|&(gap, len)| {
            let start = end + gap / unit * unit;
            end = start + len / unit * unit;
            start..end
        }).collect();
        let len = end + 11;
        with_every_backend(len, |file| {
            let before = pattern(len as usize, 1);
            file.write_at(0, &before).expect("inside the file");
            add(file, &tiles, &mut ring(slots, 40_000)).expect("the disk works");
            assert_eq!(fs::read(file.path()).expect("it is there"), added(before, &tiles));
        });
    }
}

#[test]
fn tiles_of_many_requests_survive_the_round_trip() {
    let (tile, count) = (9 << 20, 5);
    let tiles: Vec<Range<u64>> = (0..count).map(|i| i * tile..(i + 1) * tile).collect();
    with_every_backend(count * tile, |file| {
        let before = pattern((count * tile) as usize, 5);
        file.write_at(0, &before).expect("inside the file");
        let mut ring = ring(3, tile as usize);
        add(file, &tiles, &mut ring).expect("the disk works");
        assert!(fs::read(file.path()).expect("it is there") == added(before, &tiles));
        assert!(ring.iter().all(|buffer| buffer.capacity() == tile as usize), "every buffer came back");
    });
}

#[test]
fn an_error_of_the_caller_comes_back_with_every_buffer() {
    #[derive(Debug)]
    enum Failure {
        Memory(Error),
        Mine(usize),
    }
    impl From<Error> for Failure {
        fn from(error: Error) -> Self {
            Failure::Memory(error)
        }
    }
    let (tiles, mut ring) = ([0..4096, 4096..8192, 8192..12288, 12288..16384], ring(3, 4096));
    with_every_backend(16384, |file| {
        let mut ring: Vec<_> = ring.iter().map(|buffer| AlignedBuffer::new(buffer.len())).collect();
        let result = update_tiles(file, &tiles, &mut ring, &mut |tile, bytes: &mut [u8]| {
            bytes.fill(9);
            if tile == 2 { Err(Failure::Mine(tile)) } else { Ok(()) }
        });
        assert!(matches!(result, Err(Failure::Mine(2))), "{result:?}");
        assert!(ring.iter().all(|buffer| buffer.capacity() == 4096));
        let bytes = fs::read(file.path()).expect("it is there");
        assert!(
            bytes[8192..].iter().all(|&byte| byte == 0),
            "the failed tile and those after it are as they were"
        );
    });
    let (_directory, file) = best(8192);
    let result = update_tiles(&file, &[0..4096, 4096..12288], &mut ring, &mut |_, _| Err(Failure::Mine(0)));
    assert!(matches!(result, Err(Failure::Memory(Error::Range { .. }))), "{result:?}");
}

#[test]
fn a_panic_of_the_caller_passes_through_and_the_ring_goes_on() {
    let tiles = [0..4096, 4096..8192, 8192..12288];
    with_every_backend(12288, |file| {
        let mut ring = ring(3, 4096);
        let pass = AssertUnwindSafe(|| {
            update_tiles(file, &tiles, &mut ring, &mut |tile, _| {
                assert!(tile == 0, "the caller's mistake");
                Ok::<_, Error>(())
            })
        });
        catch_unwind(pass).expect_err("the caller's panic");
        add(file, &tiles, &mut ring).expect("every buffer came back");
    });
}

#[test]
fn a_disk_error_names_file_offset_and_length() {
    with_every_backend(64 * 4096, |file| {
        fs::OpenOptions::new()
            .write(true)
            .open(file.path())
            .and_then(|f| f.set_len(4096))
            .expect("truncated");
        let tiles = [0..4096, 4096..8192];
        let mut ring = ring(3, 4096);
        let error = add(file, &tiles, &mut ring).expect_err("past the end").to_string();
        let expected = "reading 4096 bytes at offset 4096 of ";
        assert!(error.starts_with(expected) && error.contains("/bytes: "), "{error}");
        assert!(ring.iter().all(|buffer| buffer.capacity() == 4096));
    });
}

#[test]
fn a_ring_too_small_is_refused_with_a_sentence() {
    let (_directory, file) = best(16384);
    let update = |ring: &mut [AlignedBuffer]| {
        add(&file, &[0..4096, 4096..12288], ring).expect_err("too small").to_string()
    };
    assert_eq!(update(&mut ring(2, 8192)), "buffer ring: 2 buffers, reading, computing and writing need 3");
    assert_eq!(update(&mut ring(3, 4096)), "buffer ring: a tile of 8192 bytes exceeds a buffer of 4096");
}
