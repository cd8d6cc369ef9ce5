//! `sapwood rebase`.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use anyhow::bail;
use clap::Args;
use sapwood_image::Format;
use sapwood_image::layer::{self, BaseSpec, Tuning};

use super::create::probe_base;
use super::online::{self, Online, Target};
use super::output;
use super::progress;
use super::reading::BaseReading;
use crate::control::client::Client;
use crate::control::wire;
use crate::host::Host;

/// Let a layer lie over another base
///
/// The disk reads as before: where the old base and the new one differ, what the layer does not hold
/// itself is copied into it. Interrupted at any moment, it reads as before and the command can be run
/// again.
///
/// With -u nothing is compared or copied: the layer only names another base from now on. That is for
/// a base that was moved, and for one that was changed by something that does not matter. Where the
/// new base is not what was recorded of the old one, the layer may read wrong, and -u says that you
/// know better; the answer tells what differs.
///
/// Nobody may use the layer, or, with --control, the server that uses it does this meanwhile.
///
/// This writes the layer, so that layers over it refuse it until they are rebased with -u themselves.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  sapwood rebase -b debian-13.raw -F raw vm1.layer     the disk stays as it is
  sapwood rebase -u -b /new/debian.raw -F raw vm1.layer  the base was moved
  sapwood rebase -b new.layer --control /run/vm1.control  while a virtual machine uses it
  sapwood rebase -b '' vm1.layer                       as sapwood flatten vm1.layer")]
pub struct Rebase {
    /// The new base, or '' for none; a relative path is relative to the layer's folder, and kept so
    #[arg(short, long, value_name = "BASE")]
    backing: OsString,

    /// Format of the base; needed unless that is a layer
    #[arg(short = 'F', long, value_name = "FORMAT")]
    backing_format: Option<Format>,

    #[command(flatten)]
    reading: BaseReading,

    /// Neither compare nor copy: only name the base
    #[arg(short, long = "unsafe")]
    unsafe_: bool,

    /// Show a bar on a terminal; that is the default
    #[arg(short, long, hide = true)]
    progress: bool,

    /// Print nothing
    #[arg(short, long)]
    quiet: bool,

    #[command(flatten)]
    online: Online,

    /// The layer
    #[arg(value_name = "LAYER", required_unless_present = "control", conflicts_with = "control")]
    path: Option<PathBuf>,
}

impl Rebase {
    pub fn run(self, host: &Host) -> anyhow::Result<()> {
        let (layer, over, change) = match self.online.target(self.path.as_ref())? {
            Target::Served(client) => self.ask(&client)?,
            Target::Free(path) => online::advise(self.rebase(host, path))?,
        };
        let said = match (self.unsafe_, change) {
            (false, _) => format!("{layer} lies over {over} now and reads as before\n"),
            (true, None) => format!("{layer} lies over {over} now, which is what was recorded\n"),
            (true, Some(change)) => format!(
                "{layer} lies over {over} now, which is not what was recorded ({change}); it is taken as it is\n"
            ),
        };
        if self.quiet { Ok(()) } else { output::print(&said) }
    }

    /// Has the server do it: the layer, its base, and how that differs from what was recorded.
    fn ask(&self, client: &Client<'_>) -> anyhow::Result<(String, String, Option<String>)> {
        self.check()?;
        let base = Some(PathBuf::from(&self.backing)).filter(|path| !path.as_os_str().is_empty());
        let format = self.backing_format.map(|format| format.name().to_owned());
        let BaseReading { snapshot, allow_backing, chain_format } = self.reading.clone();
        let chain_format = chain_format.map(|format| format.name().to_owned());
        let asked =
            wire::Rebase { base, format, snapshot, allow_backing, chain_format, unsafe_: self.unsafe_ };
        let (layer, result) = online::run(client, "/v1/disk/rebase", &asked, self.quiet)?;
        let word = |name: &str| result[name].as_str();
        let over = match (word("base"), word("format")) {
            (Some(base), Some(format)) => format!("{base} ({format})"),
            _ => "nothing".to_owned(),
        };
        Ok((layer, over, word("change").map(str::to_owned)))
    }

    fn rebase(&self, host: &Host, path: &Path) -> anyhow::Result<(String, String, Option<String>)> {
        let base = self.base(host, path)?;
        let over = match &base {
            Some(base) => format!("{} ({})", base.path.display(), base.format),
            None => "nothing".to_owned(),
        };
        let (storage, layer) = (host.storage(), path.to_owned());
        let change = if self.unsafe_ {
            host.block_on(|io| async move {
                layer::repoint(&storage, &io, &layer, base.as_ref(), Tuning::default()).await
            })?
        } else {
            rebase(host, path, base, self.quiet)?;
            None
        };
        Ok((path.display().to_string(), over, change))
    }

    fn check(&self) -> anyhow::Result<()> {
        if self.backing.is_empty() && self.backing_format.is_some() {
            bail!("-F is the format of a base, and -b '' is none");
        }
        Ok(())
    }

    fn base(&self, host: &Host, layer: &Path) -> anyhow::Result<Option<BaseSpec>> {
        self.check()?;
        if self.backing.is_empty() {
            return Ok(None);
        }
        let path = PathBuf::from(&self.backing);
        let format = match self.backing_format {
            Some(format) => format,
            None => probe_base(host, layer, &path)?,
        };
        Ok(Some(self.reading.base(path, format)?))
    }
}

/// Rebases a layer, with a bar.
pub fn rebase(host: &Host, path: &Path, base: Option<BaseSpec>, quiet: bool) -> anyhow::Result<()> {
    let bar = progress::bar(0, quiet);
    let (storage, path, shown) = (host.storage(), path.to_owned(), bar.clone());
    host.block_on(|io| async move {
        let mut report = |done, all| progress::show(&shown, done, all);
        layer::rebase(&storage, &io, &path, base.as_ref(), Tuning::default(), &mut report).await
    })?;
    bar.finish_and_clear();
    Ok(())
}
