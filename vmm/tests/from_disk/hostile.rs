//! Disks that a guest has damaged: whatever is on them, an answer comes soon, and nothing panics.

use std::time::{Duration, Instant};

use sapwood_vmm::from_disk;

use crate::images::{MIB, Random, Tree, Vast, disk, edit, find, noise};
use crate::{ESP, LINUX, ROOT, UUID, debian, grub_cfg, refusal};

/// Longest time for one disk, many times what any takes.
const LIMIT: Duration = Duration::from_secs(30);
const SEEDS: u64 = 1200;

/// Disks with every kind of structure, small, without checksums of metadata, so that damage is not found at once.
fn sample() -> Vec<Vec<u8>> {
    let tree = || {
        Tree::new()
            .file("/etc/fstab", "")
            .file("/boot/grub/grub.cfg", grub_cfg(UUID))
            .file("/boot/grub/grubenv", "saved_entry=1>1\n")
            .file("/loader/entries/a.conf", "title A\nlinux /gone\n")
            .file("/boot/loader/entries/b.conf", "title B\nlinux /gone\n")
            .file("/boot/vmlinuz-6.1.0-9-amd64", noise(1, 1500))
            .file("/boot/initrd.img-6.1.0-9-amd64", noise(2, 600))
            .link("/vmlinuz", "boot/vmlinuz-6.1.0-9-amd64")
    };
    let esp = Tree::new()
        .file("/loader/entries/a.conf", "title A\nlinux /kernels/vmlinuz-1\n")
        .file("/loader/entries/a long name of an entry.conf", "title B\nlinux /gone\n")
        .file("/kernels/vmlinuz-1", noise(3, 3000))
        .fat(2, 12, "12345678");
    let ext4 = tree().ext(2, &["-t", "ext4", "-O", "^metadata_csum,^has_journal", "-U", UUID]);
    let ext2 = tree().ext(2, &["-t", "ext2", "-b", "1024", "-U", UUID]);
    let gpt = format!("label: gpt\nstart=2048, size=4096, type={ESP}\nstart=6144, type={LINUX}\n");
    let mbr = "label: dos\nstart=2048, size=4096, type=ef\nstart=6144, size=8192, type=5\nstart=8192, size=4096, type=83\n";
    vec![disk(&gpt, 6, &[(1, &esp), (3, &ext4)]), disk(mbr, 8, &[(1, &esp), (4, &ext2)]), ext2, ext4, esp]
}

/// Where damage matters: structures lie in blocks that are not empty.
fn blocks(image: &[u8]) -> Vec<usize> {
    let is_used = |block: &usize| image[block * 512..(block + 1) * 512].iter().any(|byte| *byte != 0);
    (0..image.len() / 512).filter(is_used).collect()
}

fn mutate(image: &mut [u8], blocks: &[usize], random: &mut Random) {
    for _ in 0..1 + random.below(40) {
        let at = blocks[random.below(blocks.len())] * 512 + random.below(508);
        let hostile = [0, 1, 0xff, 0x7fff_ffff, 0xffff_ffff, u32::MAX - 1, 0x8000_0000, random.next() as u32];
        let bytes = hostile[random.below(hostile.len())].to_le_bytes();
        let len = [1, 2, 4][random.below(3)];
        image[at..at + len].copy_from_slice(&bytes[..len]);
    }
}

#[test]
fn damaged_disks_are_answered_in_time() {
    let images = sample();
    assert!(
        images.iter().all(|image| find(image, Some("A")).is_ok() || find(image, None).is_ok()),
        "undamaged"
    );
    let used: Vec<Vec<usize>> = images.iter().map(|image| blocks(image)).collect();
    let mut longest = Duration::ZERO;
    let mut answers = [0_u64; 2];
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
    println!("{SEEDS} disks, {answers:?} refused and booted, the longest took {longest:?}");
    assert!(panicked.is_empty(), "panics at seeds {panicked:?}");
    assert!(
        answers.iter().all(|count| *count > SEEDS / 20),
        "some are too damaged, and some are not: {answers:?}"
    );
    assert!(images.iter().map(Vec::len).sum::<usize>() < 64 * MIB as usize);
}

