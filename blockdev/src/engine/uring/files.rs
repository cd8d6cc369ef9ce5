//! The table of registered files.

use io_uring::IoUring;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;

use super::super::Notify;
use crate::storage::{HostFile, WeakHostFile};

/// Files registered with a ring, so that operations on them skip the descriptor look-up.
///
/// The kernel keeps a registered file's open file description. The table must not thereby keep a
/// disk locked or an unlinked file's space: it holds no [`HostFile`], the file unlocks itself
/// when its last handle is gone, and tells every engine that registered it, which then
/// [sweeps](FileTable::sweep) its table at the next collect (a sleeping engine is woken).
pub(super) struct FileTable {
    entries: Vec<Option<WeakHostFile>>,
    /// Where the last look-up ended: most come in runs on one file.
    last: usize,
    /// The kernel refused one: no more are tried.
    refused: bool,
    notify: Arc<Notify>,
}

impl FileTable {
    /// A table of `size` files; of none where they cannot be registered.
    pub(super) fn new(size: usize, notify: Arc<Notify>) -> Self {
        Self { entries: (0..size).map(|_| None).collect(), last: 0, refused: false, notify }
    }

    /// The index of `file`, which is registered at its first use. `None` while the table is full.
    pub(super) fn index(&mut self, ring: &IoUring, file: &HostFile) -> Option<usize> {
        let is_it = |entry: &Option<WeakHostFile>| entry.as_ref().is_some_and(|weak| weak.is(file));
        if self.entries.get(self.last).is_some_and(is_it) {
            return Some(self.last);
        }
        let index = match self.entries.iter().position(is_it) {
            Some(index) => index,
            None => self.register(ring, file)?,
        };
        self.last = index;
        Some(index)
    }

    fn register(&mut self, ring: &IoUring, file: &HostFile) -> Option<usize> {
        let index = self.entries.iter().position(Option::is_none).filter(|_| !self.refused)?;
        match ring.submitter().register_files_update(index as u32, &[file.as_fd().as_raw_fd()]) {
            Ok(_) => {
                self.entries[index] = Some(file.downgrade(&self.notify));
                Some(index)
            }
            Err(error) => {
                log::debug!("io_uring: {file:?} is not registered: {error}");
                self.refused = true;
                None
            }
        }
    }

    /// Lets go of files whose last handle is gone. None of them can have an operation in flight.
    pub(super) fn sweep(&mut self, ring: &IoUring) {
        for (index, entry) in self.entries.iter_mut().enumerate() {
            if entry.as_ref().is_some_and(WeakHostFile::is_closed) {
                match ring.submitter().register_files_update(index as u32, &[-1]) {
                    Ok(_) => *entry = None,
                    Err(error) => log::warn!("io_uring: a closed file stays registered: {error}"),
                }
            }
        }
    }

    #[cfg(test)]
    pub(super) fn registered(&self) -> usize {
        self.entries.iter().flatten().count()
    }
}
