//! What is started in the machine: a kernel, an initial file system, a command line.

use std::fs::File;
use std::path::Path;

use anyhow::{Context, bail};
use sapwood_image::OpenDisk;
use sapwood_vmm::from_disk::{self, Found};

use super::events::Interruption;
use super::plan::{Boot, DiskPlace, Machine};
use super::reader::Reader;
use super::volume::VolumeReader;

/// What is started, open for reading.
#[derive(Debug)]
pub struct Payload {
    /// The kernel.
    pub kernel: File,
    /// The initial file system.
    pub initrd: Option<File>,
    /// The kernel's command line.
    pub cmdline: String,
}

/// Opens the files that are given, or finds those on the first disk, which nobody may be writing. The search fails soon after
/// an interruption.
pub fn open(machine: &Machine, interruption: Interruption) -> anyhow::Result<Payload> {
    match &machine.boot {
        Boot::Files { kernel, initrd, cmdline } => Ok(Payload {
            kernel: open_file(kernel, "kernel")?,
            initrd: initrd.as_deref().map(|path| open_file(path, "initrd")).transpose()?,
            cmdline: cmdline.clone(),
        }),
        Boot::FirstDisk { entry, append } => {
            let mut found = find(machine, entry.as_deref(), interruption)?;
            found.append(append.as_deref().unwrap_or_default());
            log::info!("{}: {}", found.title, found.origin);
            Ok(Payload { kernel: found.kernel, initrd: found.initrd, cmdline: found.cmdline })
        }
    }
}

fn open_file(path: &Path, option: &str) -> anyhow::Result<File> {
    let file = File::open(path).with_context(|| format!("--{option} {}", path.display()))?;
    if !file.metadata()?.is_file() {
        bail!("--{option} {}: not a file", path.display());
    }
    Ok(file)
}

/// Finds a kernel on the first disk. It is closed again before this returns.
fn find(machine: &Machine, entry: Option<&str>, interruption: Interruption) -> anyhow::Result<Found> {
    let first = machine.disks.first().context("no disk to find a kernel on")?;
    if let Some(address) = &machine.first_volume {
        let reader = VolumeReader::open(machine.host, address.clone(), interruption)?;
        return from_disk::find(Box::new(reader), entry).with_context(|| first.name().display().to_string());
    }
    let DiskPlace::File { path, format, .. } = &first.place else {
        bail!(
            "{}: only on a disk that is a file or a volume a kernel can be found: give one with --kernel",
            first.name().display()
        );
    };
    let reader = Reader::open(path, OpenDisk { format: *format, ..OpenDisk::default() }, interruption)?;
    from_disk::find(Box::new(reader), entry).with_context(|| path.display().to_string())
}
