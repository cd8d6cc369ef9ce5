//! Writes cpio archives in the `newc` form, the one that Linux unpacks as an initial file system.
//!
//! Archives may follow one another: the kernel unpacks each in turn, so that a test's script is
//! appended to a finished initial file system without unpacking it.

/// Every archive and every member starts at a multiple of this many bytes.
const ALIGN: usize = 4;
const DIRECTORY: u32 = 0o040_755;
const REGULAR: u32 = 0o100_000;

/// An archive under construction.
#[derive(Debug, Default)]
pub struct Archive {
    bytes: Vec<u8>,
    inode: u32,
}

impl Archive {
    /// An empty archive.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a directory. Parents must be added first.
    pub fn directory(&mut self, path: &str) {
        self.member(path, DIRECTORY, &[]);
    }

    /// Adds a regular file with permission bits `mode`.
    pub fn file(&mut self, path: &str, mode: u32, data: &[u8]) {
        self.member(path, REGULAR | mode, data);
    }

    /// Ends the archive and returns its bytes.
    pub fn finish(mut self) -> Vec<u8> {
        self.member("TRAILER!!!", 0, &[]);
        self.bytes
    }

    fn member(&mut self, path: &str, mode: u32, data: &[u8]) {
        assert!(!path.starts_with('/'), "cpio paths are relative: {path}");
        let size = u32::try_from(data.len()).expect("a cpio member is smaller than 4 GiB");
        let name_size = u32::try_from(path.len() + 1).expect("a path is short");
        self.inode += 1;
        // inode, mode, uid, gid, links, mtime, size, device (4 fields), name size, checksum
        let fields = [self.inode, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name_size, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08X}").as_bytes());
        }
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(data);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(ALIGN), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_member_has_the_layout_of_the_kernel_document() {
        let mut archive = Archive::new();
        archive.file("ab", 0o644, b"xyz");
        let bytes = archive.finish();
        assert_eq!(&bytes[..6], b"070701");
        assert_eq!(&bytes[14..22], b"000081A4"); // mode
        assert_eq!(&bytes[54..62], b"00000003"); // size
        assert_eq!(&bytes[94..102], b"00000003"); // name with its NUL
        assert_eq!(&bytes[110..113], b"ab\0");
        assert_eq!(&bytes[116..119], b"xyz"); // name ends at 113, padded to 116
        assert_eq!(bytes.len() % ALIGN, 0);
    }
}
