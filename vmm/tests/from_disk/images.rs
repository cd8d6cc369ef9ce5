//! Disks made by the tools that make them elsewhere: `mke2fs`, `mkfs.vfat`, `mcopy`, `sfdisk`.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::{FileExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use sapwood_vmm::from_disk::{self, DiskReader, FindError, Found};
use tempfile::TempDir;

pub const MIB: u64 = 1 << 20;

/// A folder of files, to be made a file system of.
pub struct Tree {
    folder: TempDir,
}

impl Tree {
    pub fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap() }
    }

    pub fn file(self, path: &str, contents: impl AsRef<[u8]>) -> Self {
        let path = self.path(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, contents).unwrap();
        self
    }

    pub fn link(self, path: &str, target: &str) -> Self {
        let path = self.path(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        symlink(target, path).unwrap();
        self
    }

    fn path(&self, path: &str) -> PathBuf {
        self.folder.path().join(path.trim_start_matches('/'))
    }

    pub fn ext4(&self, mib: u64, uuid: &str) -> Vec<u8> {
        self.ext(mib, &["-t", "ext4", "-U", uuid])
    }

    /// ext2 to ext4, by the options of `mke2fs`.
    pub fn ext(&self, mib: u64, options: &[&str]) -> Vec<u8> {
        let image = tempfile::NamedTempFile::new().unwrap();
        image.as_file().set_len(mib * MIB).unwrap();
        let mut command = tool("mke2fs");
        command.args(["-q", "-F"]).args(options).arg("-d").arg(self.folder.path()).arg(image.path());
        run(&mut command, b"");
        fs::read(image.path()).unwrap()
    }

    pub fn fat(&self, mib: u64, bits: u32, id: &str) -> Vec<u8> {
        let image = tempfile::NamedTempFile::new().unwrap();
        image.as_file().set_len(mib * MIB).unwrap();
        let mut command = tool("mkfs.vfat");
        command.args(["-i", id, "-F", &bits.to_string()]).arg(image.path());
        run(&mut command, b"");
        for entry in fs::read_dir(self.folder.path()).unwrap() {
            let mut command = tool("mcopy");
            command.arg("-s").arg("-i").arg(image.path()).arg(entry.unwrap().path()).arg("::/");
            run(&mut command, b"");
        }
        fs::read(image.path()).unwrap()
    }
}

fn tool(name: &str) -> Command {
    let folders =
        ["/usr/sbin", "/sbin", "/usr/bin", "/bin"].iter().map(|folder| Path::new(folder).join(name));
    let found = folders.into_iter().find(|path| path.exists());
    Command::new(found.unwrap_or_else(|| panic!("no {name} here: cargo xtask setup installs it")))
}

fn run(command: &mut Command, input: &[u8]) {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(input).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// A disk with a table that `sfdisk` makes of `script`, and file systems at the given offsets in MiB.
pub fn disk(script: &str, mib: u64, parts: &[(u64, &[u8])]) -> Vec<u8> {
    tabled(tool("sfdisk").arg("-q"), script, mib, parts)
}

/// The same with sectors of 4 KiB, by what is typed into `fdisk`: `sfdisk` takes no other than the device's.
pub fn disk_4k(keys: &str, mib: u64, parts: &[(u64, &[u8])]) -> Vec<u8> {
    tabled(tool("fdisk").args(["-b", "4096"]), keys, mib, parts)
}

fn tabled(command: &mut Command, input: &str, mib: u64, parts: &[(u64, &[u8])]) -> Vec<u8> {
    let image = tempfile::NamedTempFile::new().unwrap();
    image.as_file().set_len(mib * MIB).unwrap();
    run(command.arg(image.path()), input.as_bytes());
    for (at, bytes) in parts {
        image.as_file().write_all_at(bytes, at * MIB).unwrap();
    }
    fs::read(image.path()).unwrap()
}

/// What `debugfs` makes of an image.
pub fn edit(image: &[u8], command: &str) -> Vec<u8> {
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), image).unwrap();
    run(tool("debugfs").args(["-w", "-R", command]).arg(file.path()), b"");
    fs::read(file.path()).unwrap()
}

/// A disk in memory.
pub struct Memory(pub Vec<u8>);

impl DiskReader for Memory {
    fn size(&self) -> u64 {
        self.0.len() as u64
    }

    fn read_at(&mut self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        assert_eq!(offset % from_disk::CHUNK as u64, 0, "as the trait promises");
        let end = offset as usize + buf.len();
        assert!(buf.len() == from_disk::CHUNK || end == self.0.len(), "as the trait promises");
        buf.copy_from_slice(&self.0[offset as usize..end]);
        Ok(())
    }
}

/// An image on a disk of 32 TiB.
pub struct Vast(pub Vec<u8>);

impl DiskReader for Vast {
    fn size(&self) -> u64 {
        1 << 45
    }

    fn read_at(&mut self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        buf.fill(0);
        if let Some(bytes) = self.0.get(offset as usize..) {
            let len = bytes.len().min(buf.len());
            buf[..len].copy_from_slice(&bytes[..len]);
        }
        Ok(())
    }
}

/// A disk in a file.
pub struct OnHost(pub File);

impl DiskReader for OnHost {
    fn size(&self) -> u64 {
        self.0.metadata().unwrap().len()
    }

    fn read_at(&mut self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.0.read_exact_at(buf, offset)
    }
}

pub fn find(disk: &[u8], wanted: Option<&str>) -> Result<Found, FindError> {
    from_disk::find(Box::new(Memory(disk.to_vec())), wanted)
}

pub fn read(file: &mut File) -> Vec<u8> {
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).unwrap();
    bytes
}

/// Bytes that look like nothing, and differ by seed.
pub fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut random = Random(seed);
    (0..len).map(|_| random.next() as u8).collect()
}

/// splitmix64.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }
}
