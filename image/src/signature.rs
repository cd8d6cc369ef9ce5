//! What a block device seems to hold: the marks by which other programs know their own.
//!
//! Marks of formats that are in wide use, so that nobody overwrites one by a slip of a device's
//! name; where each lies is what libblkid looks for (util-linux, libblkid/src/superblocks and
//! libblkid/src/partitions).

/// Bytes at the start of a device within which marks are looked for.
pub(crate) const START_BYTES: u64 = 256 << 10;
/// Bytes at its end.
pub(crate) const END_BYTES: u64 = 128 << 10;

/// A mark at an offset, and what it tells.
type Mark = (usize, &'static [u8], &'static str);

const START: &[Mark] = &[
    (0, &crate::layer::MAGIC, "a Sapwood layer"),
    (0, b"QFI\xfb", "a qcow2 image"),
    (0, b"KDMV", "a VMDK image"),
    (0, b"vhdxfile", "a VHDX image"),
    (0, b"conectix", "a VHD image"),
    (0, b"<<< ", "a VDI image"),
    (0, b"WithoutFreeSpace", "a Parallels image"),
    (0, b"WithouFreSpacExt", "a Parallels image"),
    (0, b"LUKS\xba\xbe", "a LUKS volume"),
    (0, b"XFSB", "an XFS file system"),
    (0, b"hsqs", "a squashfs file system"),
    (0, b"bluestore block device", "a Ceph OSD"),
    (0, b"\xfc\x4e\x2b\xa9", "a member of an MD RAID"),
    (4096, b"\xfc\x4e\x2b\xa9", "a member of an MD RAID"),
    (0, b"LABELONE", "an LVM physical volume"),
    (512, b"LABELONE", "an LVM physical volume"),
    (1024, b"LABELONE", "an LVM physical volume"),
    (1536, b"LABELONE", "an LVM physical volume"),
    (512, b"EFI PART", "a GPT partition table"),
    (4096, b"EFI PART", "a GPT partition table"),
    (1024, b"\x10\x20\xf5\xf2", "an F2FS file system"),
    (1024, b"\xe2\xe1\xf5\xe0", "an EROFS file system"),
    (1080, b"\x53\xef", "an ext2, ext3 or ext4 file system"),
    (4086, b"SWAPSPACE2", "swap space"),
    (4120, b"\xc6\x85\x73\xf6\x4e\x1a\x45\xca", "a bcache device"),
    (4120, b"\xc6\x85\x73\xf6\x66\xce\x90\xa9", "a bcachefs file system"),
    (32769, b"CD001", "an ISO 9660 file system"),
    (65588, b"ReIsEr", "a reiserfs file system"),
    (65600, b"_BHRfS_M", "a btrfs file system"),
    // Last: file systems keep it beside their own marks.
    (510, b"\x55\xaa", "a partition table or a boot sector"),
];

/// A ZFS uberblock's first bytes, in either byte order; they come at multiples of 1 KiB.
const ZFS: [&[u8]; 2] = [b"\x0c\xb1\xba\x00\x00\x00\x00\x00", b"\x00\x00\x00\x00\x00\xba\xb1\x0c"];
const ZFS_START: usize = 128 << 10;

/// What the first [`START_BYTES`] and the last [`END_BYTES`] of a device of `size` bytes seem to
/// be of. The second may be shorter on a small device.
pub(crate) fn find(start: &[u8], end: &[u8], size: u64) -> Option<&'static str> {
    let is_at = |bytes: &[u8], at: usize, mark: &[u8]| bytes.get(at..).is_some_and(|b| b.starts_with(mark));
    let in_start = START.iter().find(|(at, mark, _)| is_at(start, *at, mark)).map(|(.., name)| *name);
    let zfs = (ZFS_START..START_BYTES as usize).step_by(1024);
    let zfs = zfs.into_iter().any(|at| ZFS.iter().any(|mark| is_at(start, at, mark)));
    let in_start = in_start.or(zfs.then_some("a ZFS pool"));
    in_start.or_else(|| {
        let end_start = size - end.len() as u64;
        let is_at_end =
            |at: u64, mark: &[u8]| at.checked_sub(end_start).is_some_and(|at| is_at(end, at as usize, mark));
        END.iter()
            .find(|(at, mark, _)| at(size).is_some_and(|at| is_at_end(at, mark)))
            .map(|(.., name)| *name)
    })
}

/// A mark at an offset that follows from the device's size.
type EndMark = (fn(u64) -> Option<u64>, &'static [u8], &'static str);

const END: &[EndMark] = &[
    (|size| size.checked_sub(512), b"EFI PART", "a GPT partition table"),
    (|size| size.checked_sub(4096), b"EFI PART", "a GPT partition table"),
    (|size| size.checked_sub(512), b"conectix", "a VHD image"),
    (|size| (size / 65536 * 65536).checked_sub(65536), b"\xfc\x4e\x2b\xa9", "a member of an MD RAID"),
    (|size| Some(size.checked_sub(8192)? / 4096 * 4096), b"\xfc\x4e\x2b\xa9", "a member of an MD RAID"),
];

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: u64 = (16 << 20) + 512;

    fn found(at: u64, mark: &[u8]) -> Option<&'static str> {
        let mut start = vec![0; START_BYTES as usize];
        let mut end = vec![0; END_BYTES as usize];
        let end_start = SIZE - END_BYTES;
        let (bytes, at) = if at < START_BYTES { (&mut start, at) } else { (&mut end, at - end_start) };
        bytes[at as usize..at as usize + mark.len()].copy_from_slice(mark);
        find(&start, &end, SIZE)
    }

    #[test]
    fn every_mark_is_found_where_it_lies() {
        for (at, mark, name) in START {
            assert_eq!(found(*at as u64, mark), Some(*name), "{at}");
        }
        for (at, mark, name) in END {
            assert_eq!(found(at(SIZE).unwrap(), mark), Some(*name));
        }
        assert_eq!(found(200 << 10, ZFS[0]), Some("a ZFS pool"));
    }

    #[test]
    fn nothing_is_found_where_nothing_is() {
        assert_eq!(found(0, b""), None);
        assert_eq!(found(8, b"XFSB"), None, "a mark elsewhere");
        assert_eq!(find(&[], &[], 0), None);
    }
}
