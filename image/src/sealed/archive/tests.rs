//! Archives, on a real file system.

use std::fs;
use std::path::PathBuf;

use super::directory::TRAILER_MAGIC;
use super::header::seal_block;
use super::*;
use crate::bytes::put;
use crate::sealed::seal::Step;
use crate::sealed::trial::{Draw, Model, Trial, check};

fn file(trial: &Trial) -> PathBuf {
    // Beside the packs, so that what is left behind there is counted.
    trial.directory.path().join("disk.sapwood")
}

#[test]
fn a_disk_is_the_same_elsewhere() {
    for seed in 0..20 {
        let (mut draw, mut here, mut there) = (Draw(seed), Trial::new(), Trial::new());
        let model = Model::draw(&mut draw);
        let root = here.seal(model.whole(&mut draw), None).root;
        let path = file(&here);
        let exported = here.export(&path, root, None, Step::Go).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().len(), exported.bytes);
        let archive = here.open(&path).unwrap();
        assert_eq!(archive.info(), &exported.info);
        assert_eq!((archive.info().root, archive.info().base), (model.root_hash(), None));
        check(&here.io, archive.packs(), &archive.root(), &model);
        let imported = there.import(&path, None).unwrap();
        assert_eq!(imported.root.hash(), model.root_hash());
        there.check(&imported.root, &model);
    }
}

#[test]
fn an_increment_has_what_its_base_has_not() {
    for seed in 100..130 {
        let (mut draw, mut here, mut there) = (Draw(seed), Trial::new(), Trial::new());
        let old = Model::draw(&mut draw);
        let new = old.next(&mut draw);
        let old_root = here.seal(old.whole(&mut draw), None).root;
        let new_root = here.seal(new.changes(&old, &mut draw), Some(old_root)).root;
        let path = file(&here);
        let exported = here.export(&path, new_root, Some(old_root), Step::Go).unwrap();
        assert_eq!(exported.info.base, Some(old.root_hash()));
        let changed =
            (0..new.blocks.len()).filter(|at| *at >= old.blocks.len() || new.bytes(*at) != old.bytes(*at));
        assert!(exported.stats.unique <= changed.count() as u64, "nothing that is as in the base");

        let error = there.import(&path, None).unwrap_err();
        assert!(matches!(error.kind, ErrorKind::Base(_)), "{error}");
        let other = there.seal(old.next(&mut draw).whole(&mut draw), None).root;
        if other.hash() != old.root_hash() {
            assert!(there.import(&path, Some(other)).is_err(), "another base");
        }
        let base = there.seal(old.whole(&mut draw), None).root;
        let imported = there.import(&path, Some(base)).unwrap();
        assert_eq!(imported.root.hash(), new.root_hash(), "seed {seed}");
        there.check(&imported.root, &new);
    }
}

#[test]
fn many_packs_fit_into_an_archive() {
    let (mut here, mut there) = (Trial::new(), Trial::new());
    // More nodes than one pack of them holds, over few different blocks.
    let model =
        Model { size: 120_000 * BLOCK_SIZE, blocks: (0..120_000).map(|i| 1 + i * i % 7001).collect() };
    let root = here.seal(model.whole(&mut Draw(0)), None).root;
    let path = file(&here);
    let exported = here.export(&path, root, None, Step::Go).unwrap();
    assert!(exported.stats.node_bytes > 4 << 20, "{:?}", exported.stats);
    assert_eq!(exported.stats.unique, here.known_blocks());
    let imported = there.import(&path, None).unwrap();
    assert_eq!(imported.root.hash(), model.root_hash());
}

#[test]
fn half_an_archive_is_none() {
    let mut trial = Trial::new();
    let model = Model { size: 5000 * BLOCK_SIZE, blocks: (1..=5000).collect() };
    let root = trial.seal(model.whole(&mut Draw(1)), None).root;
    let (path, files) = (file(&trial), trial.files());
    for step in [Step::Stop, Step::Cancel] {
        let error = trial.export(&path, root, None, step).unwrap_err();
        assert!(matches!(error.kind, ErrorKind::Cancelled), "{error}");
        assert_eq!(trial.files(), files, "nothing is left");
    }
    fs::write(&path, b"mine").unwrap();
    assert!(trial.export(&path, root, None, Step::Go).is_err());
    assert_eq!(fs::read(&path).unwrap(), b"mine", "what is there is not overwritten");
    assert_eq!(trial.files(), files + 1);
}

