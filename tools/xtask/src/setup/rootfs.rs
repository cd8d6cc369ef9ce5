//! The guest's root file system: a small Debian in a raw image with ext4, no partition table.

use std::fs;
use std::path::Path;
use std::process::Command;
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
    let excluded = ["/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*"];
    let mut command = apt::privileged("mmdebstrap");
    command.args(excluded.map(|path| format!("--dpkgopt=path-exclude={path}")));
    finish_bootstrap(command, "essential", SUITE, packages, tree, sources)
}

/// Makes a whole Debian of `suite` (what has the priority "important", and `packages`, with documentation) in the
/// directory `tree`, as [`bootstrap`] does. Packages that were downloaded stay in `downloads`.
///
/// # Errors
/// mmdebstrap fails; the message holds what it wrote.
pub fn bootstrap_whole(
    suite: &str,
    packages: &[&str],
    tree: &Path,
    sources: &Path,
    downloads: &Path,
) -> Result<()> {
    // A mount is gone with the namespace, whatever happens to mmdebstrap.
    let mut command = apt::privileged("unshare");
    command.args(["--mount", "--propagation=private", "mmdebstrap"]);
    for step in ["download/empty", "essential/unlink", "cleanup/apt/cache"] {
        command.arg(format!("--skip={step}"));
    }
    let folder = "\"$1/var/cache/apt/archives\"";
    let from = downloads.display();
    command.arg(format!("--setup-hook=mkdir -p {folder} && mount --bind '{from}' {folder}"));
    command.arg(format!("--customize-hook=umount {folder}"));
    command.arg("--customize-hook=rm -f \"$1\"/etc/ssh/ssh_host_*");
    command.arg("--dpkgopt=force-unsafe-io");
    finish_bootstrap(command, "important", suite, packages, tree, sources)
}

fn finish_bootstrap(
    mut command: Command,
    variant: &str,
    suite: &str,
    packages: &[&str],
    tree: &Path,
    sources: &Path,
) -> Result<()> {
    let source = apt::release_source()?.with_suite(suite);
    fs::write(sources, source.to_deb822())?;
    command.args(["--quiet", "--mode=root", "--format=directory"]);
    command.arg(format!("--variant={variant}"));
    command.arg(format!("--include={}", packages.join(",")));
    command.arg("--aptopt=APT::Install-Recommends \"false\";");
    for option in apt::proxy_options() {
        command.arg(format!("--aptopt={option}"));
    }
    command.arg(suite).arg(tree).arg(sources);
    process::output(&mut command, BOOTSTRAP_LIMIT).map(|_| ())
}
