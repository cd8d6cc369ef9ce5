//! `sapwood flatten`.

use std::path::PathBuf;

use clap::Args;

use super::output;
use super::rebase::rebase;
use crate::host::Host;

/// Copy into a layer what it reads from its bases, so that it needs them no more
///
/// The disk reads as before. Interrupted at any moment, it does so, too, and the command can be run
/// again. Zeroes take no space. Nobody may use the layer; its bases are not changed.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  sapwood flatten vm1.layer                       in place
  sapwood convert -O layer vm1.layer flat.layer   the same in a new file")]
pub struct Flatten {
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

impl Flatten {
    pub fn run(self, host: &Host) -> anyhow::Result<()> {
        rebase(host, &self.path, None, self.quiet)?;
        let said = format!("{} needs no base any more\n", self.path.display());
        if self.quiet { Ok(()) } else { output::print(&said) }
    }
}
