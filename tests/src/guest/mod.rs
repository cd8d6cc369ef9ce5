//! Real guests: boots a Debian kernel in QEMU, or with `sapwood boot`, with disks from vhost-user-blk backends.
//!
//! A guest runs a shell script, given as text, in a Debian root file system (its first disk) or in
//! the initial file system alone. What the script writes comes back line by line over a serial
//! port; `mark` and `value` (see `lib.sh`) say something the host waits for or reads. Every wait
//! here has a limit, and every process ends with the value that stands for it.
//!
//! The files a guest needs are made by `cargo xtask setup`; a test asks for them with
//! [`Assets::locate`].

pub mod accelerator;
pub mod backend;
pub mod child;
pub mod cpio;
pub mod lab;
pub mod machine;
pub mod report;
pub mod store;
pub mod vmm;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

pub use backend::{Backend, BackendSpec};
pub use machine::{BootSpec, Disk, Guest, GuestSpec, Root};
pub use report::GuestReport;
pub use store::Daemon;
pub use vmm::Vmm;

/// The files a guest is made of.
#[derive(Clone, Debug)]
pub struct Assets {
    /// A Linux kernel.
    pub kernel: PathBuf,
    /// The initial file system: busybox and drivers; the scripts are appended at boot.
    pub initramfs: PathBuf,
    /// A raw image: ext4 with a small Debian, no partition table. Never written: it is a base.
    pub root_image: PathBuf,
    /// A raw image that boots by itself: GPT, one partition, a small Debian with a kernel. Never written.
    pub bootable_image: PathBuf,
    /// Where the answer to "does KVM really work here" is kept.
    pub accelerator: PathBuf,
}

impl Assets {
    /// The files made by `cargo xtask setup`: below `SAPWOOD_GUEST_DIR`, or else in `guest` beside
    /// the directory of profiles that this program was built into.
    ///
    /// # Errors
    /// They are not there; the message says what to do.
    pub fn locate() -> Result<Self> {
        let guest = match std::env::var_os("SAPWOOD_GUEST_DIR") {
            Some(directory) => PathBuf::from(directory),
            None => target_directory()?.join("guest"),
        };
        let assets = Self {
            kernel: guest.join("kernel/vmlinuz"),
            initramfs: guest.join("kernel/initramfs.cpio"),
            root_image: guest.join("root/root.raw"),
            bootable_image: guest.join("bootable/disk.raw"),
            accelerator: guest.join("accelerator"),
        };
        let files = [&assets.kernel, &assets.initramfs, &assets.root_image, &assets.bootable_image];
        for file in files {
            ensure!(file.exists(), "{} is missing: run `cargo xtask setup`", file.display());
        }
        Ok(assets)
    }
}

/// The `sapwood` program under test: `SAPWOOD_BIN`, or else the one beside this program.
///
/// # Errors
/// It is not there; the message says what to do.
pub fn sapwood_program() -> Result<PathBuf> {
    if let Some(program) = std::env::var_os("SAPWOOD_BIN") {
        return Ok(PathBuf::from(program));
    }
    let target = target_directory()?;
    let found = ["release", "debug"].map(|profile| target.join(profile).join("sapwood"));
    let found = found.into_iter().find(|program| program.is_file());
    found.context("no sapwood program: run `cargo build --release --package sapwood`")
}

/// The cargo target directory that this program lies in.
pub(crate) fn target_directory() -> Result<PathBuf> {
    let program = std::env::current_exe().context("finding this program's own file")?;
    let profile = program.ancestors().find(|path| path.ends_with("release") || path.ends_with("debug"));
    let target = profile.and_then(Path::parent).map(Path::to_owned);
    target.with_context(|| format!("{} is in no cargo target directory", program.display()))
}