/// One change of an archive, and whether its checksums were made right again.
fn mutate(bytes: &mut Vec<u8>, draw: &mut Draw) {
    let blocks = bytes.len() / BLOCK_BYTES;
    let block = |draw: &mut Draw| draw.below(blocks as u64) as usize * BLOCK_BYTES;
    match draw.below(5) {
        0 => bytes.truncate(draw.below(bytes.len() as u64) as usize),
        1 => {
            let (from, to) = (block(draw), block(draw));
            bytes.copy_within(from..from + BLOCK_BYTES, to);
        }
        2 => {
            let at = draw.below(bytes.len() as u64) as usize;
            bytes[at] ^= 1 << draw.below(8);
        }
        kind => {
            // The header, the directory, or the trailer: in a field more often than not.
            let at = [0, blocks - 2, blocks - 1][draw.below(3) as usize] * BLOCK_BYTES;
            let within = draw.below(if kind == 3 { 140 } else { 4092 }) as usize;
            let value = [0, 1, 0x10, 0x7f, 0xff][draw.below(5) as usize];
            let len = [1, 4, 8][draw.below(3) as usize];
            put(&mut bytes[at..at + BLOCK_BYTES], within, &[value; 8][..len]);
            seal_block(&mut bytes[at..at + BLOCK_BYTES]);
        }
    }
}

#[test]
fn a_mutated_archive_is_refused_or_is_the_disk_that_it_names() {
    let mut here = Trial::new();
    let model = Model { size: 300 * BLOCK_SIZE - 512, blocks: (0..300).map(|i| i % 90).collect() };
    let root = here.seal(model.whole(&mut Draw(0)), None).root;
    let path = file(&here);
    here.export(&path, root, None, Step::Go).unwrap();
    let whole = fs::read(&path).unwrap();
    assert_eq!(&whole[whole.len() - BLOCK_BYTES..][..8], &TRAILER_MAGIC);
    let (mut refused, mut whole_still) = (0, 0);
    for seed in 0..500 {
        let mut bytes = whole.clone();
        mutate(&mut bytes, &mut Draw(seed));
        let mut there = Trial::new();
        let bad = there.directory.path().join("bad.sapwood");
        fs::write(&bad, &bytes).unwrap();
        match there.import(&bad, None) {
            Err(error) => {
                refused += 1;
                assert!(!error.to_string().is_empty());
                assert_eq!(there.files(), 1, "seed {seed}: nothing is left behind");
            }
            Ok(sealed) => {
                whole_still += 1;
                let stated = there.open(&bad).unwrap().info().root;
                assert_eq!(sealed.root.hash(), stated, "seed {seed}");
                if stated == root.hash() {
                    there.check(&sealed.root, &model);
                }
            }
        }
    }
    assert!(refused > 250 && whole_still > 20, "{refused} refused, {whole_still} not");
}

#[test]
fn an_archive_of_a_huge_disk_takes_what_it_stores() {
    let (mut here, mut there) = (Trial::new(), Trial::new());
    let model = Model { size: 100 * BLOCK_SIZE, blocks: (1..=100).collect() };
    let sealed = here.seal(model.whole(&mut Draw(0)), None);
    let path = file(&here);
    here.export(&path, sealed.root, None, Step::Go).unwrap();
    let bytes = fs::read(&path).unwrap();
    let info = here.open(&path).unwrap().info().clone();
    let id = header::decode(&bytes[..BLOCK_BYTES]).unwrap().1;
    // The same nodes as the start of another disk.
    let mut import = |size| {
        let claim = ArchiveInfo { size, root: root_hash(size, &sealed.root.tree.hash), ..info.clone() };
        let mut bytes = bytes.clone();
        bytes[..BLOCK_BYTES].copy_from_slice(&header::encode(&claim, &id));
        fs::write(&path, &bytes).unwrap();
        there.import(&path, None).unwrap_err().to_string()
    };
    let error = import(crate::layer::SIZE_MAX);
    assert!(error.contains("level"), "they do not fit: {error}");
    let error = import(crate::sealed::SEALED_BYTES_MAX);
    assert!(error.contains("cannot be sealed"), "{error}");
}
