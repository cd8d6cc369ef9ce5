//! Sizes, allocation, holes, durability.

use std::path::Path;
use std::process::Command;

use sapwood_blockdev::Errno;
use sapwood_blockdev::buffer::AlignedBuf;
use sapwood_blockdev::engine::Op;
use sapwood_blockdev::storage::{HostFile, HostStorage, OpenOptions, Storage, StorageFile};
use sapwood_blockdev::units::FileOffset;

use crate::engines::{Subject, create, pattern, read, run, write};

const MIB: u64 = 1 << 20;

fn allocate(file: &HostFile, offset: u64, len: u64) -> Op<HostFile> {
    Op::Allocate { file: file.clone(), offset: FileOffset(offset), len }
}

fn punch(file: &HostFile, offset: u64, len: u64) -> Op<HostFile> {
    Op::Punch { file: file.clone(), offset: FileOffset(offset), len }
}

fn discard(file: &HostFile, offset: u64, len: u64) -> Op<HostFile> {
    Op::Discard { file: file.clone(), offset: FileOffset(offset), len }
}

pub fn allocates<E: Subject>(make: fn() -> E) {
    let (dir, mut engine) = (tempfile::tempdir().unwrap(), make());
    let file = create(dir.path(), "file");
    write(&mut engine, &file, 0, pattern(4096, 1));
    assert_eq!(run(&mut engine, allocate(&file, 0, MIB)).result, Ok(0));
    assert_eq!(file.size().unwrap(), MIB, "the file grows to the end of the range");
    assert!(file.allocated().unwrap() >= MIB);
    assert_eq!(run(&mut engine, allocate(&file, 0, 4096)).result, Ok(0));
    assert_eq!(file.size().unwrap(), MIB, "and does not shrink");
    assert_eq!(read(&mut engine, &file, 0, 4096)[..], pattern(4096, 1)[..]);
    assert_eq!(run(&mut engine, allocate(&file, 0, 0)).result, Err(Errno::INVAL));
}

pub fn allocation_without_space_fails<E: Subject>(make: fn() -> E) {
    let (dir, mut engine) = (tempfile::tempdir_in("/dev/shm").unwrap(), make());
    let file = create(dir.path(), "file");
    assert_eq!(run(&mut engine, allocate(&file, 0, 1 << 50)).result, Err(Errno::NOSPC));
    assert_eq!(run(&mut engine, allocate(&file, 1 << 62, 1 << 62)).result, Err(Errno::FBIG));
    assert_eq!(file.allocated().unwrap(), 0);
}

pub fn punched_range_reads_zero<E: Subject>(make: fn() -> E) {
    let (dir, mut engine) = (tempfile::tempdir().unwrap(), make());
    let file = create(dir.path(), "file");
    write(&mut engine, &file, 0, pattern(4 << 20, 1));
    let before = file.allocated().unwrap();
    assert_eq!(run(&mut engine, punch(&file, MIB, 2 * MIB)).result, Ok(0));
    assert_eq!(file.size().unwrap(), 4 * MIB);
    assert!(file.allocated().unwrap() <= before - 2 * MIB);
    let seen = read(&mut engine, &file, 0, 4 << 20);
    assert_eq!(seen[..1 << 20], pattern(4 << 20, 1)[..1 << 20]);
    assert!(seen[1 << 20..3 << 20].iter().all(|byte| *byte == 0));
    assert_eq!(seen[3 << 20..], pattern(4 << 20, 1)[3 << 20..]);
    assert_eq!(run(&mut engine, punch(&file, 8 * MIB, MIB)).result, Ok(0));
    assert_eq!(file.size().unwrap(), 4 * MIB, "a hole beyond the end changes nothing");
    assert_eq!(run(&mut engine, discard(&file, 3 * MIB, MIB)).result, Ok(0));
    assert!(file.allocated().unwrap() <= before - 3 * MIB, "a discard of a file is a hole");
}

