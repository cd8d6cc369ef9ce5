//! qcow2 images byte by byte, valid or not.
//!
//! Everything is appended: the header's cluster, the L1 table, then what is asked for. There are no
//! reference counts, which readers do not need.

use std::io::Write;

use flate2::Compression;
use flate2::write::DeflateEncoder;
use ruzstd::encoding::{CompressionLevel, compress_to_vec};

/// Offsets of header fields.
pub mod field {
    #![allow(missing_docs)]
    pub const VERSION: usize = 4;
    pub const BACKING_OFFSET: usize = 8;
    pub const BACKING_SIZE: usize = 16;
    pub const CLUSTER_BITS: usize = 20;
    pub const SIZE: usize = 24;
    pub const CRYPT: usize = 32;
    pub const L1_SIZE: usize = 36;
    pub const L1_OFFSET: usize = 40;
    pub const REFCOUNT_OFFSET: usize = 48;
    pub const REFCOUNT_CLUSTERS: usize = 56;
    pub const SNAPSHOTS: usize = 60;
    pub const SNAPSHOTS_OFFSET: usize = 64;
    pub const INCOMPATIBLE: usize = 72;
    pub const REFCOUNT_ORDER: usize = 96;
    pub const HEADER_LENGTH: usize = 100;
    pub const COMPRESSION: usize = 104;
    /// Where extensions start.
    pub const EXTENSIONS: usize = 112;
}

/// The kinds of header extensions.
pub mod extension {
    #![allow(missing_docs)]
    pub const BACKING_FORMAT: u32 = 0xe279_2aca;
    pub const FEATURE_NAMES: u32 = 0x6803_f857;
    pub const DATA_FILE: u32 = 0x4441_5441;
}

/// Writes a big-endian `u32`.
pub fn put32(bytes: &mut [u8], at: usize, value: u32) {
    bytes[at..at + 4].copy_from_slice(&value.to_be_bytes());
}

/// Writes a big-endian `u64`.
pub fn put64(bytes: &mut [u8], at: usize, value: u64) {
    bytes[at..at + 8].copy_from_slice(&value.to_be_bytes());
}

/// Reads a big-endian `u32`.
pub fn get32(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(bytes[at..at + 4].try_into().expect("4 bytes"))
}

/// Reads a big-endian `u64`.
pub fn get64(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().expect("8 bytes"))
}

/// What kind of image.
#[derive(Clone, Copy, Debug)]
pub struct Kind {
    /// Cluster bits.
    pub bits: u32,
    /// Extended L2 entries.
    pub extended: bool,
    /// zstd, not zlib.
    pub zstd: bool,
}

/// An image being made.
pub struct Craft {
    kind: Kind,
    /// The file so far; fields may be changed at will.
    pub file: Vec<u8>,
    /// Where the next extension goes.
    extensions: usize,
}

impl Craft {
    /// An image of version 3 of an empty disk of `size` bytes.
    pub fn new(kind: Kind, size: u64) -> Self {
        let cluster = 1usize << kind.bits;
        let mut craft = Self { kind, file: vec![0; cluster], extensions: field::EXTENSIONS };
        let entries = size.div_ceil(craft.span());
        let refcounts = craft.append(&vec![0; cluster]);
        let l1 = craft.append(&vec![0; entries as usize * 8]);
        let file = &mut craft.file;
        file[..4].copy_from_slice(b"QFI\xfb");
        put32(file, field::VERSION, 3);
        put32(file, field::CLUSTER_BITS, kind.bits);
        put64(file, field::SIZE, size);
        put32(file, field::L1_SIZE, entries as u32);
        put64(file, field::L1_OFFSET, l1);
        put64(file, field::REFCOUNT_OFFSET, refcounts);
        put32(file, field::REFCOUNT_CLUSTERS, 1);
        put64(file, field::INCOMPATIBLE, u64::from(kind.zstd) << 3 | u64::from(kind.extended) << 4);
        put32(file, field::REFCOUNT_ORDER, 4);
        put32(file, field::HEADER_LENGTH, 112);
        file[field::COMPRESSION] = u8::from(kind.zstd);
        craft
    }

