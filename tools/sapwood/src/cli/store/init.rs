//! `sapwood store init`.

use clap::Args;
use sapwood_blockdev::engine::BlockingEngine;
use sapwood_blockdev::io::block_on;
use sapwood_store::StoreOptions;
use sapwood_store::directory::init;

use super::Whole;
use crate::cli::output;
use crate::host::Host;
use crate::volumes::service::private;

/// Make a store
///
/// The directory must not exist, or be empty.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  sapwood store init /srv/vms")]
pub struct Init {
    /// Print nothing
    #[arg(short, long)]
    quiet: bool,

    #[command(flatten)]
    whole: Whole,
}

impl Init {
    pub fn run(self, host: &Host) -> anyhow::Result<()> {
        private();
        let (root, io, storage) = (self.whole.root()?, host.io()?, host.storage());
        let engine = BlockingEngine::new()?;
        let making = {
            let (root, io) = (root.clone(), io.clone());
            async move { init(&storage, &io, engine, &root, &StoreOptions::default()).await }
        };
        let id = block_on(&io, making)?;
        if self.quiet {
            return Ok(());
        }
        output::print(&format!("Made the store {} ({id})\n", root.display()))
    }
}
