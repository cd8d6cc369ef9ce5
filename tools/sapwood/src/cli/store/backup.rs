//! `sapwood store backup`.

use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::Args;

use super::DefaultStore;
use crate::cli::output::{self, Output};
use crate::cli::{progress, size};
use crate::host::Host;
use crate::volumes::access::Access;
use crate::volumes::address::default_store;
use crate::volumes::answer::BackedUp;
use crate::volumes::upkeep::BackUp;

/// Copy a store to another directory, while it is used
///
/// The copy is a store with the same id and the same snapshots. What was written to a volume since its newest snapshot is not in it:
/// take a snapshot first. What was cut off is no store, and can be begun again.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  sapwood store backup --store /srv/vms /mnt/vms-monday
  SAPWOOD_STORE=/srv/vms sapwood store backup --output=json /mnt/vms-monday")]
pub struct BackupCommand {
    #[command(flatten)]
    store: DefaultStore,

    /// human or json
    #[arg(long, value_enum, value_name = "KIND", default_value_t)]
    output: Output,

    /// Print nothing
    #[arg(short, long)]
    quiet: bool,

    /// The directory of the copy, which is empty or does not exist
    #[arg(value_name = "TO")]
    to: PathBuf,
}

impl BackupCommand {
    pub fn run(self, host: &Host) -> anyhow::Result<()> {
        let root = default_store(self.store.given())?;
        // The daemon has another folder.
        let path = std::path::absolute(&self.to).with_context(|| self.to.display().to_string())?;
        let done = Access::to(*host, &root)?.run(BackUp { path }, &progress::bar(0, self.quiet))?;
        match self.output {
            _ if self.quiet => Ok(()),
            Output::Human => output::print(&text(&root, &self.to, &done)),
            Output::Json => output::print_json(&done),
        }
    }
}

fn text(root: &Path, to: &Path, done: &BackedUp) -> String {
    let mut text = format!(
        "Backed up {} to {}: {} files with {}\n",
        root.display(),
        to.display(),
        done.files,
        size::short(done.bytes)
    );
    for volume in &done.without_heads {
        text.push_str(&format!(
            "{volume} is as in its newest snapshot: what was written since is not in the copy\n"
        ));
    }
    text
}
