//! Packs, written and read on a real file system.

use std::fs;
use std::path::Path;

use super::*;
use sapwood_blockdev::engine::{BlockingEngine, Op};
use sapwood_blockdev::io::{Io, block_on};
use sapwood_blockdev::storage::{HostStorage, OpenOptions, Storage, StorageFile};
use sapwood_blockdev::units::BLOCK_BYTES;

fn io() -> Io<BlockingEngine> {
    Io::new(BlockingEngine::new().unwrap())
}

fn block(n: u64) -> Vec<u8> {
    (0..BLOCK_BYTES as u64 / 8).flat_map(|i| ((n << 20) | (i / 3)).to_le_bytes()).collect()
}

/// A pack of `frames` frames of 5 blocks, and what it must hold.
fn written(directory: &Path, frames: u64) -> (Written, Vec<(Hash, Place, Vec<u8>)>) {
    let io = io();
    let mut writer = PackWriter::create(&HostStorage, &io, directory, 7, PackKind::Data).unwrap();
    block_on(&io.clone(), async move {
        let mut coder = Coder::new(1).unwrap();
        let mut all = Vec::new();
        for frame in 0..frames {
            let blocks: Vec<Vec<u8>> = (0..5).map(|i| block(1 + frame * 5 + i)).collect();
            let hashes: Vec<Hash> = blocks.iter().map(|block| Hash::of_block(block)).collect();
            let place = writer.push(NewRecord::frame(&mut coder, &blocks.concat()), &hashes);
            writer.write_out().await.unwrap();
            all.extend(
                blocks.into_iter().enumerate().map(|(i, block)| (hashes[i], place.with_index(i), block)),
            );
        }
        (writer.finish().await.unwrap(), all)
    })
}

/// Everything that can be read of a pack: hashes, places and blocks by its entries.
fn read(path: &Path) -> Result<Vec<(Hash, Place, Vec<u8>)>, crate::ImageError> {
    let io = io();
    let file = HostStorage.open(path, OpenOptions::READ).unwrap();
    let size = file.size().unwrap();
    block_on(&io.clone(), async move {
        let pack = Pack::open(&io, file, 0..size, 7).await?;
        let mut all = Vec::new();
        for entry in pack.entries_in(&io, 0..u32::MAX).await? {
            let frame = pack.frame(&io, entry.place).await?;
            let block = frame.block(entry.place.index()).expect("it is in the frame").to_vec();
            all.push((entry.hash, entry.place, block));
        }
        Ok(all)
    })
}

#[test]
fn a_pack_holds_what_was_put_into_it() {
    let directory = tempfile::tempdir().unwrap();
    let (pack, all) = written(directory.path(), 500);
    assert_eq!((pack.entries, pack.number), (2500, 7));
    assert_eq!(fs::metadata(&pack.path).unwrap().len(), pack.bytes);
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1, "no unfinished file is left");
    let found = read(&pack.path).unwrap();
    assert!(found == all);
    assert!(found.iter().all(|(hash, _, block)| Hash::of_block(block) == *hash));
}

#[test]
fn a_flipped_bit_anywhere_in_a_pack_is_noticed() {
    let directory = tempfile::tempdir().unwrap();
    let (pack, all) = written(directory.path(), 4);
    let whole = fs::read(&pack.path).unwrap();
    let bad_path = directory.path().join("bad");
    let records_end = whole.len() - 2 * BLOCK_BYTES;
    let mut unnoticed = Vec::new();
    for at in (0..whole.len()).step_by(37) {
        let mut bad = whole.clone();
        bad[at] ^= 0x10;
        fs::write(&bad_path, &bad).unwrap();
        match read(&bad_path) {
            Err(_) => {}
            Ok(found) => {
                assert!(found == all, "never wrong data");
                unnoticed.push(at);
            }
        }
    }
    // Nobody reads what fills up the last block of records; scrub does.
    let last = records_end - BLOCK_BYTES;
    assert!(unnoticed.iter().all(|at| (last..records_end).contains(at)), "{unnoticed:?}");
}

#[test]
fn what_is_no_whole_pack_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let (pack, _) = written(directory.path(), 4);
    let whole = fs::read(&pack.path).unwrap();
    let bad_path = directory.path().join("bad");
    for len in [0, 512, BLOCK_BYTES, whole.len() - BLOCK_BYTES, whole.len() - 1] {
        fs::write(&bad_path, &whole[..len]).unwrap();
        assert!(read(&bad_path).is_err(), "{len} bytes");
    }
    let io = io();
    let file = HostStorage.open(&pack.path, OpenOptions::READ).unwrap();
    let opened = block_on(&io.clone(), async move {
        let sync = Op::SyncDirectory { path: pack.path.parent().unwrap().to_owned() };
        io.run(sync).await.result.unwrap();
        Pack::open(&io, file, 0..pack.bytes, 8).await
    });
    assert!(opened.unwrap_err().to_string().contains("pack 7"), "another number");
}
