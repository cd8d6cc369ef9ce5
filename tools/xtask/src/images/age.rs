//! Ages an image: on a copy, as its own machine would do it, packages are upgraded, installed again, removed and added.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use sapwood_tests::corpus::{IMAGE_FILE, IMAGES};

use super::recipes;
use crate::process;
use crate::setup::apt;

/// Which image is aged: the index of one of [`IMAGES`] that is a bookworm.
const YOUNG: usize = 1;
const LIMIT: Duration = Duration::from_secs(600);
const SCRIPT: &str = include_str!("age.sh");

/// Describes what [`make`] makes.
pub fn recipe() -> String {
    format!("{}{SCRIPT}", recipes::all()[YOUNG].text())
}

/// Makes the aged image in the directory `into`.
///
/// # Errors
/// The kernel has no loop devices, or apt fails; the message holds what was written.
pub fn make(corpus: &Path, into: &Path) -> Result<()> {
    let downloads = corpus.join("downloads/aged");
    fs::create_dir_all(&downloads).with_context(|| format!("making {}", downloads.display()))?;
    let image = into.join(IMAGE_FILE);
    let mut copy = Command::new("cp");
    copy.arg("--sparse=always").arg(corpus.join(IMAGES[YOUNG]).join(IMAGE_FILE)).arg(&image);
    process::output(&mut copy, LIMIT)?;
    let release = apt::release_source()?;
    let suites = ["bookworm", "bookworm-updates", "bookworm-backports"];
    let stanzas: Vec<String> = suites.iter().map(|suite| release.with_suite(suite).to_deb822()).collect();
    let sources = into.join("debian.sources");
    fs::write(&sources, stanzas.join("\n"))?;
    let options = into.join("apt.conf");
    fs::write(&options, apt::proxy_options().join("\n"))?;
    let mount = into.join("mount");
    fs::create_dir(&mount)?;
    let mut age = apt::privileged("unshare");
    age.args(["--mount", "--propagation=private", "sh", "-euc", SCRIPT, "sh"]);
    age.args([&image, &mount, &sources, &options, &downloads]);
    process::output(&mut age, LIMIT)?;
    fs::remove_dir(&mount).with_context(|| format!("removing {}", mount.display()))
}
