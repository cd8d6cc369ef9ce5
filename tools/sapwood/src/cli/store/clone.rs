//! `sapwood clone`.

use std::ffi::OsString;

use clap::Args;

use super::DefaultStore;
use crate::cli::output;
use crate::control::wire::Failure;
use crate::host::Host;
use crate::volumes::access::Access;
use crate::volumes::address::{Address, is_same};
use crate::volumes::change::CloneSnapshot;

/// Make new volumes over a snapshot
///
/// Nothing is copied. Of several, all are made or none.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  sapwood clone /srv/vms:debian@12 web
  sapwood clone --store /srv/vms debian@12 web mail dns")]
pub struct Clone {
    #[command(flatten)]
    store: DefaultStore,

    /// Print nothing
    #[arg(short, long)]
    quiet: bool,

    /// The snapshot
    #[arg(value_name = "SNAPSHOT")]
    snapshot: OsString,

    /// Names of the new volumes, in the same store
    #[arg(value_name = "VOLUME", required = true)]
    volumes: Vec<OsString>,
}

impl Clone {
    pub fn run(self, host: &Host) -> anyhow::Result<()> {
        let address = self.store.address(&self.snapshot)?;
        let (store, of) = (address.store.clone(), address.snapshot()?);
        let name = |text: &OsString| {
            let address = Address::parse(text, Some(&store))?;
            if !is_same(&address.store, &store) {
                let text =
                    format!("{}: a clone is made in the store of its snapshot", text.to_string_lossy());
                return Err(Failure::new("invalid", text).into());
            }
            address.volume()
        };
        let names = self.volumes.iter().map(name).collect::<anyhow::Result<Vec<_>>>()?;
        let clone = CloneSnapshot { volume: of.volume.clone(), snapshot: of.snapshot.clone(), names };
        let made = Access::to(*host, &store)?.ask(clone)?.made;
        if self.quiet {
            return Ok(());
        }
        let lines: String = made.iter().map(|made| format!("Cloned {of} to {}\n", made.name)).collect();
        output::print(&lines)
    }
}
