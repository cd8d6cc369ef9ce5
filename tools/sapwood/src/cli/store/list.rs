//! `sapwood list`.

use clap::Args;

use super::{Scope, age, table};
use crate::cli::output::{self, Output};
use crate::cli::size;
use crate::host::Host;
use crate::volumes::answer::{Entries, Entry};
use crate::volumes::look::{ListSnapshots, ListVolumes};

/// List the volumes of a store, or the snapshots of a volume
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  sapwood list /srv/vms
  sapwood list /srv/vms:web
  sapwood list --output=json --store /srv/vms")]
pub struct List {
    /// human or json
    #[arg(long, value_enum, value_name = "KIND", default_value_t)]
    output: Output,

    #[command(flatten)]
    scope: Scope,
}

impl List {
    pub fn run(self, host: &Host) -> anyhow::Result<()> {
        let (access, volume) = self.scope.access(host)?;
        let is_volume = volume.is_some();
        let entries = match volume {
            Some(volume) => access.ask(ListSnapshots { volume })?,
            None => access.ask(ListVolumes {})?,
        };
        match self.output {
            Output::Human => output::print(&text(&entries, is_volume)),
            Output::Json => output::print_json(&entries.entries),
        }
    }
}

fn text(Entries { entries }: &Entries, is_volume: bool) -> String {
    let last = if is_volume { "STATE" } else { "ATTACHED" };
    let count = if is_volume { "PROTECTED" } else { "SNAPSHOTS" };
    let mut lines = vec![["NAME", "SIZE", count, "AGE", last].map(str::to_owned).to_vec()];
    let line = |entry: &Entry| {
        let attached = entry.attached.as_ref().map(|serving| serving.socket.display().to_string());
        let (count, last) = match entry.snapshots {
            Some(snapshots) => (snapshots.to_string(), attached.unwrap_or_default()),
            None => {
                let protected = if entry.protected { "yes" } else { "no" };
                (protected.to_owned(), entry.state.name().to_owned())
            }
        };
        vec![entry.name.clone(), size::short(entry.virtual_size), count, age(entry.created_ms), last]
    };
    lines.extend(entries.iter().map(line));
    table(&lines)
}
