//! Options of commands that open a disk for reading.

use clap::Args;
use sapwood_image::{Format, OpenBelow, OpenDisk};

/// How formats with snapshots and backing files inside are read.
#[derive(Args, Clone, Debug, Default)]
pub struct Reading {
    /// Read this snapshot of a qcow2 image, by id or name, not the disk as it is now
    #[arg(short = 'l', long, value_name = "SNAPSHOT")]
    snapshot: Option<String>,

    #[command(flatten)]
    backing: Backing,
}

/// What may be opened because an image names it.
#[derive(Args, Clone, Debug, Default)]
pub struct Backing {
    /// Open the backing and data files that qcow2 images name: they may be any file of this machine,
    /// so only for images from people you trust
    #[arg(long)]
    allow_backing: bool,

    /// Format of backing files of which the image does not say it: raw or qcow2
    #[arg(long, value_name = "FORMAT")]
    backing_format: Option<Format>,
}

impl Reading {
    /// How to open a disk.
    pub fn open(&self, format: Option<Format>, read_only: bool) -> OpenDisk {
        OpenDisk {
            format,
            read_only,
            below: self.backing.below(self.snapshot.clone()),
            ..OpenDisk::default()
        }
    }
}

impl Backing {
    /// How to open a disk, or a snapshot of it, for reading.
    pub fn below(&self, snapshot: Option<String>) -> OpenBelow {
        OpenBelow { allow_backing: self.allow_backing, backing_format: self.backing_format, snapshot }
    }
}
