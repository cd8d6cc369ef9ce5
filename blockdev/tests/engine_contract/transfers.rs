//! Reads and writes.

use std::collections::HashSet;

use sapwood_blockdev::Errno;
use sapwood_blockdev::buffer::{AlignedBuf, Memory, Piece, SharedBuf};
use sapwood_blockdev::engine::{Op, Transfer};
use sapwood_blockdev::io::Io;
use sapwood_blockdev::storage::{Alignment, HostStorage, OpenOptions, Storage, StorageFile};
use sapwood_blockdev::units::FileOffset;

use crate::engines::{Subject, create, create_buffered, finish, pattern, read, run, write};

pub fn reads_what_was_written<E: Subject>(make: fn() -> E) {
    let (dir, mut engine) = (tempfile::tempdir().unwrap(), make());
    for file in [create(dir.path(), "direct"), create_buffered(dir.path(), "buffered")] {
        write(&mut engine, &file, 4096, pattern(16384, 1));
        assert_eq!(read(&mut engine, &file, 4096, 16384)[..], pattern(16384, 1)[..]);
        assert_eq!(read(&mut engine, &file, 0, 4096)[..], [0; 4096]);
        assert_eq!(file.size().unwrap(), 20480);
    }
}

pub fn moves_pieces_in_order<E: Subject>(make: fn() -> E) {
    let (dir, mut engine) = (tempfile::tempdir().unwrap(), make());
    let file = create(dir.path(), "file");
    let whole = pattern(5 * 4096, 2);
    let mut memory = Memory::from(AlignedBuf::from_slice(&whole[..4096]));
    let shared = SharedBuf::heap(3 * 4096);
    shared.write_at(0, &whole[4096..4 * 4096]);
    memory.push(Piece::Shared(shared));
    memory.push(Piece::Owned(AlignedBuf::zeroed(0)));
    memory.push(Piece::Owned(AlignedBuf::from_slice(&whole[4 * 4096..])));
    let completion = run(&mut engine, Op::write(file.clone(), FileOffset(0), memory));
    assert_eq!(completion.result, Ok(5 * 4096));
    assert_eq!(read(&mut engine, &file, 0, 5 * 4096)[..], whole[..]);

    let mut memory = Memory::default();
    for blocks in [2, 1, 2] {
        memory.push(Piece::Shared(SharedBuf::heap(blocks * 4096)));
    }
    let completion = run(&mut engine, Op::read(file, FileOffset(0), memory));
    assert_eq!(completion.result, Ok(5 * 4096));
    let mut seen = vec![0; 5 * 4096];
    completion.op.into_memory().unwrap().read_at(0, &mut seen);
    assert_eq!(seen[..], whole[..]);
}

pub fn resumes_more_pieces_than_one_call_takes<E: Subject>(make: fn() -> E) {
    let dir = tempfile::tempdir().unwrap();
    let io = Io::new(make());
    let file = create(dir.path(), "file");
    let whole = pattern(2500 * 512, 3);
    let mut memory = Memory::default();
    for piece in whole.chunks(512) {
        let shared = SharedBuf::heap(512);
        shared.write_at(0, piece);
        memory.push(Piece::Shared(shared));
    }
    let outcome = block_on(&io, Op::write(file.clone(), FileOffset(0), memory));
    assert_eq!(outcome.result, Ok(whole.len()));
    let outcome = block_on(&io, Op::read(file, FileOffset(0), AlignedBuf::zeroed(whole.len())));
    assert_eq!(outcome.result, Ok(whole.len()));
    assert_eq!(outcome.memory.unwrap().into_buf()[..], whole[..]);
}

fn block_on<E: Subject>(io: &Io<E>, op: Op<E::File>) -> sapwood_blockdev::io::Outcome {
    sapwood_blockdev::io::block_on(io, io.run(op))
}

