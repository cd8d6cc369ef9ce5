//! Finds out whether KVM really boots a stock kernel here; otherwise guests run under TCG.
//!
//! `/dev/kvm` may open, make virtual machines and still not get a Linux anywhere (nested and
//! paravirtual kinds do that), so only a boot tells. The answer is kept with the host's kernel and
//! QEMU's version, and found anew when either changes.

use std::fs;
use std::io::{Seek, Write};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::vmm::QEMU;
use super::{Assets, Guest, GuestSpec, Vmm};

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

/// Whether the processor that QEMU's TCG emulates at its fullest (`-cpu max`) has AMD's virtualization, so that a guest
/// has a KVM of its own.
///
/// # Errors
/// QEMU cannot be started, or does not answer.
pub fn tcg_has_svm() -> Result<bool> {
    const QUESTION: &str = r#"{"execute": "qmp_capabilities"}
{"execute": "query-cpu-model-expansion", "arguments": {"type": "full", "model": {"name": "max"}}}
{"execute": "quit"}
"#;
    let mut question = tempfile::tempfile().context("making a temporary file")?;
    question.write_all(QUESTION.as_bytes())?;
    question.rewind()?;
    let mut qemu = Command::new("timeout");
    qemu.args(["60", QEMU, "-accel", "tcg", "-machine", "none", "-nodefaults", "-display", "none"]);
    let output = qemu.args(["-qmp", "stdio"]).stdin(question).output();
    let output = output.with_context(|| format!("running {QEMU}"))?;
    let answer = String::from_utf8_lossy(&output.stdout);
    if !answer.contains("\"model\"") {
        bail!("{QEMU} does not describe its processor: {answer}{}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(answer.contains("\"svm\": true"))
}

fn kvm_boots(assets: &Assets) -> bool {
    let usable = fs::OpenOptions::new().read(true).write(true).open("/dev/kvm").is_ok();
    if !usable {
        return false;
    }
    let spec = GuestSpec::diskless("mark alive");
    match Guest::boot_with(&spec, assets, &Vmm::Qemu(Accelerator::Kvm)) {
        Ok(guest) => guest.wait_for("alive", TRY_LIMIT).is_ok(),
        Err(_) => false,
    }
}

fn machine_key() -> Result<String> {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let output = Command::new(QEMU).arg("--version").output();
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
    staged.write_all(format!("{key}\n{}\n", found.name()).as_bytes())?;
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
