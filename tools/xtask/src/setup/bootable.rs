//! A disk that boots by itself, as a cloud image has it: GPT, one ext4 partition with a small Debian, its kernel and
//! initial file system in `/boot`. It has no boot loader: `sapwood boot` finds the kernel.
//!
//! Its systemd starts the unit `sapwood-guest`, which runs the script on the disk that begins with `#sapwood 1`, says on
//! the console how it ended, and switches off. Without such a disk the guest goes on to a login.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

use super::{apt, rootfs};
use crate::process;

/// Raised when the code below makes something else of the same packages.
const VERSION: u32 = 1;
const SIZE_MIB: u32 = 1024;
/// Where the partition starts, and what is left free after it for the second partition table.
const MARGIN_MIB: u32 = 1;
const PACKAGES: &[&str] =
    &["linux-image-cloud-amd64", "initramfs-tools", "zstd", "systemd-sysv", "udev", "kmod"];
const LIMIT: Duration = Duration::from_secs(300);

/// One root partition for x86-64, as the Discoverable Partitions Specification types it.
const PARTITIONS: &str = "label: gpt\n\
    label-id: 5A9700D0-0000-4000-8000-000000000000\n\
    start=1MiB, size=1022MiB, type=4F68BCE3-E8CD-4DB1-96E7-FBCAF984B709, \
    uuid=5A9700D0-0000-4000-8000-000000000001, name=root\n";

const UNIT: &str = include_str!("bootable/sapwood-guest.service");
const RUN: &str = include_str!("bootable/run.sh");
const FSTAB: &str = "PARTUUID=5a9700d0-0000-4000-8000-000000000001 / ext4 defaults 0 1\n";

/// Files of the disk: path and text.
const FILES: [(&str, &str); 4] = [
    ("etc/fstab", FSTAB),
    ("etc/hostname", "sapwood\n"),
    ("etc/systemd/system/sapwood-guest.service", UNIT),
    ("usr/local/lib/sapwood-guest", RUN),
];

/// Units that a test does not need: logins on terminals that the machine has not, and care for disks that live longer.
const MASKED: &[&str] = &[
    "dpkg-db-backup.timer",
    "e2scrub_all.timer",
    "e2scrub_reap.service",
    "fstrim.timer",
    "getty-static.service",
    "getty@tty1.service",
    "systemd-journal-flush.service",
    "systemd-pstore.service",
    "systemd-update-utmp.service",
    "systemd-update-utmp-runlevel.service",
];

/// Describes what [`make`] makes.
pub fn recipe() -> String {
    let files: String = FILES.iter().map(|(path, text)| format!("{path}:\n{text}")).collect();
    let (packages, masked) = (PACKAGES.join(" "), MASKED.join(" "));
    format!("{VERSION} {SIZE_MIB} MiB {packages}\nwithout {masked}\n{PARTITIONS}{files}")
}

/// Makes `disk.raw` in `into`: sparse, [`SIZE_MIB`] long.
///
/// # Errors
/// mmdebstrap, sfdisk or mke2fs fails; the message holds what they wrote.
pub fn make(into: &Path) -> Result<()> {
    let image = into.join("disk.raw");
    fs::File::create(&image)?.set_len(u64::from(SIZE_MIB) << 20)?;
    partition(&image, &into.join("partitions"))?;
    let tree = into.join("tree");
    let made = rootfs::bootstrap(PACKAGES, &tree, &into.join("debian.sources"))
        .and_then(|()| add_files(&tree))
        .and_then(|()| format(&tree, &image));
    let mut remove = apt::privileged("rm");
    remove.args(["-rf", "--one-file-system"]).arg(&tree);
    process::run(&mut remove, LIMIT)?;
    made
}

fn partition(image: &Path, script: &Path) -> Result<()> {
    fs::write(script, PARTITIONS)?;
    let sfdisk = process::find("sfdisk").context("finding sfdisk")?;
    let mut command = Command::new("sh");
    command.args(["-c", "exec \"$1\" --quiet \"$2\" <\"$3\"", "sh"]).arg(sfdisk).arg(image).arg(script);
    process::output(&mut command, LIMIT).map(|_| ())
}

fn add_files(tree: &Path) -> Result<()> {
    for (path, text) in FILES {
        let mut staged = tempfile::NamedTempFile::new().context("making a temporary file")?;
        std::io::Write::write_all(&mut staged, text.as_bytes())?;
        let mut install = apt::privileged("install");
        install.args(["-D", "-m", "644"]).arg(staged.path()).arg(tree.join(path));
        process::output(&mut install, LIMIT)?;
    }
    let units = tree.join("etc/systemd/system");
    for unit in MASKED {
        link("/dev/null", &units.join(unit))?;
    }
    link("../sapwood-guest.service", &units.join("multi-user.target.wants/sapwood-guest.service"))
}

fn link(to: &str, from: &Path) -> Result<()> {
    let mut link = apt::privileged("ln");
    link.args(["-s", "-f", to]).arg(from);
    process::output(&mut link, LIMIT).map(|_| ())
}

fn format(tree: &Path, image: &Path) -> Result<()> {
    let mut format = apt::privileged("mke2fs");
    format.args(["-q", "-F", "-t", "ext4", "-L", "root", "-m", "0", "-E"]);
    let offset = u64::from(MARGIN_MIB) << 20;
    format.arg(format!("lazy_itable_init=0,lazy_journal_init=0,root_owner=0:0,offset={offset}"));
    format.arg("-d").arg(tree).arg(image).arg(format!("{}M", SIZE_MIB - 2 * MARGIN_MIB));
    process::output(&mut format, LIMIT).map(|_| ())
}
