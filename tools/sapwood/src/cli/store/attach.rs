//! `sapwood attach` and `sapwood detach`.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::Args;

use super::DefaultStore;
use crate::cli::output;
use crate::cli::size::Size;
use crate::host::Host;
use crate::volumes::live::{AttachVolume, DetachVolume};

/// Have the daemon of a store serve a volume to virtual machines over vhost-user-blk
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

    /// Queues, each with a thread of its own
    #[arg(long, value_name = "N", default_value_t = 1)]
    #[arg(value_parser = clap::value_parser!(u16).range(1..=256))]
    queues: u16,

    /// Memory for the map of what the volume holds itself, for example 256M
    #[arg(long, value_name = "SIZE", default_value = "64M")]
    map_cache: Size,

    /// Print nothing
    #[arg(short, long)]
    quiet: bool,

    /// The volume
    #[arg(value_name = "VOLUME")]
    name: OsString,
}

/// End the serving of a volume
///
/// Requests are drained, and everything is made durable.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  sapwood detach /srv/vms:web")]
pub struct Detach {
    #[command(flatten)]
    store: DefaultStore,

    /// Print nothing
    #[arg(short, long)]
    quiet: bool,

    /// The volume
    #[arg(value_name = "VOLUME")]
    name: OsString,
}

impl Attach {
    pub fn run(self, host: &Host) -> anyhow::Result<()> {
        let (access, volume) = self.store.volume(host, &self.name)?;
        // The daemon has another folder.
        let socket = self.socket.map(std::path::absolute).transpose()?;
        let attach = AttachVolume {
            volume: volume.clone(),
            socket,
            queues: Some(self.queues),
            map_cache: Some(self.map_cache.0),
        };
        let serving = access.ask(attach)?;
        if self.quiet {
            return Ok(());
        }
        let queues =
            if serving.queues == 1 { "1 queue".to_owned() } else { format!("{} queues", serving.queues) };
        output::print(&format!("Attached {volume} at {} with {queues}\n", serving.socket.display()))
    }
}

impl Detach {
    pub fn run(self, host: &Host) -> anyhow::Result<()> {
        let (access, volume) = self.store.volume(host, &self.name)?;
        access.ask(DetachVolume { volume: volume.clone() })?;
        if self.quiet { Ok(()) } else { output::print(&format!("Detached {volume}\n")) }
    }
}
