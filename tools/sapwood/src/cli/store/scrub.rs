//! `sapwood store scrub`.

use clap::Args;

use super::{EXIT_DAMAGED, Whole};
use crate::cli::output::{self, Output};
use crate::cli::{progress, size};
use crate::host::Host;
use crate::volumes::answer::Scrub;
use crate::volumes::upkeep::ScrubStore;

/// Read everything that a store has written, and compare it with its checksums
///
/// What is damaged is named, and all volumes and snapshots that it touches, with the bytes that cannot be read.
/// Nothing is changed, but for the index, which is made again if it is damaged. Layers of attached volumes are left out.
///
/// Exit codes: 0 sound; 1 could not be done; 2 something is damaged.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  sapwood store scrub /srv/vms
  sapwood store scrub --output=json /srv/vms")]
pub struct ScrubCommand {
    /// human or json
    #[arg(long, value_enum, value_name = "KIND", default_value_t)]
    output: Output,

    /// Print nothing, and show no bar; the exit code tells
    #[arg(short, long)]
    quiet: bool,

    #[command(flatten)]
    whole: Whole,
}

impl ScrubCommand {
    pub fn run(self, host: &Host) -> anyhow::Result<u8> {
        let scrub = self.whole.access(host)?.run(ScrubStore {}, &progress::bar(0, self.quiet))?;
        match self.output {
            _ if self.quiet => {}
            Output::Human => output::print(&text(&scrub))?,
            Output::Json => output::print_json(&scrub)?,
        }
        Ok(if scrub.sound { 0 } else { EXIT_DAMAGED })
    }
}

fn text(scrub: &Scrub) -> String {
    let mut text = String::new();
    for damage in &scrub.damage {
        text.push_str(&format!("damaged: {damage}\n"));
    }
    if scrub.index_mended {
        text.push_str("The index was made again from the packs.\n");
    }
    for touched in &scrub.touched {
        let through = touched.through.as_ref().map(|name| format!(", through {name}")).unwrap_or_default();
        text.push_str(&format!("touched: {}{through}: {}\n", touched.name, touched.why));
        for range in &touched.ranges {
            let about = if touched.exact { "" } else { "within " };
            text.push_str(&format!("  {about}{} bytes at {}\n", range.length, range.start));
        }
        if touched.ranges_left_out > 0 {
            text.push_str(&format!("  and {} ranges more\n", touched.ranges_left_out));
        }
    }
    for path in &scrub.in_use {
        text.push_str(&format!("not read, because it is in use: {}\n", path.display()));
    }
    let verdict = if scrub.sound { "Everything is as it was written" } else { "Something is damaged" };
    text.push_str(&format!(
        "{verdict}: {} packs with {} and {} layers were read\n",
        scrub.packs,
        size::short(scrub.bytes),
        scrub.layers
    ));
    text
}
