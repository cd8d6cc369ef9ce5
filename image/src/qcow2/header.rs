//! The header and its extensions: the first cluster of an image.
//!
//! Source: docs/interop/qcow2.rst of QEMU, "Header", "Feature name table", "Header extensions".

use super::bytes::{be32, be64};
use super::table::Shape;
use super::{Compression, Flaw};

/// First bytes of every qcow2 image.
pub const MAGIC: [u8; 4] = *b"QFI\xfb";

/// Bytes that hold every field of fixed place, in any version.
pub(super) const FIXED_BYTES: usize = 112;
const V2_BYTES: usize = 72;
const V3_BYTES: usize = 104;

/// Largest L1 table in bytes, as in QEMU (`QCOW_MAX_L1_SIZE`).
const L1_BYTES_MAX: u64 = 32 << 20;
/// Longest name of a backing file in bytes, by the specification.
const BACKING_NAME_MAX: u64 = 1023;
/// Smallest clusters that have subclusters: 32 of 512 bytes.
const EXTENDED_CLUSTER_BITS_MIN: u32 = 14;

const INCOMPATIBLE_DIRTY: u64 = 1;
const INCOMPATIBLE_CORRUPT: u64 = 1 << 1;
const INCOMPATIBLE_DATA_FILE: u64 = 1 << 2;
const INCOMPATIBLE_COMPRESSION: u64 = 1 << 3;
const INCOMPATIBLE_EXTENDED_L2: u64 = 1 << 4;
const INCOMPATIBLE_KNOWN: u64 = (1 << 5) - 1;
const COMPATIBLE_LAZY_REFCOUNTS: u64 = 1;
const AUTOCLEAR_DATA_FILE_RAW: u64 = 1 << 1;

const EXTENSION_END: u32 = 0;
const EXTENSION_BACKING_FORMAT: u32 = 0xe279_2aca;
const EXTENSION_FEATURE_NAMES: u32 = 0x6803_f857;
const EXTENSION_DATA_FILE: u32 = 0x4441_5441;

/// Bytes of an entry of the feature name table: type, bit, name.
const FEATURE_BYTES: usize = 48;

/// A checked header.
#[derive(Clone, Debug)]
pub(crate) struct Header {
    pub(super) version: u32,
    pub(super) shape: Shape,
    /// Size of the disk in bytes, in whole sectors.
    pub(super) size: u64,
    pub(super) l1_offset: u64,
    pub(super) l1_entries: u64,
    pub(super) snapshots_offset: u64,
    pub(super) snapshot_count: u32,
    pub(super) compression: Compression,
    pub(super) refcount_bits: u32,
    pub(super) dirty: bool,
    pub(super) corrupt: bool,
    pub(super) lazy_refcounts: bool,
    /// The name of the backing file, as it is stored.
    pub(super) backing_name: Option<Vec<u8>>,
    pub(super) backing_format: Option<String>,
    /// The name of the data file, as it is stored, of an image that has one.
    pub(super) data_file: Option<Vec<u8>>,
    pub(super) data_file_raw: bool,
}

/// What the first bytes, [`FIXED_BYTES`] of them, say about how to read on: cluster bits.
pub(super) fn cluster_bits(bytes: &[u8]) -> Result<u32, Flaw> {
    if bytes.len() < V2_BYTES || bytes[..4] != MAGIC {
        return Err(Flaw::corrupt("header.magic", 0, "not a qcow2 image"));
    }
    let version = be32(bytes, 4);
    if !(2..=3).contains(&version) {
        return Err(Flaw::unsupported(format!("qcow2 version {version} is not supported, only 2 and 3")));
    }
    match be32(bytes, 20) {
        bits @ 9..=21 => Ok(bits),
        bits => Err(Flaw::corrupt("header.cluster_bits", 20, format!("{bits} is not from 9 to 21"))),
    }
}

