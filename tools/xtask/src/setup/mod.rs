//! Brings a machine to where tests and demo run: packages of the host, a guest kernel, a guest
//! root file system, a disk that boots by itself. What is there already costs nothing and needs no network.

pub mod apt;
mod bootable;
pub mod cache;
mod kernel;
pub mod rootfs;
mod sources;

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use sapwood_tests::guest::Assets;

/// How a set-up ended.
pub enum Outcome {
    /// Everything is there.
    Ready(Assets),
    /// This machine cannot have it; the text says why.
    Unable(String),
}

/// Makes sure that the programs of the host and the guest's files under `guest` (a directory of
/// the target directory) are there.
///
/// # Errors
/// The machine could have them, but bringing them failed.
pub fn ensure(guest: &Path) -> Result<Outcome> {
    fs::create_dir_all(guest).with_context(|| format!("making {}", guest.display()))?;
    let lock = fs::File::create(guest.join(".lock"))?;
    lock.lock().context("waiting for another set-up")?;
    let missing = apt::missing();
    let stale = !cache::is_fresh(guest, "kernel", &kernel::recipe())
        || !cache::is_fresh(guest, "root", &rootfs::recipe())
        || !cache::is_fresh(guest, "bootable", &bootable::recipe());
    if !missing.is_empty() || stale {
        if let Some(reason) = apt::unable() {
            let wanted = if missing.is_empty() { "the guest's files" } else { &missing.join(", ") };
            return Ok(Outcome::Unable(format!("{wanted} missing, and {reason}")));
        }
        apt::install_missing()?;
    }
    let kernel = cache::directory(guest, "kernel", &kernel::recipe(), kernel::make)?;
    let root = cache::directory(guest, "root", &rootfs::recipe(), rootfs::make)?;
    let bootable = cache::directory(guest, "bootable", &bootable::recipe(), bootable::make)?;
    Ok(Outcome::Ready(Assets {
        kernel: kernel.join("vmlinuz"),
        initramfs: kernel.join("initramfs.cpio"),
        root_image: root.join("root.raw"),
        bootable_image: bootable.join("disk.raw"),
        accelerator: guest.join("accelerator"),
    }))
}
