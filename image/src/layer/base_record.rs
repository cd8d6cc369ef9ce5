//! Base records: what lies below a layer.
//!
//! Record *n* lies in block 3 + *n* mod 2, and counts when the newest slot names it. So a base is
//! changed by writing the block that no slot names, a sync, and a checkpoint.

use super::BaseSpec;
use super::header::Header;
use super::layout::{Damage, LayerId, SIZE_MAX, damage, unsupported};
use crate::below::OpenBelow;
use crate::bytes::{array, checksum, get_u32, get_u64, put};
use crate::format::Format;
use sapwood_blockdev::storage::FileIdentity;
use sapwood_blockdev::units::{BLOCK_BYTES, BLOCK_SIZE, FileOffset};

/// Longest base path in bytes.
pub(super) const BASE_PATH_MAX: usize = 2048;
/// The numbers of base records begin with 1 and end here.
pub(super) const BASE_SEQUENCE_MAX: u64 = 1 << 55;

/// Longest id or name of a snapshot in bytes.
pub(super) const SNAPSHOT_MAX: usize = 256;
/// Files of a qcow2 chain that are listed; of all of them there is a checksum.
pub(super) const FILES_LISTED: usize = 95;
/// Files that a qcow2 chain can have, for opening: each image and its data file.
const FILES_MAX: u32 = 1 << 16;

const BASE_MAGIC: [u8; 8] = *b"SAPWBASE";
const B_LAYER_ID: usize = 8;
const B_SEQUENCE: usize = B_LAYER_ID + 16;
const B_FLAGS: usize = B_SEQUENCE + 8;
const B_FORMAT: usize = B_FLAGS + 4;
const B_PATH_LEN: usize = B_FORMAT + 4;
const B_SIZE: usize = B_PATH_LEN + 8;
const B_MTIME: usize = B_SIZE + 8;
const B_BASE_ID: usize = B_MTIME + 8;
const B_GENERATION: usize = B_BASE_ID + 16;
const B_FILES: usize = B_GENERATION + 8;
const B_FILES_SUM: usize = B_FILES + 4;
const B_BACKING_FORMAT: usize = B_FILES_SUM + 4;
const B_SNAPSHOT_LEN: usize = B_BACKING_FORMAT + 4;
const B_PATH: usize = 256;
const B_SNAPSHOT: usize = B_PATH + BASE_PATH_MAX;
const B_FILE_LIST: usize = B_SNAPSHOT + SNAPSHOT_MAX;
const B_CHECKSUM: usize = BLOCK_BYTES - 4;

const FLAG_COMMITTING: u32 = 1;

const FORMAT_NONE: u32 = 0;
const FORMAT_RAW: u32 = 1;
const FORMAT_LAYER: u32 = 2;
const FORMAT_QCOW2: u32 = 3;
const _: () = assert!(B_FILE_LIST + 16 * FILES_LISTED <= B_CHECKSUM);

/// What identified a base when it was recorded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum BaseIdentity {
    /// A raw image: its size in bytes and modification time in nanoseconds.
    Raw { size: u64, mtime_ns: u64 },
    /// A cleanly closed layer: its guest-visible size, its id and its checkpoint generation.
    Layer { size: u64, id: LayerId, generation: u64 },
    /// A qcow2 image and all that lies below it.
    Qcow2(Qcow2Identity),
}

/// What identified a qcow2 image, and how it was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Qcow2Identity {
    /// Size of the disk, or of the snapshot, in bytes.
    pub(crate) size: u64,
    /// How many files the chain has: every image, and behind it its data file.
    pub(crate) count: u32,
    /// Checksum of all their sizes and modification times.
    pub(crate) sum: u32,
    /// The first of them, from the top down.
    pub(crate) listed: Vec<FileIdentity>,
    /// The snapshot, by id or name.
    pub(crate) snapshot: Option<String>,
    /// The format of backing files whose image does not state it.
    pub(crate) backing_format: Option<Format>,
}

