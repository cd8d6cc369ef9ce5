//! Many snapshots one after the other: what lies below is never opened as a whole, and reads as if it had been.

use super::*;
use crate::format::Format;
use crate::layer::{BaseSpec, Tuning};

const SNAPSHOTS: u32 = 24;
const SIZES: [u64; 3] = [64, 40, 96];

/// SplitMix64.
pub(super) fn random(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// A disk over a raw one whose blocks hold 1.
fn rig(tuning: Tuning) -> Rig {
    let folder = tempfile::tempdir().unwrap();
    let (path, raw) = (folder.path().join("0"), folder.path().join("raw"));
    std::fs::write(&raw, vec![1; SIZES[0] as usize * BLOCK]).unwrap();
    let io = io();
    let inner = io.clone();
    let layer = block_on(&io, async move {
        let base = Some(BaseSpec::new("raw", Format::Raw));
        let options = CreateLayer { base, segment_size: 64 << 10, ..CreateLayer::default() };
        create(&HostStorage, &inner, &path, &options).await.unwrap();
        let options = OpenLayer { read_only: false, tuning };
        Layer::open(&HostStorage, &inner, &path, &options).await.unwrap()
    });
    let control = Io::new(BlockingEngine::new().unwrap());
    Rig { folder, volume: Volume::new(layer), control, committed: Rc::default(), ended: Rc::default() }
}

fn resize(rig: &Rig, blocks: u64) {
    let (volume, io) = (Arc::clone(&rig.volume), io());
    let inner = io.clone();
    block_on(&io, async move { volume.resize(&inner, blocks * BLOCK as u64).await.unwrap() });
}

/// Writes here and there, sometimes zeroes; sometimes another size.
fn change(rig: &Rig, number: u32, state: &mut u64, disk: &mut Vec<u8>) {
    if random(state).is_multiple_of(4) {
        let blocks = SIZES[(random(state) % 3) as usize];
        resize(rig, blocks);
        disk.resize(blocks as usize, 0);
    }
    let mut queue = rig.queue();
    for _ in 0..random(state) % 9 {
        let block = random(state) % disk.len() as u64;
        if random(state).is_multiple_of(3) {
            let (offset, command) = (GuestOffset(block * BLOCK as u64), Command::WriteZeroes);
            queue.submit(Request { tag: 0, offset, len: BLOCK as u64, command });
            disk[block as usize] = 0;
        } else {
            write(&mut queue, block, number as u8 + 2);
            disk[block as usize] = number as u8 + 2;
        }
        let mut done = Vec::new();
        drain(&mut queue, &mut done);
        assert!(done.iter().all(|done| done.result.is_ok()), "{done:?}");
    }
}

fn contents<Q: DeviceQueue>(queue: &mut Q, blocks: usize) -> Vec<u8> {
    (0..blocks as u64).map(|block| read(queue, block)).collect()
}

#[test]
fn what_lies_below_after_many_snapshots_reads_as_if_it_had_been_opened() {
    for (index_bytes, files_max) in [(0, 3), (640, 4), (1600, 3), (64 << 20, 128)] {
        let tuning = Tuning { index_bytes, files_max, ..Tuning::default() };
        let rig = rig(tuning);
        let (mut state, mut disk) = (index_bytes, vec![1; SIZES[0] as usize]);
        for number in 1..=SNAPSHOTS {
            change(&rig, number, &mut state, &mut disk);
            rig.begin(number, true);
            rig.end().unwrap();
            let what = format!("snapshot {number}, an index of {index_bytes} bytes");
            assert!(contents(&mut rig.queue(), disk.len()) == disk, "{what}");
            let info = rig.volume.layer().info();
            assert_eq!(info.depth, number as usize + 1, "{what}");
            assert!(info.index_bytes as u64 <= index_bytes, "{what}: {}", info.index_bytes);
        }
        let (volume, io) = (Arc::clone(&rig.volume), io());
        block_on(&io.clone(), async move { volume.close(&io).await.unwrap() });
        let Rig { folder, volume, .. } = rig;
        drop(volume);
        let layer = open(&folder.path().join(SNAPSHOTS.to_string()), true).unwrap();
        let mut queue = layer.queue(BlockingEngine::new().unwrap());
        assert!(contents(&mut queue, disk.len()) == disk, "an index of {index_bytes} bytes, opened again");
    }
}
