//! What the machine must have, and how apt brings what is missing.
//!
//! Invariant: when every program of [`NEEDED`] is there, nothing here runs apt or needs a network.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use super::sources::{self, Source};
use crate::process;

const ETC_APT: &str = "/etc/apt";
const BACKPORTS_FILE: &str = "/etc/apt/sources.list.d/sapwood-backports.sources";
const QUERY_LIMIT: Duration = Duration::from_secs(60);
const UPDATE_LIMIT: Duration = Duration::from_secs(300);
const INSTALL_LIMIT: Duration = Duration::from_secs(1200);

/// A program of the host and the package that has it.
struct Needed {
    program: &'static str,
    package: &'static str,
    /// Debian 12's own QEMU (7.2) is too old, and installing it removes newer QEMU tools:
    /// there, all QEMU packages come from the backports suite.
    backports: bool,
}

const fn needed(program: &'static str, package: &'static str, backports: bool) -> Needed {
    Needed { program, package, backports }
}

const NEEDED: &[Needed] = &[
    needed("qemu-system-x86_64", "qemu-system-x86", true),
    needed("qemu-img", "qemu-utils", true),
    needed("qemu-io", "qemu-utils", true),
    needed("qemu-storage-daemon", "qemu-utils", true),
    needed("mmdebstrap", "mmdebstrap", false),
    needed("fio", "fio", false),
    needed("mke2fs", "e2fsprogs", false),
    needed("sfdisk", "fdisk", false),
    needed("mkfs.xfs", "xfsprogs", false),
    needed("mkfs.vfat", "dosfstools", false),
    needed("mcopy", "mtools", false),
    needed("sfdisk", "fdisk", false),
    needed("setpriv", "util-linux", false),
    needed("xz", "xz-utils", false),
    needed("zstd", "zstd", false),
    needed("c++", "g++", false),
];

/// The programs that are not on this machine.
pub fn missing() -> Vec<&'static str> {
    let absent = |needed: &&Needed| process::find(needed.program).is_none();
    NEEDED.iter().filter(absent).map(|needed| needed.program).collect()
}

/// Why this machine cannot install packages by itself, if it cannot.
pub fn unable() -> Option<String> {
    if process::find("apt-get").is_none() {
        return Some("apt-get is not there (not a Debian machine)".to_owned());
    }
    if rustix::process::geteuid().is_root() {
        return None;
    }
    let mut probe = Command::new("sudo");
    probe.args(["-n", "true"]);
    match process::output(&mut probe, QUERY_LIMIT) {
        Ok(_) => None,
        Err(_) => Some("neither root nor sudo without a password".to_owned()),
    }
}

/// `program` as root: directly, or through `sudo`.
pub fn privileged(program: &str) -> Command {
    if rustix::process::geteuid().is_root() {
        return Command::new(process::find(program).unwrap_or_else(|| program.into()));
    }
    let mut command = Command::new("sudo");
    command.args(["-n", program]);
    command
}

/// Installs what [`missing`] lists; does nothing when it lists nothing.
///
/// # Errors
/// apt fails, or a program is still missing afterwards.
pub fn install_missing() -> Result<()> {
    if missing().is_empty() {
        return Ok(());
    }
    let backports = backports_suite()?;
    update()?;
    let absent = |needed: &&Needed| process::find(needed.program).is_none();
    let (newer, stable): (Vec<&Needed>, Vec<&Needed>) =
        NEEDED.iter().filter(absent).partition(|needed| needed.backports && backports.is_some());
    // The newer ones go first: an old QEMU must never be pulled in by the others.
    if !newer.is_empty() {
        let mut packages = vec!["qemu-system-x86", "qemu-utils", "seabios"];
        packages.extend(newer.iter().map(|needed| needed.package));
        install(&packages, backports.as_deref())?;
    }
    if !stable.is_empty() {
        install(&stable.iter().map(|needed| needed.package).collect::<Vec<_>>(), None)?;
    }
    let left = missing();
    ensure!(left.is_empty(), "apt installed its packages, yet these are missing: {}", left.join(", "));
    Ok(())
}

fn install(packages: &[&str], suite: Option<&str>) -> Result<()> {
    let mut packages = packages.to_vec();
    packages.sort_unstable();
    packages.dedup();
    println!("  installing {}", packages.join(" "));
    // `env` and not an environment variable of ours: sudo drops those.
    let mut command = privileged("env");
    command.args(["DEBIAN_FRONTEND=noninteractive", "apt-get", "-qq", "install", "-y"]);
    command.args(["--no-install-recommends", "--no-remove", "-o", "DPkg::Lock::Timeout=300"]);
    if let Some(suite) = suite {
        command.args(["-t", suite]);
    }
    command.args(&packages);
    process::output(&mut command, INSTALL_LIMIT).map(|_| ())
}

