//! `sapwood store account`.

use clap::Args;

use super::Whole;
use crate::cli::output::{self, Output};
use crate::cli::{progress, size};
use crate::host::Host;
use crate::volumes::answer::Accounted;
use crate::volumes::upkeep::Account;

/// Find out what every snapshot and volume takes
///
/// sapwood tree and sapwood show say it from then on, and when it was found out. A daemon does this by itself, but
/// not at once.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  sapwood store account /srv/vms && sapwood tree /srv/vms")]
pub struct AccountCommand {
    /// human or json
    #[arg(long, value_enum, value_name = "KIND", default_value_t)]
    output: Output,

    /// Print nothing, and show no bar
    #[arg(short, long)]
    quiet: bool,

    #[command(flatten)]
    whole: Whole,
}

impl AccountCommand {
    pub fn run(self, host: &Host) -> anyhow::Result<()> {
        let found = self.whole.access(host)?.run(Account {}, &progress::bar(0, self.quiet))?;
        match self.output {
            _ if self.quiet => Ok(()),
            Output::Human => output::print(&text(&found)),
            Output::Json => output::print_json(&found),
        }
    }
}

fn text(found: &Accounted) -> String {
    let referenced = found.referenced_bytes.map(size::short);
    format!(
        "{} snapshots and {} volumes: what is sealed holds {}, {} of which differ and take {}\n",
        found.snapshots,
        found.volumes,
        referenced.unwrap_or_else(|| "an unknown amount".to_owned()),
        size::short(found.unique_bytes),
        size::short(found.stored_bytes),
    )
}
