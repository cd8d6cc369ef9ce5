//! Finds the kernel, its initial file system and its command line on a guest's own disk.
//!
//! [`table`] finds the partitions, [`volume`] reads their file systems, and three methods know where a kernel may be:
//! [`entries`] (Boot Loader Specification), [`grub`] (`grub.cfg`), [`naming`] (the names that Debian and others give their kernels).
//! Each makes a list of [`Candidate`]s, the best first; the first of all whose files are there is taken. docs/boot.md is
//! the user's view of it.
//!
//! Everything here was written by a guest. Bounds: [`KERNEL_BYTES_MAX`], [`INITRD_BYTES_MAX`], those in [`volume`] for files, names and
//! links, and a budget for all that is read in [`view`].

mod entries;
mod grub;
mod naming;
mod root;
mod script;
mod superblock;
mod table;
mod version;
mod view;
mod volume;

use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, Seek, Write};

use rustix::fs::MemfdFlags;

use table::Partition;
use view::View;
pub use view::{CHUNK, DiskReader};
use volume::Volume;

/// A kernel may have as many bytes.
pub const KERNEL_BYTES_MAX: u64 = 256 << 20;
/// All initial file systems of an entry together may have as many bytes.
pub const INITRD_BYTES_MAX: u64 = 1 << 30;
/// Entries of one kind that are looked at.
const ENTRIES_MAX: usize = 256;
/// Lines of what was tried, and names of entries, in a message.
const LINES_MAX: usize = 24;
/// Characters of a line, or of a title, that are shown.
const SHOWN_CHARS_MAX: usize = 240;
/// The console that the machine has.
const CONSOLE: &str = "console=ttyS0";

/// What to boot.
#[derive(Debug)]
pub struct Found {
    /// The kernel, in memory (memfd), at its start.
    pub kernel: File,
    /// The initial file system; several are joined as boot loaders do, each at a multiple of four bytes.
    pub initrd: Option<File>,
    /// The command line of the entry, and `console=ttyS0` where it names no console.
    pub cmdline: String,
    /// What the entry is called.
    pub title: String,
    /// Where it was found, for the log: table, partition, path and method.
    pub origin: String,
}

impl Found {
    /// Puts the user's own arguments after those of the disk, where they count more.
    pub fn append(&mut self, arguments: &str) {
        if !arguments.trim().is_empty() {
            self.cmdline = format!("{} {}", self.cmdline, arguments.trim());
        }
    }
}

/// Why nothing can be booted from a disk.
#[derive(Debug, thiserror::Error)]
pub enum FindError {
    /// There is no kernel, or none that can be used.
    #[error(
        "no kernel found on the disk ({table}):{tried}\ngive one with --kernel (and --initrd, --cmdline)"
    )]
    Nothing {
        /// The kind of partition table.
        table: &'static str,
        /// What was tried, a line for each.
        tried: String,
    },
    /// There are entries, but not the one that was asked for.
    #[error("the disk has no boot entry {wanted:?}; it has:{entries}")]
    NoSuchEntry {
        /// What was asked for.
        wanted: String,
        /// What there is, a line for each.
        entries: String,
    },
    /// No memory for the files.
    #[error("cannot make a file in memory")]
    Memory(#[source] io::Error),
}

/// A file of one of the volumes.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Place {
    volume: usize,
    path: String,
}

/// Something that may be booted.
#[derive(Clone, Debug)]
struct Candidate {
    title: String,
    /// Other names that the user may choose it by.
    names: Vec<String>,
    /// The file and the method that named it.
    source: String,
    kernel: Place,
    initrds: Vec<Place>,
    cmdline: String,
}

impl Candidate {
    /// Whether the user asked for this one.
    fn is(&self, wanted: &str) -> bool {
        self.title == wanted
            || self.names.iter().any(|name| name == wanted)
            || naming::version_of(&self.kernel.path).is_some_and(|version| version == wanted)
    }
}

/// The disk, as the methods see it.
struct System {
    table: &'static str,
    partitions: Vec<Partition>,
    /// In the order in which they are searched.
    volumes: Vec<Volume>,
    /// What was looked at in vain.
    tried: Vec<String>,
}

impl System {
    fn new(disk: Box<dyn DiskReader>) -> Self {
        let disk = View::new(disk);
        let (table, partitions) = table::partitions(&disk);
        let (mut volumes, mut tried) = (Vec::new(), Vec::new());
        for partition in &partitions {
            match Volume::open(partition) {
                Ok(volume) => volumes.push(volume),
                Err(what) => tried.push(format!("{partition}: {what}")),
            }
        }
        if partitions.is_empty() {
            tried.push("the partition table has no partition that lies on the disk".to_owned());
        }
        Self { table, partitions, volumes, tried }
    }

    /// The volume whose file system has this UUID.
    fn by_uuid(&self, uuid: &str) -> Option<usize> {
        self.volumes.iter().position(|volume| volume.uuid.eq_ignore_ascii_case(uuid))
    }

    fn by_number(&self, number: u32) -> Option<usize> {
        self.volumes.iter().position(|volume| volume.partition.number == number)
    }

