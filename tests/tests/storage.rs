//! File systems of every kind under a disk: with and without direct I/O, holes, allocation ahead.
//!
//! Those that are mounted need root: `cargo xtask test --only storage` runs them, and says which
//! cannot be run.
#![allow(missing_docs, clippy::unwrap_used)]

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use sapwood_blockdev::engine::{BlockingEngine, Engine, UringEngine};
use sapwood_blockdev::storage::{Alignment, HostFile, HostStorage, OpenOptions, Storage, StorageFile};
use sapwood_image::Format;
use sapwood_image::layer::Tuning;
use sapwood_tests::lacking::LackingEngine;
use sapwood_tests::load::{Engines, Load};
use sapwood_tests::mounts::{Mounted, skip};

const MIB: u64 = 1 << 20;

fn tuning() -> Tuning {
    Tuning { checkpoint_bytes: 2 * MIB, space_slack: Some(2 * MIB), ..Tuning::default() }
}

fn blocking() -> Engines<BlockingEngine> {
    Arc::new(|| BlockingEngine::new().unwrap())
}

fn is_direct(folder: &Path) -> bool {
    let file = HostStorage.open(&folder.join("probe"), OpenOptions::CREATE).unwrap();
    std::fs::remove_file(file.path()).unwrap();
    file.alignment() != Alignment::NONE
}

/// Work on a disk in `folder`: written, discarded, closed, opened again.
fn works<E: Engine<File = HostFile>>(folder: &Path, format: Format, engines: Engines<E>) {
    let mut load = Load::create(&folder.join(format.name()), format, 8 * MIB, tuning(), engines);
    for round in 0..3 {
        for _ in 0..100 {
            assert_eq!(load.write().no_space, 0);
        }
        let half = load.blocks() / 2;
        assert_eq!(load.discard(round % 2 * half, half).no_space, 0);
        load.flush();
        load.verify();
        load.close();
        if format == Format::Layer {
            assert_eq!(load.check(), [""; 0]);
        }
        load.open();
        load.verify();
    }
    load.close();
}

/// Both formats over both engines.
fn all_work(folder: &Path) {
    for format in [Format::Layer, Format::Raw] {
        let inside = tempfile::tempdir_in(folder).unwrap();
        works(inside.path(), format, blocking());
        let inside = tempfile::tempdir_in(folder).unwrap();
        match UringEngine::new() {
            Ok(_) => works::<UringEngine>(inside.path(), format, Arc::new(|| UringEngine::new().unwrap())),
            Err(error) => skip("io_uring on another file system", &error.to_string()),
        }
    }
}

/// What was flushed is on the medium, although all of it went through the page cache. Nothing else may
/// write meanwhile, neither the disk's background work nor the file system's: the copy is not made in
/// one moment.
fn flushed_survives_a_power_cut(mounted: &Mounted, kind: &str) {
    for format in [Format::Layer, Format::Raw] {
        let name = format!("durable.{format}");
        let hour = Duration::from_secs(3600);
        let tuning = Tuning { checkpoint_interval: hour, sync_interval: hour, ..Tuning::default() };
        let mut load = Load::create(&mounted.path().join(&name), format, 8 * MIB, tuning, blocking());
        for _ in 0..5 {
            for _ in 0..40 {
                assert_eq!(load.write().no_space, 0);
            }
            assert_eq!(load.flush().done, 1);
            let Some(left) = mounted.after_power_cut(kind).unwrap() else { return };
            let mut copy = load.at(&left.path().join(&name));
            copy.verify();
            copy.close();
        }
        load.close();
    }
}

/// The file system that a test needs, or why the test is not run.
fn mounted(test: &str, mounted: Result<Mounted, String>) -> Option<Mounted> {
    mounted.map_err(|reason| skip(test, &reason)).ok()
}

/// ext4 that journals data: the kernel has no direct I/O there.
fn ext4_without_direct_io() -> Result<Mounted, String> {
    Mounted::on_loop("ext4", 128 * MIB, &["mkfs.ext4", "-q"], "data=journal,commit=1000")
}

#[test]
#[ignore = "needs root"]
fn ext4_without_direct_io_serves() {
    let Some(fs) = mounted("ext4", ext4_without_direct_io()) else { return };
    assert!(!is_direct(fs.path()));
    all_work(fs.path());
    flushed_survives_a_power_cut(&fs, "ext4");
}

#[test]
#[ignore = "needs root"]
fn ext3_without_allocation_ahead_serves() {
    let made =
        Mounted::on_loop("ext4", 128 * MIB, &["mkfs.ext4", "-q", "-O", "^extent,^64bit"], "commit=1000");
    let Some(fs) = mounted("ext3", made) else { return };
    all_work(fs.path());
    flushed_survives_a_power_cut(&fs, "ext4");
}

#[test]
#[ignore = "needs root"]
fn overlay_serves() {
    let direct = Mounted::on_loop("ext4", 128 * MIB, &["mkfs.ext4", "-q"], "commit=1000");
    for upper in [direct, ext4_without_direct_io()] {
        let Some(fs) = mounted("overlay", upper.and_then(Mounted::overlay)) else { return };
        all_work(fs.path());
        flushed_survives_a_power_cut(&fs, "ext4");
    }
}

#[test]
#[ignore = "needs root"]
fn tmpfs_serves() {
    let Some(fs) = mounted("tmpfs", Mounted::tmpfs(128 * MIB)) else { return };
    all_work(fs.path());
}

#[test]
#[ignore = "needs root"]
fn vfat_serves() {
    let Some(fs) = mounted("vfat", Mounted::on_loop("vfat", 128 * MIB, &["mkfs.vfat"], "rw")) else { return };
    let file = HostStorage.open(&fs.path().join("probe"), OpenOptions::CREATE).unwrap();
    assert_eq!(file.gives_space_back(), Some(false));
    drop(file);
    all_work(fs.path());
    flushed_survives_a_power_cut(&fs, "vfat");
}

#[test]
#[ignore = "needs a folder on NFS"]
fn nfs_serves() {
    match std::env::var_os("SAPWOOD_NFS_DIR") {
        Some(folder) => all_work(Path::new(&folder)),
        None => skip("nfs", "SAPWOOD_NFS_DIR names no folder on NFS"),
    }
}

#[test]
fn without_holes_and_allocation_everything_works() {
    let folder = tempfile::tempdir().unwrap();
    for format in [Format::Layer, Format::Raw] {
        let refused = Arc::new(AtomicU64::new(0));
        let count = Arc::clone(&refused);
        let engines: Engines<LackingEngine<BlockingEngine>> =
            Arc::new(move || LackingEngine::new(BlockingEngine::new().unwrap(), Arc::clone(&count)));
        works(folder.path(), format, engines);
        assert!(refused.load(Ordering::Relaxed) > 0, "{format}: it was asked for");
    }
}