impl Header {
    /// Reads the header from the first cluster of a file (or all there is of it).
    ///
    /// # Errors
    /// Damage, encryption, features that are not known.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, Flaw> {
        let cluster_bits = cluster_bits(bytes)?;
        let version = be32(bytes, 4);
        let header_bytes = header_length(bytes, version, 1 << cluster_bits)?;
        let (incompatible, compatible, autoclear) = match version {
            2 => (0, 0, 0),
            _ => (be64(bytes, 72), be64(bytes, 80), be64(bytes, 88)),
        };
        let backing_offset = be64(bytes, 8);
        let extensions = Extensions::parse(bytes, header_bytes, backing_offset)?;
        check_features(incompatible, extensions.feature_names)?;
        check_encryption(be32(bytes, 32))?;
        let extended = incompatible & INCOMPATIBLE_EXTENDED_L2 != 0;
        if extended && cluster_bits < EXTENDED_CLUSTER_BITS_MIN {
            let detail = "extended L2 entries need clusters of at least 16 KiB";
            return Err(Flaw::corrupt("header.cluster_bits", 20, detail));
        }
        let has_data_file = incompatible & INCOMPATIBLE_DATA_FILE != 0;
        if has_data_file && extensions.data_file.is_none_or(<[u8]>::is_empty) {
            let detail = "the data is in an external file, and the image does not say which";
            return Err(Flaw::unsupported(detail.to_owned()));
        }
        let shape = Shape { cluster_bits, version, extended, external_data: has_data_file };
        let refcount_order = if version == 2 { 4 } else { be32(bytes, 96) };
        if refcount_order > 6 {
            return Err(Flaw::corrupt("header.refcount_order", 96, format!("{refcount_order} is above 6")));
        }
        let header = Self {
            version,
            shape,
            size: be64(bytes, 24) / 512 * 512,
            l1_offset: be64(bytes, 40),
            l1_entries: u64::from(be32(bytes, 36)),
            snapshots_offset: be64(bytes, 64),
            snapshot_count: be32(bytes, 60),
            compression: compression(bytes, header_bytes, incompatible)?,
            refcount_bits: 1 << refcount_order,
            dirty: incompatible & INCOMPATIBLE_DIRTY != 0,
            corrupt: incompatible & INCOMPATIBLE_CORRUPT != 0,
            lazy_refcounts: compatible & COMPATIBLE_LAZY_REFCOUNTS != 0,
            backing_name: backing_name(bytes, backing_offset, 1 << cluster_bits)?,
            backing_format: extensions.backing_format.map(|name| String::from_utf8_lossy(name).into_owned()),
            data_file: extensions.data_file.filter(|_| has_data_file).map(<[u8]>::to_vec),
            data_file_raw: has_data_file && autoclear & AUTOCLEAR_DATA_FILE_RAW != 0,
        };
        header.check_size()?;
        check_l1(&header.shape, header.l1_offset, header.l1_entries, 40, 36)?;
        Ok(header)
    }

    fn check_size(&self) -> Result<(), Flaw> {
        if i64::try_from(self.size).is_err() {
            return Err(Flaw::corrupt("header.size", 24, "it is above 2^63"));
        }
        let needed = self.size.div_ceil(self.shape.l2_span());
        if needed > self.l1_entries {
            let detail = format!("{} entries, and the disk needs {needed}", self.l1_entries);
            return Err(Flaw::corrupt("header.l1_size", 36, detail));
        }
        Ok(())
    }
}

/// Checks the place of an L1 table; `offset_at` and `entries_at` are where it is stated.
pub(super) fn check_l1(
    shape: &Shape,
    offset: u64,
    entries: u64,
    offset_at: u64,
    entries_at: u64,
) -> Result<(), Flaw> {
    if entries * 8 > L1_BYTES_MAX {
        let detail = format!("{entries} entries, and {} is the most", L1_BYTES_MAX / 8);
        return Err(Flaw::corrupt("l1_size", entries_at, detail));
    }
    let inside = i64::try_from(offset).is_ok_and(|offset| offset.checked_add(L1_BYTES_MAX as i64).is_some());
    if entries > 0 && (offset == 0 || !inside || !offset.is_multiple_of(shape.cluster_size())) {
        let detail = format!("{offset:#x} is not where a table can be");
        return Err(Flaw::corrupt("l1_table_offset", offset_at, detail));
    }
    Ok(())
}

fn header_length(bytes: &[u8], version: u32, cluster_size: u64) -> Result<usize, Flaw> {
    if version == 2 {
        return Ok(V2_BYTES);
    }
    if bytes.len() < V3_BYTES {
        return Err(Flaw::corrupt("header", 0, "the file ends inside it"));
    }
    let length = be32(bytes, 100);
    let fits = length as usize >= V3_BYTES && length as usize <= bytes.len();
    if !fits || u64::from(length) > cluster_size {
        return Err(Flaw::corrupt("header.header_length", 100, format!("{length} bytes cannot be")));
    }
    Ok(length as usize)
}

