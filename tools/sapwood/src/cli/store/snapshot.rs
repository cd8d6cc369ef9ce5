//! `sapwood snapshot`.

use std::ffi::OsString;

use clap::Args;

use super::DefaultStore;
use crate::cli::output;
use crate::host::Host;
use crate::volumes::access::Access;
use crate::volumes::live::TakeSnapshot;

/// Take a snapshot of a volume
///
/// The volume may be attached: its guest goes on, and the snapshot is the disk as it was at one moment.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  sapwood snapshot /srv/vms:web@monday")]
pub struct Snapshot {
    #[command(flatten)]
    store: DefaultStore,

    /// Print nothing
    #[arg(short, long)]
    quiet: bool,

    /// The snapshot that is to be
    #[arg(value_name = "SNAPSHOT")]
    name: OsString,
}

impl Snapshot {
    pub fn run(self, host: &Host) -> anyhow::Result<()> {
        let address = self.store.address(&self.name)?;
        let access = Access::to(*host, &address.store)?;
        let name = address.snapshot()?;
        let made = access.ask(TakeSnapshot { volume: name.volume, name: name.snapshot })?;
        if self.quiet { Ok(()) } else { output::print(&format!("Took {}\n", made.name)) }
    }
}
