//! `sapwood check`.

use std::fmt::Write;
use std::path::PathBuf;

use clap::Args;
use sapwood_image::Format;
use sapwood_image::layer::{CheckReport, check};
use sapwood_image::probe::probe;
use serde_json::{Value, json};

use super::output::{self, Output};
use crate::host::Host;

/// Exit code: there are errors.
const EXIT_ERRORS: u8 = 2;
/// Exit code: no errors, but something to know.
const EXIT_WARNINGS: u8 = 3;
/// Exit code: the format has nothing that could be checked.
const EXIT_NO_CHECKS: u8 = 63;

/// Check that a disk's own records agree with each other
///
/// Exit codes: 0 sound; 1 the check could not be done; 2 errors; 3 no errors, but warnings; 63 the
/// format has nothing to check (raw).
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  sapwood check vm1.layer
  sapwood check --output=json vm1.layer")]
pub struct Check {
    /// Format of the disk
    #[arg(short, long, value_name = "FORMAT")]
    format: Option<Format>,

    /// human or json
    #[arg(long, value_enum, value_name = "KIND", default_value_t)]
    output: Output,

    /// Print nothing; the exit code tells
    #[arg(short, long)]
    quiet: bool,

    /// The disk
    #[arg(value_name = "DISK")]
    path: PathBuf,
}

impl Check {
    pub fn run(self, host: &Host) -> anyhow::Result<u8> {
        let (storage, path, format) = (host.storage(), self.path.clone(), self.format);
        let report = host.block_on(move |io| async move {
            let format = match format {
                Some(format) => format,
                None => probe(&storage, &io, &path).await?.format(&path)?,
            };
            match format {
                Format::Raw => Ok(None),
                Format::Layer => check(&storage, &io, &path).await.map(Some),
            }
        })?;
        let Some(report) = report else {
            eprintln!("sapwood: {}: a raw disk has nothing that could be checked", self.path.display());
            return Ok(EXIT_NO_CHECKS);
        };
        match self.output {
            _ if self.quiet => {}
            Output::Human => output::print(&text(&report))?,
            Output::Json => output::print_json(&self.json(&report))?,
        }
        Ok(match (report.errors.is_empty(), report.warnings.is_empty()) {
            (false, _) => EXIT_ERRORS,
            (true, false) => EXIT_WARNINGS,
            (true, true) => 0,
        })
    }

    fn json(&self, report: &CheckReport) -> Value {
        json!({
            "filename": self.path,
            "format": Format::Layer.name(),
            "check-errors": 0,
            "corruptions": report.errors.len(),
            "errors": report.errors,
            "warnings": report.warnings,
            "allocated-clusters": report.mapped_blocks,
            "verified-clusters": report.verified_blocks,
        })
    }
}

fn text(report: &CheckReport) -> String {
    let mut text = String::new();
    let kinds = [("ERROR", &report.errors), ("warning", &report.warnings)];
    for (kind, messages) in kinds {
        for message in messages {
            // Writing to a string does not fail.
            let _ = writeln!(text, "{kind}: {message}");
        }
    }
    text.push_str(&match report.errors.len() {
        0 => "No errors were found on the image.\n".to_owned(),
        n => format!("{n} errors were found on the image: copy what can be read with sapwood convert.\n"),
    });
    let CheckReport { mapped_blocks, verified_blocks, .. } = report;
    let _ = writeln!(text, "{verified_blocks} of {mapped_blocks} mapped blocks verified");
    text
}
