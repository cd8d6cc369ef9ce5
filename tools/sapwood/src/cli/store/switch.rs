//! `sapwood switch` and `sapwood rollback`.

use std::ffi::OsString;

use clap::Args;

use super::DefaultStore;
use crate::cli::output;
use crate::host::Host;
use crate::volumes::access::Access;
use crate::volumes::change;

/// Let a volume go on from a snapshot, of itself or of another volume
///
/// Nobody may have the volume attached. What was written to it since its last snapshot is thrown away, which has to
/// be asked for.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  sapwood switch /srv/vms:web @monday
  sapwood switch --discard /srv/vms:web debian@12")]
pub struct Switch {
    #[command(flatten)]
    store: DefaultStore,

    /// Throw away what was written since the last snapshot
    #[arg(long)]
    discard: bool,

    /// Print nothing
    #[arg(short, long)]
    quiet: bool,

    /// The volume
    #[arg(value_name = "VOLUME")]
    volume: OsString,

    /// The snapshot, in the same store: @NAME for one of the volume itself, or VOLUME@NAME
    #[arg(value_name = "SNAPSHOT")]
    to: OsString,
}

/// Let a volume go back to the newest snapshot that it lies over
///
/// Nobody may have the volume attached. What was written to it since is thrown away, which has to be asked
/// for.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  sapwood rollback --discard /srv/vms:web")]
pub struct Rollback {
    #[command(flatten)]
    store: DefaultStore,

    /// Throw away what was written since
    #[arg(long)]
    discard: bool,

    /// Print nothing
    #[arg(short, long)]
    quiet: bool,

    /// The volume
    #[arg(value_name = "VOLUME")]
    volume: OsString,
}

impl Switch {
    pub fn run(self, host: &Host) -> anyhow::Result<()> {
        let address = self.store.address(&self.volume)?;
        let (store, volume) = (address.store.clone(), address.volume()?);
        let to = super::other_snapshot(&store, &volume, &self.to)?;
        let switch = change::Switch { volume: volume.clone(), to, discard: self.discard };
        let switched = Access::to(*host, &store)?.ask(switch)?;
        say(self.quiet, &volume, &switched.to)
    }
}

impl Rollback {
    pub fn run(self, host: &Host) -> anyhow::Result<()> {
        let (access, volume) = self.store.volume(host, &self.volume)?;
        let switched = access.ask(change::Rollback { volume: volume.clone(), discard: self.discard })?;
        say(self.quiet, &volume, &switched.to)
    }
}

fn say(quiet: bool, volume: &str, to: &str) -> anyhow::Result<()> {
    if quiet { Ok(()) } else { output::print(&format!("{volume} goes on from {to}\n")) }
}
