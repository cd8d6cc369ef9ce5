//! A whole qcow2 image: described, checked, opened, read, its snapshots too, over files in memory.
//!
//! Images are given as small inputs: only the stretches that differ from zero, in sectors.
//!
//! ```text
//! byte 0       bit 0: other files may be opened; bit 1: their format is given
//! byte 1..3    sectors in the file
//! then         stretches: sector (2 bytes), start in the sector (2), length (2), bytes
//! ```
//!
//! Beyond what holds for every target: what is read is the same twice, the map has no gaps, and when
//! it says that bytes are zero, they are.

use std::path::Path;

use sapwood_image::qcow2::{self, doors};
use sapwood_image::{ExtentKind, Format, OpenBelow};
use sapwood_tests::damage::lab::wait;
use sapwood_tests::damage::memory::MemoryStorage;
use sapwood_tests::qcow2::reader::Reader;

use crate::bounded;

/// Memory for a run whatever its input, in bytes: both caches, and what reading takes.
const MEMORY: usize = 96 << 20;
/// Operations on files for each run.
const OPERATIONS: u64 = 50_000;
/// Largest file in sectors: 1 MiB.
const SECTORS_MAX: usize = 2048;
const SECTOR: usize = 512;
/// Bytes before the stretches, and before the contents of a stretch.
const HEAD: usize = 3;
const STRETCH: usize = 6;
/// Zeroes that end a stretch.
const GAP: usize = 12;
/// Bytes read from the start of each stretch of the map, and the stretches that are looked at.
const SAMPLE: u64 = 16 << 10;
const SAMPLES: usize = 64;
/// Largest disk whose whole map is asked for.
const MAPPED_MAX: u64 = 64 << 20;

/// One run.
pub fn run(data: &[u8]) {
    let Some(file) = unpack(data) else { return };
    let storage = MemoryStorage::new(OPERATIONS);
    storage.install(path(), &file);
    storage.install(Path::new("/below"), &[7; 100 * SECTOR]);
    bounded(MEMORY, || examine(&storage, data[0]));
    bounded(MEMORY, || parse(&file));
}

fn path() -> &'static Path {
    Path::new("/disk")
}

fn examine(storage: &MemoryStorage, how: u8) {
    let info = wait(storage, async |storage, io| qcow2::info(&storage, &io, path()).await);
    let check = wait(storage, async |storage, io| qcow2::check(&storage, &io, path()).await);
    let faultless = check.is_ok_and(|report| report.errors.is_empty());
    assert!(info.is_ok() || !faultless, "a faultless image can be described");
    let options = OpenBelow {
        allow_backing: how & 1 != 0,
        backing_format: (how & 2 != 0).then_some(Format::Raw),
        snapshot: None,
    };
    read(storage, &options);
    for snapshot in info.into_iter().flat_map(|info| info.snapshots).take(4) {
        read(storage, &OpenBelow { snapshot: Some(snapshot.name), ..options.clone() });
    }
}

fn read(storage: &MemoryStorage, options: &OpenBelow) {
    let Ok(mut reader) = Reader::open(storage, path(), options) else { return };
    let size = reader.size();
    let last = size.saturating_sub(SAMPLE) / 512 * 512;
    for at in [0, size / 2 / 512 * 512, last] {
        let len = SAMPLE.min(size - at) as usize;
        assert_eq!(reader.read(at, len), reader.read(at, len), "read twice");
    }
    if size > MAPPED_MAX {
        return;
    }
    let Ok(extents) = reader.extents() else { return };
    assert_eq!(extents.iter().map(|extent| extent.len).sum::<u64>(), size, "a map without gaps");
    for extent in extents.iter().take(SAMPLES) {
        let bytes = reader.read(extent.start, extent.len.min(SAMPLE) as usize);
        if matches!(extent.kind, ExtentKind::Zero | ExtentKind::Absent) {
            assert!(bytes.is_ok_and(|bytes| bytes.iter().all(|byte| *byte == 0)), "{extent:?}");
        }
    }
}

/// What an image seldom comes to.
fn parse(file: &[u8]) {
    doors::header(file);
    doors::snapshot(file);
    for zstd in [false, true] {
        doors::cluster(zstd, file, 65_536);
    }
}

/// The file of an input.
pub fn unpack(data: &[u8]) -> Option<Vec<u8>> {
    let number = |bytes: &[u8], at: usize| usize::from(u16::from_le_bytes([bytes[at], bytes[at + 1]]));
    let mut rest = data.get(HEAD..)?;
    let mut file = vec![0; number(data, 1).min(SECTORS_MAX) * SECTOR];
    while rest.len() >= STRETCH {
        let at = number(rest, 0) * SECTOR + number(rest, 2) % SECTOR;
        let len = number(rest, 4).min(rest.len() - STRETCH);
        let inside = len.min(file.len().saturating_sub(at));
        if inside > 0 {
            file[at..at + inside].copy_from_slice(&rest[STRETCH..STRETCH + inside]);
        }
        rest = &rest[STRETCH + len..];
    }
    Some(file)
}

/// The input for a file.
pub fn pack(file: &[u8], how: u8) -> Vec<u8> {
    let mut data = vec![how];
    data.extend((file.len().div_ceil(SECTOR) as u16).to_le_bytes());
    for (number, sector) in file.chunks(SECTOR).enumerate() {
        let mut at = 0;
        while let Some(start) = sector[at..].iter().position(|&byte| byte != 0).map(|skip| at + skip) {
            let zeroes = sector[start..].windows(GAP).position(|gap| gap.iter().all(|&byte| byte == 0));
            let end = zeroes.map_or(sector.len(), |len| start + len);
            [number, start, end - start].iter().for_each(|&n| data.extend((n as u16).to_le_bytes()));
            data.extend(&sector[start..end]);
            at = end;
        }
    }
    data
}
