//! What is checked of ext4 before the crate `ext4-view` is let loose on it (kernel:
//! `Documentation/filesystems/ext4/{super,group_descr,inodes}.rst`): it makes room for every block group that the superblock claims, and
//! counts through every block that the inode of the journal claims, without reading anything.

use std::error::Error;
use std::io;

use ext4_view::{Ext4, Ext4Read};

use super::view::View;

/// Where the superblock lies, and its length.
const START: u64 = 1024;
const LEN: usize = 1024;
/// Offsets in it.
const BLOCKS_LOW: usize = 0x4;
const FIRST_BLOCK: usize = 0x14;
const BLOCK_LOG: usize = 0x18;
const GROUP_BLOCKS: usize = 0x20;
const GROUP_INODES: usize = 0x28;
const MAGIC: usize = 0x38;
const INODE_LEN: usize = 0x58;
const INCOMPATIBLE: usize = 0x60;
const READ_ONLY_COMPATIBLE: usize = 0x64;
const JOURNAL_INODE: usize = 0xe0;
const DESCRIPTOR_LEN: usize = 0xfe;
const BLOCKS_HIGH: usize = 0x150;
/// The journal has to be replayed (`INCOMPAT_RECOVER`).
const RECOVER: u32 = 0x4;
/// Numbers of blocks have 64 bits, and descriptors of groups the length that the superblock says.
const IS_64BIT: u32 = 0x80;
/// Structures have checksums (`RO_COMPAT_METADATA_CSUM`).
const METADATA_CSUM: u32 = 0x400;
/// Offsets in the descriptor of a group, and in an inode.
const INODE_TABLE_LOW: usize = 0x8;
const INODE_TABLE_HIGH: usize = 0x28;
const SIZE_LOW: usize = 0x4;
const SIZE_HIGH: usize = 0x6c;

/// Blocks of 64 KiB are the largest.
const BLOCK_LOG_MAX: u32 = 6;
/// Groups of 128 MiB, the usual size, are 128 TiB then.
const GROUPS_MAX: u64 = 1 << 20;
/// The largest journal that `mke2fs` makes.
const JOURNAL_BLOCKS_MAX: u64 = 10_240_000;

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(bytes[at..at + 2].try_into().expect("two bytes"))
}

/// The superblock of a file system whose size is plausible.
pub struct Superblock([u8; LEN]);

impl Superblock {
    /// The superblock of ext2, ext3 or ext4, if this is one.
    ///
    /// # Errors
    /// It claims what cannot be, or more than is supported.
    pub fn of(view: &View) -> Result<Option<Self>, String> {
        let mut bytes = [0; LEN];
        if view.fill(START, &mut bytes).is_err() || u16_at(&bytes, MAGIC) != 0xef53 {
            return Ok(None);
        }
        let blocks = u64::from(u32_at(&bytes, BLOCKS_LOW)) | u64::from(u32_at(&bytes, BLOCKS_HIGH)) << 32;
        let block_log = u32_at(&bytes, BLOCK_LOG);
        let bad = |what: &str| Err(format!("ext4 with {what}"));
        if block_log > BLOCK_LOG_MAX {
            return bad("blocks that are too large");
        }
        if blocks.checked_mul(1024 << block_log).is_none_or(|bytes| bytes > view.len()) {
            return bad("more blocks than the partition has");
        }
        let data = blocks.saturating_sub(u64::from(u32_at(&bytes, FIRST_BLOCK)));
        let group_blocks = u64::from(u32_at(&bytes, GROUP_BLOCKS));
        if group_blocks == 0 || data.div_ceil(group_blocks) > GROUPS_MAX {
            return bad("too many block groups");
        }
        Ok(Some(Self(bytes)))
    }

    /// Opens the file system with what its journal holds, if that can be read, and else as it is without: after a crash, the
    /// latest changes are missing then.
    ///
    /// # Errors
    /// The file system is damaged, or has a feature that is not known.
    pub fn load(&self, view: &View) -> io::Result<Ext4> {
        let needs_recovery = u32_at(&self.0, INCOMPATIBLE) & RECOVER != 0;
        let why = if needs_recovery && !self.journal_is_plausible(view) {
            "its size is not plausible".to_owned()
        } else {
            match Ext4::load(Box::new(view.clone())) {
                Err(error) if needs_recovery => error.to_string(),
                other => return other.map_err(io::Error::other),
            }
        };
        log::warn!(
            "the journal of an ext4 file system is left alone ({why}): its latest changes are not seen"
        );
        let source = WithoutJournal { view: view.clone(), superblock: self.without_journal() };
        Ext4::load(Box::new(source)).map_err(io::Error::other)
    }

    /// Whether the journal has no more blocks than journals have.
    fn journal_is_plausible(&self, view: &View) -> bool {
        self.journal_size(view)
            .is_some_and(|size| size >> (10 + u32_at(&self.0, BLOCK_LOG)) <= JOURNAL_BLOCKS_MAX)
    }

    /// The length in bytes that the journal's inode says.
    fn journal_size(&self, view: &View) -> Option<u64> {
        let superblock = &self.0;
        let block_len = 1024_u64 << u32_at(superblock, BLOCK_LOG);
        let index = u32_at(superblock, JOURNAL_INODE).checked_sub(1)?;
        let group = index.checked_div(u32_at(superblock, GROUP_INODES))?;
        let is_64bit = u32_at(superblock, INCOMPATIBLE) & IS_64BIT != 0;
        let descriptor_len = if is_64bit { u64::from(u16_at(superblock, DESCRIPTOR_LEN)) } else { 32 };
        let descriptors = (u64::from(u32_at(superblock, FIRST_BLOCK)) + 1) * block_len;
        let mut descriptor = [0; 64];
        let len = if is_64bit { 64 } else { 32 };
        view.fill(descriptors + u64::from(group) * descriptor_len, &mut descriptor[..len]).ok()?;
        let high = u64::from(u32_at(&descriptor, INODE_TABLE_HIGH)) << 32;
        let table = (high | u64::from(u32_at(&descriptor, INODE_TABLE_LOW))).checked_mul(block_len)?;
        let within =
            u64::from(index % u32_at(superblock, GROUP_INODES)) * u64::from(u16_at(superblock, INODE_LEN));
        let mut inode = [0; 128];
        view.fill(table.checked_add(within)?, &mut inode).ok()?;
        Some(u64::from(u32_at(&inode, SIZE_LOW)) | u64::from(u32_at(&inode, SIZE_HIGH)) << 32)
    }

    /// The superblock of a file system that needs no recovery; without checksums, since its own is wrong then.
    fn without_journal(&self) -> [u8; LEN] {
        let mut bytes = self.0;
        for (at, flag) in [(INCOMPATIBLE, RECOVER), (READ_ONLY_COMPATIBLE, METADATA_CSUM)] {
            let flags = u32_at(&bytes, at) & !flag;
            bytes[at..at + 4].copy_from_slice(&flags.to_le_bytes());
        }
        bytes
    }
}

/// A file system with another superblock.
struct WithoutJournal {
    view: View,
    superblock: [u8; LEN],
}

impl Ext4Read for WithoutJournal {
    fn read(&mut self, start_byte: u64, dst: &mut [u8]) -> Result<(), Box<dyn Error + Send + Sync>> {
        if start_byte == START && dst.len() == LEN {
            dst.copy_from_slice(&self.superblock);
            return Ok(());
        }
        Ok(self.view.fill(start_byte, dst)?)
    }
}
