//! The names of a simulated file system, and which of them a power cut leaves.
//!
//! A directory's changes become durable with a sync of the directory, in the order in which they
//! were made, as a journal does: a power cut leaves some prefix of those not yet synced.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use super::rng::Rng;

/// The number of a file.
pub type FileId = usize;

/// One change of names, atomic.
#[derive(Clone, Debug)]
enum Change {
    Link(PathBuf, FileId),
    Unlink(PathBuf),
    Rename(PathBuf, PathBuf),
    Directory(PathBuf),
}

/// Names of files, and directories that were made.
#[derive(Clone, Debug, Default)]
struct Tree {
    files: BTreeMap<PathBuf, FileId>,
    directories: BTreeSet<PathBuf>,
}

impl Change {
    fn apply(&self, tree: &mut Tree) {
        let names = &mut tree.files;
        match self {
            Self::Directory(path) => {
                tree.directories.insert(path.clone());
            }
            Self::Link(path, file) => {
                names.insert(path.clone(), *file);
            }
            Self::Unlink(path) => {
                names.remove(path);
            }
            Self::Rename(from, to) => {
                if let Some(file) = names.remove(from) {
                    names.insert(to.clone(), file);
                }
            }
        }
    }

    fn directory(&self) -> &Path {
        let (Self::Link(path, _) | Self::Unlink(path) | Self::Rename(_, path) | Self::Directory(path)) = self;
        path.parent().unwrap_or(Path::new(""))
    }
}

/// All names of a world.
#[derive(Debug, Default)]
pub struct Names {
    durable: Tree,
    seen: Tree,
    journal: Vec<Change>,
}

impl Names {
    /// The file of this name.
    pub fn get(&self, path: &Path) -> Option<FileId> {
        self.seen.files.get(path).copied()
    }

    /// Names a file.
    pub fn link(&mut self, path: &Path, file: FileId) {
        self.change(Change::Link(path.to_owned(), file));
    }

    /// Makes a directory; says whether there was nothing of that name.
    pub fn make_directory(&mut self, path: &Path) -> bool {
        let is_new = !self.seen.directories.contains(path) && self.get(path).is_none();
        if is_new {
            self.change(Change::Directory(path.to_owned()));
        }
        is_new
    }

    /// What lies in a directory: by files in it there is one, too.
    pub fn list(&self, directory: &Path) -> Option<BTreeSet<OsString>> {
        let all = self.seen.files.keys().chain(&self.seen.directories);
        let inside = all.filter(|path| path.parent() == Some(directory));
        let names: BTreeSet<_> = inside.filter_map(|path| path.file_name().map(OsString::from)).collect();
        (!names.is_empty() || self.seen.directories.contains(directory)).then_some(names)
    }

    /// Removes a name; says whether it was there.
    pub fn unlink(&mut self, path: &Path) -> bool {
        let there = self.seen.files.contains_key(path);
        self.change(Change::Unlink(path.to_owned()));
        there
    }

    /// Renames; says whether the old name was there.
    pub fn rename(&mut self, from: &Path, to: &Path) -> bool {
        let there = self.seen.files.contains_key(from);
        self.change(Change::Rename(from.to_owned(), to.to_owned()));
        there
    }

    fn change(&mut self, change: Change) {
        change.apply(&mut self.seen);
        self.journal.push(change);
    }

    /// Makes the changes of one directory durable.
    pub fn sync(&mut self, directory: &Path) {
        let durable = &mut self.durable;
        self.journal.retain(|change| {
            let covered = change.directory() == directory;
            if covered {
                change.apply(durable);
            }
            !covered
        });
    }

    /// The power fails.
    pub fn power_cut(&mut self, rng: &mut Rng) {
        let kept = rng.between(0, self.journal.len() as u64) as usize;
        for change in self.journal.drain(..).take(kept) {
            change.apply(&mut self.durable);
        }
        // What lies in a directory is lost with it.
        let Tree { files, directories } = &mut self.durable;
        let lost: Vec<_> = self.seen.directories.difference(directories).cloned().collect();
        files.retain(|path, _| !lost.iter().any(|directory| path.starts_with(directory)));
        directories.retain(|path| !lost.iter().any(|directory| path.starts_with(directory)));
        self.seen = self.durable.clone();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_durable_only_after_its_directory_was_synced() {
        let kept = (0..50)
            .filter(|seed| {
                let mut names = Names::default();
                names.link(Path::new("/d/a"), 1);
                names.sync(Path::new("/d"));
                names.rename(Path::new("/d/a"), Path::new("/d/b"));
                names.power_cut(&mut Rng::new(*seed));
                let (a, b) = (names.get(Path::new("/d/a")), names.get(Path::new("/d/b")));
                assert_eq!(a.or(b), Some(1), "a rename is atomic");
                assert!(a.is_none() || b.is_none());
                b.is_some()
            })
            .count();
        assert!((5..45).contains(&kept), "{kept} of 50 renames persisted");
    }

    #[test]
    fn what_lies_in_a_directory_that_is_not_durable_is_lost_with_it() {
        let kept = (0..50)
            .filter(|seed| {
                let mut names = Names::default();
                assert!(names.make_directory(Path::new("/d")) && !names.make_directory(Path::new("/d")));
                names.link(Path::new("/d/a"), 1);
                names.sync(Path::new("/d"));
                assert_eq!(names.list(Path::new("/d")), Some([OsString::from("a")].into()));
                names.power_cut(&mut Rng::new(*seed));
                assert_eq!(names.get(Path::new("/d/a")).is_some(), names.list(Path::new("/d")).is_some());
                names.get(Path::new("/d/a")).is_some()
            })
            .count();
        assert!((5..45).contains(&kept), "{kept} of 50 directories persisted");
    }
}
