//! `sapwood store check`.

use clap::Args;

use super::stat::EXIT_WATERMARK;
use super::{EXIT_DAMAGED, Whole};
use crate::cli::output::{self, Output};
use crate::cli::progress;
use crate::host::Host;
use crate::volumes::answer::Checked;
use crate::volumes::upkeep::CheckStore;

/// Check that a store's catalog agrees with itself and with the files, without reading data
///
/// sapwood store scrub reads the data, too.
///
/// Exit codes: 0 sound; 1 could not be done; 2 something is missing or wrong; 3 not that, but leftovers of a
/// crash, which do no harm, or a watermark is reached.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  sapwood store check /srv/vms
  sapwood store check --output=json /srv/vms")]
pub struct CheckCommand {
    /// human or json
    #[arg(long, value_enum, value_name = "KIND", default_value_t)]
    output: Output,

    /// Print nothing; the exit code tells
    #[arg(short, long)]
    quiet: bool,

    #[command(flatten)]
    whole: Whole,
}

impl CheckCommand {
    pub fn run(self, host: &Host) -> anyhow::Result<u8> {
        let checked = self.whole.access(host)?.run(CheckStore {}, &progress::bar(0, self.quiet))?;
        match self.output {
            _ if self.quiet => {}
            Output::Human => output::print(&text(&checked))?,
            Output::Json => output::print_json(&checked)?,
        }
        Ok(if checked.problems.iter().any(|problem| problem.damage) {
            EXIT_DAMAGED
        } else if !checked.problems.is_empty() || checked.watermark.is_some() {
            EXIT_WATERMARK
        } else {
            0
        })
    }
}

fn text(checked: &Checked) -> String {
    let mut text = String::new();
    for problem in &checked.problems {
        let kind = if problem.damage { "ERROR" } else { "leftover" };
        text.push_str(&format!("{kind}: {}: {}\n", problem.subject, problem.text));
    }
    if let Some(mark) = checked.watermark {
        text.push_str(&format!("warning: the watermark of {mark} % is reached\n"));
    }
    let damaged = checked.problems.iter().filter(|problem| problem.damage).count();
    text.push_str(&match damaged {
        0 => "No errors were found in the store\n".to_owned(),
        n => format!("{n} errors were found in the store\n"),
    });
    text
}
