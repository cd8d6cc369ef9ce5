//! `sapwood store set`.

use std::str::FromStr;

use clap::Args;

use super::Whole;
use crate::cli::output;
use crate::cli::size::Size;
use crate::host::Host;
use crate::volumes::change::SetSpace;

/// Set the limits of a store's space
///
/// What is not named stays as it is.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  sapwood store set --quota 500G --reserve 20G --watermarks 80,95 /srv/vms
  sapwood store set --quota none /srv/vms")]
#[command(group(clap::ArgGroup::new("limits").args(["quota", "reserve", "watermarks"]).required(true).multiple(true)))]
pub struct Set {
    /// Most bytes that the store may take, or none
    #[arg(long, value_name = "SIZE")]
    quota: Option<Limit>,

    /// Bytes of the file system that are left to others, or none
    #[arg(long, value_name = "SIZE")]
    reserve: Option<Limit>,

    /// Shares of the space, in percent and rising, at which to warn, or none
    #[arg(long, value_name = "PERCENT,...")]
    watermarks: Option<Watermarks>,

    /// Print nothing
    #[arg(short, long)]
    quiet: bool,

    #[command(flatten)]
    whole: Whole,
}

/// A number of bytes, or none.
#[derive(Clone, Copy, Debug)]
struct Limit(Option<u64>);

/// Shares in percent.
#[derive(Clone, Debug)]
struct Watermarks(Vec<u8>);

impl FromStr for Limit {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "none" => Ok(Self(None)),
            _ => text.parse().map(|Size(bytes)| Self(Some(bytes))),
        }
    }
}

impl FromStr for Watermarks {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "none" {
            return Ok(Self(Vec::new()));
        }
        let marks = text.split(',').map(|mark| mark.trim_end_matches('%').parse());
        let marks: Result<_, _> = marks.collect();
        marks.map(Self).map_err(|_| "watermarks are numbers of percent, for example 80,95".to_owned())
    }
}

impl Set {
    pub fn run(self, host: &Host) -> anyhow::Result<()> {
        let set = SetSpace {
            quota: self.quota.map(|Limit(bytes)| bytes),
            reserve: self.reserve.map(|Limit(bytes)| bytes),
            watermarks: self.watermarks.map(|Watermarks(marks)| marks),
        };
        self.whole.access(host)?.ask(set)?;
        if self.quiet { Ok(()) } else { output::print("The limits are set\n") }
    }
}
