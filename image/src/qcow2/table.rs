//! Entries of L1 and L2 tables.
//!
//! Source: docs/interop/qcow2.rst of QEMU, "Cluster mapping" and "Extended L2 Entries".

/// Where an L1 entry says that its L2 table is, and an L2 entry its cluster: bits 9 to 55.
const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
const L2_COMPRESSED: u64 = 1 << 62;
/// The cluster is used once; in an image with an external data file it marks offset 0 as in use.
const L2_COPIED: u64 = 1 << 63;
const L2_ZERO: u64 = 1;
/// Subclusters in a cluster of an image with extended L2 entries.
const SUBCLUSTERS: u64 = 32;
/// What the length of compressed data is counted in.
const COMPRESSED_SECTOR: u64 = 512;

/// What decides how tables are read.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    pub(super) cluster_bits: u32,
    pub(super) version: u32,
    /// L2 entries have 16 bytes and describe 32 subclusters each.
    pub(super) extended: bool,
    /// Clusters are in another file.
    pub(super) external_data: bool,
}

/// Where the bytes of a cluster, or of a subcluster, are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mapping {
    /// Nowhere in this image: in the backing file.
    Unallocated,
    /// They are zeroes.
    Zero,
    /// At this offset of the file that holds the data.
    Data(u64),
    /// Compressed with the rest of the cluster.
    Compressed {
        /// Where the compressed bytes start in the image's file.
        offset: u64,
        /// Their length in bytes at most: what follows the compressed data is to be ignored.
        len: u32,
    },
    /// In the packs of a sealed snapshot: never in a qcow2 image.
    Sealed,
}

impl Mapping {
    /// The same, `bytes` further on.
    pub(super) fn advanced(self, bytes: u64) -> Self {
        match self {
            Self::Data(offset) => Self::Data(offset + bytes),
            other => other,
        }
    }
}

impl Shape {
    /// Bytes in a cluster.
    pub(crate) fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Bytes in an L2 entry.
    pub(super) fn l2_entry_bytes(&self) -> u64 {
        if self.extended { 16 } else { 8 }
    }

    /// Bytes of disk that an L2 table describes: at most 2^39.
    pub(super) fn l2_span(&self) -> u64 {
        self.cluster_size() / self.l2_entry_bytes() * self.cluster_size()
    }

    /// Bytes of disk that are mapped as one: a subcluster or a cluster.
    pub(super) fn unit(&self) -> u64 {
        if self.extended { self.cluster_size() / SUBCLUSTERS } else { self.cluster_size() }
    }

