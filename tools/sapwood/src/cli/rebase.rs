//! `sapwood rebase`.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use anyhow::bail;
use clap::Args;
use sapwood_image::Format;
use sapwood_image::layer::{self, BaseSpec, Tuning};

use super::create::probe_base;
use super::output;
use super::progress;
use super::reading::BaseReading;
use crate::host::Host;

/// Let a layer that nobody uses lie over another base
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
/// This writes the layer, so that layers over it refuse it until they are rebased with -u themselves.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  sapwood rebase -b debian-13.raw -F raw vm1.layer     the disk stays as it is
  sapwood rebase -u -b /new/debian.raw -F raw vm1.layer  the base was moved
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

    /// The layer
    #[arg(value_name = "LAYER")]
    path: PathBuf,
}

impl Rebase {
    pub fn run(self, host: &Host) -> anyhow::Result<()> {
        let base = self.base(host)?;
        let over = match &base {
            Some(base) => format!("{} ({})", base.path.display(), base.format),
            None => "nothing".to_owned(),
        };
        let layer = self.path.display();
        let said = if self.unsafe_ {
            let (storage, path) = (host.storage(), self.path.clone());
            let repointed = host.block_on(|io| async move {
                layer::repoint(&storage, &io, &path, base.as_ref(), Tuning::default()).await
            })?;
            match repointed {
                None => format!("{layer} lies over {over} now, which is what was recorded\n"),
                Some(change) => format!(
                    "{layer} lies over {over} now, which is not what was recorded ({change}); it is taken as it is\n"
                ),
            }
        } else {
            rebase(host, &self.path, base, self.quiet)?;
            format!("{layer} lies over {over} now and reads as before\n")
        };
        if self.quiet { Ok(()) } else { output::print(&said) }
    }

    fn base(&self, host: &Host) -> anyhow::Result<Option<BaseSpec>> {
        match (self.backing.is_empty(), self.backing_format) {
            (true, None) => Ok(None),
            (true, Some(_)) => bail!("-F is the format of a base, and -b '' is none"),
            (false, format) => {
                let path = PathBuf::from(&self.backing);
                let format = match format {
                    Some(format) => format,
                    None => probe_base(host, &self.path, &path)?,
                };
                Ok(Some(self.reading.base(path, format)?))
            }
        }
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
