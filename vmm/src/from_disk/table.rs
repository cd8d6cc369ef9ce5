//! Partition tables: GPT (UEFI specification 2.10, chapter 5) with sectors of 512 or 4096 bytes, MBR with logical partitions,
//! or a file system on the whole disk. The bytes are decoded by the crate `gpt`.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};

use gpt::disk::LogicalBlockSize;
use gpt::mbr::{PartRecord, ProtectiveMBR};

use super::view::View;

/// Partitions that are looked at.
const PARTITIONS_MAX: usize = 128;
/// Entries that a GPT may have room for; 128 are usual.
const GPT_ENTRIES_MAX: u32 = 1024;
/// Offsets in the header of a GPT (UEFI 2.10, table 5.5).
const GPT_ENTRIES_OFFSET: usize = 80;
const GPT_ENTRY_LEN_OFFSET: usize = 84;
/// The only length of an entry that the crate accepts, and that anything writes.
const GPT_ENTRY_LEN: u32 = 128;
const SECTOR: u64 = 512;

/// What a partition is for, in the order in which a kernel is looked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Purpose {
    /// The extended boot loader partition (Discoverable Partitions Specification, and Boot Loader Specification).
    Xbootldr,
    /// The EFI system partition.
    Esp,
    /// The root file system of an x86-64 system (Discoverable Partitions Specification).
    Root,
    /// A file system of Linux.
    Linux,
    /// The whole disk, which has no partition table.
    WholeDisk,
    /// Anything else.
    Other,
}

/// A partition, inside the disk.
#[derive(Clone, Debug)]
pub struct Partition {
    /// Its number as Linux counts; 0: the whole disk.
    pub number: u32,
    /// What its type says.
    pub purpose: Purpose,
    /// What the kernel calls `PARTUUID`: of a GPT the partition's GUID, of an MBR the disk's signature and the number.
    pub partuuid: Option<String>,
    /// Its bytes.
    pub view: View,
}

impl fmt::Display for Partition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.number {
            0 => f.write_str("the whole disk"),
            number => write!(f, "partition {number}"),
        }
    }
}

/// The partitions in the order in which a kernel is looked for, and what kind of table there is. Partitions that are not
/// inside the disk are left out.
pub fn partitions(disk: &View) -> (&'static str, Vec<Partition>) {
    let whole = || Partition { number: 0, purpose: Purpose::WholeDisk, partuuid: None, view: disk.clone() };
    let mbr = mbr_at(disk, 0);
    // A GPT has a protective MBR before it, also where only the copy of the table at the end is left; where the
    // MBR says something else, what looks like a GPT is a remnant.
    let protected = mbr.as_ref().is_some_and(|mbr| records(mbr).any(|(_, record)| record.os_type == 0xee));
    let table = match &mbr {
        Some(_) if protected => gpt(disk).map(|found| ("GPT", found)),
        Some(mbr) if !is_fat(disk) => mbr_partitions(disk, mbr).map(|found| ("MBR", found)),
        _ => None,
    };
    let (kind, mut found) = table.unwrap_or_else(|| ("no partition table", vec![whole()]));
    found.sort_by_key(|partition| (partition.purpose, partition.number));
    (kind, found)
}

fn gpt(disk: &View) -> Option<Vec<Partition>> {
    for sector in [LogicalBlockSize::Lb512, LogicalBlockSize::Lb4096] {
        let len = u64::from(sector);
        let last = (disk.len() / len).checked_sub(1)?;
        // What the crate asserts, or makes room for, is checked before it sees the headers.
        if !header_is_sane(disk, len) || !header_is_sane(disk, last * len) {
            continue;
        }
        let config = gpt::GptConfig::new().writable(false).logical_block_size(sector);
        // A panic of the crate is an error like another: nothing of it is used afterwards.
        let opened = catch_unwind(AssertUnwindSafe(|| config.open_from_device(disk.clone())));
        let Ok(Ok(table)) = opened else { continue };
        let used = table.partitions().iter().filter(|(_, entry)| entry.is_used()).take(PARTITIONS_MAX);
        let partitions = used.filter_map(|(&number, entry)| {
            let start = entry.first_lba.checked_mul(len)?;
            let size = entry.last_lba.checked_sub(entry.first_lba)?.checked_add(1)?.checked_mul(len)?;
            let kind = entry.part_type_guid.guid.as_hyphenated().to_string();
            let partuuid = Some(entry.part_guid.as_hyphenated().to_string());
            Some(Partition { number, purpose: gpt_purpose(&kind), partuuid, view: disk.part(start, size)? })
        });
        return Some(partitions.collect());
    }
    None
}

