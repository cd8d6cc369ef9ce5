//! Damaged and hostile qcow2 images: attacks by name, and damage by seed. In memory, with
//! operations and memory counted.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::path::Path;

use sapwood_blockdev::device::DeviceError;
use sapwood_image::qcow2;
use sapwood_image::{ErrorKind, Format, ImageError, OpenBelow};
use sapwood_tests::damage::lab::wait;
use sapwood_tests::damage::memory::MemoryStorage;
use sapwood_tests::damage::meter::{Meter, metered};
use sapwood_tests::qcow2::craft::{Craft, Kind, extension, field, get64, put32, put64, specimen};
use sapwood_tests::qcow2::mutate::mutate;
use sapwood_tests::qcow2::reader::{Reader, trusting};
use sapwood_tests::sim::rng::Rng;

#[global_allocator]
static METER: Meter = Meter;

/// What one small image may take: memory in bytes and operations on files. The caches may hold
/// 16 MiB and 8 MiB, a compressed cluster takes up to 8 MiB while it is decompressed (with its window 16).
const MEMORY_MAX: usize = 64 << 20;
const OPERATIONS_MAX: u64 = 60_000;
const SEEDS: u64 = 1_500;
/// Bytes of a disk that are looked at, from its start and from its end.
const LOOKED_AT: u64 = 1 << 20;

const PLAIN: Kind = Kind { bits: 12, extended: false, zstd: false };
const EXTENDED: Kind = Kind { bits: 14, extended: true, zstd: true };

fn path() -> &'static Path {
    Path::new("/images/disk")
}

fn store(image: &[u8]) -> MemoryStorage {
    let storage = MemoryStorage::new(OPERATIONS_MAX);
    storage.install(path(), image);
    storage
}

fn info(storage: &MemoryStorage) -> Result<qcow2::Qcow2Info, ImageError> {
    wait(storage, async |storage, io| qcow2::info(&storage, &io, path()).await)
}

fn check(storage: &MemoryStorage) -> Result<qcow2::CheckReport, ImageError> {
    wait(storage, async |storage, io| qcow2::check(&storage, &io, path()).await)
}

fn open(storage: &MemoryStorage) -> Result<Reader<MemoryStorage>, ImageError> {
    Reader::open(storage, path(), &trusting())
}

/// Describes, checks, opens, reads. Says how it ended.
fn survive(image: &[u8]) -> &'static str {
    let storage = store(image);
    let is_clean = |error: &ImageError| {
        let text = error.to_string();
        assert!(error.path.starts_with("/images") && !text.contains('\n'), "{text}");
    };
    info(&storage).err().iter().for_each(is_clean);
    let report = check(&storage);
    report.as_ref().err().into_iter().for_each(is_clean);
    for snapshot in ["1", "second"] {
        let options = OpenBelow { snapshot: Some(snapshot.to_owned()), ..trusting() };
        match Reader::open(&storage, path(), &options) {
            Ok(mut reader) => drop(look(&mut reader)),
            Err(error) => is_clean(&error),
        }
    }
    let mut reader = match open(&storage) {
        Ok(reader) => reader,
        Err(error) => {
            is_clean(&error);
            return "refused";
        }
    };
    let looked = look(&mut reader);
    let faultless = report.is_ok_and(|report| report.errors.is_empty());
    match looked {
        Ok(()) => "works",
        // Compressed data is not checked.
        Err(DeviceError::Corrupt) => {
            if faultless {
                "undetected"
            } else {
                "corrupt"
            }
        }
        Err(other) => panic!("{other}"),
    }
}

/// Reads the start and the end of a disk; the last error.
fn look(reader: &mut Reader<MemoryStorage>) -> Result<(), DeviceError> {
    let size = reader.size();
    let mut result = Ok(());
    for start in [0, size.saturating_sub(LOOKED_AT)] {
        let end = size.min(start + LOOKED_AT);
        for at in (start..end).step_by(64 << 10) {
            let len = (end - at).min(64 << 10);
            result = reader.read(at, len as usize).map(drop).and(result);
        }
    }
    if size <= 64 << 20 {
        reader.extents().err().iter().for_each(|error| assert!(!error.to_string().is_empty()));
    }
    result
}

