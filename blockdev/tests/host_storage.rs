//! Opening, locking and identifying files of the host.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::fs;
use std::io::ErrorKind;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use sapwood_blockdev::storage::{
    Alignment, HostFile, HostStorage, Lock, LockError, OpenOptions, Storage, StorageFile,
};

fn open(path: &Path, options: OpenOptions) -> HostFile {
    HostStorage.open(path, options).unwrap()
}

#[test]
fn creates_and_opens() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file");
    let absent = HostStorage.open(&path, OpenOptions::WRITE).unwrap_err();
    assert_eq!(absent.kind(), ErrorKind::NotFound);
    let file = open(&path, OpenOptions::CREATE);
    assert_eq!(file.path(), path);
    assert_eq!((file.size().unwrap(), file.allocated().unwrap(), file.is_device()), (0, 0, false));
    let exists = HostStorage.open(&path, OpenOptions::CREATE).unwrap_err();
    assert_eq!(exists.kind(), ErrorKind::AlreadyExists);
}

#[test]
fn only_disks_are_opened() {
    let dir = tempfile::tempdir().unwrap();
    let fifo = dir.path().join("fifo");
    let made = Command::new("mkfifo").arg(&fifo).status().unwrap();
    assert!(made.success());
    for path in [dir.path(), &fifo, Path::new("/dev/null")] {
        let error = HostStorage.open(path, OpenOptions::READ).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
        assert!(error.to_string().contains(path.to_str().unwrap()), "{error}");
    }
}

#[test]
fn alignment_is_stated_and_usable() {
    let here = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let memory = tempfile::tempdir_in("/dev/shm").unwrap();
    for dir in [&here, &memory] {
        let path = dir.path().join("file");
        let direct = open(&path, OpenOptions::CREATE).alignment();
        assert!(direct.memory.is_power_of_two() && direct.memory <= 4096, "{direct:?}");
        assert!(direct.offset.is_power_of_two() && direct.offset <= 4096, "{direct:?}");
        assert_eq!(open(&path, OpenOptions::WRITE.buffered()).alignment(), Alignment::NONE);
    }
}

#[test]
fn no_direct_io_means_buffered() {
    // procfs has files without direct I/O on every machine.
    let file = open(Path::new("/proc/version"), OpenOptions::READ);
    assert_eq!(file.alignment(), Alignment::NONE);
}

#[test]
fn identity_follows_size_and_modification() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file");
    fs::write(&path, [1; 1000]).unwrap();
    let file = open(&path, OpenOptions::READ);
    let first = file.identity().unwrap();
    assert_eq!(first.size, 1000);
    assert!(first.mtime_ns > 1_700_000_000_000_000_000);
    assert_eq!(open(&path, OpenOptions::READ).identity().unwrap(), first);
    std::thread::sleep(Duration::from_millis(20));
    fs::write(&path, [2; 1000]).unwrap();
    assert_ne!(file.identity().unwrap().mtime_ns, first.mtime_ns);
}

#[test]
fn randomness_differs() {
    let (mut one, mut two) = ([0; 4096], [0; 4096]);
    HostStorage.random(&mut one).unwrap();
    HostStorage.random(&mut two).unwrap();
    assert_ne!(one, two);
    assert_ne!(one[4000..], [0; 96]);
}

/// Who holds the lock, by the refusal.
fn refused(result: Result<(), LockError>) -> String {
    match result {
        Err(LockError::Held(holder)) => holder.expect("/proc/locks tells"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn conflict_names_this_process() {
    let dir = tempfile::tempdir().unwrap();
    let file = open(&dir.path().join("file"), OpenOptions::CREATE);
    let other = open(file.path(), OpenOptions::READ);
    file.lock(Lock::Exclusive).unwrap();
    file.lock(Lock::Exclusive).unwrap();
    let expected = format!("process {} (host_storage", std::process::id());
    for lock in [Lock::Shared, Lock::Exclusive] {
        let holder = refused(other.lock(lock));
        assert!(holder.starts_with(&expected), "{holder}");
    }
    file.lock(Lock::Shared).unwrap();
    other.lock(Lock::Shared).unwrap();
}

#[test]
fn failed_strengthening_keeps_the_weaker_lock() {
    let dir = tempfile::tempdir().unwrap();
    let file = open(&dir.path().join("file"), OpenOptions::CREATE);
    let second = open(file.path(), OpenOptions::WRITE);
    let third = open(file.path(), OpenOptions::WRITE);
    file.lock(Lock::Shared).unwrap();
    second.lock(Lock::Shared).unwrap();
    refused(file.lock(Lock::Exclusive));
    drop(second);
    refused(third.lock(Lock::Exclusive));
    file.lock(Lock::Exclusive).unwrap();
}

#[test]
fn another_process_is_named_and_its_death_frees_the_lock() {
    let dir = tempfile::tempdir().unwrap();
    let file = open(&dir.path().join("file"), OpenOptions::CREATE);
    // Without --no-fork flock(1) would start a child that holds the lock beside it.
    let mut holder = Command::new("flock")
        .args(["--no-fork", "--wait", "20", file.path().to_str().unwrap(), "sleep", "1000"])
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    let start = Instant::now();
    let name = loop {
        // A lock granted before flock(1) has started goes with its handle.
        let file = open(file.path(), OpenOptions::WRITE);
        match file.lock(Lock::Shared) {
            Err(LockError::Held(Some(name))) if name.contains("sleep") => break name,
            _ => assert!(start.elapsed() < Duration::from_secs(20), "flock(1) did not start"),
        }
        drop(file);
        std::thread::sleep(Duration::from_millis(10));
    };
    assert_eq!(name, format!("process {} (sleep 1000)", holder.id()));
    holder.kill().unwrap();
    holder.wait().unwrap();
    file.lock(Lock::Exclusive).unwrap();
}

#[test]
fn directories_are_made_and_listed() {
    let dir = tempfile::tempdir().unwrap();
    let inner = dir.path().join("inner");
    assert_eq!(HostStorage.list_directory(&inner).unwrap_err().kind(), ErrorKind::NotFound);
    HostStorage.create_directory(&inner).unwrap();
    assert_eq!(HostStorage.create_directory(&inner).unwrap_err().kind(), ErrorKind::AlreadyExists);
    for name in ["b", "a"] {
        open(&inner.join(name), OpenOptions::CREATE);
    }
    assert_eq!(HostStorage.list_directory(&inner).unwrap(), ["a", "b"]);
    assert_eq!(HostStorage.list_directory(dir.path()).unwrap(), ["inner"]);
}