    fn cluster(&self) -> u64 {
        1 << self.kind.bits
    }

    fn entry_bytes(&self) -> u64 {
        if self.kind.extended { 16 } else { 8 }
    }

    /// Bytes of disk below one L1 entry.
    pub fn span(&self) -> u64 {
        self.cluster() / self.entry_bytes() * self.cluster()
    }

    /// Appends bytes in clusters of their own; where.
    pub fn append(&mut self, bytes: &[u8]) -> u64 {
        let at = self.file.len();
        self.file.extend(bytes);
        let len = self.file.len().next_multiple_of(1 << self.kind.bits);
        self.file.resize(len, 0);
        at as u64
    }

    /// Where the L2 entry of a cluster of the disk is; its table is made if there is none.
    pub fn entry(&mut self, cluster: u64) -> usize {
        let per_table = self.cluster() / self.entry_bytes();
        let l1 = (get64(&self.file, field::L1_OFFSET) + cluster / per_table * 8) as usize;
        if get64(&self.file, l1) == 0 {
            let table = self.append(&vec![0; 1 << self.kind.bits]);
            put64(&mut self.file, l1, 1 << 63 | table);
        }
        let table = get64(&self.file, l1) & 0x00ff_ffff_ffff_fe00;
        (table + cluster % per_table * self.entry_bytes()) as usize
    }

    /// Sets an L2 entry.
    pub fn set(&mut self, cluster: u64, value: u64) {
        let at = self.entry(cluster);
        put64(&mut self.file, at, value);
    }

    /// Sets the bitmap of an extended L2 entry: subclusters that are stored, and that are zero.
    pub fn set_bitmap(&mut self, cluster: u64, stored: u32, zero: u32) {
        let at = self.entry(cluster) + 8;
        put64(&mut self.file, at, u64::from(zero) << 32 | u64::from(stored));
    }

    /// A stored cluster.
    pub fn data(&mut self, cluster: u64, bytes: &[u8]) {
        let at = self.append(bytes);
        self.set(cluster, 1 << 63 | at);
        if self.kind.extended {
            self.set_bitmap(cluster, u32::MAX, 0);
        }
    }

    /// A zero cluster.
    pub fn zero(&mut self, cluster: u64) {
        match self.kind.extended {
            true => self.set_bitmap(cluster, 0, u32::MAX),
            false => self.set(cluster, 1),
        }
    }

    /// A compressed cluster, `skip` bytes into clusters of its own.
    pub fn compressed(&mut self, cluster: u64, bytes: &[u8], skip: usize) {
        let packed = match self.kind.zstd {
            true => compress_to_vec(bytes, CompressionLevel::Fastest),
            false => {
                let mut encoder = DeflateEncoder::new(Vec::new(), Compression::best());
                encoder.write_all(bytes).expect("memory");
                encoder.finish().expect("memory")
            }
        };
        self.compressed_as(cluster, &packed, skip);
    }

    /// The same, of bytes that somebody else compressed, or not.
    pub fn compressed_as(&mut self, cluster: u64, packed: &[u8], skip: usize) {
        let at = self.append(&[&vec![0; skip], packed].concat()) + skip as u64;
        let sectors = (at + packed.len() as u64).div_ceil(512) - at / 512;
        self.set(cluster, 1 << 62 | (sectors - 1) << (62 - (self.kind.bits - 8)) | at);
    }

    /// A header extension.
    pub fn extension(&mut self, kind: u32, bytes: &[u8]) {
        put32(&mut self.file, self.extensions, kind);
        put32(&mut self.file, self.extensions + 4, bytes.len() as u32);
        self.file[self.extensions + 8..][..bytes.len()].copy_from_slice(bytes);
        self.extensions += 8 + bytes.len().next_multiple_of(8);
    }

