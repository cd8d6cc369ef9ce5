//! Which file system is the root, for kernels whose command line no boot loader has written.

use super::System;
use super::table::{Partition, Purpose};

/// What a root file system has, and a file system of its own for `/boot` has not.
const SIGNS: [&str; 3] = ["/etc/fstab", "/etc/os-release", "/sbin/init"];

/// The root file system, as the kernel's `root=` names it. `own` is the volume that the kernel lies on; with
/// `has_initrd` something can look for the UUID of a file system.
///
/// It is, in this order: the volume of the kernel, where it looks like a root; the partition whose type says so (Discoverable
/// Partitions Specification); another volume that looks like one; the only partition of Linux that cannot be read here.
pub fn of(system: &System, own: usize, has_initrd: bool) -> Option<String> {
    let looks_like_root = |volume: usize| {
        let volume = &system.volumes[volume];
        !volume.is_fat() && SIGNS.iter().any(|path| volume.has_file(path))
    };
    if looks_like_root(own) {
        return Some(name(system, own, has_initrd));
    }
    let typed = system.partitions.iter().find(|partition| partition.purpose == Purpose::Root);
    if let Some(partition) = typed {
        return by_partition(partition);
    }
    if let Some(volume) = (0..system.volumes.len()).find(|volume| looks_like_root(*volume)) {
        return Some(name(system, volume, has_initrd));
    }
    let is_read = |partition: &Partition| system.by_number(partition.number).is_some();
    let linux = system.partitions.iter().filter(|partition| partition.purpose == Purpose::Linux);
    let unread: Vec<&Partition> = linux.filter(|partition| !is_read(partition)).collect();
    match unread.as_slice() {
        [partition] => by_partition(partition),
        _ => None,
    }
}

fn by_partition(partition: &Partition) -> Option<String> {
    partition.partuuid.as_ref().map(|partuuid| format!("PARTUUID={partuuid}"))
}

/// The kernel itself knows no UUIDs of file systems, only those of partitions.
fn name(system: &System, volume: usize, has_initrd: bool) -> String {
    let volume = &system.volumes[volume];
    match &volume.partition.partuuid {
        _ if has_initrd => format!("UUID={}", volume.uuid),
        Some(partuuid) => format!("PARTUUID={partuuid}"),
        None => "/dev/vda".to_owned(),
    }
}