fn check_encryption(method: u32) -> Result<(), Flaw> {
    let name = match method {
        0 => return Ok(()),
        1 => "AES",
        2 => "LUKS",
        _ => "an unknown method",
    };
    Err(Flaw::unsupported(format!(
        "encrypted ({name}), which is not supported: decrypt it with qemu-img convert first"
    )))
}

fn check_features(incompatible: u64, names: &[u8]) -> Result<(), Flaw> {
    let unknown = incompatible & !INCOMPATIBLE_KNOWN;
    if unknown == 0 {
        return Ok(());
    }
    let name_of = |bit: u32| {
        let entry = names.chunks_exact(FEATURE_BYTES).find(|e| e[0] == 0 && u32::from(e[1]) == bit);
        entry.map(|e| {
            let name = String::from_utf8_lossy(&e[2..]);
            format!(" ({})", name.trim_end_matches('\0').escape_debug())
        })
    };
    let bits = (0..64).filter(|bit| unknown >> bit & 1 == 1);
    let list: Vec<String> = bits.map(|bit| format!("{bit}{}", name_of(bit).unwrap_or_default())).collect();
    Err(Flaw::unsupported(format!("uses incompatible features that are not known: bit {}", list.join(", "))))
}

fn compression(bytes: &[u8], header_bytes: usize, incompatible: u64) -> Result<Compression, Flaw> {
    let stated = if header_bytes > V3_BYTES { bytes[V3_BYTES] } else { 0 };
    let flagged = incompatible & INCOMPATIBLE_COMPRESSION != 0;
    let at = V3_BYTES as u64;
    match (stated, flagged) {
        (0, false) => Ok(Compression::Zlib),
        (1, true) => Ok(Compression::Zstd),
        (0 | 1, _) => {
            Err(Flaw::corrupt("header.compression_type", at, "it does not agree with the feature bits"))
        }
        (other, _) => Err(Flaw::unsupported(format!("compression type {other} is not supported"))),
    }
}

fn backing_name(bytes: &[u8], offset: u64, cluster_size: u64) -> Result<Option<Vec<u8>>, Flaw> {
    if offset == 0 {
        return Ok(None);
    }
    if offset > cluster_size {
        let detail = format!("{offset:#x} is outside of the first cluster");
        return Err(Flaw::corrupt("header.backing_file_offset", 8, detail));
    }
    let len = u64::from(be32(bytes, 16));
    if len > BACKING_NAME_MAX.min(cluster_size - offset) {
        return Err(Flaw::corrupt(
            "header.backing_file_size",
            16,
            format!("a name of {len} bytes is too long"),
        ));
    }
    let name = bytes.get(offset as usize..(offset + len) as usize);
    let name = name.ok_or_else(|| Flaw::corrupt("backing file name", offset, "the file ends inside it"))?;
    Ok((!name.is_empty()).then(|| name.to_vec()))
}

/// The extensions that mean something to a reader.
#[derive(Default)]
struct Extensions<'a> {
    backing_format: Option<&'a [u8]>,
    data_file: Option<&'a [u8]>,
    feature_names: &'a [u8],
}

impl<'a> Extensions<'a> {
    fn parse(bytes: &'a [u8], start: usize, backing_offset: u64) -> Result<Self, Flaw> {
        let mut found = Self::default();
        let end = match backing_offset {
            0 => bytes.len(),
            offset => bytes.len().min(usize::try_from(offset).unwrap_or(usize::MAX)),
        };
        let mut at = start;
        while at + 8 <= end {
            let (kind, len) = (be32(bytes, at), be32(bytes, at + 4) as usize);
            if kind == EXTENSION_END {
                break;
            }
            let data = at + 8;
            if len > end - data {
                let detail = format!("extension {kind:#x} of {len} bytes goes beyond the first cluster");
                return Err(Flaw::corrupt("header extension", at as u64, detail));
            }
            let contents = &bytes[data..data + len];
            match kind {
                EXTENSION_BACKING_FORMAT => found.backing_format = Some(contents),
                EXTENSION_DATA_FILE => found.data_file = Some(contents),
                EXTENSION_FEATURE_NAMES => found.feature_names = contents,
                // What is not known may be ignored: what may not has an incompatible bit.
                _ => {}
            }
            at = data + len.next_multiple_of(8);
        }
        Ok(found)
    }
}
