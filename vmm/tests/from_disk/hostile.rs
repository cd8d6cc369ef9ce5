//! Disks that a guest has damaged: whatever is on them, an answer comes soon, and nothing panics.

use std::time::{Duration, Instant};

use crate::images::{MIB, Random, Tree, disk, find};
use crate::{ESP, LINUX, UUID, grub_cfg};

/// Longest time for one disk, many times what any takes.
const LIMIT: Duration = Duration::from_secs(30);
const SEEDS: u64 = 1200;

/// A disk with every kind of structure, small, without checksums of metadata, so that damage is not found at once.
fn sample() -> Vec<Vec<u8>> {
    let tree = || {
        Tree::new()
            .file("/etc/fstab", "")
            .file("/boot/grub/grub.cfg", grub_cfg(UUID))
            .file("/boot/grub/grubenv", "saved_entry=1>1\n")
            .file("/loader/entries/a.conf", "title A\nlinux /gone\n")
            .file("/boot/loader/entries/b.conf", "title B\nlinux /gone\n")
            .file("/boot/vmlinuz-6.1.0-9-amd64", "")
            .link("/vmlinuz", "boot/vmlinuz-6.1.0-9-amd64")
    };
    let esp = Tree::new()
        .file("/loader/entries/a.conf", "title A\nlinux /gone\n")
        .file("/loader/entries/a long name of an entry.conf", "title B\nlinux /gone\n")
        .file("/vmlinuz-1", "")
        .fat(2, 12, "12345678");
    let ext4 = tree().ext4(2, UUID);
    let ext2 = tree().ext2(2);
    let gpt = format!("label: gpt\nstart=2048, size=4096, type={ESP}\nstart=6144, type={LINUX}\n");
    let mbr = "label: dos\nstart=2048, size=4096, type=ef\nstart=6144, size=8192, type=5\nstart=8192, size=4096, type=83\n";
    vec![disk(&gpt, 6, &[(1, &esp), (3, &ext4)]), disk(mbr, 8, &[(1, &esp), (4, &ext2)]), ext2, esp]
}

/// Where damage matters: structures lie in blocks that are not empty.
fn blocks(image: &[u8]) -> Vec<usize> {
    let is_used = |block: &usize| image[block * 512..(block + 1) * 512].iter().any(|byte| *byte != 0);
    (0..image.len() / 512).filter(is_used).collect()
}

fn mutate(image: &mut [u8], blocks: &[usize], random: &mut Random) {
    for _ in 0..1 + random.below(12) {
        let at = blocks[random.below(blocks.len())] * 512 + random.below(508);
        let hostile = [0, 1, 0xff, 0x7fff_ffff, 0xffff_ffff, u32::MAX - 1, 0x8000_0000, random.next() as u32];
        let bytes = hostile[random.below(hostile.len())].to_le_bytes();
        let len = [1, 2, 4][random.below(3)];
        image[at..at + len].copy_from_slice(&bytes[..len]);
    }
}

#[test]
fn damaged_disks_are_answered_in_time() {
    // The crates' panics are caught; their messages would fill the test's output.
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let images = sample();
    let used: Vec<Vec<usize>> = images.iter().map(|image| blocks(image)).collect();
    let mut longest = Duration::ZERO;
    let mut answers = [0; 2];
    let mut panicked = Vec::new();
    for seed in 0..SEEDS {
        let mut random = Random(seed);
        let which = seed as usize % images.len();
        let mut image = images[which].clone();
        mutate(&mut image, &used[which], &mut random);
        let begun = Instant::now();
        match std::panic::catch_unwind(|| find(&image, None).is_ok()) {
            Ok(is_found) => answers[usize::from(is_found)] += 1,
            Err(_) => panicked.push(seed),
        }
        longest = longest.max(begun.elapsed());
        assert!(begun.elapsed() < LIMIT, "seed {seed}: {:?}", begun.elapsed());
    }
    std::panic::set_hook(hook);
    println!("{SEEDS} disks, {answers:?} refused and booted, the longest took {longest:?}");
    assert!(panicked.is_empty(), "panics at seeds {panicked:?}");
    assert!(images.iter().map(Vec::len).sum::<usize>() < 64 * MIB as usize);
}
