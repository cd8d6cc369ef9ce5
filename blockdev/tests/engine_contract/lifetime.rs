//! Who owns what, until when.

use sapwood_blockdev::buffer::AlignedBuf;
use sapwood_blockdev::engine::Op;
use sapwood_blockdev::storage::{HostStorage, Lock, LockError, OpenOptions, Storage, StorageFile};
use sapwood_blockdev::units::FileOffset;

use crate::engines::{Subject, create, finish, pattern, read, write};

pub fn drop_with_operations_in_flight<E: Subject>(make: fn() -> E) {
    let dir = tempfile::tempdir().unwrap();
    let file = create(dir.path(), "file");
    write(&mut make(), &file, 0, pattern(8 << 20, 1));
    for round in 0..20 {
        let mut engine = make();
        for i in 0..500 {
            let offset = FileOffset(i * 16384);
            engine.submit(i, Op::read(file.clone(), offset, AlignedBuf::zeroed(16384)));
            if i % 50 == round {
                engine.submit(1000 + i, Op::Sync { file: file.clone() });
            }
        }
        engine.collect(&mut Vec::new());
        drop(engine);
        // What the kernel still wrote to would show up in fresh memory of the same sizes.
        let fresh: Vec<_> = (0..500).map(|_| AlignedBuf::zeroed(16384)).collect();
        std::thread::yield_now();
        assert!(fresh.iter().all(|buf| buf.iter().all(|byte| *byte == 0)), "round {round}");
    }
}

pub fn drop_before_anything_was_started<E: Subject>(make: fn() -> E) {
    let dir = tempfile::tempdir().unwrap();
    let mut engine = make();
    let file = create(dir.path(), "file");
    file.lock(Lock::Exclusive).unwrap();
    for i in 0..600 {
        engine.submit(i, Op::write(file.clone(), FileOffset(i * 4096), pattern(4096, i)));
    }
    let path = file.path().to_path_buf();
    drop(file);
    drop(engine);
    HostStorage.open(&path, OpenOptions::WRITE).unwrap().lock(Lock::Exclusive).unwrap();
}

pub fn lock_goes_with_the_last_handle<E: Subject>(make: fn() -> E) {
    let (dir, mut engine) = (tempfile::tempdir().unwrap(), make());
    let file = create(dir.path(), "file");
    file.lock(Lock::Exclusive).unwrap();
    write(&mut engine, &file, 0, pattern(4096, 1));
    let other = HostStorage.open(file.path(), OpenOptions::WRITE).unwrap();
    let clone = file.clone();
    drop(file);
    assert!(matches!(other.lock(Lock::Exclusive), Err(LockError::Held(_))));
    drop(clone);
    other.lock(Lock::Exclusive).expect("free, though the engine that used the file lives on");
    assert_eq!(read(&mut engine, &other, 0, 4096)[..], pattern(4096, 1)[..]);
}

pub fn lock_stays_with_an_operation<E: Subject>(make: fn() -> E) {
    let (dir, mut engine) = (tempfile::tempdir().unwrap(), make());
    let file = create(dir.path(), "file");
    file.lock(Lock::Exclusive).unwrap();
    let other = HostStorage.open(file.path(), OpenOptions::WRITE).unwrap();
    engine.submit(0, Op::write(file, FileOffset(0), pattern(4096, 1)));
    assert!(matches!(other.lock(Lock::Exclusive), Err(LockError::Held(_))));
    let done = finish(&mut engine, 1);
    assert!(matches!(other.lock(Lock::Exclusive), Err(LockError::Held(_))), "the completion has it");
    drop(done);
    other.lock(Lock::Exclusive).unwrap();
}

pub fn more_files_than_the_table_holds<E: Subject>(make: fn() -> E) {
    let (dir, mut engine) = (tempfile::tempdir().unwrap(), make());
    let files: Vec<_> = (0..100).map(|i| create(dir.path(), &format!("file{i}"))).collect();
    for round in 0..2 {
        for (i, file) in files.iter().enumerate() {
            let seed = round * 1000 + i as u64;
            engine.submit(seed, Op::write(file.clone(), FileOffset(0), pattern(4096, seed)));
        }
        finish(&mut engine, files.len());
    }
    for (i, file) in files.iter().enumerate() {
        assert_eq!(read(&mut engine, file, 0, 4096)[..], pattern(4096, 1000 + i as u64)[..]);
    }
    drop(files);
    for i in 0..100 {
        let file = create(dir.path(), &format!("later{i}"));
        write(&mut engine, &file, 0, pattern(4096, i));
        assert_eq!(read(&mut engine, &file, 0, 4096)[..], pattern(4096, i)[..]);
    }
}