/// CRC-32 of a polynomial, bit by bit: `0xedb8_8320` is that of GPT, `0x82f6_3b78` that of ext4.
fn crc(polynomial: u32, bytes: &[u8]) -> u32 {
    let step = |crc: u32, byte: &u8| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| (crc >> 1) ^ (polynomial * (crc & 1)))
    };
    bytes.iter().fold(u32::MAX, step)
}

#[test]
fn a_partition_table_with_room_for_anything_is_refused() {
    let image =
        disk(&format!("label: gpt\nstart=4096, type={ROOT}\n"), 12, &[(2, &debian("1").ext4(8, UUID))]);
    assert!(find(&image, None).is_ok());
    let fields: [(usize, &[u8]); 4] = [
        (80, &u32::MAX.to_le_bytes()), // the number of entries
        (84, &0_u32.to_le_bytes()),    // the length of one
        (84, &4096_u32.to_le_bytes()),
        (72, &(u64::MAX / 512 - 3).to_le_bytes()), // where they begin
    ];
    for (at, value) in fields {
        let mut image = image.clone();
        for header in [512, image.len() - 512] {
            image[header + at..][..value.len()].copy_from_slice(value);
            image[header + 16..header + 20].fill(0);
            let sum = !crc(0xedb8_8320, &image[header..header + 92]);
            image[header + 16..header + 20].copy_from_slice(&sum.to_le_bytes());
        }
        let message = refusal(&image, None);
        assert!(message.contains("(no partition table)"), "{at}: {message}");
    }
}

#[test]
fn entries_that_are_too_long_are_refused() {
    let image = Tree::new()
        .file("/boot/loader/entries/long.conf", format!("linux /k\ntitle {}\n", "x".repeat(70_000)))
        .file("/boot/loader/entries/grown.conf", format!("linux /k\noptions{}\n", " $a".repeat(1000)))
        .file("/boot/grub/grubenv", format!("a={}\n", "x".repeat(4000)))
        .file("/boot/k", noise(1, 1000))
        .ext4(8, UUID);
    let message = refusal(&image, None);
    assert!(message.contains("entries/long.conf: longer than 65536 bytes"), "{message}");
    assert!(message.contains("grown.conf: its command line is too long"), "{message}");
}

#[test]
fn logical_partitions_in_a_circle_end() {
    let script = "label: dos\nstart=2048, size=8192, type=5\nstart=4096, size=4096, type=83\n";
    let mut image = disk(script, 6, &[]);
    let record = 2048 * 512 + 446 + 16;
    image[record..record + 16].copy_from_slice(&[0, 0, 0, 0, 5, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0]);
    image.copy_within(2048 * 512..2049 * 512, 2049 * 512);
    let begun = Instant::now();
    assert!(refusal(&image, None).contains("(MBR)"));
    assert!(begun.elapsed() < LIMIT);
}

#[test]
fn lengths_that_ext4_claims_are_not_believed() {
    let image =
        debian("1").link("/vmlinuz", &"boot/./".repeat(12)).ext(4, &["-t", "ext4", "-O", "^metadata_csum"]);
    let link = edit(&image, "sif /vmlinuz size 0x3fffffffff");
    assert!(find(&link, None).is_ok(), "the kernel is found by its name");
    let kernel = edit(&image, "sif /boot/vmlinuz-1 size 0x3fffffffff");
    assert!(refusal(&kernel, None).contains("more than the 268435456 that are allowed"));
    let config = Tree::new().file("/boot/grub/grub.cfg", "x".repeat((1 << 20) + 1)).ext4(8, UUID);
    assert!(refusal(&config, None).contains("/boot/grub/grub.cfg: 1048577 bytes long"));
    let mut blocks = image.clone();
    blocks[1024 + 4..1024 + 8].fill(0xff);
    assert!(refusal(&blocks, None).contains("ext4 with more blocks than the partition has"));
    blocks[1024 + 0x20..1024 + 0x24].copy_from_slice(&1_u32.to_le_bytes());
    let vast = from_disk::find(Box::new(Vast(blocks)), None).unwrap_err().to_string();
    assert!(vast.contains("ext4 with too many block groups"), "{vast}");
    let mut large = image;
    large[1024 + 0x18] = 21;
    assert!(refusal(&large, None).contains("ext4 with blocks that are too large"));
}

