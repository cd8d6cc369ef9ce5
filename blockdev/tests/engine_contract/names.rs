//! Renames, removals, directories.

use std::fs;
use std::path::PathBuf;

use sapwood_blockdev::Errno;
use sapwood_blockdev::engine::Op;

use crate::engines::{Subject, run};

pub fn renames<E: Subject>(make: fn() -> E) {
    let (dir, mut engine) = (tempfile::tempdir().unwrap(), make());
    let (from, to) = (dir.path().join("from"), dir.path().join("to"));
    fs::write(&from, "new").unwrap();
    fs::write(&to, "old").unwrap();
    let rename = || Op::Rename { from: from.clone(), to: to.clone() };
    assert_eq!(run(&mut engine, rename()).result, Ok(0));
    assert_eq!(fs::read_to_string(&to).unwrap(), "new");
    assert!(!from.exists());
    assert_eq!(run(&mut engine, rename()).result, Err(Errno::NOENT));
}

pub fn unlinks<E: Subject>(make: fn() -> E) {
    let (dir, mut engine) = (tempfile::tempdir().unwrap(), make());
    let path = dir.path().join("file");
    fs::write(&path, "").unwrap();
    assert_eq!(run(&mut engine, Op::Unlink { path: path.clone() }).result, Ok(0));
    assert!(!path.exists());
    assert_eq!(run(&mut engine, Op::Unlink { path }).result, Err(Errno::NOENT));
    let path = dir.path().to_path_buf();
    assert_eq!(run(&mut engine, Op::Unlink { path }).result, Err(Errno::ISDIR));
}

pub fn syncs_directory<E: Subject>(make: fn() -> E) {
    let (dir, mut engine) = (tempfile::tempdir().unwrap(), make());
    let path = dir.path().to_path_buf();
    assert_eq!(run(&mut engine, Op::SyncDirectory { path }).result, Ok(0));
    let path = dir.path().join("absent");
    assert_eq!(run(&mut engine, Op::SyncDirectory { path }).result, Err(Errno::NOENT));
    let path = dir.path().join("file");
    fs::write(&path, "").unwrap();
    assert_eq!(run(&mut engine, Op::SyncDirectory { path }).result, Err(Errno::NOTDIR));
}

pub fn bad_names_fail<E: Subject>(make: fn() -> E) {
    let mut engine = make();
    let bad = || PathBuf::from("a\0b");
    assert_eq!(run(&mut engine, Op::Unlink { path: bad() }).result, Err(Errno::INVAL));
    assert_eq!(run(&mut engine, Op::Rename { from: bad(), to: bad() }).result, Err(Errno::INVAL));
    assert_eq!(run(&mut engine, Op::SyncDirectory { path: bad() }).result, Err(Errno::INVAL));
    assert_eq!(run(&mut engine, Op::Unlink { path: PathBuf::new() }).result, Err(Errno::NOENT));
}
