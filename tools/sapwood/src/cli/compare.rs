//! `sapwood compare`.

use std::path::PathBuf;

use clap::Args;
use sapwood_image::compare::compare;
use sapwood_image::{Format, OpenDisk};

use super::reading::Backing;
use super::{output, progress};
use crate::host::Host;

/// Exit code: the disks differ.
const EXIT_DIFFERENT: u8 = 1;
/// Exit code: the comparison could not be done.
pub const EXIT_FAILED: u8 = 2;

/// Compare what two disks hold
///
/// A disk that is shorter counts as if it ended in zeroes, unless -s is given.
///
/// Exit codes: 0 identical; 1 different; 2 the comparison could not be done.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  sapwood compare -F raw vm1.layer vm1.raw
  sapwood compare -s vm1.layer vm2.layer")]
pub struct Compare {
    /// Format of the first disk; needed unless it is a layer or qcow2
    #[arg(short, long, value_name = "FORMAT")]
    format: Option<Format>,

    /// Format of the second disk; needed unless it is a layer or qcow2
    #[arg(short = 'F', long, value_name = "FORMAT")]
    second_format: Option<Format>,

    /// Read this snapshot of the first disk, a qcow2 image, by id or name
    #[arg(short = 'l', long, value_name = "SNAPSHOT")]
    snapshot: Option<String>,

    /// The same of the second disk
    #[arg(long, value_name = "SNAPSHOT")]
    second_snapshot: Option<String>,

    #[command(flatten)]
    backing: Backing,

    /// Disks of different sizes differ
    #[arg(short, long)]
    strict: bool,

    /// Show a bar on a terminal; that is the default
    #[arg(short, long, hide = true)]
    progress: bool,

    /// Print nothing; the exit code tells
    #[arg(short, long)]
    quiet: bool,

    /// The first disk
    #[arg(value_name = "DISK1")]
    first: PathBuf,

    /// The second disk
    #[arg(value_name = "DISK2")]
    second: PathBuf,
}

impl Compare {
    pub fn run(self, host: &Host) -> anyhow::Result<u8> {
        let open = |format, snapshot: &Option<String>| OpenDisk {
            format,
            read_only: true,
            below: self.backing.below(snapshot.clone()),
            ..OpenDisk::default()
        };
        let mut a = host.side(&self.first, open(self.format, &self.snapshot))?;
        let mut b = host.side(&self.second, open(self.second_format, &self.second_snapshot))?;
        let (size_a, size_b) = (a.size(), b.size());
        if self.strict && size_a != size_b {
            return self.answer(EXIT_DIFFERENT, "Strict mode: Image size mismatch!\n");
        }
        let bar = progress::bar(size_a.max(size_b), self.quiet);
        let difference = compare(&mut a, &mut b, &mut |done| bar.set_position(done))?;
        bar.finish_and_clear();
        a.close()?;
        b.close()?;
        if size_a != size_b && !self.quiet {
            output::print("Warning: Image size mismatch!\n")?;
        }
        match difference {
            None => self.answer(0, "Images are identical.\n"),
            Some(at) => self.answer(EXIT_DIFFERENT, &format!("Content mismatch at offset {at}!\n")),
        }
    }

    fn answer(&self, code: u8, text: &str) -> anyhow::Result<u8> {
        if !self.quiet {
            output::print(text)?;
        }
        Ok(code)
    }
}
