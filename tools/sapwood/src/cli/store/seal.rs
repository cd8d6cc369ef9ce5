//! `sapwood store seal`.

use clap::Args;
use sapwood_store::Name;

use super::Scope;
use crate::cli::output::{self, Output};
use crate::cli::{progress, size};
use crate::host::Host;
use crate::volumes::answer::{Sealed, SealedOne};
use crate::volumes::upkeep::{SealAll, SealSnapshot};

/// Move snapshots into packs: checksummed, compressed, and what is stored already only once
///
/// Without a snapshot, all that can be sealed are, the oldest first; with one, it and those that it lies over. A daemon
/// does this by itself.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  sapwood store seal /srv/vms
  sapwood store seal /srv/vms:web@monday")]
pub struct Seal {
    /// human or json
    #[arg(long, value_enum, value_name = "KIND", default_value_t)]
    output: Output,

    /// Print nothing, and show no bar
    #[arg(short, long)]
    quiet: bool,

    #[command(flatten)]
    scope: Scope,
}

impl Seal {
    pub fn run(self, host: &Host) -> anyhow::Result<()> {
        let (access, name) = self.scope.any(host)?;
        let bar = progress::bar(0, self.quiet);
        let sealed = match name {
            None => access.run(SealAll {}, &bar)?,
            Some(name) => {
                let Name::Snapshot(name) = name else { return Err(super::wants_snapshot(&name)) };
                access.run(SealSnapshot { volume: name.volume, snapshot: name.snapshot }, &bar)?
            }
        };
        match self.output {
            _ if self.quiet => Ok(()),
            Output::Human => output::print(&text(&sealed)),
            Output::Json => output::print_json(&sealed),
        }
    }
}

fn text(sealed: &Sealed) -> String {
    let line = |one: &SealedOne| {
        let name = one.name.as_deref().unwrap_or("a deleted snapshot");
        let counts = &one.sealed;
        format!(
            "Sealed {name}: {} were read, {} were stored already, and {} are stored as {}\n",
            size::short(counts.read_bytes),
            size::short(counts.duplicate_bytes),
            size::short(counts.unique_bytes),
            size::short(counts.stored_bytes + counts.node_bytes),
        )
    };
    match sealed.snapshots.is_empty() {
        true => "There is nothing to seal\n".to_owned(),
        false => sealed.snapshots.iter().map(line).collect(),
    }
}
