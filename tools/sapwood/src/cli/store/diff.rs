//! `sapwood diff`.

use std::ffi::OsString;

use clap::Args;
use sapwood_store::SnapshotName;

use super::DefaultStore;
use crate::cli::output::{self, Output};
use crate::cli::{progress, size};
use crate::host::Host;
use crate::volumes::access::Access;
use crate::volumes::answer;
use crate::volumes::transfer::DiffSnapshot;

/// Show which bytes of a disk differ between two snapshots
///
/// What is listed is to be copied to make the one of the other: the list of changed blocks for a backup. What was written
/// again as it was is no difference.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  sapwood diff /srv/vms:web@monday @tuesday
  sapwood diff --output=json /srv/vms:web@monday @tuesday
  sapwood diff --all /srv/vms:web@monday                   all that is not zero")]
pub struct Diff {
    #[command(flatten)]
    store: DefaultStore,

    /// Compare with a disk of zeroes
    #[arg(long, conflicts_with = "to")]
    all: bool,

    /// human or json
    #[arg(long, value_enum, value_name = "KIND", default_value_t)]
    output: Output,

    /// The older snapshot
    #[arg(value_name = "FROM")]
    from: OsString,

    /// The newer one, in the same store: @NAME for one of the same volume, or VOLUME@NAME
    #[arg(value_name = "TO", required_unless_present = "all")]
    to: Option<OsString>,
}

impl Diff {
    pub fn run(self, host: &Host) -> anyhow::Result<()> {
        let address = self.store.address(&self.from)?;
        let store = address.store.clone();
        let from = address.snapshot()?;
        let diff = match self.to.as_deref() {
            Some(to) => {
                let to: SnapshotName = super::other_snapshot(&store, &from.volume, to)?
                    .parse()
                    .map_err(crate::control::wire::Failure::from)?;
                DiffSnapshot { volume: to.volume, snapshot: to.snapshot, from: Some(from.to_string()) }
            }
            None => DiffSnapshot { volume: from.volume, snapshot: from.snapshot, from: None },
        };
        let found = Access::to(*host, &store)?.run(diff, &progress::bar(0, false))?;
        match self.output {
            Output::Human => output::print(&text(&found)),
            Output::Json => output::print_json(&found),
        }
    }
}

fn text(diff: &answer::Diff) -> String {
    let mut text = format!("{:<20}LENGTH\n", "START");
    for extent in &diff.extents {
        text.push_str(&format!("{:<20}{}\n", extent.start, extent.length));
    }
    text.push_str(&format!("{} differ\n", size::display(diff.bytes)));
    if diff.from_size != diff.to_size {
        text.push_str(&format!(
            "size: {}, then {}\n",
            size::display(diff.from_size),
            size::display(diff.to_size)
        ));
    }
    text
}
