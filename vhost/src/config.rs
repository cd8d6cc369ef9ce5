//! The configuration space (virtio 1.2, section 5.2.4).
//!
//! | offset | bytes | field |
//! | --- | --- | --- |
//! | 0 | 8 | capacity in sectors |
//! | 8 | 4 | size_max: bytes in a segment |
//! | 12 | 4 | seg_max: segments in a request |
//! | 16 | 4 | geometry (not offered) |
//! | 20 | 4 | blk_size: logical block in bytes |
//! | 24 | 1 | physical_block_exp: logical blocks in a physical one, log 2 |
//! | 25 | 1 | alignment_offset |
//! | 26 | 2 | min_io_size in logical blocks |
//! | 28 | 4 | opt_io_size in logical blocks |
//! | 32 | 1 | writeback: the only field that a driver may write |
//! | 34 | 2 | num_queues |
//! | 36 | 12 | discard: max sectors, max segments, sector alignment |
//! | 48 | 12 | write zeroes: max sectors, max segments, may unmap (1 byte), padding |

use sapwood_blockdev::device::Geometry;
use sapwood_blockdev::units::SECTOR_SIZE;

/// Bytes that are defined; what a driver reads beyond them is zero.
pub const CONFIG_BYTES: usize = 60;

/// Offset of the `writeback` byte.
pub const WRITEBACK_OFFSET: usize = 32;

/// Data segments a request should have at most. Two less than the smallest common queue size:
/// header and status need a descriptor each.
pub const SEGMENTS_MAX: u32 = 126;

/// Bytes a segment should have at most.
pub const SEGMENT_BYTES_MAX: u32 = 512 * 1024;

/// Segments in one discard or write-zeroes request.
pub const RANGES_MAX: u32 = 32;

/// Sectors in one segment of a discard or write-zeroes request: 2 GiB.
pub const RANGE_SECTORS_MAX: u32 = 1 << 22;

/// The configuration space of a device now.
pub fn space(geometry: &Geometry, queues: u16, writeback: bool) -> [u8; CONFIG_BYTES] {
    let physical = (u64::from(geometry.physical_block) / SECTOR_SIZE).max(1);
    let alignment = (u64::from(geometry.discard_granularity) / SECTOR_SIZE).max(1);
    let mut bytes = [0; CONFIG_BYTES];
    let mut put = |offset: usize, field: &[u8]| bytes[offset..offset + field.len()].copy_from_slice(field);
    put(0, &(geometry.size / SECTOR_SIZE).to_le_bytes());
    put(8, &SEGMENT_BYTES_MAX.to_le_bytes());
    put(12, &SEGMENTS_MAX.to_le_bytes());
    put(20, &(SECTOR_SIZE as u32).to_le_bytes());
    put(24, &[physical.ilog2() as u8]);
    put(26, &u16::try_from(physical).unwrap_or(u16::MAX).to_le_bytes());
    put(WRITEBACK_OFFSET, &[u8::from(writeback)]);
    put(34, &queues.to_le_bytes());
    put(36, &RANGE_SECTORS_MAX.to_le_bytes());
    put(40, &RANGES_MAX.to_le_bytes());
    put(44, &(alignment as u32).to_le_bytes());
    put(48, &RANGE_SECTORS_MAX.to_le_bytes());
    put(52, &RANGES_MAX.to_le_bytes());
    put(56, &[1]);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::mem::offset_of;
    use virtio_bindings::bindings::virtio_blk::virtio_blk_config as Kernel;

    #[test]
    fn fields_lie_where_the_kernel_headers_say() {
        assert_eq!(offset_of!(Kernel, size_max), 8);
        assert_eq!(offset_of!(Kernel, seg_max), 12);
        assert_eq!(offset_of!(Kernel, blk_size), 20);
        assert_eq!(offset_of!(Kernel, physical_block_exp), 24);
        assert_eq!(offset_of!(Kernel, min_io_size), 26);
        assert_eq!(offset_of!(Kernel, wce), WRITEBACK_OFFSET);
        assert_eq!(offset_of!(Kernel, num_queues), 34);
        assert_eq!(offset_of!(Kernel, max_discard_sectors), 36);
        assert_eq!(offset_of!(Kernel, max_discard_seg), 40);
        assert_eq!(offset_of!(Kernel, discard_sector_alignment), 44);
        assert_eq!(offset_of!(Kernel, max_write_zeroes_sectors), 48);
        assert_eq!(offset_of!(Kernel, max_write_zeroes_seg), 52);
        assert_eq!(offset_of!(Kernel, write_zeroes_may_unmap), 56);
    }

    #[test]
    fn values_follow_the_geometry() {
        let geometry =
            Geometry { size: 3 << 30, read_only: false, physical_block: 4096, discard_granularity: 65536 };
        let space = space(&geometry, 4, true);
        assert_eq!(space[..8], (6u64 << 20).to_le_bytes());
        assert_eq!(space[24], 3, "4096 is 512 shifted by 3");
        assert_eq!(space[26..28], 8u16.to_le_bytes());
        assert_eq!(space[32], 1);
        assert_eq!(space[34..36], 4u16.to_le_bytes());
        assert_eq!(space[44..48], 128u32.to_le_bytes());
    }
}