/// Whether there is no header at `offset`, or one that can be read with bounds.
fn header_is_sane(disk: &View, offset: u64) -> bool {
    let mut header = [0; 92];
    if disk.fill(offset, &mut header).is_err() || !header.starts_with(b"EFI PART") {
        return true;
    }
    let field = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().expect("four bytes"));
    field(GPT_ENTRIES_OFFSET) <= GPT_ENTRIES_MAX && field(GPT_ENTRY_LEN_OFFSET) == GPT_ENTRY_LEN
}

/// Types of the Discoverable Partitions Specification.
fn gpt_purpose(guid: &str) -> Purpose {
    match guid.to_ascii_lowercase().as_str() {
        "bc13c2ff-59e6-4262-a352-b275fd6f7172" => Purpose::Xbootldr,
        "c12a7328-f81f-11d2-ba4b-00a0c93ec93b" => Purpose::Esp,
        "4f68bce3-e8cd-4db1-96e7-fbcaf984b709" => Purpose::Root,
        "0fc63daf-8483-4772-8e79-3d69d8477de4" => Purpose::Linux,
        _ => Purpose::Other,
    }
}

fn mbr_purpose(kind: u8) -> Purpose {
    match kind {
        0xea => Purpose::Xbootldr, // Boot Loader Specification
        0xef => Purpose::Esp,
        0x83 => Purpose::Linux,
        _ => Purpose::Other,
    }
}

fn is_extended(kind: u8) -> bool {
    matches!(kind, 0x05 | 0x0f | 0x85)
}

/// The boot record in the sector at `offset`.
fn mbr_at(disk: &View, offset: u64) -> Option<ProtectiveMBR> {
    let mut sector = [0; SECTOR as usize];
    disk.fill(offset, &mut sector).ok()?;
    ProtectiveMBR::from_bytes(&sector, LogicalBlockSize::Lb512).ok()
}

/// Its used entries, counted from 1.
fn records(mbr: &ProtectiveMBR) -> impl Iterator<Item = (u32, PartRecord)> {
    let records = (0..4_u32).filter_map(|index| Some((index + 1, mbr.partition(index as usize)?)));
    records.filter(|(_, record)| record.os_type != 0 && record.lb_size != 0)
}

/// `None` where the entries make no sense: boot code of something else.
fn mbr_partitions(disk: &View, mbr: &ProtectiveMBR) -> Option<Vec<Partition>> {
    let signature = u32::from_le_bytes(*mbr.disk_signature());
    let partition = |number: u32, kind: u8, start: u64, sectors: u32| {
        let view = disk.part(start * SECTOR, u64::from(sectors) * SECTOR)?;
        let partuuid = Some(format!("{signature:08x}-{number:02x}"));
        Some(Partition { number, purpose: mbr_purpose(kind), partuuid, view })
    };
    let mut found = Vec::new();
    for (number, record) in records(mbr) {
        if record.boot_indicator & 0x7f != 0 || record.lb_start == 0 {
            return None;
        }
        if is_extended(record.os_type) {
            let logical = logical(disk, u64::from(record.lb_start));
            let numbered = (5..).zip(logical).filter_map(|(number, (start, logical))| {
                partition(number, logical.os_type, start, logical.lb_size)
            });
            found.extend(numbered);
        } else {
            found.extend(partition(number, record.os_type, u64::from(record.lb_start), record.lb_size));
        }
    }
    (!found.is_empty()).then_some(found)
}

/// The chain of logical partitions in the extended partition that begins at `extended`, with the sectors that they begin at.
fn logical(disk: &View, extended: u64) -> Vec<(u64, PartRecord)> {
    let mut found = Vec::new();
    let mut at = extended;
    while found.len() < PARTITIONS_MAX {
        let Some(record) = mbr_at(disk, at * SECTOR) else { break };
        let (Some(own), Some(next)) = (record.partition(0), record.partition(1)) else { break };
        if own.os_type == 0 || own.lb_size == 0 {
            break;
        }
        found.push((at + u64::from(own.lb_start), own));
        if !is_extended(next.os_type) || next.lb_start == 0 {
            break;
        }
        at = extended + u64::from(next.lb_start);
    }
    found
}

/// Whether the disk begins with the boot sector of a FAT file system, whose code lies where an MBR has its entries.
pub fn is_fat(view: &View) -> bool {
    let mut sector = [0; SECTOR as usize];
    if view.fill(0, &mut sector).is_err() {
        return false;
    }
    let name = sector[54..].starts_with(b"FAT") || sector[82..].starts_with(b"FAT");
    matches!(sector[0], 0xeb | 0xe9) && sector[510..] == [0x55, 0xaa] && name
}
