//! `sapwood resize`.

use std::path::PathBuf;

use anyhow::{Context, bail};
use clap::Args;
use sapwood_image::{Format, OpenDisk, Side};

use super::output;
use super::size::{self, NewSize};
use crate::host::{Host, HostEngine};

/// Change the size of a disk that nobody uses
///
/// What is added reads as zeroes. What is cut off is lost, so that must be asked for with --shrink.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  sapwood resize vm1.layer 20G
  sapwood resize vm1.layer +5G
  sapwood resize --shrink -f raw disk.raw -- -1G")]
pub struct Resize {
    /// Format of the disk; needed unless it is a layer
    #[arg(short, long, value_name = "FORMAT")]
    format: Option<Format>,

    /// Allow the disk to become smaller: what lies past the new end is lost
    #[arg(long)]
    shrink: bool,

    /// Print nothing
    #[arg(short, long)]
    quiet: bool,

    /// The disk
    #[arg(value_name = "DISK")]
    path: PathBuf,

    /// The new size, or with + or - the difference
    #[arg(value_name = "SIZE", allow_hyphen_values = true)]
    size: NewSize,
}

impl Resize {
    pub fn run(self, host: &Host) -> anyhow::Result<()> {
        let side = host.side(&self.path, OpenDisk { format: self.format, ..OpenDisk::default() })?;
        let old = side.size();
        let resized = self.resize(&side, old);
        // Also when nothing was done: a layer that is not closed has to be recovered.
        side.close()?;
        let new = resized?;
        let said = format!(
            "Resized {} from {} to {}\n",
            self.path.display(),
            size::display(old),
            size::display(new)
        );
        if self.quiet { Ok(()) } else { output::print(&said) }
    }

    /// Changes the size from `old`; to what.
    fn resize(&self, side: &Side<HostEngine>, old: u64) -> anyhow::Result<u64> {
        let new = self.size.from(old).with_context(|| format!("the disk has {}", size::display(old)))?;
        if new < old && !self.shrink {
            bail!(
                "{}: shrinking from {old} to {new} bytes loses what lies past the new end: shrink the file \
                 system inside first, then pass --shrink",
                self.path.display()
            );
        }
        side.resize(new)?;
        Ok(new)
    }
}
