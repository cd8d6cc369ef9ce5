//! A disk of any format, for those who look for a kernel on it: opened for reading, with system calls that block.

use std::io;
use std::path::{Path, PathBuf};

use anyhow::Context;
use sapwood_blockdev::buffer::SharedBuf;
use sapwood_blockdev::device::{self, BlockDevice, Command};
use sapwood_blockdev::engine::BlockingEngine;
use sapwood_blockdev::io::{Io, block_on};
use sapwood_blockdev::storage::HostStorage;
use sapwood_blockdev::units::GuestOffset;
use sapwood_image::{Disk, DiskQueue, OpenDisk};
use sapwood_vmm::from_disk::{CHUNK, DiskReader};

use super::events::Interruption;
use super::server::with_options;

/// An open disk. It is locked, as any that is read, until this is dropped: before a server opens it for writing.
pub struct Reader {
    queue: DiskQueue<BlockingEngine>,
    memory: SharedBuf,
    size: u64,
    interruption: Interruption,
}

impl Reader {
    /// Opens the disk at `path`, for reading whatever `options` say. After an interruption it reads no more.
    ///
    /// # Errors
    /// It cannot be opened, or something has it open for writing.
    pub fn open(path: &Path, options: OpenDisk, interruption: Interruption) -> anyhow::Result<Self> {
        let io = Io::new(BlockingEngine::new().context("cannot make an engine")?);
        let (at, inner): (PathBuf, _) = (path.to_owned(), io.clone());
        let options = OpenDisk { read_only: true, ..options };
        let disk = block_on(&io, async move { Disk::open(&HostStorage, &inner, &at, options).await })
            .map_err(with_options)?;
        let queue = disk.queue_on(Io::new(BlockingEngine::new().context("cannot make an engine")?));
        let size = disk.geometry().size;
        Ok(Self { queue, memory: SharedBuf::heap(CHUNK), size, interruption })
    }
}

impl DiskReader for Reader {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&mut self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        if self.interruption.has_come() {
            return Err(io::Error::other("the search was interrupted"));
        }
        let command = Command::Read(self.memory.slice(0..buf.len()).into());
        device::run(&mut self.queue, GuestOffset(offset), buf.len() as u64, command)
            .map_err(io::Error::other)?;
        self.memory.read_at(0, buf);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::process::Command as Process;
    use std::time::Duration;

    use sapwood_image::Format;
    use sapwood_image::layer::{self, BaseSpec, CreateLayer, Layer, OpenLayer};
    use sapwood_vmm::from_disk::{self, FindError};

    use super::super::events::Events;
    use super::*;

    /// Makes a layer over `base`, writes `bytes` into it at `offset`, and closes it.
    fn layer_over(base: &Path, path: &Path, offset: u64, bytes: &[u8]) {
        let io = Io::new(BlockingEngine::new().unwrap());
        let (inner, at) = (io.clone(), path.to_owned());
        let options = CreateLayer { base: Some(BaseSpec::new(base, Format::Raw)), ..CreateLayer::default() };
        let layer = block_on(&io, async move {
            layer::create(&HostStorage, &inner, &at, &options).await.unwrap();
            Layer::open(&HostStorage, &inner, &at, &OpenLayer::default()).await.unwrap()
        });
        let mut queue = layer.queue_on(Io::new(BlockingEngine::new().unwrap()));
        let memory = SharedBuf::heap(bytes.len());
        memory.write_at(0, bytes);
        let command = Command::Write(memory.into());
        device::run(&mut queue, GuestOffset(offset), bytes.len() as u64, command).unwrap();
        let inner = io.clone();
        block_on(&io, async move { layer.close(&inner).await.unwrap() });
    }

    #[test]
    fn a_layer_is_read_with_what_lies_below() {
        let folder = tempfile::tempdir().unwrap();
        let (base, path) = (folder.path().join("base.raw"), folder.path().join("disk.layer"));
        let mut bytes: Vec<u8> = (0..2 * CHUNK + 512).map(|i| (i % 251) as u8).collect();
        fs::write(&base, &bytes).unwrap();
        let above = [7; 8192];
        layer_over(&base, &path, CHUNK as u64 - 4096, &above);
        bytes[CHUNK - 4096..][..8192].copy_from_slice(&above);
        let mut reader = Reader::open(&path, OpenDisk::default(), Interruption::default()).unwrap();
        assert_eq!(reader.size(), bytes.len() as u64);
        for (index, expected) in bytes.chunks(CHUNK).enumerate() {
            let mut found = vec![0; expected.len()];
            reader.read_at((index * CHUNK) as u64, &mut found).unwrap();
            assert!(found == expected, "chunk {index}");
        }
        assert!(reader.read_at(3 * CHUNK as u64, &mut [0; 512]).is_err(), "beyond the end");
        assert!(
            Reader::open(&folder.path().join("none"), OpenDisk::default(), Interruption::default()).is_err()
        );
    }

    #[test]
    fn nothing_is_read_after_an_interruption() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk.raw");
        fs::File::create(&path).unwrap().set_len(CHUNK as u64).unwrap();
        let options = || OpenDisk { format: Some(Format::Raw), ..OpenDisk::default() };
        let over = Events::new(Some(Duration::ZERO)).unwrap().interruption();
        for (interruption, reads) in [(Interruption::default(), true), (over, false)] {
            assert_eq!(interruption.has_come(), !reads);
            let mut reader = Reader::open(&path, options(), interruption).unwrap();
            assert_eq!(reader.read_at(0, &mut [0; 512]).is_ok(), reads);
        }
    }

    #[test]
    fn a_kernel_is_found_on_a_layer() {
        let folder = tempfile::tempdir().unwrap();
        let (base, path) = (folder.path().join("base.raw"), folder.path().join("disk.layer"));
        let tree = folder.path().join("tree");
        fs::create_dir_all(tree.join("boot")).unwrap();
        fs::create_dir_all(tree.join("etc")).unwrap();
        fs::write(tree.join("etc/fstab"), "").unwrap();
        fs::write(tree.join("boot/vmlinuz-6.1"), "the kernel").unwrap();
        fs::File::create(&base).unwrap().set_len(8 << 20).unwrap();
        let mut format = Process::new("mke2fs");
        format.env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin").args(["-q", "-F", "-t", "ext4", "-d"]);
        assert!(format.arg(&tree).arg(&base).status().unwrap().success());
        layer_over(&base, &path, 0, &[0; 512]);
        let mut found = from_disk::find(
            Box::new(Reader::open(&path, OpenDisk::default(), Interruption::default()).unwrap()),
            None,
        )
        .unwrap();
        let mut kernel = String::new();
        io::Read::read_to_string(&mut found.kernel, &mut kernel).unwrap();
        assert_eq!(kernel, "the kernel");
        // The layer is free again for a server, and hides what it overwrites.
        let mut file_system = vec![0; 4096];
        file_system[..4].copy_from_slice(b"XFSB");
        fs::remove_file(&path).unwrap();
        layer_over(&base, &path, 0, &file_system);
        let hidden = from_disk::find(
            Box::new(Reader::open(&path, OpenDisk::default(), Interruption::default()).unwrap()),
            None,
        );
        assert!(matches!(hidden, Err(FindError::Nothing { tried, .. }) if tried.contains("XFS")));
    }
}