    /// The offset of an L2 table; 0: there is none.
    pub(super) fn decode_l1(&self, entry: u64) -> Result<u64, &'static str> {
        match entry & OFFSET_MASK {
            offset if offset.is_multiple_of(self.cluster_size()) => Ok(offset),
            _ => Err("the L2 table is not aligned to a cluster"),
        }
    }

    /// Decodes an L2 entry, with its `bitmap` where entries are extended, for the byte of the disk at
    /// `unit`, which starts a subcluster or cluster.
    pub(super) fn decode_l2(&self, entry: u64, bitmap: u64, unit: u64) -> Result<Mapping, &'static str> {
        if entry & L2_COMPRESSED != 0 {
            return self.decode_compressed(entry);
        }
        let in_cluster = unit % self.cluster_size();
        let offset = entry & OFFSET_MASK;
        let allocated = offset != 0 || self.external_data && entry & L2_COPIED != 0;
        if allocated && !offset.is_multiple_of(self.cluster_size()) {
            return Err("the cluster is not aligned");
        }
        if allocated && self.external_data && offset != unit - in_cluster {
            return Err("a cluster of the external data file is not where it is on the disk");
        }
        let data = Mapping::Data(offset + in_cluster);
        if self.extended {
            return Self::decode_subcluster(bitmap, in_cluster / self.unit(), allocated, data);
        }
        match (entry & L2_ZERO != 0, allocated) {
            (true, _) if self.version < 3 => Err("a zero cluster in an image of version 2"),
            (true, _) => Ok(Mapping::Zero),
            (false, true) => Ok(data),
            (false, false) => Ok(Mapping::Unallocated),
        }
    }

    fn decode_subcluster(
        bitmap: u64,
        number: u64,
        allocated: bool,
        data: Mapping,
    ) -> Result<Mapping, &'static str> {
        let (stored, zero) = (bitmap as u32, (bitmap >> 32) as u32);
        if stored & zero != 0 {
            return Err("a subcluster is both stored and zero");
        }
        if !allocated && stored != 0 {
            return Err("a subcluster is stored in a cluster that is not");
        }
        Ok(match (zero >> number & 1, stored >> number & 1) {
            (1, _) => Mapping::Zero,
            (_, 1) => data,
            _ => Mapping::Unallocated,
        })
    }

    fn decode_compressed(&self, entry: u64) -> Result<Mapping, &'static str> {
        if self.external_data {
            return Err("a compressed cluster in an image with an external data file");
        }
        let offset_bits = 62 - (self.cluster_bits - 8);
        let offset = entry & ((1 << offset_bits) - 1);
        let sectors = (entry >> offset_bits & ((1 << (self.cluster_bits - 8)) - 1)) + 1;
        let len = sectors * COMPRESSED_SECTOR - offset % COMPRESSED_SECTOR;
        // At most 2^13 sectors.
        Ok(Mapping::Compressed { offset, len: len as u32 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STANDARD: Shape = Shape { cluster_bits: 16, version: 3, extended: false, external_data: false };

    #[test]
    fn standard_entries() {
        let decode = |entry| STANDARD.decode_l2(entry, 0, 0x2_0000);
        assert_eq!(decode(0), Ok(Mapping::Unallocated));
        assert_eq!(decode(1), Ok(Mapping::Zero));
        assert_eq!(decode(0x5_0001), Ok(Mapping::Zero));
        assert_eq!(decode(L2_COPIED | 0x5_0000), Ok(Mapping::Data(0x5_0000)));
        assert!(decode(0x5_0200).is_err());
        let old = Shape { version: 2, ..STANDARD };
        assert!(old.decode_l2(1, 0, 0).is_err());
        assert_eq!(STANDARD.l2_span(), 512 << 20);
    }

    #[test]
    fn compressed_entries() {
        // 64 KiB clusters: 54 bits of offset, 8 bits of further sectors.
        let entry = L2_COMPRESSED | 3 << 54 | 0x1_2345;
        let expected = Mapping::Compressed { offset: 0x1_2345, len: 4 * 512 - 0x145 };
        assert_eq!(STANDARD.decode_l2(entry, 0, 0), Ok(expected));
        let large = Shape { cluster_bits: 21, ..STANDARD };
        let all = large.decode_l2(L2_COMPRESSED | (L2_COMPRESSED - 1), 0, 0);
        assert!(
            matches!(all, Ok(Mapping::Compressed { offset, len: 3_145_729..=4_194_304 }) if offset < 1 << 49)
        );
    }

    #[test]
    fn extended_entries() {
        let shape = Shape { extended: true, ..STANDARD };
        let decode = |entry, bitmap, unit| shape.decode_l2(entry, bitmap, unit);
        let bitmap = 1 | 2 << 32;
        assert_eq!(decode(0x5_0000, bitmap, 0x1_0000), Ok(Mapping::Data(0x5_0000)));
        assert_eq!(decode(0x5_0000, bitmap, 0x1_0800), Ok(Mapping::Zero));
        assert_eq!(decode(0x5_0000, bitmap, 0x1_1000), Ok(Mapping::Unallocated));
        assert_eq!(decode(0, 2 << 32, 0x1_0800), Ok(Mapping::Zero));
        assert!(decode(0, 1, 0).is_err());
        assert!(decode(0x5_0000, 1 | 1 << 32, 0).is_err());
    }

    #[test]
    fn external_data_is_where_it_is_on_the_disk() {
        let shape = Shape { external_data: true, ..STANDARD };
        assert_eq!(shape.decode_l2(L2_COPIED, 0, 0), Ok(Mapping::Data(0)));
        assert_eq!(shape.decode_l2(0, 0, 0), Ok(Mapping::Unallocated));
        assert!(shape.decode_l2(L2_COPIED | 0x1_0000, 0, 0x2_0000).is_err());
        assert!(shape.decode_l2(L2_COMPRESSED, 0, 0).is_err());
    }
}
