//! File systems: ext2 to ext4 by the crate `ext4-view`, FAT by the crate `fatfs`. Both read bytes that a guest wrote, so what
//! they are known to do with hostile ones is kept from happening here:
//!
//! - they loop: every round reads, and the [`View`] has a budget for that;
//! - they make room for as much as the disk says: sizes are checked before they are asked;
//! - they panic: that is caught, and the file system is not asked again.

use std::cell::Cell;
use std::fmt;
use std::io::{self, ErrorKind, Read, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};

use ext4_view::{Ext4, Ext4Error};

use super::superblock::Superblock;
use super::table::{self, Partition};
use super::view::View;

/// A file that is read as text.
pub const TEXT_BYTES_MAX: u64 = 1 << 20;
/// Names that are read of a directory.
const NAMES_MAX: usize = 4096;
/// Bytes of a path (`PATH_MAX`), and its parts once links have been followed.
const PATH_BYTES_MAX: usize = 4096;
const PARTS_MAX: usize = 64;
/// Links that are followed on the way to a file.
const LINKS_MAX: usize = 16;
enum FileSystem {
    Ext4(Ext4),
    Fat(fatfs::FileSystem<View>),
}

/// A file system that can be read.
pub struct Volume {
    /// Where it lies.
    pub partition: Partition,
    /// Its UUID, as the kernel, `blkid` and GRUB write it.
    pub uuid: String,
    fs: FileSystem,
    /// The crate panicked: its state is not to be trusted any more.
    broken: Cell<bool>,
}

impl fmt::Display for Volume {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = if self.is_fat() { "FAT" } else { "ext4" };
        write!(f, "{} ({kind})", self.partition)
    }
}

impl Volume {
    /// The file system in a partition.
    ///
    /// # Errors
    /// What there is instead, or what is wrong with it.
    pub fn open(partition: &Partition) -> Result<Self, String> {
        let view = &partition.view;
        let opened = if let Some(superblock) = Superblock::of(view)? {
            contained(|| superblock.load(view)).map(|ext4| {
                let uuid = ext4.uuid().to_string();
                (FileSystem::Ext4(ext4), uuid)
            })
        } else if table::is_fat(view) {
            contained(|| fatfs::FileSystem::new(view.clone(), fatfs::FsOptions::new())).map(|fat| {
                let id = fat.volume_id();
                (FileSystem::Fat(fat), format!("{:04X}-{:04X}", id >> 16, id & 0xffff))
            })
        } else {
            return Err(foreign(view).to_owned());
        };
        let (fs, uuid) = opened.map_err(|error| error.to_string())?;
        Ok(Self { partition: partition.clone(), uuid, fs, broken: Cell::new(false) })
    }

    /// Whether it is FAT, which has no links, owners or root directories of Linux.
    pub fn is_fat(&self) -> bool {
        matches!(self.fs, FileSystem::Fat(_))
    }

    /// Whether there is a file at `path`, from the root of this file system.
    pub fn has_file(&self, path: &str) -> bool {
        self.ask(|| self.find(path)).is_ok_and(|found| found.is_some_and(|found| !found.is_folder))
    }

    /// Where the links of `path` lead: a path without any, or `None` where nothing is.
    ///
    /// # Errors
    /// The file system cannot be read, or there are too many links.
    pub fn follow(&self, path: &str) -> io::Result<Option<String>> {
        Ok(self.ask(|| self.find(path))?.map(|found| found.path))
    }