impl Qcow2Identity {
    /// The identity of a chain with these files.
    pub(crate) fn new(size: u64, files: &[FileIdentity], options: &OpenBelow) -> Self {
        let mut sum = crc32fast::Hasher::new();
        for file in files {
            sum.update(&file.size.to_le_bytes());
            sum.update(&file.mtime_ns.to_le_bytes());
        }
        Self {
            size,
            count: files.len() as u32,
            sum: sum.finalize(),
            listed: files.iter().take(FILES_LISTED).copied().collect(),
            snapshot: options.snapshot.clone(),
            backing_format: options.backing_format,
        }
    }

    /// How it is opened again. What it names may be opened, because it is what it was.
    pub(crate) fn options(&self) -> OpenBelow {
        OpenBelow {
            allow_backing: true,
            backing_format: self.backing_format,
            snapshot: self.snapshot.clone(),
        }
    }

    fn encode(&self, b: &mut [u8]) {
        put(b, B_FILES, &self.count.to_le_bytes());
        put(b, B_FILES_SUM, &self.sum.to_le_bytes());
        let backing_format = self.backing_format.map_or(FORMAT_NONE, number);
        put(b, B_BACKING_FORMAT, &backing_format.to_le_bytes());
        let snapshot = self.snapshot.as_deref().unwrap_or_default();
        assert!(snapshot.len() <= SNAPSHOT_MAX, "checked where a base is named");
        put(b, B_SNAPSHOT_LEN, &(snapshot.len() as u32).to_le_bytes());
        put(b, B_SNAPSHOT, snapshot.as_bytes());
        for (i, file) in self.listed.iter().enumerate() {
            put(b, B_FILE_LIST + 16 * i, &file.size.to_le_bytes());
            put(b, B_FILE_LIST + 16 * i + 8, &file.mtime_ns.to_le_bytes());
        }
    }

    fn decode(b: &[u8], size: u64) -> Result<Self, Damage> {
        let count = get_u32(b, B_FILES);
        if count == 0 || count > FILES_MAX {
            return Err(damage("base.files", B_FILES, count));
        }
        let backing_format = match get_u32(b, B_BACKING_FORMAT) {
            FORMAT_NONE => None,
            FORMAT_RAW => Some(Format::Raw),
            FORMAT_QCOW2 => Some(Format::Qcow2),
            other => return Err(damage("base.backing_format", B_BACKING_FORMAT, other)),
        };
        let len = get_u32(b, B_SNAPSHOT_LEN) as usize;
        if len > SNAPSHOT_MAX {
            return Err(damage("base.snapshot_len", B_SNAPSHOT_LEN, len));
        }
        let snapshot = String::from_utf8(b[B_SNAPSHOT..B_SNAPSHOT + len].to_vec())
            .map_err(|_| damage("base.snapshot", B_SNAPSHOT, "it is not UTF-8"))?;
        let file = |i: usize| {
            let at = B_FILE_LIST + 16 * i;
            FileIdentity { size: get_u64(b, at), mtime_ns: get_u64(b, at + 8) }
        };
        Ok(Self {
            size,
            count,
            sum: get_u32(b, B_FILES_SUM),
            listed: (0..FILES_LISTED.min(count as usize)).map(file).collect(),
            snapshot: (len > 0).then_some(snapshot),
            backing_format,
        })
    }
}

/// The number by which records name a format.
fn number(format: Format) -> u32 {
    match format {
        Format::Raw => FORMAT_RAW,
        Format::Layer => FORMAT_LAYER,
        Format::Qcow2 => FORMAT_QCOW2,
        Format::Sealed => unreachable!("a base that is no file is recorded in another way"),
    }
}

impl BaseIdentity {
    pub(crate) fn format(&self) -> Format {
        match self {
            Self::Raw { .. } => Format::Raw,
            Self::Layer { .. } => Format::Layer,
            Self::Qcow2(_) => Format::Qcow2,
        }
    }

    /// Guest-visible size in bytes.
    pub(crate) fn size(&self) -> u64 {
        match self {
            Self::Raw { size, .. } | Self::Layer { size, .. } => *size,
            Self::Qcow2(qcow2) => qcow2.size,
        }
    }
}

/// A base as a layer names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct BaseRef {
    /// As the user gave it; a relative path starts at the layer's folder.
    pub(crate) path: String,
    pub(crate) identity: BaseIdentity,
}

