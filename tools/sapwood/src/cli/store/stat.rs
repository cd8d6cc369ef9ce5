//! `sapwood store stat`.

use std::fmt::Write;

use clap::Args;

use super::Whole;
use crate::cli::output::{self, Output};
use crate::cli::size;
use crate::host::Host;
use crate::volumes::answer;
use crate::volumes::look::ShowStore;

/// Show what a store holds, and its limits
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
        Ok(0)
    }
}

fn text(stat: &answer::Stat) -> String {
    let mut text = format!("store: {}\nid: {}\n", stat.path.display(), stat.id);
    // Writing to a string does not fail.
    let _ = writeln!(text, "volumes: {}, {} of volumes and snapshots attached", stat.volumes, stat.attached);
    let _ = writeln!(text, "snapshots: {}, {} not sealed yet", stat.snapshots, stat.frozen);
    if stat.nameless > 0 {
        let _ = writeln!(text, "deleted snapshots that others need: {}", stat.nameless);
    }
    let limit = |bytes: Option<u64>| bytes.map_or_else(|| "none".to_owned(), size::display);
    let _ = writeln!(text, "quota: {}\nreserve: {}", limit(stat.quota), limit(stat.reserve));
    let marks: Vec<String> = stat.watermarks.iter().map(|mark| format!("{mark} %")).collect();
    let marks = if marks.is_empty() { "none".to_owned() } else { marks.join(", ") };
    let _ = writeln!(text, "watermarks: {marks}");
    text
}
