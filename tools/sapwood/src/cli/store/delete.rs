//! `sapwood delete`.

use std::ffi::OsString;

use clap::Args;
use sapwood_store::Name;

use super::DefaultStore;
use crate::cli::output;
use crate::host::Host;
use crate::volumes::access::Access;
use crate::volumes::change::{DeleteSnapshot, DeleteVolume};

/// Delete volumes and snapshots
///
/// What was made over a snapshot stays, with all that it needs. The name is gone at once, the space when
/// nothing needs it any more.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  sapwood delete /srv/vms:web@monday
  sapwood delete --with-snapshots /srv/vms:web")]
pub struct Delete {
    #[command(flatten)]
    store: DefaultStore,

    /// Delete the snapshots of a volume with it
    #[arg(long)]
    with_snapshots: bool,

    /// Print nothing
    #[arg(short, long)]
    quiet: bool,

    /// What to delete, one after the other
    #[arg(value_name = "NAME", required = true)]
    names: Vec<OsString>,
}

impl Delete {
    pub fn run(self, host: &Host) -> anyhow::Result<()> {
        for text in &self.names {
            let address = self.store.address(text)?;
            let access = Access::to(*host, &address.store)?;
            let shown = address.name.to_string();
            match address.name {
                Name::Volume(volume) => {
                    access.ask(DeleteVolume { volume, with_snapshots: self.with_snapshots })?
                }
                Name::Snapshot(name) => {
                    access.ask(DeleteSnapshot { volume: name.volume, snapshot: name.snapshot })?
                }
            };
            if !self.quiet {
                output::print(&format!("Deleted {shown}\n"))?;
            }
        }
        Ok(())
    }
}