impl BaseRef {
    /// The base by name, and how it is read.
    pub(super) fn spec(&self) -> BaseSpec {
        let options = match &self.identity {
            BaseIdentity::Qcow2(qcow2) => qcow2.options(),
            _ => OpenBelow::default(),
        };
        BaseSpec { options, ..BaseSpec::new(&self.path, self.identity.format()) }
    }
}

/// A base record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct BaseRecord {
    pub(crate) layer_id: LayerId,
    /// Its number, from 1.
    pub(super) sequence: u64,
    /// The layer is being merged into its base, which therefore may be anything between what it was
    /// and what it is to become; together with the layer it still is the same disk.
    pub(crate) committing: bool,
    pub(crate) base: Option<BaseRef>,
}

/// Where base record `sequence` lies: they alternate.
pub(super) fn base_offset(sequence: u64) -> FileOffset {
    FileOffset(BLOCK_SIZE * (3 + sequence % 2))
}

impl BaseRecord {
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut b = vec![0; BLOCK_BYTES];
        put(&mut b, 0, &BASE_MAGIC);
        put(&mut b, B_LAYER_ID, &self.layer_id);
        put(&mut b, B_SEQUENCE, &self.sequence.to_le_bytes());
        put(&mut b, B_FLAGS, &(if self.committing { FLAG_COMMITTING } else { 0 }).to_le_bytes());
        if let Some(base) = &self.base {
            put(&mut b, B_SIZE, &base.identity.size().to_le_bytes());
            match &base.identity {
                BaseIdentity::Raw { mtime_ns, .. } => put(&mut b, B_MTIME, &mtime_ns.to_le_bytes()),
                BaseIdentity::Layer { id, generation, .. } => {
                    put(&mut b, B_BASE_ID, id);
                    put(&mut b, B_GENERATION, &generation.to_le_bytes());
                }
                BaseIdentity::Qcow2(qcow2) => qcow2.encode(&mut b),
            }
            put(&mut b, B_FORMAT, &number(base.identity.format()).to_le_bytes());
            assert!(base.path.len() <= BASE_PATH_MAX, "checked where a base is named");
            put(&mut b, B_PATH_LEN, &(base.path.len() as u32).to_le_bytes());
            put(&mut b, B_PATH, base.path.as_bytes());
        }
        let sum = checksum(&[&b[..B_CHECKSUM]]);
        put(&mut b, B_CHECKSUM, &sum.to_le_bytes());
        b
    }

    /// Decodes the block in which record `sequence` of a layer lies.
    pub(super) fn decode(b: &[u8], header: &Header, sequence: u64) -> Result<Self, Damage> {
        if array::<8>(b, 0) != BASE_MAGIC {
            return Err(damage("base.magic", 0, "it is not that of a base record"));
        }
        if checksum(&[&b[..B_CHECKSUM]]) != get_u32(b, B_CHECKSUM) {
            return Err(damage("base.checksum", B_CHECKSUM, "it does not match"));
        }
        let layer_id = array(b, B_LAYER_ID);
        if layer_id != header.layer_id {
            return Err(damage("base.layer_id", B_LAYER_ID, "it belongs to another layer"));
        }
        let found = get_u64(b, B_SEQUENCE);
        if found != sequence {
            let detail = format!("the newest checkpoint belongs to base record {sequence}, this is {found}");
            return Err(damage("base.sequence", B_SEQUENCE, detail));
        }
        let flags = get_u32(b, B_FLAGS);
        if flags & !FLAG_COMMITTING != 0 {
            let detail = format!("unknown flags {flags:#x} of the base: a newer program wrote them");
            return Err(unsupported("base.flags", B_FLAGS, detail));
        }
        let committing = flags & FLAG_COMMITTING != 0;
        let base = Self::decode_base(b)?;
        if committing && base.is_none() {
            return Err(damage("base.flags", B_FLAGS, "a commit into nothing is under way"));
        }
        Ok(Self { layer_id, sequence, committing, base })
    }

    fn decode_base(b: &[u8]) -> Result<Option<BaseRef>, Damage> {
        let size = get_u64(b, B_SIZE);
        if size > SIZE_MAX {
            return Err(damage("base.size", B_SIZE, size));
        }
        let identity = match get_u32(b, B_FORMAT) {
            FORMAT_NONE => return Ok(None),
            FORMAT_RAW => BaseIdentity::Raw { size, mtime_ns: get_u64(b, B_MTIME) },
            FORMAT_LAYER => {
                BaseIdentity::Layer { size, id: array(b, B_BASE_ID), generation: get_u64(b, B_GENERATION) }
            }
            FORMAT_QCOW2 => BaseIdentity::Qcow2(Qcow2Identity::decode(b, size)?),
            other => {
                let detail = format!("unknown format {other} of the base: a newer program recorded it");
                return Err(unsupported("base.format", B_FORMAT, detail));
            }
        };
        let len = get_u32(b, B_PATH_LEN) as usize;
        if len == 0 || len > BASE_PATH_MAX {
            return Err(damage("base.path_len", B_PATH_LEN, len));
        }
        let path = String::from_utf8(b[B_PATH..B_PATH + len].to_vec())
            .map_err(|_| damage("base.path", B_PATH, "it is not UTF-8"))?;
        Ok(Some(BaseRef { path, identity }))
    }
}

