//! Notes on what a file system or device lacks, each made once: a thousand clones share one.

use std::collections::BTreeSet;
use std::sync::{Mutex, PoisonError};

use rustix::fs::{FileType, Stat};

/// What there is to note.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Note {
    NoDirectIo,
    NoSpaceBack,
}

/// What was noted, with the number of the file system or device.
static NOTED: Mutex<BTreeSet<(Note, bool, u64)>> = Mutex::new(BTreeSet::new());

/// Whether this process notes this for the first time of the device, or of the file system that
/// holds the file.
pub(super) fn first_time(stat: &Stat, note: Note) -> bool {
    let is_device = FileType::from_raw_mode(stat.st_mode) == FileType::BlockDevice;
    let number = if is_device { stat.st_rdev } else { stat.st_dev };
    NOTED.lock().unwrap_or_else(PoisonError::into_inner).insert((note, is_device, number))
}
