//! The engines under test, and how the tests drive them.

use std::path::Path;
use std::time::Duration;

use sapwood_blockdev::buffer::AlignedBuf;
use sapwood_blockdev::engine::{
    BlockingEngine, Completion, Engine, EngineStats, Features, Op, UringEngine, UringOptions, WatchFd,
};
use sapwood_blockdev::storage::{HostFile, HostStorage, OpenOptions, Storage};
use sapwood_blockdev::units::FileOffset;

/// A host engine with counters.
pub trait Subject: WatchFd<File = HostFile> {
    fn stats(&self) -> EngineStats;
}

impl Subject for UringEngine {
    fn stats(&self) -> EngineStats {
        self.stats()
    }
}

impl Subject for BlockingEngine {
    fn stats(&self) -> EngineStats {
        self.stats()
    }
}

pub fn uring() -> UringEngine {
    UringEngine::new().unwrap()
}

pub fn uring_coop_taskrun() -> UringEngine {
    let allowed = Features { defer_taskrun: false, single_issuer: false, ..Features::ALL };
    UringEngine::with_options(&UringOptions { allowed, ..UringOptions::default() }).unwrap()
}

pub fn uring_old_kernel() -> UringEngine {
    let engine = UringEngine::with_options(&UringOptions { allowed: Features::NONE, ..Default::default() });
    let engine = engine.unwrap();
    assert_eq!(engine.features(), Features::NONE);
    engine
}

pub fn uring_tiny() -> UringEngine {
    let options = UringOptions { entries: 4, in_flight: 32, files: 2, allowed: Features::ALL };
    UringEngine::with_options(&options).unwrap()
}

pub fn blocking() -> BlockingEngine {
    BlockingEngine::new().unwrap()
}

/// Collects until `count` more operations have finished; in order of their tokens.
pub fn finish<E: Engine>(engine: &mut E, count: usize) -> Vec<Completion<E::File>> {
    let mut done = Vec::new();
    let deadline = engine.now() + Duration::from_secs(60);
    loop {
        engine.collect(&mut done);
        if done.len() >= count {
            break;
        }
        assert!(engine.now() < deadline, "{} of {count} within a minute", done.len());
        engine.wait(Some(deadline));
    }
    assert_eq!(done.len(), count);
    done.sort_by_key(|completion| completion.token);
    done
}

/// Performs one operation.
pub fn run<E: Engine>(engine: &mut E, op: Op<E::File>) -> Completion<E::File> {
    engine.submit(7, op);
    let completion = finish(engine, 1).remove(0);
    assert_eq!(completion.token, 7);
    completion
}

/// A new file in `directory`.
pub fn create(directory: &Path, name: &str) -> HostFile {
    HostStorage.open(&directory.join(name), OpenOptions::CREATE).unwrap()
}

/// A new file through the page cache.
pub fn create_buffered(directory: &Path, name: &str) -> HostFile {
    HostStorage.open(&directory.join(name), OpenOptions::CREATE.buffered()).unwrap()
}

/// Memory with contents that tell offsets and seeds apart.
pub fn pattern(len: usize, seed: u64) -> AlignedBuf {
    let mut buf = AlignedBuf::zeroed(len);
    for (i, word) in buf.chunks_mut(8).enumerate() {
        let value = (seed << 32 | i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        word.copy_from_slice(&value.to_le_bytes()[..word.len()]);
    }
    buf
}

pub fn write<E: Engine>(engine: &mut E, file: &E::File, offset: u64, buf: AlignedBuf) {
    let len = buf.len();
    let completion = run(engine, Op::write(file.clone(), FileOffset(offset), buf));
    assert_eq!(completion.result, Ok(len));
}

/// Reads `len` bytes, all of which must be there.
pub fn read<E: Engine>(engine: &mut E, file: &E::File, offset: u64, len: usize) -> AlignedBuf {
    let completion = run(engine, Op::read(file.clone(), FileOffset(offset), AlignedBuf::zeroed(len)));
    assert_eq!(completion.result, Ok(len));
    completion.op.into_memory().unwrap().into_buf()
}