#[test]
fn no_damage_by_seed_is_more_than_an_error() {
    let kinds = [PLAIN, Kind { bits: 9, ..PLAIN }, EXTENDED, Kind { bits: 16, zstd: true, ..PLAIN }];
    let specimens = kinds.map(|kind| specimen(kind).0);
    let mut ends: BTreeMap<&str, u32> = BTreeMap::new();
    let mut most = 0;
    for seed in 0..SEEDS {
        println!("seed {seed}");
        let mut image = specimens[(seed % 4) as usize].clone();
        mutate(&mut image, &mut Rng::new(seed));
        let (end, peak) = metered(MEMORY_MAX, || survive(&image));
        most = most.max(peak);
        *ends.entry(end).or_default() += 1;
    }
    println!("{ends:?}, at most {most} bytes");
    for end in ["refused", "works", "corrupt"] {
        assert!(ends[end] > 100, "{end}: damage gets everywhere");
    }
}

/// The message about an image that is refused within the bounds.
fn refusal(image: &[u8]) -> String {
    let refused = || open(&store(image)).err().expect("it is refused").to_string();
    metered(MEMORY_MAX, refused).0
}

fn plain() -> Craft {
    let mut craft = Craft::new(PLAIN, 1 << 20);
    craft.data(0, &[7; 4096]);
    craft
}

/// An image with one field of the header changed.
fn with32(at: usize, value: u32) -> Vec<u8> {
    let mut craft = plain();
    put32(&mut craft.file, at, value);
    craft.file
}

fn with64(at: usize, value: u64) -> Vec<u8> {
    let mut craft = plain();
    put64(&mut craft.file, at, value);
    craft.file
}

#[test]
fn absurd_headers_are_refused_by_field() {
    let cases = [
        (with32(0, 0), "magic"),
        (with32(field::VERSION, 1), "version 1"),
        (with32(field::VERSION, 4), "version 4"),
        (with32(field::CLUSTER_BITS, 8), "cluster_bits"),
        (with32(field::CLUSTER_BITS, 22), "cluster_bits"),
        (with32(field::CLUSTER_BITS, u32::MAX), "cluster_bits"),
        (with32(field::L1_SIZE, u32::MAX), "l1_size"),
        (with32(field::L1_SIZE, (4 << 20) + 1), "l1_size"),
        (with32(field::L1_SIZE, 0), "l1_size"),
        (with64(field::L1_OFFSET, 12_289), "l1_table_offset"),
        (with64(field::L1_OFFSET, 0), "l1_table_offset"),
        (with64(field::L1_OFFSET, u64::MAX << 12), "l1_table_offset"),
        (with64(field::SIZE, 1 << 60), "l1_size"),
        (with64(field::SIZE, u64::MAX), "size"),
        (with32(field::CRYPT, 1), "AES"),
        (with32(field::CRYPT, 2), "LUKS"),
        (with64(field::BACKING_OFFSET, 1 << 20), "backing_file_offset"),
        (with64(field::INCOMPATIBLE, 1 << 5), "bit 5"),
        (with64(field::INCOMPATIBLE, 1 << 63), "bit 63"),
        (with64(field::INCOMPATIBLE, 1 << 2), "external file"),
        (with64(field::INCOMPATIBLE, 1 << 3), "compression_type"),
        (with64(field::INCOMPATIBLE, 1 << 4), "cluster_bits"),
        (with32(field::COMPRESSION, 9 << 24), "compression type 9"),
        (with32(field::REFCOUNT_ORDER, 7), "refcount_order"),
        (with32(field::HEADER_LENGTH, 96), "header_length"),
        (with32(field::HEADER_LENGTH, u32::MAX), "header_length"),
    ];
    for (image, word) in cases {
        let said = refusal(&image);
        assert!(said.contains(word) && said.starts_with("/images/disk: "), "no '{word}' in {said}");
    }
}

