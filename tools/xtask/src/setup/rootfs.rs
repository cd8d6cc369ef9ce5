//! The guest's root file system: a small Debian in a raw image with ext4, no partition table.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::Result;

use super::apt;
use crate::process;

/// Raised when the code below makes something else of the same packages.
const VERSION: u32 = 1;
const SUITE: &str = "bookworm";
const SIZE_MIB: u32 = 1024;
const PACKAGES: &[&str] =
    &["fio", "e2fsprogs", "xfsprogs", "util-linux", "mount", "coreutils", "procps", "diffutils"];
const BOOTSTRAP_LIMIT: Duration = Duration::from_secs(900);
const FORMAT_LIMIT: Duration = Duration::from_secs(300);

/// Describes what [`make`] makes.
pub fn recipe() -> String {
    format!("{VERSION} {SUITE} {SIZE_MIB} MiB {}\n", PACKAGES.join(" "))
}

/// Makes `root.raw` in `into`: sparse, [`SIZE_MIB`] long.
///
/// # Errors
/// mmdebstrap or mke2fs fails; the message holds what they wrote.
pub fn make(into: &Path) -> Result<()> {
    let image = into.join("root.raw");
    fs::File::create(&image)?.set_len(u64::from(SIZE_MIB) << 20)?;
    let tree = into.join("tree");
    let made = bootstrap(PACKAGES, &tree, &into.join("debian.sources")).and_then(|()| {
        let mut format = apt::privileged("mke2fs");
        format.args(["-q", "-F", "-t", "ext4", "-L", "root", "-m", "0", "-E"]);
        format.arg("lazy_itable_init=0,lazy_journal_init=0,root_owner=0:0");
        format.arg("-d").arg(&tree).arg(&image);
        process::output(&mut format, FORMAT_LIMIT).map(|_| ())
    });
    let mut remove = apt::privileged("rm");
    remove.args(["-rf", "--one-file-system"]).arg(&tree);
    process::run(&mut remove, FORMAT_LIMIT)?;
    made
}

/// Makes a Debian of the essential packages and `packages` in the directory `tree`; `sources` becomes apt's configuration
/// for it.
///
/// # Errors
/// mmdebstrap fails; the message holds what it wrote.
pub fn bootstrap(packages: &[&str], tree: &Path, sources: &Path) -> Result<()> {
    let source = apt::release_source()?.with_suite(SUITE);
    fs::write(sources, source.to_deb822())?;
    let mut command = apt::privileged("mmdebstrap");
    command.args(["--quiet", "--mode=root", "--format=directory", "--variant=essential"]);
    command.arg(format!("--include={}", packages.join(",")));
    command.arg("--aptopt=APT::Install-Recommends \"false\";");
    for option in apt::proxy_options() {
        command.arg(format!("--aptopt={option}"));
    }
    for path in ["/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*"] {
        command.arg(format!("--dpkgopt=path-exclude={path}"));
    }
    command.arg(SUITE).arg(tree).arg(sources);
    process::output(&mut command, BOOTSTRAP_LIMIT).map(|_| ())
}
