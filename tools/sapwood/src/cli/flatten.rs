//! `sapwood flatten`.

use std::path::PathBuf;

use clap::Args;

use super::online::{self, Online, Target};
use super::output;
use super::rebase::rebase;
use crate::control::wire;
use crate::host::Host;

/// Copy into a layer what it reads from its bases, so that it needs them no more
///
/// The disk reads as before. Interrupted at any moment, it does so, too, and the command can be run
/// again. Zeroes take no space. Its bases are not changed.
///
/// Nobody may use the layer, or, with --control, the server that uses it does this meanwhile.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  sapwood flatten vm1.layer                       in place
  sapwood flatten --control /run/vm1.control      while a virtual machine uses it
  sapwood convert -O layer vm1.layer flat.layer   the same in a new file")]
pub struct Flatten {
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

impl Flatten {
    pub fn run(self, host: &Host) -> anyhow::Result<()> {
        let layer = match self.online.target(self.path.as_ref())? {
            Target::Served(client) => {
                online::run(&client, "/v1/disk/flatten", &wire::Nothing {}, self.quiet)?.0
            }
            Target::Free(path) => {
                online::advise(rebase(host, path, None, self.quiet))?;
                path.display().to_string()
            }
        };
        let said = format!("{layer} needs no base any more\n");
        if self.quiet { Ok(()) } else { output::print(&said) }
    }
}
