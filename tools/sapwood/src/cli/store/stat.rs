//! `sapwood store stat`.

use std::fmt::Write;

use clap::Args;

use super::{Whole, age};
use crate::cli::output::{self, Output};
use crate::cli::size;
use crate::host::Host;
use crate::volumes::answer;
use crate::volumes::look::ShowStore;

/// Exit code: a watermark is reached.
pub const EXIT_WATERMARK: u8 = 3;

/// Show what a store holds and takes, and its limits
///
/// Exit codes: 0 done; 1 could not be done; 3 a watermark (sapwood store set) is reached.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  sapwood store stat /srv/vms
  sapwood store stat --output=json /srv/vms")]
pub struct Stat {
    /// human or json
    #[arg(long, value_enum, value_name = "KIND", default_value_t)]
    output: Output,

    #[command(flatten)]
    whole: Whole,
}

impl Stat {
    pub fn run(self, host: &Host) -> anyhow::Result<u8> {
        let stat = self.whole.access(host)?.ask(ShowStore {})?;
        match self.output {
            Output::Human => output::print(&text(&stat))?,
            Output::Json => output::print_json(&stat)?,
        }
        Ok(if stat.watermark.is_some() { EXIT_WATERMARK } else { 0 })
    }
}

fn text(stat: &answer::Stat) -> String {
    let mut text = String::new();
    write(&mut text, stat).expect("writing to a string does not fail");
    text
}

fn write(text: &mut String, stat: &answer::Stat) -> std::fmt::Result {
    writeln!(text, "store: {}\nid: {}", stat.path.display(), stat.id)?;
    writeln!(text, "volumes: {}", stat.volumes)?;
    let snapshots = stat.bare + stat.frozen + stat.sealed - stat.nameless;
    writeln!(text, "snapshots: {snapshots} ({} of all that are kept are not sealed yet)", stat.frozen)?;
    if stat.nameless > 0 {
        writeln!(text, "deleted snapshots that others need: {}", stat.nameless)?;
    }
    writeln!(text, "attached: {}", stat.attached)?;
    let (layers, packs) = (size::short(stat.layer_bytes), size::short(stat.pack_bytes));
    let others = size::short(stat.index_bytes + stat.catalog_bytes);
    let all = stat.layer_bytes + stat.pack_bytes + stat.index_bytes + stat.catalog_bytes;
    writeln!(
        text,
        "takes: {} (layers {layers}, packs {packs}, index and catalog {others})",
        size::short(all)
    )?;
    writeln!(text, "needed of packs: {}", size::short(stat.live_bytes))?;
    if let Some(ratio) = stat.compression {
        writeln!(text, "compression: {ratio:.2}")?;
    }
    if let (Some(ratio), Some(then)) = (stat.deduplication, stat.account_ms) {
        writeln!(text, "deduplication: {ratio:.2} ({} ago)", age(then))?;
    }
    let limit = |bytes: Option<u64>| bytes.map_or_else(|| "none".to_owned(), size::display);
    writeln!(text, "quota: {}\nreserve: {}", limit(stat.quota), limit(stat.reserve))?;
    let marks: Vec<String> = stat.watermarks.iter().map(|mark| format!("{mark} %")).collect();
    let marks = if marks.is_empty() { "none".to_owned() } else { marks.join(", ") };
    writeln!(text, "watermarks: {marks}")?;
    if let (Some(left), Some(full)) = (stat.left_bytes, stat.full_percent) {
        writeln!(text, "left: {}, {full} % are taken", size::short(left))?;
    }
    if let Some(mark) = stat.watermark {
        writeln!(text, "warning: the watermark of {mark} % is reached")?;
    }
    Ok(())
}
