//! `sapwood check`.

use std::fmt::Write;
use std::path::PathBuf;

use clap::Args;
use sapwood_image::Format;
use sapwood_image::layer;
use sapwood_image::probe::probe;
use sapwood_image::qcow2;
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
/// Of a layer, its records and map and the checksum of every block. Of a qcow2 image, that the header
/// and the tables of the disk and of its snapshots are sound, and that every cluster lies in the file;
/// reference counts, compressed data and other files are not looked at.
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
                // The store checks what is in its packs.
                Format::Raw | Format::Sealed => Ok(None),
                Format::Layer => layer::check(&storage, &io, &path).await.map(|r| Some(Report::Layer(r))),
                Format::Qcow2 => qcow2::check(&storage, &io, &path).await.map(|r| Some(Report::Qcow2(r))),
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
        let (errors, warnings) = report.findings();
        Ok(match (errors.is_empty(), warnings.is_empty()) {
            (false, _) => EXIT_ERRORS,
            (true, false) => EXIT_WARNINGS,
            (true, true) => 0,
        })
    }

    fn json(&self, report: &Report) -> Value {
        let (errors, warnings) = report.findings();
        let mut value = json!({
            "filename": self.path,
            "format": report.format().name(),
            "check-errors": 0,
            "corruptions": errors.len(),
            "errors": errors,
            "warnings": warnings,
        });
        match report {
            Report::Layer(report) => {
                value["allocated-clusters"] = report.mapped_blocks.into();
                value["verified-clusters"] = report.verified_blocks.into();
            }
            Report::Qcow2(report) => {
                value["total-clusters"] = report.total_clusters.into();
                value["allocated-clusters"] = report.allocated_clusters.into();
                value["compressed-clusters"] = report.compressed_clusters.into();
            }
        }
        value
    }
}

/// What a check found, by format.
enum Report {
    Layer(layer::CheckReport),
    Qcow2(qcow2::CheckReport),
}

impl Report {
    fn format(&self) -> Format {
        match self {
            Self::Layer(_) => Format::Layer,
            Self::Qcow2(_) => Format::Qcow2,
        }
    }

    /// Errors and warnings.
    fn findings(&self) -> (&[String], &[String]) {
        match self {
            Self::Layer(report) => (&report.errors, &report.warnings),
            Self::Qcow2(report) => (&report.errors, &report.warnings),
        }
    }

    fn summary(&self) -> String {
        match self {
            Self::Layer(layer::CheckReport { mapped_blocks, verified_blocks, .. }) => {
                format!("{verified_blocks} of {mapped_blocks} mapped blocks verified")
            }
            Self::Qcow2(report) => format!(
                "{} clusters allocated for a disk of {}, {} of them compressed; reference counts not checked",
                report.allocated_clusters, report.total_clusters, report.compressed_clusters
            ),
        }
    }
}

fn text(report: &Report) -> String {
    let mut text = String::new();
    let (errors, warnings) = report.findings();
    let kinds = [("ERROR", errors), ("warning", warnings)];
    for (kind, messages) in kinds {
        for message in messages {
            // Writing to a string does not fail.
            let _ = writeln!(text, "{kind}: {message}");
        }
    }
    text.push_str(&match errors.len() {
        0 => "No errors were found on the image.\n".to_owned(),
        n => format!("{n} errors were found on the image: copy what can be read with sapwood convert.\n"),
    });
    let _ = writeln!(text, "{}", report.summary());
    text
}
