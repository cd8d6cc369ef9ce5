//! `sapwood import`.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use clap::Args;
use sapwood_image::Format;
use sapwood_store::{Name, SnapshotName};

use super::DefaultStore;
use crate::cli::output::{self, Output};
use crate::cli::reading::Reading;
use crate::cli::{progress, size};
use crate::host::Host;
use crate::volumes::access::Access;
use crate::volumes::answer::Imported;
use crate::volumes::transfer;

/// The snapshot of an imported volume, unless another name is given.
const SNAPSHOT: &str = "imported";

/// Make a volume of a disk that is not in the store
///
/// The disk is sealed on the way in: what the store has already is not stored again, and the rest is compressed. It
/// becomes a snapshot, and the volume lies over that. What the disk reads from its bases is imported, too.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  sapwood import debian.qcow2 /srv/vms:debian
  sapwood import -f raw debian.raw /srv/vms:debian@12")]
pub struct Import {
    #[command(flatten)]
    store: DefaultStore,

    /// Format of the disk; needed unless it is a layer or qcow2
    #[arg(short, long, value_name = "FORMAT")]
    format: Option<Format>,

    #[command(flatten)]
    reading: Reading,

    /// Threads that hash and compress; by default as many as there are processors, at most 8
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=8))]
    threads: Option<u16>,

    /// human or json
    #[arg(long, value_enum, value_name = "KIND", default_value_t)]
    output: Output,

    /// Print nothing, and show no bar
    #[arg(short, long)]
    quiet: bool,

    /// The disk; it is not changed
    #[arg(value_name = "DISK")]
    disk: PathBuf,

    /// The new volume, and the name of its snapshot; that is `imported` unless it is said
    #[arg(value_name = "VOLUME[@SNAPSHOT]")]
    name: OsString,
}

impl Import {
    pub fn run(self, host: &Host) -> anyhow::Result<()> {
        let address = self.store.address(&self.name)?;
        let access = Access::to(*host, &address.store)?;
        let SnapshotName { volume, snapshot } = match address.name {
            Name::Volume(volume) => SnapshotName { volume, snapshot: SNAPSHOT.to_owned() },
            Name::Snapshot(name) => name,
        };
        let below = self.reading.open(None, true).below;
        let import = transfer::Import {
            volume,
            snapshot,
            // The daemon has another folder.
            path: std::path::absolute(&self.disk)?,
            format: self.format.map(|format| format.to_string()),
            read_snapshot: below.snapshot,
            allow_backing: below.allow_backing,
            backing_format: below.backing_format.map(|format| format.to_string()),
            threads: self.threads,
        };
        let imported = access.run(import, &progress::bar(0, self.quiet))?;
        match self.output {
            _ if self.quiet => Ok(()),
            Output::Human => output::print(&text(&self.disk, &imported)),
            Output::Json => output::print_json(&imported),
        }
    }
}

fn text(disk: &Path, imported: &Imported) -> String {
    let counts = &imported.sealed;
    format!(
        "Imported {} as {}: {}, of which {} were read, {} were stored already, and {} are stored as {}\n",
        disk.display(),
        imported.name,
        size::short(imported.virtual_size),
        size::short(counts.read_bytes),
        size::short(counts.duplicate_bytes),
        size::short(counts.unique_bytes),
        size::short(counts.stored_bytes + counts.node_bytes),
    )
}