    /// The names in a directory, sorted; none where it is missing.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn names(&self, path: &str) -> io::Result<Vec<String>> {
        let mut names = self.ask(|| match self.find(path)? {
            Some(found) if found.is_folder => self.list(&found.path),
            _ => Ok(Vec::new()),
        })?;
        names.sort();
        Ok(names)
    }

    /// A file's text; `None` where it is missing. Bytes that are not UTF-8 become U+FFFD.
    ///
    /// # Errors
    /// It cannot be read, or is longer than [`TEXT_BYTES_MAX`].
    pub fn text(&self, path: &str) -> io::Result<Option<String>> {
        if !self.has_file(path) {
            return Ok(None);
        }
        let mut bytes = Vec::new();
        self.copy(path, &mut bytes, TEXT_BYTES_MAX)?;
        Ok(Some(String::from_utf8_lossy(&bytes).into_owned()))
    }

    /// Copies a file of at most `max` bytes, and says how many it had.
    ///
    /// # Errors
    /// It is missing, too long, or cannot be read or written.
    pub fn copy(&self, path: &str, to: &mut dyn Write, max: u64) -> io::Result<u64> {
        self.ask(|| {
            let found = self.find(path)?.filter(|found| !found.is_folder).ok_or(ErrorKind::NotFound)?;
            if found.len > max {
                let message = format!("{} bytes long, more than the {max} that are allowed", found.len);
                return Err(io::Error::new(ErrorKind::FileTooLarge, message));
            }
            let copied = match &self.fs {
                FileSystem::Ext4(ext4) => {
                    pour(&mut ext4.open(found.path.as_str()).map_err(from_ext4)?, to, found.len)?
                }
                FileSystem::Fat(fat) => {
                    let entry = find_in_fat(fat, &found.path)?.ok_or(ErrorKind::NotFound)?;
                    pour(&mut entry.to_file(), to, found.len)?
                }
            };
            if copied == found.len { Ok(copied) } else { Err(ErrorKind::UnexpectedEof.into()) }
        })
    }

    /// Asks the crate, unless it has panicked before.
    fn ask<T>(&self, question: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        if self.broken.get() {
            return Err(damaged());
        }
        self.broken.set(true);
        let answer = contained(|| {
            let answer = question();
            self.broken.set(false);
            answer
        })?;
        Ok(answer)
    }

    fn find(&self, path: &str) -> io::Result<Option<Place>> {
        if path.len() > PATH_BYTES_MAX {
            return Err(ErrorKind::InvalidInput.into());
        }
        match &self.fs {
            FileSystem::Ext4(ext4) => find_in_ext4(ext4, path),
            FileSystem::Fat(fat) => {
                let path = plain(path);
                if path == "/" {
                    return Ok(Some(Place { path, is_folder: true, len: 0 }));
                }
                let entry = find_in_fat(fat, &path)?;
                Ok(entry.map(|entry| Place { path, is_folder: entry.is_dir(), len: entry.len() }))
            }
        }
    }

    fn list(&self, path: &str) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        match &self.fs {
            FileSystem::Ext4(ext4) => {
                for entry in ext4.read_dir(path).map_err(from_ext4)?.take(NAMES_MAX) {
                    let entry = entry.map_err(from_ext4)?;
                    names.extend(entry.file_name().as_str().map(str::to_owned));
                }
            }
            FileSystem::Fat(fat) => {
                let entry = if path == "/" { None } else { find_in_fat(fat, path)? };
                let folder = entry.map_or_else(|| fat.root_dir(), |entry| entry.to_dir());
                for entry in folder.iter().take(NAMES_MAX) {
                    names.push(entry?.file_name());
                }
            }
        }
        Ok(names)
    }
}

/// Something that exists.
struct Place {
    /// Without links.
    path: String,
    is_folder: bool,
    len: u64,
}

fn damaged() -> io::Error {
    io::Error::other("the file system is damaged, and its reader gave up")
}

fn contained<T>(question: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    catch_unwind(AssertUnwindSafe(question)).unwrap_or_else(|_| Err(damaged()))
}

fn from_ext4(error: Ext4Error) -> io::Error {
    match error {
        Ext4Error::NotFound | Ext4Error::NotADirectory => ErrorKind::NotFound.into(),
        other => io::Error::other(other),
    }
}

/// Copies until the end, or until more than `len` have come.
fn pour(from: &mut dyn Read, to: &mut dyn Write, len: u64) -> io::Result<u64> {
    let mut buf = vec![0; 64 << 10];
    let mut copied = 0;
    while copied <= len {
        let read = from.read(&mut buf)?;
        if read == 0 {
            break;
        }
        to.write_all(&buf[..read])?;
        copied += read as u64;
    }
    Ok(copied)
}

