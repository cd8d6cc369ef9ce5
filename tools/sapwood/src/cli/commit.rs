//! `sapwood commit`.

use std::path::{Path, PathBuf};

use clap::Args;
use sapwood_image::layer::{self, Committed, Tuning};

use super::online::{self, Online, Target};
use super::output;
use super::progress;
use super::size;
use crate::control::wire;
use crate::host::Host;

/// Merge a layer into its base
///
/// The base then reads as the layer did, and the layer stays over it, empty, or is removed with -d. A
/// base that is smaller than the layer grows; one that is larger keeps its size and what lies past
/// the layer's end. Nobody may use either, or, with --control, the server that uses the layer does this
/// meanwhile; what its guest writes then stays in the layer.
///
/// This changes the base: every other layer over it would read wrong and is refused afterwards.
/// Flatten those first, or rebase them.
///
/// Interrupted at any moment, running it again finishes it. Until then the layer is refused for
/// anything else, and nobody may use the base, which is neither the old one nor the new.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  sapwood commit vm1.layer      the changes move into the base
  sapwood commit -d vm1.layer   and the layer is removed
  sapwood commit --control /run/vm1.control  while a virtual machine uses it")]
pub struct Commit {
    /// Remove the layer afterwards
    #[arg(short, long, conflicts_with = "control")]
    delete: bool,

    /// Show a bar on a terminal; that is the default
    #[arg(short, long, hide = true)]
    progress: bool,

    /// Print nothing
    #[arg(short, long)]
    quiet: bool,

    #[command(flatten)]
    online: Online,

    /// The layer
    #[arg(value_name = "LAYER", required_unless_present = "control", conflicts_with = "control")]
    path: Option<PathBuf>,
}

impl Commit {
    pub fn run(self, host: &Host) -> anyhow::Result<()> {
        let (layer, committed, left) = match self.online.target(self.path.as_ref())? {
            Target::Served(client) => {
                let (layer, said) = online::run(&client, "/v1/disk/commit", &wire::Nothing {}, self.quiet)?;
                let base = said["base"].as_str().unwrap_or_default().into();
                let written = said["written-bytes"].as_u64().unwrap_or_default();
                (layer, Committed { base, written }, "holds what was written meanwhile")
            }
            Target::Free(path) => {
                let committed = online::advise(self.commit(host, path))?;
                let left = if self.delete { "is removed" } else { "is empty" };
                (path.display().to_string(), committed, left)
            }
        };
        let said = format!(
            "Merged {layer} into {}: {} of data written; the layer {left}\n",
            committed.base.display(),
            size::display(committed.written),
        );
        if self.quiet { Ok(()) } else { output::print(&said) }
    }

    fn commit(&self, host: &Host, path: &Path) -> anyhow::Result<Committed> {
        let bar = progress::bar(0, self.quiet);
        let (storage, path, shown, delete) = (host.storage(), path.to_owned(), bar.clone(), self.delete);
        let committed = host.block_on(|io| async move {
            let mut report = |done, all| progress::show(&shown, done, all);
            layer::commit(&storage, &io, &path, delete, Tuning::default(), &mut report).await
        })?;
        bar.finish_and_clear();
        Ok(committed)
    }
}
