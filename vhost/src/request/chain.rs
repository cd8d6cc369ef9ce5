//! Follows a descriptor chain (virtio 1.2, section 2.7.5).
//!
//! Whatever the descriptors say: each is read once, at most [`DESCRIPTORS_MAX`] are, and what
//! comes out is a list of readable spans and a list of writable ones.

use sapwood_blockdev::buffer::SharedBuf;
use thiserror::Error;

use super::layout::{DESCRIPTOR_BYTES, DESCRIPTOR_INDIRECT, DESCRIPTOR_NEXT, DESCRIPTOR_WRITE, Descriptor};
use crate::guest::{GuestMap, Outside};

/// Descriptors in one chain, those of an indirect table included. Drivers keep to the queue size.
pub const DESCRIPTORS_MAX: usize = 1024;

/// Why a chain makes no sense.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum ChainError {
    /// An index beyond the table's end.
    #[error("descriptor {0} is not in the table")]
    Index(u16),
    /// More descriptors than there can be: a loop, as a rule.
    #[error("the chain is too long, or a loop")]
    TooLong,
    /// A readable descriptor after a writable one (section 2.7.4.2).
    #[error("readable memory after writable memory")]
    Order,
    /// An indirect descriptor although the feature was not negotiated.
    #[error("indirect descriptors were not negotiated")]
    NotNegotiated,
    /// An indirect descriptor that has a next one (section 2.7.5.3.1).
    #[error("an indirect descriptor is not the last one")]
    IndirectNext,
    /// An indirect descriptor in an indirect table.
    #[error("an indirect table in an indirect table")]
    Nested,
    /// An indirect table of no or of broken descriptors.
    #[error("an indirect table of {0} bytes")]
    TableLength(u32),
    /// The indirect table is not in guest memory.
    #[error("indirect table: {0}")]
    Table(#[from] Outside),
}

/// A stretch of guest memory named by a descriptor, not yet looked up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// Guest physical address.
    pub address: u64,
    /// Length in bytes.
    pub len: u32,
}

/// The memory of a chain. Kept and filled again, so that it allocates only once.
#[derive(Debug, Default)]
pub struct Chain {
    pub(super) readable: Vec<Span>,
    pub(super) writable: Vec<Span>,
    descriptors: usize,
}

/// Where descriptors are read from.
enum Table<'a> {
    Direct(&'a SharedBuf),
    Indirect { map: &'a GuestMap, address: u64, len: u32 },
}

impl Table<'_> {
    fn entries(&self) -> usize {
        match self {
            Self::Direct(window) => window.len() / DESCRIPTOR_BYTES,
            Self::Indirect { len, .. } => *len as usize / DESCRIPTOR_BYTES,
        }
    }

    fn get(&self, index: u16) -> Result<Descriptor, ChainError> {
        let at = usize::from(index);
        if at >= self.entries() {
            return Err(ChainError::Index(index));
        }
        let mut bytes = [0; DESCRIPTOR_BYTES];
        match self {
            Self::Direct(window) => window.read_at(at * DESCRIPTOR_BYTES, &mut bytes),
            Self::Indirect { map, address, len } => {
                let outside = Outside { address: *address, len: u64::from(*len) };
                let at = address.checked_add((at * DESCRIPTOR_BYTES) as u64).ok_or(outside)?;
                map.read(at, &mut bytes)?;
            }
        }
        Ok(Descriptor::parse(bytes))
    }
}

impl Chain {
    /// Follows the chain that starts at `head` of the descriptor table `table`.
    ///
    /// # Errors
    /// When the chain makes no sense; nothing of it may then be used.
    pub fn walk(
        &mut self,
        table: &SharedBuf,
        head: u16,
        map: &GuestMap,
        indirect_negotiated: bool,
    ) -> Result<(), ChainError> {
        self.readable.clear();
        self.writable.clear();
        self.descriptors = 0;
        let Some(indirect) = self.follow(&Table::Direct(table), head)? else { return Ok(()) };
        let Descriptor { address, len, flags, .. } = indirect;
        if !indirect_negotiated {
            return Err(ChainError::NotNegotiated);
        }
        // The write flag of the descriptor itself means nothing (section 2.7.5.3.2).
        if flags & DESCRIPTOR_NEXT != 0 {
            return Err(ChainError::IndirectNext);
        }
        if len == 0 || !(len as usize).is_multiple_of(DESCRIPTOR_BYTES) {
            return Err(ChainError::TableLength(len));
        }
        match self.follow(&Table::Indirect { map, address, len }, 0)? {
            None => Ok(()),
            Some(_) => Err(ChainError::Nested),
        }
    }

    /// Follows descriptors within one table; an indirect one ends them and is returned.
    fn follow(&mut self, table: &Table<'_>, head: u16) -> Result<Option<Descriptor>, ChainError> {
        let (mut index, mut left) = (head, table.entries());
        loop {
            if left == 0 || self.descriptors == DESCRIPTORS_MAX {
                return Err(ChainError::TooLong);
            }
            (left, self.descriptors) = (left - 1, self.descriptors + 1);
            let descriptor = table.get(index)?;
            if descriptor.flags & DESCRIPTOR_INDIRECT != 0 {
                return Ok(Some(descriptor));
            }
            self.append(&descriptor)?;
            if descriptor.flags & DESCRIPTOR_NEXT == 0 {
                return Ok(None);
            }
            index = descriptor.next;
        }
    }

    fn append(&mut self, descriptor: &Descriptor) -> Result<(), ChainError> {
        let span = Span { address: descriptor.address, len: descriptor.len };
        if descriptor.flags & DESCRIPTOR_WRITE != 0 {
            self.writable.push(span);
        } else if self.writable.is_empty() {
            self.readable.push(span);
        } else {
            return Err(ChainError::Order);
        }
        Ok(())
    }
}

/// Bytes in a list of spans: at most [`DESCRIPTORS_MAX`] times 2^32, which fits.
pub(super) fn total(spans: &[Span]) -> u64 {
    spans.iter().map(|span| u64::from(span.len)).sum()
}
