//! `sapwood compact`.

use std::path::PathBuf;

use clap::Args;
use sapwood_image::layer::{self, Tuning};

use super::output;
use super::progress;
use super::size;
use crate::host::Host;

/// Lay what was written scattered in the order of the disk again
///
/// Sequential reads of a layer that was filled at random become as fast as if it had been written in
/// order, and the space of what was overwritten is given back. The disk reads as before. Interrupted at
/// any moment, what was done is kept, and the command can be run again.
///
/// Nobody may use the layer. This writes it, so that layers over it refuse it until they are rebased
/// with -u. Meanwhile the file may grow by an eighth of what the layer holds, and 48 segments.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  sapwood compact vm1.layer      with a bar, then what was gained
  sapwood compact -q vm1.layer   silently")]
pub struct Compact {
    /// Show a bar on a terminal; that is the default
    #[arg(short, long, hide = true)]
    progress: bool,

    /// Print nothing
    #[arg(short, long)]
    quiet: bool,

    /// The layer
    #[arg(value_name = "LAYER")]
    path: PathBuf,
}

impl Compact {
    pub fn run(self, host: &Host) -> anyhow::Result<()> {
        let bar = progress::bar(0, self.quiet);
        let (storage, path, shown) = (host.storage(), self.path.clone(), bar.clone());
        let compacted = host.block_on(|io| async move {
            let mut report = |done, all| progress::show(&shown, done, all);
            layer::compact(&storage, &io, &path, Tuning::default(), &mut report).await
        })?;
        bar.finish_and_clear();
        if self.quiet {
            return Ok(());
        }
        let mut said = format!(
            "{} lies in {} pieces now, which were {}: {} of data moved, {} given back\n",
            self.path.display(),
            compacted.runs_after,
            compacted.runs_before,
            size::display(compacted.moved),
            size::display(compacted.used_before.saturating_sub(compacted.used_after)),
        );
        if compacted.damaged > 0 {
            let left = size::display(compacted.damaged);
            said += &format!("{left} beside damaged data were left where they are; run sapwood check\n");
        }
        output::print(&said)
    }
}