#[test]
fn a_chain_of_clusters_in_a_circle_ends() {
    let mut image = Tree::new().file("/loader/entries/a.conf", "linux /x").fat(20, 16, "12345678");
    let field = |at: usize| u16::from_le_bytes([image[at], image[at + 1]]) as usize;
    // Every last cluster of a chain leads to itself.
    let (start, sectors, copies) = (field(14) * 512, field(22), 2);
    for copy in 0..copies {
        for cluster in 2..sectors * 256 {
            let at = start + copy * sectors * 512 + cluster * 2;
            if image[at..at + 2] >= [0xf8, 0xff][..] && image[at + 1] == 0xff {
                image[at..at + 2].copy_from_slice(&(cluster as u16).to_le_bytes());
            }
        }
    }
    let begun = Instant::now();
    let message = refusal(&image, None);
    assert!(begun.elapsed() < LIMIT);
    assert!(message.contains("circles") || message.contains("/x is not there"), "{message}");
}

/// A file system that is to be recovered, and where the superblock of its journal lies.
fn crashed(size: Option<&str>) -> (Vec<u8>, usize) {
    let mut image = debian("1").ext(24, &["-t", "ext4", "-b", "4096", "-O", "^metadata_csum"]);
    if let Some(size) = size {
        image = edit(&image, &format!("sif <8> size {size}"));
    }
    let image = edit(&image, "feature +needs_recovery");
    let magic = [0xc0, 0x3b, 0x39, 0x98, 0, 0, 0, 4];
    let at = image.chunks(4096).position(|block| block.starts_with(&magic)).unwrap() * 4096;
    (image, at)
}

/// Makes the journal one that is understood, which begins at `block`.
fn begin_journal(journal: &mut [u8], block: u32) {
    journal[0x1c..0x20].copy_from_slice(&block.to_be_bytes());
    journal[0x28..0x2c].copy_from_slice(&0x12_u32.to_be_bytes()); // 64 bits, checksums of version 3
    journal[0x50] = 4; // CRC32C
    journal[0xfc..0x100].fill(0);
    let sum = crc(0x82f6_3b78, journal);
    journal[0xfc..0x100].copy_from_slice(&sum.to_be_bytes());
}

#[test]
fn a_journal_that_claims_to_be_vast_is_left_alone() {
    // Counting through it would take minutes.
    let (mut image, at) = crashed(Some("0xffffffff000"));
    begin_journal(&mut image[at..at + 1024], 0xffff_fff0);
    let begun = Instant::now();
    assert!(find(&image, None).is_ok());
    assert!(begun.elapsed() < LIMIT, "{:?}", begun.elapsed());
    // The largest that is believed.
    let (mut image, at) = crashed(Some("41943040000"));
    begin_journal(&mut image[at..at + 1024], 10_239_999);
    let begun = Instant::now();
    assert!(find(&image, None).is_ok());
    assert!(begun.elapsed() < LIMIT, "{:?}", begun.elapsed());
}

#[test]
fn a_journal_of_an_old_kind_is_left_alone() {
    // Without checksums, the crate does not replay it.
    let (image, _) = crashed(None);
    assert!(find(&image, None).is_ok());
}