/// The parts of a path without `.`, `..` and empty ones, for a file system without links.
fn plain(path: &str) -> String {
    let mut parts: Vec<&str> = Vec::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()),
            part => parts.push(part),
        }
    }
    format!("/{}", parts.join("/"))
}

/// Follows links here rather than in the crate, which would make room for as much as a link says that it is long.
fn find_in_ext4(ext4: &Ext4, path: &str) -> io::Result<Option<Place>> {
    let mut pending: Vec<String> = path.rsplit('/').map(str::to_owned).collect();
    let mut place = Place { path: "/".to_owned(), is_folder: true, len: 0 };
    let mut links = 0;
    let mut parts = 0;
    while let Some(part) = pending.pop() {
        match part.as_str() {
            "" | "." => continue,
            ".." => {
                let end = place.path.rfind('/').unwrap_or(0).max(1);
                place.path.truncate(end);
                place.is_folder = true;
                continue;
            }
            _ => parts += 1,
        }
        if parts > PARTS_MAX {
            return Err(io::Error::other("the path has too many parts"));
        }
        let next = format!("{}/{part}", place.path.trim_end_matches('/'));
        let metadata = match ext4.symlink_metadata(next.as_str()).map_err(from_ext4) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            other => other?,
        };
        if !metadata.is_symlink() {
            place = Place { path: next, is_folder: metadata.is_dir(), len: metadata.len() };
            continue;
        }
        links += 1;
        if links > LINKS_MAX || metadata.len() > PATH_BYTES_MAX as u64 {
            return Err(io::Error::other(format!(
                "{next}: too many symbolic links, or one that is too long"
            )));
        }
        let target = ext4.read_link(next.as_str()).map_err(from_ext4)?;
        let target = target.to_str().map_err(io::Error::other)?;
        if target.starts_with('/') {
            place.path = "/".to_owned();
        }
        pending.extend(target.rsplit('/').map(str::to_owned));
    }
    Ok(Some(place))
}

type FatEntry<'a> = fatfs::DirEntry<'a, View>;

/// Walks down part by part: the crate would recurse as deep as a path says. Names are compared without regard to case.
fn find_in_fat<'a>(fat: &'a fatfs::FileSystem<View>, path: &str) -> io::Result<Option<FatEntry<'a>>> {
    let mut found: Option<FatEntry<'a>> = None;
    for part in path.split('/').filter(|part| !part.is_empty()).take(PARTS_MAX) {
        let folder = match &found {
            None => fat.root_dir(),
            Some(entry) if entry.is_dir() => entry.to_dir(),
            Some(_) => return Ok(None),
        };
        let mut next = None;
        for entry in folder.iter() {
            let entry = entry?;
            if entry.file_name().eq_ignore_ascii_case(part)
                || entry.short_file_name().eq_ignore_ascii_case(part)
            {
                next = Some(entry);
                break;
            }
        }
        found = Some(match next {
            Some(entry) => entry,
            None => return Ok(None),
        });
    }
    Ok(found)
}

/// What else there is, for the message that says why no kernel was found.
fn foreign(view: &View) -> &'static str {
    let known: [(u64, &[u8], &str); 8] = [
        (0, b"XFSB", "XFS, which is not read"),
        (0x1_0040, b"_BHRfS_M", "btrfs, which is not read"),
        (0, b"LUKS\xba\xbe", "an encrypted volume"),
        (0x200, b"LABELONE", "LVM, which is not read"),
        (0x218, b"LVM2 001", "LVM, which is not read"),
        (0, b"hsqs", "squashfs, which is not read"),
        (0xff6, b"SWAPSPACE2", "swap space"),
        (0x8001, b"CD001", "ISO 9660, which is not read"),
    ];
    for (offset, magic, name) in known {
        let mut bytes = [0; 10];
        let bytes = &mut bytes[..magic.len()];
        if view.fill(offset, bytes).is_ok() && bytes == magic {
            return name;
        }
    }
    "no file system that is known here"
}
