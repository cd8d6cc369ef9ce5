//! What only the io_uring engine promises: few system calls, and letting go of files.

use std::path::Path;
use std::thread;
use std::time::Duration;

use super::*;
use crate::buffer::AlignedBuf;
use crate::storage::{HostStorage, OpenOptions, Storage};
use crate::units::FileOffset;

fn create(directory: &Path, name: &str) -> HostFile {
    HostStorage.open(&directory.join(name), OpenOptions::CREATE).unwrap()
}

fn write(file: &HostFile, block: u64) -> Op<HostFile> {
    Op::write(file.clone(), FileOffset(block * 4096), AlignedBuf::zeroed(4096))
}

fn finish(engine: &mut UringEngine, count: usize) {
    let mut done = Vec::new();
    engine.collect(&mut done);
    while done.len() < count {
        engine.wait(None);
        engine.collect(&mut done);
    }
    assert!(done.iter().all(|completion| completion.result.is_ok()), "{done:?}");
}

/// Registered files, by the table and by the kernel.
fn registered(engine: &UringEngine) -> (usize, usize) {
    let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", engine.ring.as_raw_fd())).unwrap();
    let mut lines = info.lines().skip_while(|line| !line.starts_with("UserFiles:"));
    lines.next().expect("io_uring tells its files");
    let listed = lines.take_while(|line| line.starts_with(' '));
    let in_kernel = listed.filter(|line| !line.contains("<none>")).count();
    (engine.files.registered(), in_kernel)
}

#[test]
fn a_batch_is_one_system_call() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let file = create(dir.path(), "file");
    let mut engine = UringEngine::new().unwrap();
    for i in 0..256 {
        engine.submit(i, write(&file, i));
    }
    assert_eq!(engine.stats().enters, 0);
    let mut done = Vec::new();
    engine.collect(&mut done);
    assert_eq!(engine.stats().enters, 1);
    // How many completions have come when a wait ends, and whether it has more to hand out then, is the kernel's affair.
    let mut waits = 0;
    while done.len() < 256 {
        engine.wait(None);
        engine.collect(&mut done);
        waits += 1;
    }
    let enters = engine.stats().enters;
    assert!(enters <= 1 + 2 * waits, "{enters} system calls for one batch and {waits} waits");
    for _ in 0..100 {
        engine.collect(&mut done);
        engine.wait(Some(Duration::ZERO));
    }
    assert_eq!(engine.stats().enters, enters, "with nothing to do the kernel is left alone");
}

#[test]
fn too_many_for_the_rings_go_in_turns() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let file = create(dir.path(), "file");
    let options = UringOptions { entries: 8, in_flight: 32, ..UringOptions::default() };
    let mut engine = UringEngine::with_options(&options).unwrap();
    for i in 0..1000 {
        engine.submit(i, write(&file, i));
    }
    while engine.in_flight() > 0 {
        engine.wait(None);
        assert!(engine.in_kernel <= 32, "{} for a completion queue of 32", engine.in_kernel);
        engine.collect(&mut Vec::new());
    }
    assert_eq!(engine.ring.completion().overflow(), 0);
    assert_eq!(engine.stats().completed, 1000);
    let enters = engine.stats().enters;
    assert!(enters <= 2000, "{enters} system calls: at worst each completion makes room for one");
}

#[test]
fn vectors_are_reused() {
    let dir = tempfile::tempdir().unwrap();
    let file = create(dir.path(), "file");
    let mut engine = UringEngine::new().unwrap();
    for _ in 0..10 {
        for i in 0..4 {
            let mut memory = crate::buffer::Memory::from(AlignedBuf::zeroed(4096));
            memory.push(crate::buffer::Piece::Owned(AlignedBuf::zeroed(4096)));
            engine.submit(i, Op::write(file.clone(), FileOffset(i * 8192), memory));
        }
        finish(&mut engine, 4);
        assert!(engine.pool.idle() <= 5);
        assert!(engine.slots.is_empty() || engine.wake_armed);
    }
}

#[test]
fn closed_files_are_let_go() {
    let dir = tempfile::tempdir().unwrap();
    let mut engine = UringEngine::new().unwrap();
    if !engine.features().fixed_files {
        return eprintln!("not tested: no registered files here");
    }
    let files: Vec<_> = (0..10).map(|i| create(dir.path(), &i.to_string())).collect();
    for file in &files {
        engine.submit(0, write(file, 0));
    }
    finish(&mut engine, 10);
    assert_eq!(registered(&engine), (10, 10));
    drop(files);
    finish(&mut engine, 0);
    assert_eq!(registered(&engine), (0, 0));
}

#[test]
fn a_file_closed_elsewhere_wakes_the_sleeper() {
    let dir = tempfile::tempdir().unwrap();
    let mut engine = UringEngine::new().unwrap();
    let file = create(dir.path(), "file");
    engine.submit(0, write(&file, 0));
    finish(&mut engine, 1);
    let closer = thread::spawn(move || {
        thread::sleep(Duration::from_millis(50));
        drop(file);
    });
    let start = engine.now();
    while registered(&engine) != (0, 0) {
        engine.wait(None);
        engine.collect(&mut Vec::new());
        assert!(engine.now() < start + Duration::from_secs(30));
    }
    closer.join().unwrap();
}

#[test]
fn the_end_leaves_no_file_behind() {
    let dir = tempfile::tempdir().unwrap();
    let file = create(dir.path(), "file");
    let mut engine = UringEngine::new().unwrap();
    let waker = engine.waker();
    for i in 0..600 {
        engine.submit(i, write(&file, i));
    }
    engine.collect(&mut Vec::new());
    let weak = file.downgrade(&engine.notify);
    drop(engine);
    assert!(!weak.is_closed());
    drop(file);
    assert!(weak.is_closed(), "nothing was leaked");
    waker.wake();
}

#[test]
fn says_what_is_in_use() {
    let engine = UringEngine::new().unwrap();
    let text = engine.to_string();
    assert!(text.starts_with("io_uring, 256 entries, 1024 in flight: "), "{text}");
    assert_eq!(text.contains("DEFER_TASKRUN"), engine.features() != Features::NONE);
}
