//! Telling a format by the first bytes of a file.
//!
//! Layers and qcow2 images are recognised. Raw images have no magic, and a guest can write any magic
//! into one; so nothing is ever taken for raw because it looks like nothing else: whoever means raw
//! says so. With that rule nobody gets used to opening raw disks without naming the format, and a
//! guest that forges a header in its raw disk finds nobody who would believe it.
//!
//! Should somebody leave the format out all the same, a forged header must not be worth anything. A
//! qcow2 header can name any file of the host as its backing or data file, whose contents the guest
//! would then read. Such files are opened only with leave (`OpenBelow::allow_backing`), which is not
//! given by default; so what a forged header can show is the forger's own disk.

use std::path::Path;

use sapwood_blockdev::buffer::AlignedBuf;
use sapwood_blockdev::engine::{Engine, Op};
use sapwood_blockdev::io::Io;
use sapwood_blockdev::storage::{OpenOptions, Storage};
use sapwood_blockdev::units::{BLOCK_BYTES, FileOffset};

use crate::error::{ErrorKind, ImageError};
use crate::format::Format;
use crate::{layer, qcow2};

/// What a file looks like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Guess {
    /// A layer.
    Layer,
    /// A qcow2 image.
    Qcow2,
    /// An image of a format that this program does not read.
    Foreign(&'static str),
    /// Anything: a raw disk, or no disk at all.
    Unknown,
}

/// First bytes of formats worth a better message than "unknown".
const FOREIGN: [(&[u8], &str); 4] =
    [(b"KDMV", "vmdk"), (b"vhdxfile", "vhdx"), (b"<<< ", "vdi"), (b"WithoutFreeSpace", "parallels")];

/// Looks at the first bytes of `path`.
///
/// # Errors
/// When the file cannot be opened or read.
pub async fn probe<S: Storage, E: Engine<File = S::File>>(
    storage: &S,
    io: &Io<E>,
    path: &Path,
) -> Result<Guess, ImageError> {
    let file = storage.open(path, OpenOptions::READ).map_err(|e| ImageError::io(path, "open", e))?;
    let read = Op::read(file, FileOffset(0), AlignedBuf::zeroed(BLOCK_BYTES));
    let start = io.run(read).await.zero_filled().map_err(|e| ImageError::errno(path, "read", e))?;
    Ok(guess(&start.into_buf()))
}

fn guess(start: &[u8]) -> Guess {
    if start.starts_with(&layer::MAGIC) {
        return Guess::Layer;
    }
    if start.starts_with(&qcow2::MAGIC) {
        return Guess::Qcow2;
    }
    let foreign = FOREIGN.iter().find(|(magic, _)| start.starts_with(magic));
    foreign.map_or(Guess::Unknown, |(_, name)| Guess::Foreign(name))
}

impl Guess {
    /// The format to open `path` with when none was named.
    ///
    /// # Errors
    /// When it is not recognised; the message says what to do.
    pub fn format(self, path: &Path) -> Result<Format, ImageError> {
        let detail = match self {
            Self::Layer => return Ok(Format::Layer),
            Self::Qcow2 => return Ok(Format::Qcow2),
            Self::Foreign(name) => format!(
                "looks like {name}, which is not supported: convert it first (qemu-img convert -O raw), or \
                 pass -f raw to use its bytes as they are"
            ),
            Self::Unknown => {
                "neither a layer nor qcow2: pass -f raw if it is a raw disk (the format of raw disks is never \
                              guessed, because a guest can write anything into one)"
                    .to_owned()
            }
        };
        Err(ImageError::new(path, ErrorKind::Unsupported(detail)))
    }
}
