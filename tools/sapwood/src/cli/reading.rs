//! Options of commands that open a disk for reading.

use std::path::PathBuf;

use anyhow::bail;
use clap::Args;
use sapwood_image::layer::BaseSpec;
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
    /// Whether anything was asked for.
    pub fn is_given(&self) -> bool {
        self.snapshot.is_some() || self.backing.allow_backing || self.backing.backing_format.is_some()
    }

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

/// How a qcow2 base is read. It is kept in the layer.
#[derive(Args, Clone, Debug, Default)]
pub struct BaseReading {
    /// Let the base be this snapshot of a qcow2 image, by id or name, not its disk as it is now
    #[arg(short = 'l', long, value_name = "SNAPSHOT")]
    pub snapshot: Option<String>,

    /// Open the backing and data files that a qcow2 base names, now and whenever the layer is opened, as
    /// long as none of them changes: they may be any file of this machine, so only for images from
    /// people you trust
    #[arg(long)]
    pub allow_backing: bool,

    /// Format of backing files of which a qcow2 base does not say it: raw or qcow2
    #[arg(long, value_name = "FORMAT")]
    pub chain_format: Option<Format>,
}

impl BaseReading {
    /// A base that is read so.
    pub fn base(&self, path: PathBuf, format: Format) -> anyhow::Result<BaseSpec> {
        let options = OpenBelow {
            allow_backing: self.allow_backing,
            backing_format: self.chain_format,
            snapshot: self.snapshot.clone(),
        };
        if format != Format::Qcow2 && options != OpenBelow::default() {
            bail!(
                "--snapshot, --allow-backing and --chain-format are for a base of the format qcow2 (-F qcow2)"
            );
        }
        Ok(BaseSpec { options, ..BaseSpec::new(path, format) })
    }

    /// Whether anything was asked for.
    pub fn is_given(&self) -> bool {
        self.allow_backing || self.chain_format.is_some() || self.snapshot.is_some()
    }
}