/// Brings apt's lists up to date, once in a process, with the backports suite among them.
///
/// # Errors
/// apt-get fails; its message says why.
pub fn update() -> Result<()> {
    static DONE: OnceLock<()> = OnceLock::new();
    if DONE.get().is_some() {
        return Ok(());
    }
    println!("  bringing apt's lists up to date");
    let mut command = privileged("apt-get");
    command.args(["-qq", "update", "-o", "DPkg::Lock::Timeout=300"]);
    process::output(&mut command, UPDATE_LIMIT)?;
    let _ = DONE.set(());
    Ok(())
}

/// The release's code name, for example `bookworm`.
///
/// # Errors
/// `/etc/os-release` does not say.
pub fn codename() -> Result<String> {
    let text = fs::read_to_string("/etc/os-release").context("reading /etc/os-release")?;
    let line = text.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME="));
    let name = line.context("/etc/os-release names no VERSION_CODENAME")?;
    Ok(name.trim_matches('"').to_owned())
}

/// This machine's own archive of the release it runs.
///
/// # Errors
/// apt's configuration cannot be read or has none.
pub fn release_source() -> Result<Source> {
    let all = sources::configured(Path::new(ETC_APT))?;
    sources::release(&all, &codename()?)
}

/// Makes the backports suite known to apt where the release needs it, and names it.
///
/// # Errors
/// apt's configuration has no archive to derive it from, or cannot be written.
pub fn backports_suite() -> Result<Option<String>> {
    let codename = codename()?;
    if codename != "bookworm" {
        return Ok(None); // later releases have what is needed themselves
    }
    let suite = format!("{codename}-backports");
    let all = sources::configured(Path::new(ETC_APT))?;
    if sources::release(&all, &suite).is_err() {
        let stanza = sources::release(&all, &codename)?.with_suite(&suite).to_deb822();
        let mut staged = tempfile::NamedTempFile::new().context("making a temporary file")?;
        std::io::Write::write_all(&mut staged, stanza.as_bytes())?;
        let mut command = privileged("install");
        command.args(["-m", "644"]).arg(staged.path()).arg(BACKPORTS_FILE);
        process::output(&mut command, QUERY_LIMIT)?;
        println!("  wrote {BACKPORTS_FILE}");
    }
    Ok(Some(suite))
}

/// Downloads the candidate of `package` (from `suite` where given) and unpacks it below `into`.
///
/// # Errors
/// apt does not know the package, or cannot fetch or unpack it.
pub fn unpack(package: &str, suite: Option<&str>, into: &Path) -> Result<()> {
    let download = tempfile::tempdir().context("making a temporary directory")?;
    let mut command = Command::new("apt-get");
    command.args(["-qq", "download", package]).current_dir(download.path());
    if let Some(suite) = suite {
        command.args(["-t", suite]);
    }
    if rustix::process::geteuid().is_root() {
        // apt's sandbox user cannot write into a private directory, and says so at length.
        command.args(["-o", "APT::Sandbox::User=root"]);
    }
    process::output(&mut command, INSTALL_LIMIT)?;
    let deb = only_deb(download.path())?;
    let mut command = Command::new("dpkg-deb");
    command.arg("-x").arg(&deb).arg(into);
    process::output(&mut command, INSTALL_LIMIT).map(|_| ())
}

fn only_deb(directory: &Path) -> Result<PathBuf> {
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "deb") {
            return Ok(path);
        }
    }
    bail!("apt-get download left no package behind")
}

/// What the candidate of `package` depends on, as apt's `Depends` field has it.
///
/// # Errors
/// apt does not know the package.
pub fn depends(package: &str, suite: Option<&str>) -> Result<String> {
    let mut command = Command::new("apt-cache");
    command.args(["--no-all-versions", "show", package]);
    if let Some(suite) = suite {
        command.args(["-o", &format!("APT::Default-Release={suite}")]);
    }
    let text = process::output(&mut command, QUERY_LIMIT)?;
    let field = text.lines().find_map(|line| line.strip_prefix("Depends: "));
    Ok(field.with_context(|| format!("package {package} depends on nothing"))?.to_owned())
}

/// The proxy options of the host's apt, for an apt that runs with its own configuration.
pub fn proxy_options() -> Vec<String> {
    let mut command = Command::new("apt-config");
    command.args(["dump", "--format", "%F \"%v\";%n"]);
    let text = process::output(&mut command, QUERY_LIMIT).unwrap_or_default();
    let wanted = ["Acquire::http::Proxy", "Acquire::https::Proxy"];
    let proxies = text.lines().filter(|line| wanted.iter().any(|name| line.starts_with(name)));
    proxies.map(str::to_owned).collect()
}