#[test]
fn names_and_extensions_beyond_their_place_are_refused() {
    let mut long = plain();
    long.backing("x", Some("raw"));
    put32(&mut long.file, field::BACKING_SIZE, 1024);
    assert!(refusal(&long.file).contains("1024"));
    let mut extended = plain();
    extended.extension(0x1234, &[]);
    put32(&mut extended.file, field::EXTENSIONS + 4, u32::MAX);
    assert!(refusal(&extended.file).contains("extension"));
    let mut named = plain();
    let mut table = vec![0, 9];
    table.extend(b"teleportation");
    table.resize(48, 0);
    named.extension(extension::FEATURE_NAMES, &table);
    put64(&mut named.file, field::INCOMPATIBLE, 1 << 9);
    assert!(refusal(&named.file).contains("bit 9 (teleportation)"));
}

#[test]
fn reference_counts_do_not_matter() {
    for value in [0, 1 << 62, u64::MAX] {
        let mut craft = plain();
        put64(&mut craft.file, field::REFCOUNT_OFFSET, value);
        put32(&mut craft.file, field::REFCOUNT_CLUSTERS, value as u32);
        assert_eq!(open(&store(&craft.file)).unwrap().read(0, 4096).unwrap(), [7; 4096]);
    }
}

#[test]
fn marked_as_dirty_or_corrupt_is_read() {
    for bit in [0, 1] {
        let mut craft = plain();
        put64(&mut craft.file, field::INCOMPATIBLE, 1 << bit);
        let storage = store(&craft.file);
        assert_eq!(open(&storage).unwrap().read(0, 4096).unwrap(), [7; 4096]);
        let report = check(&storage).unwrap();
        assert_eq!((report.warnings.len(), report.errors.len()), (1 - bit, bit), "{report:?}");
    }
}

/// A chain of images, each of which names the next, and the last one the first or nothing.
fn chain(length: usize, is_loop: bool) -> MemoryStorage {
    let storage = MemoryStorage::new(OPERATIONS_MAX);
    for number in 0..length {
        let mut craft = Craft::new(PLAIN, 1 << 20);
        let next = if number + 1 == length { 0 } else { number + 1 };
        if next > 0 || is_loop {
            craft.backing(&if next == 0 { "disk".to_owned() } else { format!("{next}") }, Some("qcow2"));
        }
        if next == 0 {
            craft.data(1, &[5; 4096]);
        }
        let name =
            if number == 0 { path().to_owned() } else { Path::new("/images").join(number.to_string()) };
        storage.install(&name, &craft.file);
    }
    storage
}

#[test]
fn chains_end() {
    let error = open(&chain(1, true)).err().unwrap();
    assert!(matches!(error.kind, ErrorKind::Base(_)) && error.to_string().contains("loop"), "{error}");
    assert!(open(&chain(5, true)).err().unwrap().to_string().contains("loop"));
    let deepest = metered(MEMORY_MAX, || {
        let mut reader = open(&chain(101, false)).unwrap();
        assert_eq!(reader.read(0, 8192).unwrap(), [[0; 4096], [5; 4096]].concat());
    });
    println!("{} bytes for a chain of 101", deepest.1);
    for length in [102, 1000] {
        let error = metered(MEMORY_MAX, || open(&chain(length, false)).err().unwrap()).0;
        assert!(error.to_string().contains("more than 100"), "{error}");
    }
}

#[test]
fn nothing_but_paths_is_followed() {
    for name in ["nbd://host/disk", "json:{\"driver\":\"null-co\"}", "file:other", "ssh:x"] {
        let mut craft = plain();
        craft.backing(name, Some("raw"));
        let said = refusal(&craft.file);
        assert!(said.contains("only paths") && !said.contains('\n'), "{said}");
    }
    for format in ["vmdk", "layer", "", "qcow2\n"] {
        let mut craft = plain();
        craft.backing("below", Some(format));
        let said = refusal(&craft.file);
        assert!(said.contains("only raw and qcow2") && !said.contains('\n'), "{said}");
    }
    let mut craft = plain();
    craft.backing("below", None);
    assert!(refusal(&craft.file).contains("--backing-format"));
    let storage = store(&craft.file);
    storage.install(Path::new("/images/below"), &[3; 8192]);
    let options = OpenBelow { backing_format: Some(Format::Raw), ..trusting() };
    let mut reader = Reader::open(&storage, path(), &options).unwrap();
    assert_eq!(reader.read(4096, 8192).unwrap(), [[3; 4096], [0; 4096]].concat());
}

