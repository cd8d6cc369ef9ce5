//! `sapwood export`.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::Args;
use sapwood_store::SnapshotName;

use super::DefaultStore;
use crate::cli::output::{self, Output};
use crate::cli::{progress, size};
use crate::host::Host;
use crate::volumes::access::Access;
use crate::volumes::answer::Exported;
use crate::volumes::transfer;

/// Write a snapshot to one file, an archive, which any store can import
///
/// With --since only what differs from another snapshot is written: whoever imports that has to have the other one. A snapshot
/// that is not sealed is sealed first.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  sapwood export /srv/vms:web@monday web.sapwood
  sapwood export /srv/vms:web@tuesday --since @monday web-2.sapwood")]
pub struct Export {
    #[command(flatten)]
    store: DefaultStore,

    /// Leave out what is as in this snapshot of the same store: @NAME for one of the same volume, or VOLUME@NAME
    #[arg(long, value_name = "SNAPSHOT")]
    since: Option<OsString>,

    /// human or json
    #[arg(long, value_enum, value_name = "KIND", default_value_t)]
    output: Output,

    /// Print nothing, and show no bar
    #[arg(short, long)]
    quiet: bool,

    /// The snapshot
    #[arg(value_name = "SNAPSHOT")]
    snapshot: OsString,

    /// The file, which must not exist
    #[arg(value_name = "FILE")]
    file: PathBuf,
}

impl Export {
    pub fn run(self, host: &Host) -> anyhow::Result<()> {
        let address = self.store.address(&self.snapshot)?;
        let store = address.store.clone();
        let SnapshotName { volume, snapshot } = address.snapshot()?;
        let since = self.since.as_deref();
        let since = since.map(|since| super::other_snapshot(&store, &volume, since)).transpose()?;
        // The daemon has another folder.
        let path = std::path::absolute(&self.file).with_context(|| self.file.display().to_string())?;
        let export = transfer::Export { volume, snapshot, path, since };
        let exported = Access::to(*host, &store)?.run(export, &progress::bar(0, self.quiet))?;
        match self.output {
            _ if self.quiet => Ok(()),
            Output::Human => output::print(&text(&self.file, &exported)),
            Output::Json => output::print_json(&exported),
        }
    }
}

fn text(file: &Path, exported: &Exported) -> String {
    let what = if exported.base.is_some() { ", an increment" } else { "" };
    format!("Exported {} to {}: {}{what}\n", exported.name, file.display(), size::short(exported.bytes))
}