pub fn truncates<E: Subject>(make: fn() -> E) {
    let (dir, mut engine) = (tempfile::tempdir().unwrap(), make());
    let file = create(dir.path(), "file");
    write(&mut engine, &file, 0, pattern(8192, 1));
    for size in [MIB, 4096, 0, 12288] {
        let completion = run(&mut engine, Op::Truncate { file: file.clone(), size });
        assert_eq!((completion.result, file.size().unwrap()), (Ok(0), size));
    }
    assert_eq!(read(&mut engine, &file, 0, 12288)[..], [0; 12288]);
    let file = HostStorage.open(file.path(), OpenOptions::READ).unwrap();
    assert_eq!(run(&mut engine, Op::Truncate { file, size: 1 }).result, Err(Errno::INVAL));
}

pub fn syncs<E: Subject>(make: fn() -> E) {
    let (dir, mut engine) = (tempfile::tempdir().unwrap(), make());
    let file = create(dir.path(), "file");
    write(&mut engine, &file, 0, pattern(4096, 1));
    let completion = run(&mut engine, Op::Sync { file });
    assert_eq!(completion.result, Ok(0));
    assert!(completion.op.into_memory().is_none());
}

/// A loop device over a file, taken away at the end.
struct LoopDevice(String);

impl LoopDevice {
    /// `None` where we may not make one (not root, a container).
    fn over(path: &Path) -> Option<Self> {
        let output = Command::new("losetup").args(["--find", "--show"]).arg(path).output().ok()?;
        output.status.success().then(|| Self(String::from_utf8(output.stdout).unwrap().trim().to_owned()))
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        Command::new("losetup").args(["--detach", &self.0]).status().unwrap();
    }
}

pub fn device_is_a_file_of_fixed_size<E: Subject>(make: fn() -> E) {
    let (dir, mut engine) = (tempfile::tempdir().unwrap(), make());
    let below = create(dir.path(), "file");
    run(&mut engine, Op::Truncate { file: below.clone(), size: 8 * MIB }).result.unwrap();
    let Some(device) = LoopDevice::over(below.path()) else {
        return eprintln!("not tested: no loop device can be made here");
    };
    let file = HostStorage.open(Path::new(&device.0), OpenOptions::WRITE).unwrap();
    assert!(file.is_device());
    assert_eq!((file.size().unwrap(), file.allocated().unwrap()), (8 * MIB, 8 * MIB));
    assert_eq!(file.identity().unwrap().size, 8 * MIB);
    assert!(file.alignment().offset >= 512, "{:?}", file.alignment());

    write(&mut engine, &file, 0, pattern(8 << 20, 1));
    assert_eq!(run(&mut engine, Op::Sync { file: file.clone() }).result, Ok(0));
    assert_eq!(run(&mut engine, allocate(&file, 4 * MIB, 4 * MIB)).result, Ok(0));
    assert_eq!(run(&mut engine, allocate(&file, 4 * MIB, 4 * MIB + 1)).result, Err(Errno::NOSPC));
    assert_eq!(run(&mut engine, allocate(&file, u64::MAX, 2)).result, Err(Errno::NOSPC));
    assert_eq!(run(&mut engine, punch(&file, MIB, MIB)).result, Ok(0));
    let seen = read(&mut engine, &file, 0, 8 << 20);
    assert!(seen[1 << 20..2 << 20].iter().all(|byte| *byte == 0));
    assert_eq!(seen[2 << 20..], pattern(8 << 20, 1)[2 << 20..]);
    assert!(below.allocated().unwrap() <= 7 * MIB + 65536, "the discard reached the file below");
    assert_eq!(run(&mut engine, discard(&file, 4 * MIB, 2 * MIB)).result, Ok(0));
    assert!(below.allocated().unwrap() <= 5 * MIB + 65536, "so did this one");
    assert_eq!(run(&mut engine, discard(&file, 8 * MIB, MIB)).result, Err(Errno::INVAL));
    assert_eq!(file.gives_space_back(), Some(true));
    let claimed = HostStorage.open(Path::new(&device.0), OpenOptions::WRITE).unwrap_err();
    assert_eq!(claimed.kind(), std::io::ErrorKind::ResourceBusy, "{claimed}");
    HostStorage.open(Path::new(&device.0), OpenOptions::READ).unwrap();
    let beyond = Op::write(file, FileOffset(8 * MIB), AlignedBuf::zeroed(4096));
    assert_eq!(run(&mut engine, beyond).result, Err(Errno::NOSPC));
}
