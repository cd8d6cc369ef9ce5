//! `sapwood commit`.

use std::path::PathBuf;

use clap::Args;
use sapwood_image::layer::{self, Tuning};

use super::output;
use super::progress;
use super::size;
use crate::host::Host;

/// Merge a layer into its base
///
/// The base then reads as the layer did, and the layer stays over it, empty, or is removed with -d. A
/// base that is smaller than the layer grows; one that is larger keeps its size and what lies past
/// the layer's end. Nobody may use either.
///
/// This changes the base: every other layer over it would read wrong and is refused afterwards.
/// Flatten those first, or rebase them.
///
/// Interrupted at any moment, running it again finishes it. Until then the layer is refused for
/// anything else, and nobody may use the base, which is neither the old one nor the new.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  sapwood commit vm1.layer      the changes move into the base
  sapwood commit -d vm1.layer   and the layer is removed")]
pub struct Commit {
    /// Remove the layer afterwards
    #[arg(short, long)]
    delete: bool,

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

impl Commit {
    pub fn run(self, host: &Host) -> anyhow::Result<()> {
        let bar = progress::bar(0, self.quiet);
        let (storage, path, shown, delete) = (host.storage(), self.path.clone(), bar.clone(), self.delete);
        let committed = host.block_on(|io| async move {
            let mut report = |done, all| progress::show(&shown, done, all);
            layer::commit(&storage, &io, &path, delete, Tuning::default(), &mut report).await
        })?;
        bar.finish_and_clear();
        let said = format!(
            "Merged {} into {}: {} of data written; the layer is {}\n",
            self.path.display(),
            committed.base.display(),
            size::display(committed.written),
            if delete { "removed" } else { "empty" }
        );
        if self.quiet { Ok(()) } else { output::print(&said) }
    }
}
