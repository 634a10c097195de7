//! Many ranks write one checkpoint.

use super::{Dice, assert_state, companions, contents, facts, files, partition, reader, save, save_parts};
use hearth_train::checkpoint::{
    self, BackgroundSave, Checkpoint, Partial, Piece, StateDtype, StateFile, StateTensor, begin, finish,
    saver::CHUNK_BYTES, step_path, write_pieces,
};
use hearth_train::{Disk, TrainConfig};
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

#[test]
fn the_bytes_do_not_depend_on_the_ranks_that_wrote_them() {
    let dir = tempfile::tempdir().unwrap();
    for dtype in [StateDtype::F32, StateDtype::Bf16] {
        let layout = files(dtype);
        let one = |world: usize, seed| {
            let run = dir.path().join(format!("{dtype:?}-{world}-{seed}"));
            let parts = partition(&layout, world, &mut Dice(seed));
            save_parts(&Disk, &run, 3, &layout, &parts).expect("saves")
        };
        let reference = contents(&one(1, 0));
        assert_eq!(reference.len(), 4);
        for seed in 1..20 {
            let path = one(1 + seed as usize % 5, seed);
            assert!(contents(&path) == reference, "seed {seed}");
            let manifest = Checkpoint::open(&path).expect("is complete").manifest;
            assert_eq!((manifest.world, manifest.stage), (1 + seed as usize % 5, 1));
        }
    }
}

#[test]
fn bytes_that_no_rank_or_two_ranks_wrote_are_named_and_nothing_is_saved() {
    let (dir, layout) = (tempfile::tempdir().unwrap(), files(StateDtype::F32));
    let whole = |file: usize| Piece { file, offset: 0, bytes: layout[file].data_bytes() };
    let message = |parts: &[Vec<Piece>]| {
        save_parts(&Disk, dir.path(), 1, &layout, parts).expect_err("is refused").to_string()
    };
    let head = Piece { file: 1, offset: 0, bytes: 40 };
    let tail = |offset| Piece { file: 1, offset, bytes: layout[1].data_bytes() - offset };
    let cases = [
        (message(&[vec![whole(0)]]), "optimizer.safetensors: no piece covers bytes 4096..4480"),
        (message(&[vec![whole(0), head], vec![tail(44)]]), "no piece covers bytes 4136..4140"),
        (message(&[vec![whole(0), head], vec![tail(36)]]), "two pieces cover bytes 4132..4136"),
        (message(&[vec![whole(0), whole(1)], vec![whole(1)]]), "two pieces cover bytes 4096..4480"),
    ];
    for (message, part) in cases {
        assert!(message.contains(part) && message.contains("step-1 was not saved"), "{message}");
    }
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn saving_a_step_again_by_other_ranks_leaves_the_first_one_alone() {
    let dir = tempfile::tempdir().unwrap();
    let manifest = |path: &Path| Checkpoint::open(path).expect("complete").manifest;
    let first = manifest(&save(&Disk, dir.path(), 4, 1, 1).expect("saves"));
    assert_eq!(manifest(&save(&Disk, dir.path(), 4, 3, 2).expect("saves")), first);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
}

#[test]
fn a_save_in_the_background_writes_the_same_and_reports_what_failed() {
    let (dir, layout) = (tempfile::tempdir().unwrap(), files(StateDtype::F32));
    let parts = partition(&layout, 2, &mut Dice(5));
    let partial = begin(&Disk, dir.path(), 1, &layout, &companions(), false).expect("begins");
    let ranks: Vec<_> = parts.iter().map(|p| in_background(&partial, p, reader(1, &layout))).collect();
    let written = ranks.into_iter().map(|rank| rank.join().expect("writes")).collect();
    let broken = in_background(&partial, &parts[0], |_, _, _| Err(io::Error::other("nvme tier: torn")));
    assert_eq!(broken.join().expect_err("fails").to_string(), "nvme tier: torn");
    let panicked = in_background(&partial, &parts[0], |_, _, _| panic!("a bug"));
    assert!(panicked.join().expect_err("fails").to_string().contains("panicked"));
    finish(&Disk, partial, facts(&TrainConfig::default(), 1, 2), written).expect("saves");
    assert_state(&Checkpoint::open(&step_path(dir.path(), 1)).expect("is complete"));
}

fn in_background(
    partial: &Partial,
    pieces: &[Piece],
    read: impl FnMut(&Piece, u64, &mut [u8]) -> io::Result<()> + Send + 'static,
) -> BackgroundSave {
    let path = partial.path().to_owned();
    BackgroundSave::spawn(Arc::new(Disk), path, files(StateDtype::F32), pieces.to_vec(), read)
        .expect("a thread")
}

#[test]
fn a_dropped_background_save_stops_before_what_it_reads_is_gone() {
    let (dir, layout) = (tempfile::tempdir().unwrap(), files(StateDtype::F32));
    let partial = begin(&Disk, dir.path(), 1, &layout, &[], false).expect("begins");
    let pieces: Vec<_> = (0..95).map(|i| Piece { file: 1, offset: 4 * i, bytes: 4 }).collect();
    let (asked, source) = (Arc::new(AtomicUsize::new(0)), Arc::new(()));
    let (count, held) = (asked.clone(), source.clone());
    let (proceed, wait) = std::sync::mpsc::channel::<()>();
    let save = in_background(&partial, &pieces, move |_, _, _| {
        let _held = &held;
        count.fetch_add(1, Ordering::SeqCst);
        wait.recv().map_err(io::Error::other)
    });
    proceed.send(()).unwrap();
    drop(proceed);
    drop(save);
    assert_eq!(Arc::strong_count(&source), 1, "the thread has let go of what it read");
    assert!(asked.load(Ordering::SeqCst) <= 2);
}

#[test]
fn long_pieces_are_read_in_aligned_chunks_and_hashed_in_parts() {
    let dir = tempfile::tempdir().unwrap();
    let tensor = StateTensor { name: "w".into(), shape: vec![17 << 20], dtype: StateDtype::F32 };
    let layout = vec![StateFile { name: checkpoint::MODEL_FILE.into(), tensors: vec![tensor] }];
    let bytes = layout[0].data_bytes();
    let pieces =
        [Piece { file: 0, offset: 0, bytes: 1000 }, Piece { file: 0, offset: 1000, bytes: bytes - 1000 }];
    let partial = begin(&Disk, dir.path(), 1, &layout, &[], false).expect("begins");
    let mut read = |piece: &Piece, offset: u64, buffer: &mut [u8]| {
        let (start, end) = (piece.offset + offset, piece.offset + offset + buffer.len() as u64);
        assert_eq!(start / CHUNK_BYTES, (end - 1) / CHUNK_BYTES, "{start}..{end}");
        buffer.fill((start / CHUNK_BYTES) as u8);
        Ok(())
    };
    let written = write_pieces(&Disk, partial.path(), &layout, &pieces, &mut read).expect("writes");
    let lengths: Vec<u64> = written.iter().map(|written| written.piece.bytes).collect();
    assert_eq!(lengths, [1000, (64 << 20) - 1000, 4 << 20]);
    let path = finish(&Disk, partial, facts(&TrainConfig::default(), 1, 1), vec![written]).expect("saves");
    let mut reader = Checkpoint::open(&path).expect("is complete").reader(&layout[0]).expect("is there");
    let mut around = [0; 8];
    reader.read(5 * CHUNK_BYTES - 4, &mut around).expect("reads");
    assert_eq!(around, [4, 4, 4, 4, 5, 5, 5, 5]);
}
