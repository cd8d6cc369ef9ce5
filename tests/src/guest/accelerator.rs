//! Finds out whether KVM really boots a stock kernel here; otherwise guests run under TCG.
//!
//! `/dev/kvm` may open, make virtual machines and still not get a Linux anywhere (nested and
//! paravirtual kinds do that), so only a boot tells. The answer is kept with the host's kernel and
//! QEMU's version, and found anew when either changes.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::{Assets, Guest, GuestSpec};

/// A guest under real KVM reaches its script in two or three seconds.
const TRY_LIMIT: Duration = Duration::from_secs(20);
const OVERRIDE: &str = "SAPWOOD_ACCELERATOR";

/// How a guest's processor is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accelerator {
    /// The host's processor.
    Kvm,
    /// QEMU's translator, one thread for each virtual processor.
    Tcg,
}

impl Accelerator {
    /// The accelerator to use: `SAPWOOD_ACCELERATOR` (`kvm` or `tcg`) if set, else the kept
    /// answer, else what a trial boot shows.
    ///
    /// # Errors
    /// The variable holds something else, or QEMU is not there.
    pub fn detect(assets: &Assets) -> Result<Self> {
        if let Ok(name) = std::env::var(OVERRIDE) {
            return Self::parse(&name).with_context(|| format!("{OVERRIDE}={name}: kvm or tcg?"));
        }
        let key = machine_key()?;
        if let Some(known) = recall(&assets.accelerator, &key) {
            return Ok(known);
        }
        let found = if kvm_boots(assets) { Self::Kvm } else { Self::Tcg };
        remember(&assets.accelerator, &key, found)?;
        Ok(found)
    }

    /// The name: `kvm` or `tcg`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        }
    }

    fn parse(name: &str) -> Option<Self> {
        [Self::Kvm, Self::Tcg].into_iter().find(|accelerator| accelerator.name() == name)
    }

    pub(super) fn arguments(self) -> Vec<String> {
        let words = match self {
            Self::Kvm => ["-accel", "kvm", "-cpu", "host"],
            Self::Tcg => ["-accel", "tcg,thread=multi,tb-size=512", "-cpu", "max"],
        };
        words.map(str::to_owned).to_vec()
    }
}

fn kvm_boots(assets: &Assets) -> bool {
    let usable = fs::OpenOptions::new().read(true).write(true).open("/dev/kvm").is_ok();
    if !usable {
        return false;
    }
    let spec = GuestSpec::diskless("mark alive");
    match Guest::boot_with(&spec, assets, Accelerator::Kvm) {
        Ok(guest) => guest.wait_for("alive", TRY_LIMIT).is_ok(),
        Err(_) => false,
    }
}

fn machine_key() -> Result<String> {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let output = Command::new("qemu-system-x86_64").arg("--version").output();
    let output = output.context("running qemu-system-x86_64: run `cargo xtask setup`")?;
    if !output.status.success() {
        bail!("qemu-system-x86_64 --version ended with {}", output.status);
    }
    let version = String::from_utf8_lossy(&output.stdout);
    Ok(format!("{} {}", release.trim(), version.lines().next().unwrap_or_default()))
}

fn recall(file: &Path, key: &str) -> Option<Accelerator> {
    let text = fs::read_to_string(file).ok()?;
    let (kept_key, name) = text.trim_end().split_once('\n')?;
    if kept_key == key { Accelerator::parse(name) } else { None }
}

fn remember(file: &Path, key: &str, found: Accelerator) -> Result<()> {
    let directory = file.parent().unwrap_or(Path::new("."));
    let mut staged = tempfile::NamedTempFile::new_in(directory)?;
    std::io::Write::write_all(&mut staged, format!("{key}\n{}\n", found.name()).as_bytes())?;
    staged.persist(file)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_kept_for_its_machine_only() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("accelerator");
        assert_eq!(recall(&file, "a"), None);
        remember(&file, "a", Accelerator::Tcg).unwrap();
        assert_eq!(recall(&file, "a"), Some(Accelerator::Tcg));
        assert_eq!(recall(&file, "b"), None);
    }
}