    /// A backing file; extensions come before.
    pub fn backing(&mut self, name: &str, format: Option<&str>) {
        if let Some(format) = format {
            self.extension(extension::BACKING_FORMAT, format.as_bytes());
        }
        let at = self.extensions + 8;
        put64(&mut self.file, field::BACKING_OFFSET, at as u64);
        put32(&mut self.file, field::BACKING_SIZE, name.len() as u32);
        self.file[at..at + name.len()].copy_from_slice(name.as_bytes());
    }

    /// Snapshots of the disk as it is now, in a table of their own.
    pub fn snapshots(&mut self, names: &[(&str, &str)]) {
        let (l1, entries) = (get64(&self.file, field::L1_OFFSET), get32(&self.file, field::L1_SIZE));
        let mut table = Vec::new();
        for (id, name) in names {
            let copy = self.file[l1 as usize..][..entries as usize * 8].to_vec();
            let copy = self.append(&copy);
            table.extend(copy.to_be_bytes());
            table.extend(entries.to_be_bytes());
            table.extend([id.len() as u16, name.len() as u16].map(u16::to_be_bytes).concat());
            table.extend([7u32, 8].map(u32::to_be_bytes).concat());
            table.extend(9u64.to_be_bytes());
            table.extend([0u32, 16].map(u32::to_be_bytes).concat());
            table.extend([0, get64(&self.file, field::SIZE)].map(u64::to_be_bytes).concat());
            table.extend([id.as_bytes(), name.as_bytes()].concat());
            table.resize(table.len().next_multiple_of(8), 0);
        }
        let at = self.append(&table);
        put32(&mut self.file, field::SNAPSHOTS, names.len() as u32);
        put64(&mut self.file, field::SNAPSHOTS_OFFSET, at);
    }
}

/// A cluster of bytes that compress somewhat.
pub fn pattern(seed: u64, len: usize) -> Vec<u8> {
    (0..len as u64).map(|i| (i / 7 * (seed + 3) % 11) as u8 + seed as u8).collect()
}

/// An image with something of everything, and what its disk holds.
pub fn specimen(kind: Kind) -> (Vec<u8>, Vec<u8>) {
    specimen_of(kind, 40, usize::MAX)
}

/// The same, of `clusters` clusters, of which each holds at most `filled` bytes that are not zero.
pub fn specimen_of(kind: Kind, clusters: usize, filled: usize) -> (Vec<u8>, Vec<u8>) {
    let cluster = 1usize << kind.bits;
    // The last cluster is cut, where it has more than a sector.
    let size = clusters * cluster - cluster / 2 / 512 * 512;
    let mut craft = Craft::new(kind, size as u64);
    let mut disk = vec![0; clusters * cluster];
    for number in 0..clusters {
        let mut bytes = pattern(number as u64, cluster.min(filled));
        bytes.resize(cluster, 0);
        let place = &mut disk[number * cluster..(number + 1) * cluster];
        match number % 8 {
            0 | 1 | 7 => craft.data(number as u64, &bytes),
            2 => craft.zero(number as u64),
            3 => craft.compressed(number as u64, &bytes, number * 37 % cluster),
            5 if kind.extended => {
                craft.data(number as u64, &bytes);
                craft.set_bitmap(number as u64, 0x00ff_00f0, 0xff00_0000);
            }
            5 => craft.compressed(number as u64, &bytes, 0),
            _ => continue,
        }
        match number % 8 {
            2 => {}
            5 if kind.extended => {
                let unit = cluster / 32;
                for sub in (0..32).filter(|sub| 0x00ff_00f0u32 >> sub & 1 == 1) {
                    place[sub * unit..(sub + 1) * unit].copy_from_slice(&bytes[sub * unit..(sub + 1) * unit]);
                }
            }
            _ => place.copy_from_slice(&bytes),
        }
        if number == clusters / 2 {
            craft.snapshots(&[("1", "first"), ("2", "second")]);
        }
    }
    disk.truncate(size);
    (craft.file, disk)
}
