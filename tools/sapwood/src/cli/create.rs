//! `sapwood create`.

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use clap::Args;
use sapwood_image::layer::CreateLayer;
use sapwood_image::probe::{Guess, probe};
use sapwood_image::raw::CreateRaw;
use sapwood_image::{CreateDisk, Format};

use super::options::FormatOptions;
use super::output;
use super::reading::BaseReading;
use super::size::{self, Size};
use super::store::DefaultStore;
use crate::host::Host;
use crate::volumes::access::Access;
use crate::volumes::address::Address;
use crate::volumes::change::CreateVolume;

/// Make a new disk
///
/// A layer keeps what is written to it and reads everything else from its base, which must not
/// change any more. Making one takes milliseconds, however large the base is.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  sapwood create disk.layer 10G                         an empty disk
  sapwood create -b debian.raw -F raw vm1.layer         a disk over a base, of the base's size
  sapwood create -b debian.raw -F raw vm2.layer 20G     the same, larger
  sapwood create -b debian.qcow2 -F qcow2 vm3.layer     over a qcow2 image
  sapwood create /dev/vg/vm4 10G                        an empty disk on a block device
  sapwood create -f raw disk.raw 10G                    a sparse raw disk
  sapwood create /srv/vms:web 10G                       an empty volume in a store")]
pub struct Create {
    /// Format of the new disk: layer or raw; by default layer
    #[arg(short, long, value_name = "FORMAT")]
    format: Option<Format>,

    /// The base; a relative path is relative to the new disk's folder, and kept so
    #[arg(short, long, value_name = "BASE")]
    backing: Option<PathBuf>,

    /// Format of the base; needed unless that is a layer
    #[arg(short = 'F', long, value_name = "FORMAT")]
    backing_format: Option<Format>,

    #[command(flatten)]
    reading: BaseReading,

    /// Options of the format, as NAME=VALUE,...; layer: size, backing_file, backing_fmt,
    /// segment_size; raw: size, preallocation (off, falloc)
    #[arg(short, value_name = "OPTIONS")]
    options: Vec<String>,

    /// Overwrite what a block device holds; a file is never overwritten
    #[arg(long)]
    force: bool,

    #[command(flatten)]
    store: DefaultStore,

    /// Print nothing
    #[arg(short, long)]
    quiet: bool,

    /// The new disk: a file that does not exist, or for a layer a block device; or a volume of a store, as
    /// STORE:volume
    #[arg(value_name = "DISK")]
    path: PathBuf,

    /// Size of the disk, for example 10G; by default the base's
    #[arg(value_name = "SIZE")]
    size: Option<Size>,
}

impl Create {
    pub fn run(self, host: &Host) -> anyhow::Result<()> {
        if let Some(address) = Address::of_disk(self.path.as_os_str(), self.store.given())? {
            return self.create_volume(host, address);
        }
        let format = self.format.unwrap_or(Format::Layer);
        let options = FormatOptions::parse(&self.options, format)?;
        let size = self.size.map(|Size(n)| n).or(options.size);
        let backing = self.backing.clone().or(options.backing_file);
        let backing_format = self.backing_format.or(options.backing_format);
        let mut layer = CreateLayer { size, overwrite: self.force, ..CreateLayer::default() };
        layer.segment_size = options.segment_size.unwrap_or(layer.segment_size);
        let disk = match (format, backing) {
            (Format::Raw, Some(_)) => bail!("a raw disk has no base: use -f layer"),
            (Format::Qcow2 | Format::Sealed, _) => {
                bail!("{format} images are read, not made: use -f layer or -f raw")
            }
            (Format::Raw, None) => {
                let size = size.context("how large? Give a SIZE, for example 10G")?;
                CreateDisk::Raw(CreateRaw { size, allocate: options.allocate })
            }
            (Format::Layer, None) if size.is_none() => {
                bail!("how large? Give a SIZE, for example 10G, or a base with -b")
            }
            (Format::Layer, None) if backing_format.is_some() => {
                bail!("-F is the format of a base: give one with -b")
            }
            (Format::Layer, None) if self.reading.is_given() => {
                bail!("--snapshot, --allow-backing and --chain-format are for a base: give one with -b")
            }
            (Format::Layer, None) => CreateDisk::Layer(layer),
            (Format::Layer, Some(base)) => {
                let format = match backing_format {
                    Some(format) => format,
                    None => probe_base(host, &self.path, &base)?,
                };
                CreateDisk::Layer(CreateLayer { base: Some(self.reading.base(base, format)?), ..layer })
            }
        };
        let said = self.describe(format, &disk);
        let (storage, path) = (host.storage(), self.path);
        host.block_on(|io| async move { sapwood_image::create(&storage, &io, &path, disk).await })?;
        if self.quiet { Ok(()) } else { output::print(&said) }
    }

    /// Makes a volume of a store.
    fn create_volume(self, host: &Host, address: Address) -> anyhow::Result<()> {
        let options = FormatOptions::parse(&self.options, Format::Layer)?;
        let is_file = self.format.is_some()
            || self.force
            || self.backing.or(options.backing_file).is_some()
            || self.backing_format.or(options.backing_format).is_some()
            || options.segment_size.is_some()
            || self.reading.is_given();
        if is_file {
            bail!(
                "{}: a volume has a size only (sapwood clone makes one over a snapshot)",
                self.path.display()
            );
        }
        let size = self.size.map(|Size(n)| n).or(options.size);
        let size = size.context("how large? Give a SIZE, for example 10G")?;
        let access = Access::to(*host, &address.store)?;
        let made = access.ask(CreateVolume { name: address.volume()?, size })?;
        let said = format!("Created {}: volume, {}\n", made.name, size::display(made.virtual_size));
        if self.quiet { Ok(()) } else { output::print(&said) }
    }

    fn describe(&self, format: Format, disk: &CreateDisk) -> String {
        let (size, base) = match disk {
            CreateDisk::Raw(raw) => (Some(raw.size), None),
            CreateDisk::Layer(layer) => (layer.size, layer.base.as_ref()),
        };
        let size = size.map(|size| format!(", {}", size::display(size))).unwrap_or_default();
        let base = base.map(|base| format!(", over {} ({})", base.path.display(), base.format));
        format!("Created {}: {format}{size}{}\n", self.path.display(), base.unwrap_or_default())
    }
}

/// The format of a base that was named without one; a relative path starts at the folder of `layer`.
pub fn probe_base(host: &Host, layer: &Path, base: &Path) -> anyhow::Result<Format> {
    let path = layer.parent().unwrap_or(Path::new("")).join(base);
    let storage = host.storage();
    match host.block_on(move |io| async move { probe(&storage, &io, &path).await })? {
        Guess::Layer => Ok(Format::Layer),
        _ => bail!("{}: not a layer: give the format of the base, for example -F raw", base.display()),
    }
}