    fn try_in_vain(&mut self, what: String) {
        if self.tried.len() < LINES_MAX {
            self.tried.push(what);
        }
    }

    /// A file's text, and a note where it is there but cannot be read.
    fn text(&mut self, volume: usize, path: &str) -> Option<String> {
        match self.volumes[volume].text(path) {
            Ok(text) => text,
            Err(error) => {
                let what = format!("{}: {path}: {error}", self.volumes[volume]);
                self.try_in_vain(what);
                None
            }
        }
    }

    /// The names in a directory, and a note where it cannot be read.
    fn names(&mut self, volume: usize, path: &str) -> Vec<String> {
        match self.volumes[volume].names(path) {
            Ok(names) => names,
            Err(error) => {
                let what = format!("{}: {path}: {error}", self.volumes[volume]);
                self.try_in_vain(what);
                Vec::new()
            }
        }
    }

    /// Brings a candidate's files into memory.
    fn load(&self, candidate: &Candidate) -> Result<Result<Found, String>, FindError> {
        let mut kernel = memory("sapwood-kernel")?;
        let mut initrd = memory("sapwood-initrd")?;
        let copied = copy(&self.volumes, &candidate.kernel, &mut kernel, KERNEL_BYTES_MAX).and_then(|len| {
            if len == 0 { Err(format!("{}: an empty file", candidate.kernel.path)) } else { Ok(()) }
        });
        let copied = copied.and_then(|()| {
            let mut len = 0_u64;
            for place in &candidate.initrds {
                let padding = len.next_multiple_of(4) - len;
                initrd.write_all(&[0; 3][..padding as usize]).map_err(|error| error.to_string())?;
                len += padding;
                len += copy(&self.volumes, place, &mut initrd, INITRD_BYTES_MAX.saturating_sub(len))?;
            }
            kernel.rewind().and_then(|()| initrd.rewind()).map_err(|error| error.to_string())
        });
        if let Err(what) = copied {
            return Ok(Err(format!("{}: {what}", candidate.source)));
        }
        Ok(Ok(Found {
            kernel,
            initrd: (!candidate.initrds.is_empty()).then_some(initrd),
            cmdline: with_console(&candidate.cmdline),
            title: printable(&candidate.title),
            origin: format!("{}, {}", self.table, printable(&candidate.source)),
        }))
    }
}

fn memory(name: &str) -> Result<File, FindError> {
    let made = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC);
    made.map(File::from).map_err(|error| FindError::Memory(error.into()))
}

fn copy(volumes: &[Volume], place: &Place, to: &mut File, max: u64) -> Result<u64, String> {
    let volume = &volumes[place.volume];
    volume.copy(&place.path, to, max).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => format!("{} is not there, on {volume}", place.path),
        _ => format!("{}: {error}, on {volume}", place.path),
    })
}

/// The command line on one line, with a console.
fn with_console(cmdline: &str) -> String {
    let plain: String = cmdline.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    let mut cmdline = plain.trim().to_owned();
    if !cmdline.split_whitespace().any(|word| word.starts_with("console=")) {
        let space = if cmdline.is_empty() { "" } else { " " };
        cmdline = format!("{cmdline}{space}{CONSOLE}");
    }
    cmdline
}

/// Text from the disk as it may be shown on a terminal: without control characters, and not too long.
fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '?' } else { c }).take(SHOWN_CHARS_MAX).collect()
}

/// Lines for a message, indented, and not too many.
fn lines<'a>(all: impl Iterator<Item = &'a str>) -> String {
    let mut text = String::new();
    for (index, line) in all.enumerate() {
        if index == LINES_MAX {
            text.push_str("\n  and more");
            break;
        }
        let _ = write!(text, "\n  {}", printable(line));
    }
    text
}

/// Finds what to boot: the disk's default, or the entry that has the title, the name or the kernel's version `wanted`.
///
/// # Errors
/// Nothing was found, and the message says what was tried where; or there is no such entry, and it says which there are.
pub fn find(disk: Box<dyn DiskReader>, wanted: Option<&str>) -> Result<Found, FindError> {
    let mut system = System::new(disk);
    let methods: [fn(&mut System) -> Vec<Candidate>; 3] =
        [entries::candidates, grub::candidates, naming::candidates];
    let mut others: Vec<String> = Vec::new();
    let mut matched = false;
    for method in methods {
        for candidate in method(&mut system) {
            if wanted.is_some_and(|wanted| !candidate.is(wanted)) {
                let names = candidate.names.iter().map(|name| format!(" ({name})"));
                others.push(format!("{}{}", candidate.title, names.collect::<String>()));
                continue;
            }
            matched = true;
            match system.load(&candidate)? {
                Ok(found) => return Ok(found),
                Err(what) => system.try_in_vain(what),
            }
        }
    }
    match wanted {
        Some(wanted) if !matched && !others.is_empty() => {
            let entries = lines(others.iter().map(String::as_str));
            Err(FindError::NoSuchEntry { wanted: wanted.to_owned(), entries })
        }
        _ => {
            let tried = lines(system.tried.iter().map(String::as_str));
            Err(FindError::Nothing { table: system.table, tried })
        }
    }
}
