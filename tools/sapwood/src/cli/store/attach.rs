//! `sapwood attach` and `sapwood detach`.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::Args;
use sapwood_store::{Name, SnapshotName};

use super::DefaultStore;
use crate::cli::output;
use crate::cli::size::Size;
use crate::host::Host;
use crate::volumes::access::Access;
use crate::volumes::live::{AttachSnapshot, AttachVolume, DetachSnapshot, DetachVolume};

/// Have the daemon of a store serve a volume, or a snapshot for reading, over vhost-user-blk
///
/// When the daemon ends, the next one serves it again, at the same socket, until it is detached. If it could not, what is
/// not given here is as it was.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  sapwood attach /srv/vms:web
  sapwood attach /srv/vms:web --socket /run/vms/web.sock --queues 4")]
pub struct Attach {
    #[command(flatten)]
    store: DefaultStore,

    /// Where the virtual machine connects; by default NAME.sock in the daemon's folder for sockets
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,

    /// Queues, each with a thread of its own [default: 1]
    #[arg(long, value_name = "N")]
    #[arg(value_parser = clap::value_parser!(u16).range(1..=256))]
    queues: Option<u16>,

    /// Memory for the map of what the volume holds itself, for example 256M [default: 64M]
    #[arg(long, value_name = "SIZE")]
    map_cache: Option<Size>,

    /// Print nothing
    #[arg(short, long)]
    quiet: bool,

    /// The volume or snapshot
    #[arg(value_name = "NAME")]
    name: OsString,
}

/// End the serving of a volume or snapshot
///
/// Requests are drained, and everything is made durable. The next daemon does not attach it again.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  sapwood detach /srv/vms:web")]
pub struct Detach {
    #[command(flatten)]
    store: DefaultStore,

    /// Print nothing
    #[arg(short, long)]
    quiet: bool,

    /// The volume or snapshot
    #[arg(value_name = "NAME")]
    name: OsString,
}

impl Attach {
    pub fn run(self, host: &Host) -> anyhow::Result<()> {
        let address = self.store.address(&self.name)?;
        let access = Access::to(*host, &address.store)?;
        let shown = address.name.to_string();
        // The daemon has another folder.
        let socket = self.socket.map(std::path::absolute).transpose()?;
        let (queues, map_cache) = (self.queues, self.map_cache.map(|size| size.0));
        let serving = match address.name {
            Name::Volume(volume) => {
                access.ask(AttachVolume { volume, socket, queues, map_cache, transient: false })?
            }
            Name::Snapshot(SnapshotName { volume, snapshot }) => {
                access.ask(AttachSnapshot { volume, snapshot, socket, queues })?
            }
        };
        if self.quiet {
            return Ok(());
        }
        let queues =
            if serving.queues == 1 { "1 queue".to_owned() } else { format!("{} queues", serving.queues) };
        output::print(&format!("Attached {shown} at {} with {queues}\n", serving.socket.display()))
    }
}

impl Detach {
    pub fn run(self, host: &Host) -> anyhow::Result<()> {
        let address = self.store.address(&self.name)?;
        let access = Access::to(*host, &address.store)?;
        let shown = address.name.to_string();
        match address.name {
            Name::Volume(volume) => access.ask(DetachVolume { volume })?,
            Name::Snapshot(SnapshotName { volume, snapshot }) => {
                access.ask(DetachSnapshot { volume, snapshot })?
            }
        };
        if self.quiet { Ok(()) } else { output::print(&format!("Detached {shown}\n")) }
    }
}
