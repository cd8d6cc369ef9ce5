//! What is counted of requests is what they did, exactly, and goes on with the next layer.

use std::collections::BTreeSet;
use std::ops::ControlFlow;

use super::deep::random;
use super::*;
use crate::counts::{Counts, Lookups};
use crate::format::Format;
use crate::layer::BaseSpec;
use sapwood_blockdev::device::run;
use sapwood_blockdev::units::{BLOCK_SIZE, BlockSpan};

const SECTOR: u64 = 512;
const BLOCKS: u64 = 96;

/// A disk over a raw one of ones.
fn rig() -> Rig {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("raw"), vec![1; BLOCKS as usize * BLOCK]).unwrap();
    let (io, path) = (io(), folder.path().join("0"));
    let made = path.clone();
    block_on(&io.clone(), async move {
        let base = Some(BaseSpec::new("raw", Format::Raw));
        create(&HostStorage, &io, &made, &CreateLayer { base, ..CreateLayer::default() }).await.unwrap();
    });
    let volume = Volume::new(open(&path, false).unwrap());
    let control = Io::new(BlockingEngine::new().unwrap());
    Rig { folder, volume, control, committed: Rc::default(), ended: Rc::default() }
}

impl Rig {
    fn counts(&self) -> Counts {
        self.volume.layer().counts()
    }
}

#[test]
fn random_requests_over_snapshots_count_what_they_did() {
    let (rig, mut state) = (rig(), 7);
    let (mut held, mut expected) = (BTreeSet::new(), Counts::default());
    for number in 1..=4 {
        let mut queue = rig.queue();
        for _ in 0..60 {
            let offset = random(&mut state) % (BLOCKS * 8);
            let len = 1 + random(&mut state) % (BLOCKS * 8 - offset).min(40);
            let (offset, len) = (GuestOffset(offset * SECTOR), len * SECTOR);
            let span = BlockSpan::of(offset, len);
            let memory = SharedBuf::heap(len as usize);
            let kind = random(&mut state) % 4;
            let command = match kind {
                0 => Command::Read(memory.into()),
                1 => Command::Write(memory.into()),
                2 => Command::WriteZeroes,
                _ => Command::Discard,
            };
            run(&mut queue, offset, len, command).unwrap();
            expected.map.hits += 1;
            if kind > 1 {
                held.retain(|block| !span.whole.contains(block));
            }
            let data: Vec<u64> = match kind {
                1 => span.touched.clone().collect(),
                2 => span.cut(),
                _ => Vec::new(),
            };
            expected.first_writes += data.into_iter().map(|block| u64::from(held.insert(block))).sum::<u64>();
            expected.merged_blocks += if kind == 1 || kind == 2 { span.cut().len() as u64 } else { 0 };
            assert_eq!(rig.counts(), expected, "{offset:?} {len} {kind}");
        }
        assert_eq!(rig.volume.layer().info().live_blocks, held.len() as u64);
        drop(queue);
        rig.begin(number, true);
        rig.end().unwrap();
        held.clear();
        assert_eq!(rig.counts(), expected, "a snapshot takes nothing away");
    }
    assert!(expected.first_writes > 200 && expected.merged_blocks > 100, "{expected:?}");
}

#[test]
fn what_comes_together_is_joined() {
    let rig = Rig::new();
    let mut queue = rig.queue();
    for block in [1, 2, 2, 40, 1] {
        write(&mut queue, block, 1);
    }
    poll(&mut queue);
    let counts = |rig: &Rig| {
        let counts = rig.counts();
        (counts.first_writes, counts.joined_writes, counts.joined_flushes)
    };
    assert_eq!(counts(&rig), (3, 4, 0), "one record");
    // One write of several parts is joined to nothing.
    let len = 100 * BLOCK;
    let memory = SharedBuf::heap(len);
    run(&mut queue, GuestOffset(0), len as u64, Command::Write(memory.into())).unwrap();
    assert_eq!(counts(&rig), (100, 4, 0));
    // What is no write is none of those that are joined.
    write(&mut queue, 3, 1);
    queue.submit(Request { tag: 7, offset: GuestOffset(0), len: BLOCK_SIZE, command: Command::Discard });
    poll(&mut queue);
    assert_eq!(counts(&rig), (100, 4, 0));
    (0..3).for_each(|_| flush(&mut queue));
    assert_eq!(poll(&mut queue), [99; 3]);
    assert_eq!(counts(&rig), (100, 4, 2), "one sync");
    flush(&mut queue);
    assert_eq!(poll(&mut queue), [99]);
    assert_eq!(counts(&rig), (100, 4, 2), "nothing had to be synced");
}

#[test]
fn copies_from_below_are_no_first_writes() {
    let rig = rig();
    let mut queue = rig.queue();
    write(&mut queue, 3, 1);
    poll(&mut queue);
    let (layer, io) = (rig.volume.layer(), rig.control.clone());
    block_on(&rig.control, async move {
        let go_on = &mut |_, _| ControlFlow::Continue(());
        layer.rebase(&HostStorage, &io, None, go_on).await.unwrap();
    });
    let layer = rig.volume.layer();
    assert_eq!((layer.info().live_blocks, layer.counts().first_writes), (BLOCKS, 1));
    write(&mut queue, 4, 1);
    poll(&mut queue);
    assert_eq!((layer.info().live_blocks, layer.counts().first_writes), (BLOCKS, 1));
}

#[test]
fn a_map_that_has_to_be_read_is_a_miss() {
    let folder = tempfile::tempdir().unwrap();
    let (io, path) = (io(), folder.path().join("0"));
    let made = path.clone();
    block_on(&io.clone(), async move {
        let options = CreateLayer { size: Some(1 << 30), ..CreateLayer::default() };
        create(&HostStorage, &io, &made, &options).await.unwrap();
    });
    let volume = Volume::new(open(&path, false).unwrap());
    let mut queue = volume.queue(BlockingEngine::new().unwrap());
    // In leaves that do not follow one another.
    let blocks = [0, 5 * 512, 11 * 512];
    for block in blocks {
        write(&mut queue, block, 1);
        poll(&mut queue);
    }
    assert_eq!(volume.layer().counts().map, Lookups { hits: 3, misses: 0 }, "nothing was stored");
    drop(queue);
    let (closed, io) = (Arc::clone(&volume), self::io());
    block_on(&io.clone(), async move { closed.close(&io).await.unwrap() });
    drop(volume);
    let volume = Volume::new(open(&path, false).unwrap());
    let mut queue = volume.queue(BlockingEngine::new().unwrap());
    assert_eq!(read(&mut queue, blocks[0]), 1);
    write(&mut queue, blocks[1], 2);
    poll(&mut queue);
    let cut = Command::Write(SharedBuf::heap(SECTOR as usize).into());
    run(&mut queue, GuestOffset(blocks[2] * BLOCK_SIZE), SECTOR, cut).unwrap();
    assert_eq!(volume.layer().counts().map, Lookups { hits: 0, misses: 3 });
    for block in blocks {
        read(&mut queue, block + 1);
    }
    assert_eq!(volume.layer().counts().map, Lookups { hits: 3, misses: 3 });
    let counts = volume.layer().counts();
    assert_eq!((counts.first_writes, counts.merged_blocks), (0, 1), "since it was opened");
}
