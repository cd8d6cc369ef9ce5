//! What requests look like in guest memory (virtio 1.2, sections 2.7.5 and 5.2.6).

/// Bytes in a descriptor: address (8), length (4), flags (2), next (2).
pub const DESCRIPTOR_BYTES: usize = 16;

/// `VIRTQ_DESC_F_NEXT`: the chain goes on at `next`.
pub const DESCRIPTOR_NEXT: u16 = 1;
/// `VIRTQ_DESC_F_WRITE`: the device may write the memory; otherwise it may read it.
pub const DESCRIPTOR_WRITE: u16 = 2;
/// `VIRTQ_DESC_F_INDIRECT`: the memory is a table of descriptors.
pub const DESCRIPTOR_INDIRECT: u16 = 4;

/// Bytes in a request's header: type (4), reserved (4), sector (8).
pub const HEADER_BYTES: usize = 16;

/// `VIRTIO_BLK_T_IN`.
pub const TYPE_READ: u32 = 0;
/// `VIRTIO_BLK_T_OUT`.
pub const TYPE_WRITE: u32 = 1;
/// `VIRTIO_BLK_T_FLUSH`.
pub const TYPE_FLUSH: u32 = 4;
/// `VIRTIO_BLK_T_GET_ID`.
pub const TYPE_GET_ID: u32 = 8;
/// `VIRTIO_BLK_T_DISCARD`.
pub const TYPE_DISCARD: u32 = 11;
/// `VIRTIO_BLK_T_WRITE_ZEROES`.
pub const TYPE_WRITE_ZEROES: u32 = 13;

/// Bytes in a segment of a discard or write-zeroes request: sector (8), sectors (4), flags (4).
pub const RANGE_BYTES: usize = 16;
/// The `unmap` flag of such a segment; the other 31 bits are reserved.
pub const RANGE_UNMAP: u32 = 1;

/// Bytes of the device's name that GET_ID returns.
pub const ID_BYTES: usize = 20;

/// The byte that ends a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    /// `VIRTIO_BLK_S_OK`.
    Ok = 0,
    /// `VIRTIO_BLK_S_IOERR`.
    IoError = 1,
    /// `VIRTIO_BLK_S_UNSUPP`.
    Unsupported = 2,
}

/// A descriptor, copied out of guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Descriptor {
    /// Guest physical address.
    pub address: u64,
    /// Length in bytes.
    pub len: u32,
    /// `DESCRIPTOR_*`.
    pub flags: u16,
    /// Index of the next descriptor if the flags say so.
    pub next: u16,
}

impl Descriptor {
    /// Decodes a descriptor.
    pub fn parse(bytes: [u8; DESCRIPTOR_BYTES]) -> Self {
        let word = u128::from_le_bytes(bytes);
        Self {
            address: word as u64,
            len: (word >> 64) as u32,
            flags: (word >> 96) as u16,
            next: (word >> 112) as u16,
        }
    }

    /// Encodes a descriptor.
    pub fn bytes(self) -> [u8; DESCRIPTOR_BYTES] {
        let high = u64::from(self.len) | u64::from(self.flags) << 32 | u64::from(self.next) << 48;
        (u128::from(self.address) | u128::from(high) << 64).to_le_bytes()
    }
}

/// A request's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// `TYPE_*`.
    pub kind: u32,
    /// First sector of a read or write.
    pub sector: u64,
}

impl Header {
    /// Decodes a header.
    pub fn parse(bytes: [u8; HEADER_BYTES]) -> Self {
        let word = u128::from_le_bytes(bytes);
        Self { kind: word as u32, sector: (word >> 64) as u64 }
    }

    /// Encodes a header.
    pub fn bytes(self) -> [u8; HEADER_BYTES] {
        (u128::from(self.kind) | u128::from(self.sector) << 64).to_le_bytes()
    }
}

/// A segment of a discard or write-zeroes request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// First sector.
    pub sector: u64,
    /// Number of sectors.
    pub sectors: u32,
    /// `RANGE_UNMAP` and reserved bits.
    pub flags: u32,
}

impl Range {
    /// Decodes a segment.
    pub fn parse(bytes: [u8; RANGE_BYTES]) -> Self {
        let word = u128::from_le_bytes(bytes);
        Self { sector: word as u64, sectors: (word >> 64) as u32, flags: (word >> 96) as u32 }
    }

    /// Encodes a segment.
    pub fn bytes(self) -> [u8; RANGE_BYTES] {
        let high = u64::from(self.sectors) | u64::from(self.flags) << 32;
        (u128::from(self.sector) | u128::from(high) << 64).to_le_bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::mem::size_of;
    use virtio_bindings::bindings::virtio_blk as blk;
    use virtio_bindings::bindings::virtio_ring as ring;

    #[test]
    fn constants_are_those_of_the_kernel_headers() {
        assert_eq!(u32::from(DESCRIPTOR_NEXT), ring::VRING_DESC_F_NEXT);
        assert_eq!(u32::from(DESCRIPTOR_WRITE), ring::VRING_DESC_F_WRITE);
        assert_eq!(u32::from(DESCRIPTOR_INDIRECT), ring::VRING_DESC_F_INDIRECT);
        assert_eq!(TYPE_READ, blk::VIRTIO_BLK_T_IN);
        assert_eq!(TYPE_WRITE, blk::VIRTIO_BLK_T_OUT);
        assert_eq!(TYPE_FLUSH, blk::VIRTIO_BLK_T_FLUSH);
        assert_eq!(TYPE_GET_ID, blk::VIRTIO_BLK_T_GET_ID);
        assert_eq!(TYPE_DISCARD, blk::VIRTIO_BLK_T_DISCARD);
        assert_eq!(TYPE_WRITE_ZEROES, blk::VIRTIO_BLK_T_WRITE_ZEROES);
        assert_eq!(Status::IoError as u32, blk::VIRTIO_BLK_S_IOERR);
        assert_eq!(Status::Unsupported as u32, blk::VIRTIO_BLK_S_UNSUPP);
        assert_eq!(RANGE_UNMAP, blk::VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP);
        assert_eq!(ID_BYTES as u32, blk::VIRTIO_BLK_ID_BYTES);
        assert_eq!(HEADER_BYTES, size_of::<blk::virtio_blk_outhdr>());
        assert_eq!(RANGE_BYTES, size_of::<blk::virtio_blk_discard_write_zeroes>());
        assert_eq!(DESCRIPTOR_BYTES, size_of::<ring::vring_desc>());
    }

    #[test]
    fn structures_are_little_endian() {
        let descriptor = Descriptor { address: 0x0807_0605_0403_0201, len: 0x0c0b_0a09, flags: 5, next: 7 };
        assert_eq!(descriptor.bytes(), [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 5, 0, 7, 0]);
        assert_eq!(Descriptor::parse(descriptor.bytes()), descriptor);
        let header = Header { kind: 1, sector: 0x0807_0605_0403_0201 };
        assert_eq!(header.bytes(), [1, 0, 0, 0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8]);
        assert_eq!(Header::parse(header.bytes()), header);
        let range = Range { sector: 1, sectors: 2, flags: 3 };
        assert_eq!(range.bytes(), [1, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0]);
        assert_eq!(Range::parse(range.bytes()), range);
    }
}
