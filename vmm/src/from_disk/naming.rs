//! Kernels by their names: Debian's `/vmlinuz` and `/boot/vmlinuz-VERSION`, and what others call the initial file system.

use super::{Candidate, ENTRIES_MAX, Place, System, root, version};

/// Links to the kernel that Debian keeps.
const LINKS: [&str; 2] = ["/vmlinuz", "/boot/vmlinuz"];
/// The root of the volume comes second: there lie the kernels of a `/boot` that is a partition of its own.
const FOLDERS: [&str; 2] = ["/boot", ""];
const KERNEL: &str = "vmlinuz-";

/// The version in the name of a kernel.
pub fn version_of(path: &str) -> Option<&str> {
    path.rsplit('/').next()?.strip_prefix(KERNEL)
}

/// The kernels of all volumes: those that links lead to first, then the newest.
pub fn candidates(system: &mut System) -> Vec<Candidate> {
    let mut all: Vec<Candidate> = Vec::new();
    for volume in 0..system.volumes.len() {
        let mut kernels: Vec<String> = Vec::new();
        for link in LINKS {
            kernels.extend(system.volumes[volume].follow(link).ok().flatten());
        }
        for folder in FOLDERS {
            let names = system.names(volume, if folder.is_empty() { "/" } else { folder });
            let mut names: Vec<&String> = names.iter().filter(|name| version_of(name).is_some()).collect();
            // Rescue systems are for when nothing else boots.
            names.sort_by(|a, b| {
                let is_rescue = |name: &str| name.contains("rescue");
                is_rescue(a).cmp(&is_rescue(b)).then_with(|| version::compare_kernels(b, a))
            });
            kernels.extend(names.iter().map(|name| format!("{folder}/{name}")));
        }
        for kernel in kernels {
            let is_known = all.iter().any(|known| known.kernel == Place { volume, path: kernel.clone() });
            if !is_known && all.len() < ENTRIES_MAX && system.volumes[volume].has_file(&kernel) {
                all.extend(candidate(system, volume, kernel));
            }
        }
    }
    if all.is_empty() {
        for volume in 0..system.volumes.len() {
            let what = format!("{}: no boot entries, no grub.cfg, no vmlinuz", system.volumes[volume]);
            system.try_in_vain(what);
        }
    }
    all
}

fn candidate(system: &mut System, volume: usize, kernel: String) -> Option<Candidate> {
    let initrd = initrd_of(system, volume, &kernel);
    let Some(root) = root::of(system, volume, initrd.is_some()) else {
        let what = format!("{}: {kernel}: the root file system was not found", system.volumes[volume]);
        system.try_in_vain(what);
        return None;
    };
    let title = version_of(&kernel).map_or_else(|| kernel.clone(), |version| format!("Linux {version}"));
    let source = format!("{}: {kernel}, by its name", system.volumes[volume]);
    let initrds = initrd.into_iter().map(|path| Place { volume, path }).collect();
    let names = vec![kernel.clone()];
    Some(Candidate {
        title,
        names,
        source,
        kernel: Place { volume, path: kernel },
        initrds,
        cmdline: format!("root={root} ro"),
    })
}

/// The initial file system beside a kernel: as Debian, Fedora and Arch, and openSUSE call it.
fn initrd_of(system: &System, volume: usize, kernel: &str) -> Option<String> {
    let folder = kernel.rsplit_once('/').map_or("", |(folder, _)| folder);
    let names = match version_of(kernel) {
        Some(version) => vec![
            format!("{folder}/initrd.img-{version}"),
            format!("{folder}/initramfs-{version}.img"),
            format!("{folder}/initrd-{version}"),
            format!("{folder}/initramfs-{version}"),
        ],
        None => vec![format!("{folder}/initrd.img"), format!("{folder}/initrd")],
    };
    names.into_iter().find(|path| system.volumes[volume].has_file(path))
}
