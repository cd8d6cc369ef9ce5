//! The guest's kernel, and the initial file system with the drivers it has as modules.
//!
//! Both come from packages that are unpacked into the cache; nothing is installed on the host.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use sapwood_tests::guest::cpio::Archive;

use super::apt;
use crate::process;

/// Raised when the code below makes something else of the same packages.
const VERSION: u32 = 2;
const META_PACKAGE: &str = "linux-image-cloud-amd64";
const BUSYBOX_PACKAGE: &str = "busybox-static";
const UNPACK_LIMIT: Duration = Duration::from_secs(60);

/// The modules a guest may need, dependencies aside, in the order of loading.
const MODULES: &[&str] = &[
    "crc32c_generic",
    "virtio_pci",
    "virtio_mmio",
    "virtio_blk",
    "virtio_console",
    "virtio_rng",
    "pvpanic_mmio",
    "ext4",
    "xfs",
];
/// What a guest loads that runs guests itself; only when its command line says so.
const KVM_MODULES: &[&str] = &["irqbypass", "kvm", "kvm_amd"];

/// Describes what [`make`] makes.
pub fn recipe() -> String {
    let modules = [MODULES, KVM_MODULES].concat().join(" ");
    format!("{VERSION} {META_PACKAGE} {BUSYBOX_PACKAGE} {modules}\n")
}

/// Makes `vmlinuz`, `initramfs.cpio` and `release` (the kernel's version) in `into`.
///
/// # Errors
/// apt cannot bring the packages, or they do not hold what is expected.
pub fn make(into: &Path) -> Result<()> {
    let suite = apt::backports_suite()?;
    apt::update()?;
    let unpacked = into.join("unpacked");
    let depends = apt::depends(META_PACKAGE, suite.as_deref())?;
    let package = depends.split([' ', ',']).find(|word| word.starts_with("linux-image-"));
    let package = package.with_context(|| format!("{META_PACKAGE} names no kernel: {depends}"))?;
    println!("  kernel package {package}");
    apt::unpack(package, suite.as_deref(), &unpacked)?;
    apt::unpack(BUSYBOX_PACKAGE, None, &unpacked)?;

    let boot = unpacked.join("boot");
    let image = find_below(&boot, |name| name.starts_with("vmlinuz-"))?;
    fs::copy(&image, into.join("vmlinuz"))?;
    let release = image.file_name().unwrap_or_default().to_string_lossy().replace("vmlinuz-", "");
    fs::write(into.join("release"), &release)?;

    let library = ["lib/modules", "usr/lib/modules"]
        .map(|path| unpacked.join(path).join(&release))
        .into_iter()
        .find(|path| path.is_dir())
        .with_context(|| format!("package {package} has no modules"))?;
    let modules = Modules::open(&library)?;
    let busybox = ["bin/busybox", "usr/bin/busybox"].map(|path| unpacked.join(path));
    let busybox = busybox.iter().find(|path| path.is_file()).context("no busybox in its package")?;
    fs::write(into.join("initramfs.cpio"), initial_file_system(&fs::read(busybox)?, &modules)?)?;
    fs::remove_dir_all(&unpacked)?;
    Ok(())
}

fn initial_file_system(busybox: &[u8], modules: &Modules) -> Result<Vec<u8>> {
    let mut archive = Archive::new();
    for path in ["bin", "proc", "sys", "run", "newroot", "modules"] {
        archive.directory(path);
    }
    archive.file("bin/busybox", 0o755, busybox);
    let mut order = Vec::new();
    // A list holds what the lists before it do not.
    for (list, wanted) in [("order", MODULES), ("order.kvm", KVM_MODULES)] {
        let begin = order.len();
        for name in wanted {
            modules.load(name, &mut order)?;
        }
        let mut names = String::new();
        for (name, bytes) in &order[begin..] {
            archive.file(&format!("modules/{name}.ko"), 0o644, bytes);
            names.push_str(name);
            names.push('\n');
        }
        archive.file(&format!("modules/{list}"), 0o644, names.as_bytes());
    }
    Ok(archive.finish())
}

/// The modules of an unpacked kernel package.
struct Modules {
    files: BTreeMap<String, PathBuf>,
    builtin: String,
}

impl Modules {
    fn open(library: &Path) -> Result<Self> {
        let mut files = BTreeMap::new();
        let mut left = vec![library.to_owned()];
        while let Some(directory) = left.pop() {
            for entry in fs::read_dir(&directory)? {
                let path = entry?.path();
                let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
                if path.is_dir() && !path.is_symlink() {
                    left.push(path);
                } else if let Some((stem, _)) = name.split_once(".ko") {
                    files.insert(stem.replace('-', "_"), path);
                }
            }
        }
        let builtin = fs::read_to_string(library.join("modules.builtin")).unwrap_or_default();
        Ok(Self { files, builtin: builtin.replace('-', "_") })
    }

    /// Appends the module `name` to `order`, what it depends on before it.
    fn load(&self, name: &str, order: &mut Vec<(String, Vec<u8>)>) -> Result<()> {
        if order.iter().any(|(loaded, _)| loaded == name) {
            return Ok(());
        }
        let Some(path) = self.files.get(name) else {
            let builtin = self.builtin.contains(&format!("/{name}.ko"));
            ensure!(builtin, "the kernel has no module {name}");
            return Ok(());
        };
        let bytes = decompress(path)?;
        for dependency in dependencies(&bytes) {
            self.load(&dependency.replace('-', "_"), order)?;
        }
        order.push((name.to_owned(), bytes));
        Ok(())
    }
}

/// The bytes of a module file, which may be compressed.
fn decompress(path: &Path) -> Result<Vec<u8>> {
    let program = match path.extension().and_then(|extension| extension.to_str()) {
        Some("xz") => "xz",
        Some("zst") => "zstd",
        _ => return Ok(fs::read(path)?),
    };
    let work = tempfile::tempdir()?;
    let copy = work.path().join(path.file_name().unwrap_or_default());
    fs::copy(path, &copy)?;
    process::output(Command::new(program).arg("-dq").arg(&copy), UNPACK_LIMIT)?;
    Ok(fs::read(copy.with_extension(""))?)
}

/// The names in the `depends=` entry of a module's information section.
fn dependencies(module: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(found) = module.windows(KEY.len()).position(|window| window == KEY) else {
        return Vec::new();
    };
    let value = &module[found + KEY.len()..];
    let end = value.iter().position(|&byte| byte == 0).unwrap_or(value.len());
    let value = String::from_utf8_lossy(&value[..end]);
    value.split(',').filter(|name| !name.is_empty()).map(str::to_owned).collect()
}

fn find_below(directory: &Path, wanted: impl Fn(&str) -> bool) -> Result<PathBuf> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        if wanted(&entry.file_name().to_string_lossy()) {
            return Ok(entry.path());
        }
    }
    anyhow::bail!("{} has no such file", directory.display())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dependencies_of_a_module() {
        let section = b"license=GPL\0depends=virtio,virtio_ring\0intree=Y\0";
        assert_eq!(dependencies(section), ["virtio", "virtio_ring"]);
        assert!(dependencies(b"license=GPL\0depends=\0").is_empty());
        assert!(dependencies(b"nothing").is_empty());
    }
}