pub fn honours_what_is_done_already<E: Subject>(make: fn() -> E) {
    let (dir, mut engine) = (tempfile::tempdir().unwrap(), make());
    let file = create_buffered(dir.path(), "file");
    let mut memory = Memory::from(pattern(100, 1));
    memory.push(Piece::Owned(pattern(200, 2)));
    memory.push(Piece::Owned(pattern(300, 3)));
    for (done, moved) in [(50, 550), (100, 500), (250, 350), (600, 0)] {
        let transfer = Transfer { done, ..Transfer::new(file.clone(), FileOffset(10), memory) };
        let completion = run(&mut engine, Op::Write(transfer));
        assert_eq!(completion.result, Ok(moved), "with {done} bytes done");
        memory = completion.op.into_memory().unwrap();
    }
    let seen = read(&mut engine, &file, 0, 610);
    assert_eq!(seen[..60], [0; 60], "the first 50 bytes were said to be done");
    assert_eq!(seen[60..110], pattern(100, 1)[50..]);
    assert_eq!(seen[110..310], pattern(200, 2)[..]);
    assert_eq!(seen[310..], pattern(300, 3)[..]);
}

pub fn moves_no_more_than_it_is_to<E: Subject>(make: fn() -> E) {
    let (dir, mut engine) = (tempfile::tempdir().unwrap(), make());
    for file in [create_buffered(dir.path(), "buffered"), create(dir.path(), "direct")] {
        let whole = pattern(5 * 4096, 1);
        let mut memory = Memory::default();
        whole.chunks(3 * 4096).for_each(|piece| memory.push(Piece::Owned(AlignedBuf::from_slice(piece))));
        let mut transfer =
            Transfer { at_most: 2 * 4096, ..Transfer::new(file.clone(), FileOffset(0), memory) };
        // The second time it ends in the second piece.
        for moved in [2 * 4096, 2 * 4096, 4096] {
            let completion = run(&mut engine, Op::Write(transfer));
            assert_eq!(completion.result, Ok(moved));
            let Op::Write(back) = completion.op else { panic!("a write") };
            transfer = Transfer { done: back.done + moved, ..back };
        }
        assert_eq!(read(&mut engine, &file, 0, 5 * 4096)[..], whole[..]);
        let transfer =
            Transfer { at_most: 4096, ..Transfer::new(file, FileOffset(4096), AlignedBuf::zeroed(8192)) };
        let completion = run(&mut engine, Op::Read(transfer));
        assert_eq!(completion.result, Ok(4096));
        let buf = completion.op.into_memory().unwrap().into_buf();
        assert_eq!((&buf[..4096], &buf[4096..]), (&whole[4096..8192], &[0; 4096][..]));
    }
}

pub fn read_ends_at_end_of_file<E: Subject>(make: fn() -> E) {
    let (dir, mut engine) = (tempfile::tempdir().unwrap(), make());
    let file = create_buffered(dir.path(), "file");
    write(&mut engine, &file, 0, pattern(5000, 1));
    let direct = HostStorage.open(file.path(), OpenOptions::READ).unwrap();
    for file in [file, direct] {
        let at = |offset| Op::read(file.clone(), FileOffset(offset), AlignedBuf::zeroed(8192));
        assert_eq!(run(&mut engine, at(0)).result, Ok(5000));
        assert_eq!(run(&mut engine, at(4096)).result, Ok(904));
        assert_eq!(run(&mut engine, at(8192)).result, Ok(0));
    }
}

pub fn nothing_is_moved_for_no_memory<E: Subject>(make: fn() -> E) {
    let (dir, mut engine) = (tempfile::tempdir().unwrap(), make());
    let file = create(dir.path(), "file");
    let write = Op::write(file.clone(), FileOffset(4096), Memory::default());
    assert_eq!(run(&mut engine, write).result, Ok(0));
    let read = Op::read(file.clone(), FileOffset(0), AlignedBuf::zeroed(0));
    assert_eq!(run(&mut engine, read).result, Ok(0));
    assert_eq!(file.size().unwrap(), 0);
}

pub fn thousands_are_in_flight<E: Subject>(make: fn() -> E) {
    const COUNT: usize = 3000;
    let (dir, mut engine) = (tempfile::tempdir().unwrap(), make());
    let file = create(dir.path(), "file");
    for i in 0..COUNT {
        let place = FileOffset((i * 7 % COUNT) as u64 * 4096);
        engine.submit(i as u64, Op::write(file.clone(), place, pattern(4096, i as u64)));
    }
    assert_eq!(engine.in_flight(), COUNT);
    let done = finish(&mut engine, COUNT);
    assert!(done.iter().all(|completion| completion.result == Ok(4096)));
    assert_eq!(engine.in_flight(), 0);
    for i in 0..COUNT {
        let place = FileOffset((i * 7 % COUNT) as u64 * 4096);
        engine.submit(i as u64, Op::read(file.clone(), place, AlignedBuf::zeroed(4096)));
    }
    for completion in finish(&mut engine, COUNT) {
        let buf = completion.op.into_memory().unwrap().into_buf();
        assert_eq!(buf[..], pattern(4096, completion.token)[..]);
    }
}

