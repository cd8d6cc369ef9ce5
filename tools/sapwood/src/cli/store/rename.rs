//! `sapwood rename`.

use std::ffi::OsString;

use clap::Args;
use sapwood_store::{Name, SnapshotName};

use super::DefaultStore;
use crate::cli::output;
use crate::host::Host;
use crate::volumes::access::Access;
use crate::volumes::change::{RenameSnapshot, RenameVolume};

/// Give a volume or snapshot another name
///
/// A volume may be attached. Its snapshots stay its own.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  sapwood rename /srv/vms:web www
  sapwood rename /srv/vms:web@monday before-upgrade")]
pub struct Rename {
    #[command(flatten)]
    store: DefaultStore,

    /// Print nothing
    #[arg(short, long)]
    quiet: bool,

    /// The volume or snapshot
    #[arg(value_name = "NAME")]
    name: OsString,

    /// The new name; of a snapshot without that of its volume
    #[arg(value_name = "NEW")]
    to: String,
}

impl Rename {
    pub fn run(self, host: &Host) -> anyhow::Result<()> {
        let address = self.store.address(&self.name)?;
        let access = Access::to(*host, &address.store)?;
        let (from, to) = (address.name.to_string(), self.to);
        let said = match address.name {
            Name::Volume(volume) => {
                access.ask(RenameVolume { volume, to: to.clone() })?;
                format!("Renamed {from} to {to}\n")
            }
            Name::Snapshot(SnapshotName { volume, snapshot }) => {
                access.ask(RenameSnapshot { volume: volume.clone(), snapshot, to: to.clone() })?;
                format!("Renamed {from} to {volume}@{to}\n")
            }
        };
        if self.quiet { Ok(()) } else { output::print(&said) }
    }
}