#[cfg(test)]
mod tests {
    use super::super::base::describe_change;
    use super::*;

    const HEADER: Header = Header { layer_id: [7; 16], segment_blocks: 1024 };

    fn record(count: usize, snapshot: Option<&str>) -> BaseRecord {
        let files: Vec<_> =
            (0..count as u64).map(|i| FileIdentity { size: 512 * i, mtime_ns: 1000 + i }).collect();
        let options = OpenBelow {
            allow_backing: true,
            backing_format: Some(Format::Raw),
            snapshot: snapshot.map(str::to_owned),
        };
        let identity = BaseIdentity::Qcow2(Qcow2Identity::new(1 << 30, &files, &options));
        let base = Some(BaseRef { path: "b".repeat(BASE_PATH_MAX), identity });
        BaseRecord { layer_id: HEADER.layer_id, sequence: 5, committing: false, base }
    }

    #[test]
    fn qcow2_bases_survive_encoding() {
        let long = "s".repeat(SNAPSHOT_MAX);
        for (count, snapshot) in [(1, None), (FILES_LISTED, Some(long.as_str())), (202, Some("one"))] {
            let record = record(count, snapshot);
            let b = record.encode();
            assert_eq!(BaseRecord::decode(&b, &HEADER, 5).as_ref(), Ok(&record));
            for (at, value, field) in [
                (B_FILES, 0, "base.files"),
                (B_FILES, FILES_MAX + 1, "base.files"),
                (B_BACKING_FORMAT, FORMAT_LAYER, "base.backing_format"),
                (B_SNAPSHOT_LEN, SNAPSHOT_MAX as u32 + 1, "base.snapshot_len"),
            ] {
                let mut b = b.clone();
                put(&mut b, at, &value.to_le_bytes());
                let sum = checksum(&[&b[..B_CHECKSUM]]);
                put(&mut b, B_CHECKSUM, &sum.to_le_bytes());
                assert_eq!(BaseRecord::decode(&b, &HEADER, 5).unwrap_err().field, field);
            }
        }
    }

    #[test]
    fn a_change_of_any_file_is_told() {
        let was = record(202, None).base.unwrap().identity;
        assert_eq!(describe_change(&was, &was, &[]), None);
        let BaseIdentity::Qcow2(qcow2) = &was else { unreachable!() };
        let tell = |change: &dyn Fn(&mut Qcow2Identity)| {
            let mut is = qcow2.clone();
            change(&mut is);
            describe_change(&was, &BaseIdentity::Qcow2(is), &["top".into(), "low".into()]).unwrap()
        };
        assert!(tell(&|is| is.listed[1].size = 9).contains("low had 512 bytes and has 9"));
        assert!(tell(&|is| is.listed[0].mtime_ns = 9).contains("top was modified"));
        assert!(tell(&|is| is.count = 3).contains("202 files and has 3"));
        assert!(tell(&|is| is.sum ^= 1).contains("deep in its chain"));
        assert!(tell(&|is| is.snapshot = Some("x".to_owned())).contains("snapshot was none and is x"));
    }
}
