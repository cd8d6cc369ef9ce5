//! Where the workspace and its target directory are.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::process;

const METADATA_LIMIT: Duration = Duration::from_secs(120);
const BUILD_LIMIT: Duration = Duration::from_secs(1200);

/// The workspace that this program was started in.
pub struct Workspace {
    /// The directory of the workspace's `Cargo.toml`.
    pub root: PathBuf,
    /// Cargo's target directory.
    pub target: PathBuf,
}

impl Workspace {
    /// Asks cargo.
    ///
    /// # Errors
    /// cargo fails, or answers with something else than its documented JSON.
    pub fn locate() -> Result<Self> {
        let metadata = metadata(&own_manifest())?;
        let path = |name: &str| {
            let value = metadata[name].as_str().map(PathBuf::from);
            value.with_context(|| format!("cargo metadata has no {name}"))
        };
        Ok(Self { root: path("workspace_root")?, target: path("target_directory")? })
    }

    /// Where the guest's files are kept.
    pub fn guest(&self) -> PathBuf {
        self.target.join("guest")
    }

    /// Where the corpus is kept.
    pub fn corpus(&self) -> PathBuf {
        self.target.join("corpus")
    }

    /// The `sapwood` program: the one that `SAPWOOD_BIN` names, else built here for release.
    ///
    /// # Errors
    /// It does not build.
    pub fn sapwood(&self) -> Result<PathBuf> {
        if let Some(program) = std::env::var_os("SAPWOOD_BIN") {
            return Ok(PathBuf::from(program));
        }
        let mut build = self.cargo();
        build.args(["build", "--quiet", "--release", "--package", "sapwood"]);
        process::run(&mut build, BUILD_LIMIT)?;
        Ok(self.target.join("release/sapwood"))
    }

    /// A cargo command in the workspace.
    pub fn cargo(&self) -> Command {
        let mut command = cargo();
        command.current_dir(&self.root);
        command
    }
}

/// This package's manifest: as cargo says when it runs this program, else as it was built.
fn own_manifest() -> PathBuf {
    let directory = std::env::var_os("CARGO_MANIFEST_DIR").map(PathBuf::from);
    directory.unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into()).join("Cargo.toml")
}

fn cargo() -> Command {
    Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
}

/// The answer of `cargo metadata --no-deps` for `manifest`.
///
/// # Errors
/// cargo fails, or writes no JSON.
pub fn metadata(manifest: &Path) -> Result<Value> {
    let mut command = cargo();
    command.args(["metadata", "--no-deps", "--format-version=1", "--manifest-path"]).arg(manifest);
    let text = process::output(&mut command, METADATA_LIMIT)?;
    serde_json::from_str(&text).context("reading the answer of cargo metadata")
}
