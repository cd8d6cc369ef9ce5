//! Makes one image: installs a Debian into a directory and formats that.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use sapwood_tests::corpus::IMAGE_FILE;

use super::recipes::Recipe;
use crate::process;
use crate::setup::{apt, rootfs};

/// Size of the disk, most of which is a hole.
const SIZE_MIB: u64 = 3072;
/// What was written later than this was written while installing, and is dated so: 2025-01-01.
const EPOCH: u64 = 1_735_689_600;
const LIMIT: Duration = Duration::from_secs(300);

/// Makes the image of `recipe` in the directory `into`. Packages are downloaded to a directory below `corpus`.
///
/// # Errors
/// mmdebstrap or mke2fs fails; the message holds what they wrote.
pub fn make(recipe: &Recipe, corpus: &Path, into: &Path) -> Result<()> {
    let downloads = corpus.join("downloads").join(recipe.name);
    fs::create_dir_all(&downloads).with_context(|| format!("making {}", downloads.display()))?;
    let image = into.join(IMAGE_FILE);
    fs::File::create(&image)?.set_len(SIZE_MIB << 20)?;
    let tree = into.join("tree");
    let sources = into.join("debian.sources");
    let made = rootfs::bootstrap_whole(recipe.suite, &recipe.packages(), &tree, &sources, &downloads)
        .and_then(|()| date(&tree))
        .and_then(|()| format(recipe, &tree, &image));
    let mut remove = apt::privileged("rm");
    remove.args(["-rf", "--one-file-system"]).arg(&tree);
    process::run(&mut remove, LIMIT)?;
    made
}

/// Dates what the installation wrote, so that it does not depend on the day.
fn date(tree: &Path) -> Result<()> {
    let mut find = apt::privileged("find");
    find.arg(tree).args(["-newermt", &format!("@{EPOCH}"), "-exec", "touch", "-h", "-d"]);
    find.arg(format!("@{EPOCH}")).args(["{}", "+"]);
    process::output(&mut find, LIMIT).map(|_| ())
}

fn format(recipe: &Recipe, tree: &Path, image: &Path) -> Result<()> {
    let mut format = apt::privileged("env");
    format.arg(format!("E2FSPROGS_FAKE_TIME={EPOCH}"));
    format.args(["mke2fs", "-q", "-F", "-t", "ext4", "-L", "root", "-m", "0", "-U", &recipe.uuid, "-E"]);
    format.arg(format!("lazy_itable_init=0,lazy_journal_init=0,root_owner=0:0,hash_seed={}", recipe.uuid));
    format.arg("-d").arg(tree).arg(image);
    process::output(&mut format, LIMIT).map(|_| ())
}
