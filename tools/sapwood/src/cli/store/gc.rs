//! `sapwood store gc`.

use clap::Args;

use super::Whole;
use crate::cli::output::{self, Output};
use crate::cli::{progress, size};
use crate::host::Host;
use crate::volumes::answer::Collected;
use crate::volumes::upkeep::Collect;

/// Free what no snapshot needs any more
///
/// Packs of which little is needed are removed, and what of them is needed is written to new ones. Guests go on
/// meanwhile. A daemon does this by itself, but not at once.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  sapwood store gc /srv/vms
  sapwood store gc --live-percent 80 /srv/vms")]
pub struct Gc {
    /// Rewrite packs of which less than this part is needed: more frees more, and writes more
    #[arg(long, value_name = "PERCENT", default_value_t = 50, value_parser = clap::value_parser!(u32).range(0..=100))]
    live_percent: u32,

    /// human or json
    #[arg(long, value_enum, value_name = "KIND", default_value_t)]
    output: Output,

    /// Print nothing, and show no bar
    #[arg(short, long)]
    quiet: bool,

    #[command(flatten)]
    whole: Whole,
}

impl Gc {
    pub fn run(self, host: &Host) -> anyhow::Result<()> {
        let collect = Collect { live_percent: Some(self.live_percent) };
        let collected = self.whole.access(host)?.run(collect, &progress::bar(0, self.quiet))?;
        match self.output {
            _ if self.quiet => Ok(()),
            Output::Human => output::print(&text(&collected)),
            Output::Json => output::print_json(&collected),
        }
    }
}

fn text(collected: &Collected) -> String {
    let mut text = format!(
        "Freed {}: {} packs are gone, what was needed of {} of them takes {} elsewhere\n",
        size::short(collected.bytes_freed),
        collected.packs_dropped,
        collected.packs_rewritten,
        size::short(collected.bytes_written),
    );
    if collected.packs_held > 0 {
        text.push_str(&format!(
            "{} packs are left to the next collection: they are in use\n",
            collected.packs_held
        ));
    }
    for kept in &collected.packs_kept {
        text.push_str(&format!("kept, because it is damaged: {kept}\n"));
    }
    text
}