#[test]
fn damaged_tables_are_errors_where_they_are() {
    let sane = |craft: &mut Craft| {
        craft.data(1, &[8; 4096]);
        get64(&craft.file, field::L1_OFFSET) as usize
    };
    // Each with the cluster that it harms; the rest is read.
    type Harm = fn(&mut Craft, usize);
    let harms: [(&str, Harm); 7] = [
        ("l1: not aligned", |craft, l1| put64(&mut craft.file, l1 + 8, 1 << 63 | 0x1200)),
        ("l1: outside", |craft, l1| put64(&mut craft.file, l1 + 8, 1 << 63 | 1 << 40)),
        ("l2: not aligned", |craft, _| craft.set(512, 1 << 63 | 0x1200)),
        ("compressed: outside", |craft, _| craft.set(512, 1 << 62 | 1 << 40)),
        ("compressed: zeroes", |craft, _| craft.compressed_as(512, &[0; 100], 0)),
        ("compressed: short", |craft, _| craft.compressed(512, &[1; 4095], 0)),
        ("compressed: random", |craft, _| craft.compressed_as(512, &[0x55; 3000], 0)),
    ];
    for (what, harm) in harms {
        let mut craft = Craft::new(PLAIN, 4 << 20);
        let l1 = sane(&mut craft);
        harm(&mut craft, l1);
        let mut reader = open(&store(&craft.file)).unwrap();
        assert_eq!(reader.read(512 * 4096, 4096), Err(DeviceError::Corrupt), "{what}");
        assert_eq!(reader.read(4096, 4096).unwrap(), [8; 4096], "{what}");
    }
    // A table of which a part is missing, in the midst of what is read at once.
    let mut craft = Craft::new(PLAIN, 4 << 20);
    sane(&mut craft);
    let table = craft.entry(512);
    craft.file.truncate(table + 800);
    let mut reader = open(&store(&craft.file)).unwrap();
    assert_eq!(reader.read(512 * 4096, 100 * 4096).unwrap(), vec![0; 100 * 4096]);
    assert_eq!(reader.read(512 * 4096, 101 * 4096), Err(DeviceError::Corrupt));
    // What QEMU reads as zeroes, so do we; the check tells.
    let mut craft = Craft::new(PLAIN, 4 << 20);
    sane(&mut craft);
    craft.set(512, 1 << 63 | 1 << 40);
    let storage = store(&craft.file);
    assert_eq!(open(&storage).unwrap().read(512 * 4096, 4096).unwrap(), [0; 4096]);
    assert_eq!(check(&storage).unwrap().errors.len(), 1);
}

#[test]
fn subclusters_that_contradict_themselves_are_errors() {
    for (entry, stored, zero) in [(1u64 << 63, 1, 1), (0, 1, 0)] {
        let mut craft = Craft::new(EXTENDED, 4 << 20);
        let at = craft.append(&[7; 1 << 14]);
        craft.set(0, if entry == 0 { 0 } else { entry | at });
        craft.set_bitmap(0, stored, zero);
        let mut reader = open(&store(&craft.file)).unwrap();
        assert_eq!(reader.read(0, 512), Err(DeviceError::Corrupt));
    }
}

/// A zstd frame with a window of `window` bytes (a power of two from 1 KiB) of blocks that each
/// repeat one byte 128 KiB times.
fn zstd_bomb(window: u64, blocks: usize) -> Vec<u8> {
    let mut frame = vec![0x28, 0xb5, 0x2f, 0xfd, 0, ((window.ilog2() - 10) << 3) as u8];
    for number in 0..blocks {
        let header = u32::from(number + 1 == blocks) | 1 << 1 | (128 << 10) << 3;
        frame.extend(&header.to_le_bytes()[..3]);
        frame.push(7);
    }
    frame
}

