//! `sapwood convert`.

use std::path::PathBuf;

use anyhow::{Context, bail};
use clap::Args;
use sapwood_image::convert::{Target, copy};
use sapwood_image::{CreateDisk, Format, OpenDisk, remove_incomplete};

use super::options::FormatOptions;
use super::progress;
use super::reading::Reading;
use crate::host::{Host, HostEngine};

/// Copy a disk to another, of the same format or another
///
/// What the source reads from its bases is copied too: the target stands alone. Holes and zeroes
/// are not stored. A target that could not be completed is removed.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  sapwood convert -O raw vm1.layer vm1.raw          what the guest sees, for any other tool
  sapwood convert -f raw -O layer old.raw new.layer
  sapwood convert -O layer --allow-backing vm1.qcow2 vm1.layer
  sapwood convert -O layer vm1.layer flat.layer     drop the base, and the space of dead data")]
pub struct Convert {
    /// Format of the source; needed unless it is a layer or qcow2
    #[arg(short, long, value_name = "FORMAT")]
    format: Option<Format>,

    /// Format of the target: raw or layer
    #[arg(short = 'O', long, value_name = "FORMAT", default_value_t = Format::Raw)]
    target_format: Format,

    /// Options of the target's format, as NAME=VALUE,...; layer: size, segment_size; raw: size,
    /// preallocation (off, falloc)
    #[arg(short, value_name = "OPTIONS")]
    options: Vec<String>,

    /// Overwrite what a block device holds; a file is never overwritten
    #[arg(long, conflicts_with = "no_create")]
    force: bool,

    /// The target exists, is at least as large, and is overwritten
    #[arg(short = 'n', long)]
    no_create: bool,

    #[command(flatten)]
    reading: Reading,

    /// Show a bar on a terminal; that is the default
    #[arg(short, long, hide = true)]
    progress: bool,

    /// Show no bar
    #[arg(short, long)]
    quiet: bool,

    /// The disk to copy; it is not changed
    #[arg(value_name = "SOURCE")]
    source: PathBuf,

    /// The disk to make; without -n it must not exist, but for a block device under a layer
    #[arg(value_name = "TARGET")]
    target: PathBuf,
}

impl Convert {
    pub fn run(self, host: &Host) -> anyhow::Result<()> {
        if self.target_format == Format::Qcow2 {
            bail!("qcow2 images are read, not made: use -O layer or -O raw");
        }
        let options = FormatOptions::parse(&self.options, self.target_format)?;
        if self.no_create && !self.options.is_empty() {
            bail!("-o is for a target that is made, -n for one that exists");
        }
        if options.backing_file.is_some() || options.backing_format.is_some() {
            bail!("the target of a conversion has no base: use sapwood create -b for a disk over a base");
        }
        let source = host.side(&self.source, self.reading.open(self.format, true))?;
        if self.no_create {
            return self.copy(host, source, Target::Used);
        }
        let size = options.size.unwrap_or(source.size());
        let mut disk = CreateDisk::empty(self.target_format, size).context("a format that is only read")?;
        match &mut disk {
            CreateDisk::Raw(raw) => raw.allocate = options.allocate,
            CreateDisk::Layer(layer) => {
                layer.overwrite = self.force;
                layer.segment_size = options.segment_size.unwrap_or(layer.segment_size);
            }
        }
        let (storage, path) = (host.storage(), self.target.clone());
        host.block_on(|io| async move { sapwood_image::create(&storage, &io, &path, disk).await })?;
        let copied = self.copy(host, source, Target::Zero);
        if copied.is_err() {
            let (storage, path) = (host.storage(), self.target.clone());
            let removed = host.block_on(|io| async move { remove_incomplete(&storage, &io, &path).await });
            if let Err(error) = removed {
                log::warn!("the incomplete target is still there: {error:#}");
            }
        }
        copied
    }

    fn copy(
        &self,
        host: &Host,
        mut source: sapwood_image::Side<HostEngine>,
        before: Target,
    ) -> anyhow::Result<()> {
        let options = OpenDisk { format: Some(self.target_format), ..OpenDisk::default() };
        let mut target = host.side(&self.target, options)?;
        let bar = progress::bar(target.size(), self.quiet);
        copy(&mut source, &mut target, before, &mut |done| bar.set_position(done))
            .with_context(|| format!("{} is not complete", self.target.display()))?;
        source.close()?;
        target.close()?;
        bar.finish_and_clear();
        Ok(())
    }
}
