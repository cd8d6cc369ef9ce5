//! The disks, made when they are first needed and removed in the end.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use tempfile::TempDir;

use super::case::{Contestant, DiskState};
use crate::process;

/// Size of the written disks.
const WRITTEN_BYTES: u64 = 256 << 20;
/// Size of the base, and of what is made over it.
const BASE_BYTES: u64 = 1 << 30;
const COMMAND_LIMIT: Duration = Duration::from_secs(120);

/// A folder of disks, removed on drop.
pub struct Disks {
    folder: TempDir,
    sapwood: PathBuf,
}

impl Disks {
    /// Disks in a new folder below `parent`.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn new(parent: &Path, sapwood: &Path) -> Result<Self> {
        let folder = tempfile::Builder::new().prefix("disks-").tempdir_in(parent)?;
        Ok(Self { folder, sapwood: sapwood.to_owned() })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Where they are.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Where a contestant listens.
    pub fn socket(&self, contestant: Contestant) -> PathBuf {
        self.path(&format!("{}.sock", contestant.file_name()))
    }

    /// Size of the disks in bytes.
    pub fn size(&self, state: DiskState) -> u64 {
        match state {
            DiskState::Written => WRITTEN_BYTES,
            DiskState::OverBase => BASE_BYTES,
        }
    }

    /// The base of fresh disks.
    pub fn base(&self) -> PathBuf {
        self.path("base.raw")
    }

    /// A disk of which every block was written; it stays.
    ///
    /// # Errors
    /// A program fails.
    pub fn written(&self, contestant: Contestant) -> Result<PathBuf> {
        let disk = self.path(contestant.file_name());
        if disk.exists() {
            return Ok(disk);
        }
        match contestant {
            Contestant::SapwoodRaw | Contestant::QemuRaw => fill(&disk, WRITTEN_BYTES)?,
            Contestant::SapwoodLayer => {
                let source = self.written(Contestant::SapwoodRaw)?;
                self.sapwood(&["convert", "-q", "-f", "raw", "-O", "layer"], &[&source, &disk])?;
            }
            Contestant::Qcow2 | Contestant::Qcow2Extended => {
                let source = self.written(Contestant::QemuRaw)?;
                qemu_img(&["convert", "-f", "raw", "-O", "qcow2"], &[&source, &disk])?;
            }
        }
        Ok(disk)
    }

    /// A new disk over the base.
    ///
    /// # Errors
    /// A program fails.
    pub fn fresh(&self, contestant: Contestant) -> Result<PathBuf> {
        let base = self.base();
        if !base.exists() {
            fill(&base, BASE_BYTES)?;
        }
        let disk = self.path(&format!("fresh-{}", contestant.file_name()));
        let backing = base.to_str().context("a path of UTF-8")?;
        let over = ["-b", backing, "-F", "raw"];
        match contestant {
            Contestant::SapwoodRaw | Contestant::QemuRaw => unreachable!("a raw disk has no base"),
            Contestant::SapwoodLayer => {
                self.sapwood(&[&["create", "-q", "-f", "layer"], &over[..]].concat(), &[&disk])?;
            }
            Contestant::Qcow2 => {
                qemu_img(&[&["create", "-q", "-f", "qcow2"], &over[..]].concat(), &[&disk])?;
            }
            Contestant::Qcow2Extended => {
                let format = ["create", "-q", "-f", "qcow2", "-o", "extended_l2=on,cluster_size=128k"];
                qemu_img(&[&format[..], &over[..]].concat(), &[&disk])?;
            }
        }
        Ok(disk)
    }

    fn sapwood(&self, arguments: &[&str], paths: &[&Path]) -> Result<()> {
        process::output(Command::new(&self.sapwood).args(arguments).args(paths), COMMAND_LIMIT).map(drop)
    }
}

fn qemu_img(arguments: &[&str], paths: &[&Path]) -> Result<()> {
    process::output(Command::new("qemu-img").args(arguments).args(paths), COMMAND_LIMIT).map(drop)
}

/// Bytes that the file system has given to a file.
///
/// # Errors
/// There is no such file.
pub fn allocated(path: &Path) -> Result<u64> {
    Ok(fs::metadata(path)?.blocks() * 512)
}

/// Writes a file of blocks that all differ and hold no zero block.
///
/// # Errors
/// It cannot be written.
pub fn fill(path: &Path, bytes: u64) -> Result<()> {
    let write = || -> std::io::Result<()> {
        let mut out = BufWriter::with_capacity(1 << 20, File::create(path)?);
        let mut block = [0x5a; 4096];
        for number in 0..bytes / 4096 {
            block[..8].copy_from_slice(&number.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes());
            out.write_all(&block)?;
        }
        out.into_inner()?.sync_all()
    };
    write().with_context(|| format!("writing {}", path.display()))
}
