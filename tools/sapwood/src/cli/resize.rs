//! `sapwood resize`.

use std::ffi::OsString;
use std::path::Path;

use anyhow::{Context, bail};
use clap::Args;
use clap::error::ErrorKind::ValueValidation;
use sapwood_image::{Format, OpenDisk};

use super::online::{self, Online, Target};
use super::size::{self, NewSize};
use super::store::DefaultStore;
use super::{output, progress};
use crate::control::wire;
use crate::host::Host;
use crate::volumes::access::Access;
use crate::volumes::address::Address;
use crate::volumes::live::ResizeVolume;

/// Change the size of a disk
///
/// What is added reads as zeroes. What is cut off is lost, so that must be asked for with --shrink.
///
/// With --control the server that uses the disk does it, and the virtual machine is told. So it is of a volume that
/// the daemon of its store has attached.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  sapwood resize vm1.layer 20G
  sapwood resize vm1.layer +5G
  sapwood resize --control /run/vm1.control +5G  while a virtual machine uses it
  sapwood resize /srv/vms:web 20G                a volume of a store
  sapwood resize --shrink -f raw disk.raw -- -1G")]
pub struct Resize {
    /// Format of the disk; needed unless it is a layer
    #[arg(short, long, value_name = "FORMAT", conflicts_with = "control")]
    format: Option<Format>,

    /// Allow the disk to become smaller: what lies past the new end is lost
    #[arg(long)]
    shrink: bool,

    /// Print nothing
    #[arg(short, long)]
    quiet: bool,

    #[command(flatten)]
    online: Online,

    #[command(flatten)]
    store: DefaultStore,

    /// The disk, or a volume of a store, as STORE:volume; with --control the size stands here
    #[arg(value_name = "DISK")]
    first: OsString,

    /// The new size, or with + or - the difference
    #[arg(value_name = "SIZE", allow_hyphen_values = true)]
    #[arg(required_unless_present = "control", conflicts_with = "control")]
    size: Option<NewSize>,
}

impl Resize {
    pub fn run(self, host: &Host) -> anyhow::Result<()> {
        let (path, old, new) = match self.size {
            Some(size) => match Address::of_disk(&self.first, self.store.given())? {
                Some(address) => self.resize_volume(host, address, size)?,
                None => online::advise(self.resize(host, Path::new(&self.first), size))?,
            },
            None => self.ask()?,
        };
        let said = format!("Resized {path} from {} to {}\n", size::display(old), size::display(new));
        if self.quiet { Ok(()) } else { output::print(&said) }
    }

    /// Has the server do it: the disk, its size before and after.
    fn ask(&self) -> anyhow::Result<(String, u64, u64)> {
        let size = self.first.to_string_lossy().parse::<NewSize>();
        let size = size.map_err(|why| clap::Error::raw(ValueValidation, format!("{why}\n")))?;
        let Target::Served(client) = self.online.target(None)? else {
            unreachable!("clap wants one of them")
        };
        let disk = client.disk()?;
        let path = disk["filename"].as_str().unwrap_or_default();
        let old = disk["virtual-size"].as_u64().context("the server does not say how large the disk is")?;
        let asked = wire::Resize { size: self.new_size(path, old, size)?, shrink: self.shrink };
        let (path, _) = online::run(&client, "/v1/disk/resize", &asked, self.quiet)?;
        Ok((path, old, asked.size))
    }

    /// Changes a volume: its name, its size before and after.
    fn resize_volume(
        &self,
        host: &Host,
        address: Address,
        size: NewSize,
    ) -> anyhow::Result<(String, u64, u64)> {
        let access = Access::to(*host, &address.store)?;
        let volume = address.volume()?;
        // Whoever has it open knows its size.
        let (size, difference) = match size {
            NewSize::To(size) => (Some(size), None),
            NewSize::Grow(more) => (None, Some(i64::try_from(more)?)),
            NewSize::Shrink(less) => (None, Some(-i64::try_from(less)?)),
        };
        let resize = ResizeVolume { volume: volume.clone(), size, difference, shrink: self.shrink };
        let resized = access.run(resize, &progress::bar(0, self.quiet))?;
        Ok((volume, resized.old_size, resized.size))
    }

    fn resize(&self, host: &Host, path: &Path, size: NewSize) -> anyhow::Result<(String, u64, u64)> {
        let side = host.side(path, OpenDisk { format: self.format, ..OpenDisk::default() })?;
        let (path, old) = (path.display().to_string(), side.size());
        let resized = self.new_size(&path, old, size).and_then(|new| Ok(side.resize(new).map(|()| new)?));
        // Also when nothing was done: a layer that is not closed has to be recovered.
        side.close()?;
        Ok((path, old, resized?))
    }

    /// The size to change to from `old`.
    fn new_size(&self, path: &str, old: u64, size: NewSize) -> anyhow::Result<u64> {
        let new = size.from(old).with_context(|| format!("the disk has {}", size::display(old)))?;
        if new < old && !self.shrink {
            bail!(
                "{path}: shrinking from {old} to {new} bytes loses what lies past the new end: shrink the file \
                 system inside first, then pass --shrink"
            );
        }
        Ok(new)
    }
}