#[test]
fn bombs_are_bounded_by_a_cluster() {
    let zstd = Kind { bits: 21, extended: false, zstd: true };
    for (window, blocks, expected) in [
        (1 << 20, 16, Ok(())),
        (1 << 20, 17, Err(DeviceError::Corrupt)),
        (1 << 20, 500_000, Err(DeviceError::Corrupt)),
        (1 << 30, 16, Err(DeviceError::Corrupt)),
    ] {
        let mut craft = Craft::new(zstd, 8 << 20);
        craft.compressed_as(1, &zstd_bomb(window, blocks), 0);
        let file = craft.file;
        let (read, peak) = metered(MEMORY_MAX, || open(&store(&file)).unwrap().read(3 << 20, 4096));
        assert_eq!(read.map(|bytes| assert_eq!(bytes, [7; 4096])), expected, "{window} {blocks}");
        println!("{window} {blocks}: {peak} bytes");
    }
    // A deflate stream that goes on is cut off, as QEMU does.
    let mut craft = Craft::new(Kind { zstd: false, ..zstd }, 8 << 20);
    craft.compressed(1, &vec![9; 64 << 20], 0);
    let file = craft.file;
    let (read, _) = metered(MEMORY_MAX, || open(&store(&file)).unwrap().read(3 << 20, 4096));
    assert_eq!(read.unwrap(), [9; 4096]);
}

#[test]
fn many_compressed_clusters_at_once_are_bounded() {
    let kind = Kind { bits: 21, extended: false, zstd: false };
    let mut craft = Craft::new(kind, 64 << 20);
    for cluster in 0..24 {
        craft.compressed(cluster, &vec![cluster as u8; 2 << 20], 0);
        // As long as can be stated: 4 MiB are read for each.
        let at = craft.entry(cluster);
        let longest = get64(&craft.file, at) | ((1 << 13) - 1) << 49;
        put64(&mut craft.file, at, longest);
    }
    let storage = store(&craft.file);
    let mut reader = open(&storage).unwrap();
    // The engine keeps what a read brings a second time.
    let (results, peak) = metered(48 << 20, || reader.read_sectors((0..24).map(|i| i * (2 << 20))));
    assert!(results == vec![Ok(()); 24], "{results:?}");
    println!("{peak} bytes");
}

#[test]
fn a_sparse_image_of_absurd_size_takes_no_memory() {
    // The largest tables that there can be, of which the file holds nothing.
    let kind = Kind { bits: 21, extended: false, zstd: false };
    let mut craft = Craft::new(kind, 1 << 30);
    put64(&mut craft.file, field::SIZE, 1 << 61);
    put32(&mut craft.file, field::L1_SIZE, 4 << 20);
    let file = craft.file;
    let (read, peak) = metered(40 << 20, || open(&store(&file)).unwrap().read(1 << 60, 4096));
    assert_eq!(read, Err(DeviceError::Corrupt), "the table is not in the file");
    println!("{peak} bytes");
}

#[test]
fn absurd_snapshot_tables_are_refused_when_asked_for() {
    let wants = OpenBelow { snapshot: Some("first".to_owned()), ..trusting() };
    let refused = |image: &[u8]| {
        let storage = store(image);
        open(&storage).unwrap();
        assert!(!check(&storage).unwrap().errors.is_empty());
        let read = || Reader::open(&storage, path(), &wants).err().unwrap().to_string();
        metered(MEMORY_MAX, read).0
    };
    let made = || {
        let mut craft = plain();
        craft.snapshots(&[("1", "first")]);
        craft.file
    };
    type Harm = fn(&mut Vec<u8>, usize);
    let harms: [(&str, Harm); 7] = [
        ("65536", |file, _| put32(file, field::SNAPSHOTS, 65_537)),
        ("ends", |file, _| put32(file, field::SNAPSHOTS, 65_536)),
        ("0x200", |file, _| put64(file, field::SNAPSHOTS_OFFSET, 0x200)),
        ("can be", |file, _| put64(file, field::SNAPSHOTS_OFFSET, 1 << 62)),
        ("extra_data_size", |file, at| put32(file, at + 36, 1025)),
        ("l1_size", |file, at| put32(file, at + 8, u32::MAX)),
        ("l1_table_offset", |file, at| put64(file, at, 77)),
    ];
    for (word, harm) in harms {
        let mut file = made();
        let at = get64(&file, field::SNAPSHOTS_OFFSET) as usize;
        harm(&mut file, at);
        let said = refused(&file);
        assert!(said.contains(word), "no '{word}' in {said}");
    }
}
