//! `sapwood rename`.

use std::ffi::OsString;

use clap::Args;
use sapwood_store::{Name, SnapshotName};

use super::DefaultStore;
use crate::cli::output;
use crate::host::Host;
use crate::volumes::access::Access;
use crate::volumes::address::Address;
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

    /// The new name; of a snapshot without that of its volume, or all of it
    #[arg(value_name = "NEW")]
    to: OsString,
}

impl Rename {
    pub fn run(self, host: &Host) -> anyhow::Result<()> {
        let address = self.store.address(&self.name)?;
        let (from, to) = (address.name.to_string(), Address::name_in(&address.store, &self.to)?);
        let access = Access::to(*host, &address.store)?;
        let said = match address.name {
            Name::Volume(volume) => {
                access.ask(RenameVolume { volume, to: to.clone() })?;
                format!("Renamed {from} to {to}\n")
            }
            Name::Snapshot(SnapshotName { volume, snapshot }) => {
                let own = to.strip_prefix(&volume).unwrap_or(&to).strip_prefix('@');
                let to = own.map_or(to.clone(), str::to_owned);
                access.ask(RenameSnapshot { volume: volume.clone(), snapshot, to: to.clone() })?;
                format!("Renamed {from} to {volume}@{to}\n")
            }
        };
        if self.quiet { Ok(()) } else { output::print(&said) }
    }
}