pub fn misaligned_direct_transfer_fails_or_is_right<E: Subject>(make: fn() -> E) {
    let (dir, mut engine) = (tempfile::tempdir().unwrap(), make());
    let file = create(dir.path(), "file");
    let mut expected = pattern(16384, 1);
    write(&mut engine, &file, 0, pattern(16384, 1));
    for (offset, start, len) in [(100, 0, 4096), (0, 0, 100), (4096, 3, 4096), (512, 1, 511)] {
        let window = SharedBuf::heap(8192).slice(start..start + len);
        window.write_at(0, &pattern(len, 9));
        let completion = run(&mut engine, Op::write(file.clone(), FileOffset(offset as u64), window));
        match completion.result {
            Ok(moved) => {
                assert_eq!(moved, len);
                expected[offset..offset + len].copy_from_slice(&pattern(len, 9));
            }
            Err(errno) => assert_eq!(errno, Errno::INVAL),
        }
        assert_eq!(read(&mut engine, &file, 0, 16384)[..], expected[..], "{len} bytes at {offset}");
    }
    assert!(file.alignment() != Alignment::NONE || expected[100..108] == pattern(8, 9)[..]);
}

pub fn write_to_read_only_file_fails<E: Subject>(make: fn() -> E) {
    let (dir, mut engine) = (tempfile::tempdir().unwrap(), make());
    let file = create(dir.path(), "file");
    write(&mut engine, &file, 0, pattern(4096, 1));
    let file = HostStorage.open(file.path(), OpenOptions::READ).unwrap();
    let completion = run(&mut engine, Op::write(file.clone(), FileOffset(0), pattern(4096, 2)));
    assert_eq!(completion.result, Err(Errno::BADF));
    let memory = completion.op.into_memory().unwrap();
    assert_eq!(memory.into_buf()[..], pattern(4096, 2)[..], "the memory comes back");
    assert_eq!(read(&mut engine, &file, 0, 4096)[..], pattern(4096, 1)[..]);
}

pub fn offset_beyond_every_file_fails<E: Subject>(make: fn() -> E) {
    let (dir, mut engine) = (tempfile::tempdir().unwrap(), make());
    let file = create(dir.path(), "file");
    for offset in [u64::MAX, u64::MAX - 4095, 1 << 63, (1 << 63) - 4096 + 1] {
        let write = Op::write(file.clone(), FileOffset(offset), pattern(4096, 1));
        assert_eq!(run(&mut engine, write).result, Err(Errno::INVAL), "at {offset}");
        let read = Op::read(file.clone(), FileOffset(offset), pattern(4096, 1));
        assert_eq!(run(&mut engine, read).result, Err(Errno::INVAL), "at {offset}");
    }
    assert_eq!(file.size().unwrap(), 0, "u64::MAX is not the file position");
}

pub fn reports_tokens_and_counts<E: Subject>(make: fn() -> E) {
    let (dir, mut engine) = (tempfile::tempdir().unwrap(), make());
    let file = create(dir.path(), "file");
    for token in [u64::MAX, 0, 1 << 40] {
        engine.submit(token, Op::write(file.clone(), FileOffset(0), pattern(4096, 1)));
    }
    engine.submit(5, Op::Sync { file });
    engine.submit(6, Op::Unlink { path: dir.path().join("absent") });
    assert_eq!(engine.in_flight(), 5);
    let tokens: HashSet<u64> = finish(&mut engine, 5).iter().map(|done| done.token).collect();
    assert_eq!(tokens, HashSet::from([u64::MAX, 0, 1 << 40, 5, 6]));
    let stats = engine.stats();
    assert_eq!((stats.submitted, stats.completed, engine.in_flight()), (5, 5, 0));
}
