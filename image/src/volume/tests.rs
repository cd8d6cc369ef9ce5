//! A volume on the host's files, in one thread that says who goes on when.

mod counts;
mod deep;
mod in_store;

use std::cell::{Cell, RefCell};
use std::path::Path;
use std::rc::Rc;

use sapwood_blockdev::buffer::SharedBuf;
use sapwood_blockdev::device::{Command, DeviceQueue, Done, Request, drain};
use sapwood_blockdev::engine::{BlockingEngine, Time};
use sapwood_blockdev::io::block_on;
use sapwood_blockdev::storage::HostStorage;
use sapwood_blockdev::units::GuestOffset;
use tempfile::TempDir;

use super::*;
use crate::layer::{CreateLayer, OpenLayer, create};

const BLOCK: usize = 4096;
const POLLS_MAX: usize = 1000;

type Queue = VolumeQueue<BlockingEngine>;

struct Rig {
    folder: TempDir,
    volume: Arc<Volume<BlockingEngine>>,
    control: Io<BlockingEngine>,
    committed: Rc<Cell<bool>>,
    ended: Rc<RefCell<Option<Result<(), ImageError>>>>,
}

fn io() -> Io<BlockingEngine> {
    Io::new(BlockingEngine::new().unwrap())
}

fn open(path: &Path, read_only: bool) -> Result<Arc<Layer<BlockingEngine>>, ImageError> {
    let (io, path) = (io(), path.to_owned());
    let options = OpenLayer { read_only, ..OpenLayer::default() };
    block_on(&io.clone(), async move { Layer::open(&HostStorage, &io, &path, &options).await })
}

impl Rig {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (io, path) = (io(), folder.path().join("0"));
        block_on(&io.clone(), {
            let path = path.clone();
            async move {
                let options = CreateLayer { size: Some(1 << 20), ..CreateLayer::default() };
                create(&HostStorage, &io, &path, &options).await.unwrap();
            }
        });
        let volume = Volume::new(open(&path, false).unwrap());
        let control = Io::new(BlockingEngine::new().unwrap());
        Self { folder, volume, control, committed: Rc::default(), ended: Rc::default() }
    }

    fn queue(&self) -> Queue {
        self.volume.queue(BlockingEngine::new().unwrap())
    }

    /// Orders a snapshot by which the disk goes on with layer `number`, and goes on until that waits for
    /// queues, or has ended.
    fn begin(&self, number: u32, may_commit: bool) {
        let path = self.folder.path().join(number.to_string());
        let next = Successor::New { path, base: self.volume.path().file_name().unwrap().into() };
        let (volume, io, ended) = (Arc::clone(&self.volume), self.control.clone(), Rc::clone(&self.ended));
        let committed = Rc::clone(&self.committed);
        committed.set(false);
        self.control.spawn(async move {
            let commit = async || {
                committed.set(may_commit);
                let refused = ImageError::new("catalog", ErrorKind::Cancelled);
                if may_commit { Ok(()) } else { Err(refused) }
            };
            let result = volume.snapshot(&HostStorage, &io, &next, commit).await;
            *ended.borrow_mut() = Some(result);
        });
        self.poll_until(|rig| rig.committed.get() || rig.ended.borrow().is_some());
        (0..10).for_each(|_| self.control.poll(&mut Vec::new()));
    }

    fn poll_until(&self, is_true: impl Fn(&Self) -> bool) {
        for _ in 0..POLLS_MAX {
            if is_true(self) {
                return;
            }
            self.control.poll(&mut Vec::new());
        }
        panic!("it did not come");
    }

    /// Goes on until the snapshot has ended.
    fn end(&self) -> Result<(), ImageError> {
        self.poll_until(|rig| rig.ended.borrow().is_some());
        self.ended.take().unwrap()
    }

    fn number(&self) -> String {
        self.volume.path().file_name().unwrap().to_str().unwrap().to_owned()
    }
}

fn write(queue: &mut Queue, block: u64, byte: u8) {
    let buf = SharedBuf::heap(BLOCK);
    buf.write_at(0, &[byte; BLOCK]);
    let offset = GuestOffset(block * BLOCK as u64);
    let command = Command::Write(buf.into());
    queue.submit(Request { tag: block, offset, len: BLOCK as u64, command });
}

fn flush(queue: &mut Queue) {
    queue.submit(Request { tag: 99, offset: GuestOffset(0), len: 0, command: Command::Flush });
}

fn read<Q: DeviceQueue>(queue: &mut Q, block: u64) -> u8 {
    let buf = SharedBuf::heap(BLOCK);
    let command = Command::Read(buf.clone().into());
    queue.submit(Request {
        tag: block,
        offset: GuestOffset(block * BLOCK as u64),
        len: BLOCK as u64,
        command,
    });
    let mut done = Vec::new();
    drain(queue, &mut done);
    assert!(done.iter().all(|done| done.result.is_ok()), "{done:?}");
    let mut bytes = vec![0; BLOCK];
    buf.read_at(0, &mut bytes);
    assert!(bytes.iter().all(|byte| *byte == bytes[0]));
    bytes[0]
}

/// The tags of what has finished.
fn poll(queue: &mut Queue) -> Vec<u64> {
    let mut done: Vec<Done> = Vec::new();
    queue.poll(&mut done);
    assert!(done.iter().all(|done| done.result.is_ok()), "{done:?}");
    done.iter().map(|done| done.tag).collect()
}

#[test]
fn what_comes_during_a_switch_waits_until_all_have_left() {
    let rig = Rig::new();
    let mut queues = [rig.queue(), rig.queue()];
    write(&mut queues[1], 1, 1);
    assert_eq!(poll(&mut queues[1]), [1]);
    write(&mut queues[0], 0, 1);
    rig.begin(1, true);
    assert_eq!(rig.number(), "0");
    write(&mut queues[1], 2, 2);
    write(&mut queues[1], 3, 3);
    assert_eq!(poll(&mut queues[1]), [], "the other queue has not left");
    assert_eq!(queues[1].outstanding(), 2);
    assert_eq!(poll(&mut queues[0]), [0], "what was in flight ends on the old layer");
    assert_eq!(rig.number(), "1");
    assert_eq!(poll(&mut queues[1]), [2, 3]);
    let contents = [1, 1, 2, 3, 0];
    assert_eq!([0, 1, 2, 3, 4].map(|block| read(&mut queues[0], block)), contents, "over the open layer");
    rig.end().unwrap();
    assert_eq!([0, 1, 2, 3, 4].map(|block| read(&mut queues[0], block)), contents, "over the closed one");
    let info = rig.volume.layer().info();
    assert_eq!((info.live_blocks, info.depth), (2, 1));
    let old = open(&rig.folder.path().join("0"), true).unwrap();
    assert!(old.info().clean, "it is closed, and others may read it");
    let mut old = old.queue(BlockingEngine::new().unwrap());
    assert_eq!([0, 1, 2, 3].map(|block| read(&mut old, block)), [1, 1, 0, 0]);
}

#[test]
fn nobody_waits_for_queues_without_anything_outstanding_that_sleep_or_go() {
    let rig = Rig::new();
    let _never_used = rig.queue();
    let (mut asleep, mut gone, mut busy) = (rig.queue(), rig.queue(), rig.queue());
    for queue in [&mut asleep, &mut gone, &mut busy] {
        write(queue, 5, 5);
        assert_eq!(poll(queue), [5]);
    }
    asleep.wait(Some(Time::ZERO));
    write(&mut busy, 6, 6);
    rig.begin(1, true);
    assert_eq!(poll(&mut busy), [6]);
    assert_eq!(rig.number(), "0");
    drop(gone);
    assert_eq!(rig.number(), "1", "the last one has gone");
    rig.end().unwrap();
    // It has slept through all of it.
    write(&mut asleep, 7, 7);
    assert_eq!(poll(&mut asleep), [7]);
    assert_eq!([5, 6, 7].map(|block| read(&mut busy, block)), [5, 6, 7]);
    assert_eq!(rig.volume.layer().info().live_blocks, 1);
}

#[test]
fn a_queue_that_wakes_up_during_a_switch_waits_for_the_others() {
    let rig = Rig::new();
    let (mut asleep, mut busy) = (rig.queue(), rig.queue());
    write(&mut busy, 1, 1);
    rig.begin(1, true);
    write(&mut asleep, 2, 2);
    assert_eq!(poll(&mut asleep), []);
    assert_eq!(poll(&mut busy), [1]);
    assert_eq!(poll(&mut asleep), [2]);
    rig.end().unwrap();
    assert_eq!(rig.volume.layer().info().live_blocks, 1, "it went to the new layer");
}

#[test]
fn a_flush_waits_until_the_old_layer_is_durable() {
    let rig = Rig::new();
    let mut queue = rig.queue();
    write(&mut queue, 1, 1);
    rig.begin(1, true);
    flush(&mut queue);
    assert_eq!(poll(&mut queue), [1]);
    assert_eq!(rig.number(), "1");
    write(&mut queue, 2, 2);
    assert_eq!(poll(&mut queue), [2], "a write does not wait");
    for _ in 0..10 {
        assert_eq!(poll(&mut queue), [], "the old layer is not synced");
    }
    rig.end().unwrap();
    assert_eq!(poll(&mut queue), [99]);
}

#[test]
fn a_commit_that_fails_leaves_the_disk_as_it_was() {
    let rig = Rig::new();
    let mut queue = rig.queue();
    write(&mut queue, 1, 1);
    assert_eq!(poll(&mut queue), [1]);
    rig.begin(1, false);
    let failed = rig.end().unwrap_err();
    assert!(matches!(failed.kind, ErrorKind::Cancelled), "{failed}");
    assert_eq!(rig.number(), "0");
    queue.wait(Some(Time::ZERO));
    rig.begin(2, true);
    rig.end().unwrap();
    assert_eq!((rig.number().as_str(), read(&mut queue, 1)), ("2", 1));
}

#[test]
fn a_path_that_leads_elsewhere_is_refused() {
    let rig = Rig::new();
    let (other, io) = (rig.folder.path().join("other"), io());
    block_on(&io.clone(), {
        let options = CreateLayer { size: Some(1 << 20), ..CreateLayer::default() };
        async move { create(&HostStorage, &io, &other, &options).await.unwrap() }
    });
    for (base, what) in [("other", "over which the new layer is to lie"), ("none", "No such file")] {
        let next = Successor::New { path: rig.folder.path().join("1"), base: base.into() };
        let (volume, io) = (Arc::clone(&rig.volume), rig.control.clone());
        let refused = block_on(&rig.control, async move {
            volume.snapshot(&HostStorage, &io, &next, async || Ok(())).await.unwrap_err()
        });
        assert!(refused.to_string().contains(what), "{refused}");
        assert!(!rig.folder.path().join("1").exists());
    }
}

#[test]
fn one_snapshot_at_a_time_and_no_change_of_size_or_end_meanwhile() {
    let rig = Rig::new();
    let mut queue = rig.queue();
    write(&mut queue, 1, 1);
    rig.begin(1, true);
    let (volume, io) = (Arc::clone(&rig.volume), io());
    let refused = block_on(&io.clone(), async move { volume.resize(&io, 2 << 20).await.unwrap_err() });
    assert!(matches!(refused.kind, ErrorKind::Unfinished(_)), "{refused}");
    let (volume, io) = (Arc::clone(&rig.volume), self::io());
    let refused = block_on(&io.clone(), async move { volume.close(&io).await.unwrap_err() });
    assert!(matches!(refused.kind, ErrorKind::Unfinished(_)), "{refused}");
    assert_eq!(poll(&mut queue), [1]);
    rig.end().unwrap();
    let (volume, io) = (Arc::clone(&rig.volume), self::io());
    block_on(&io.clone(), async move { volume.resize(&io, 2 << 20).await.unwrap() });
    assert_eq!(rig.volume.geometry().size, 2 << 20);
}

#[test]
fn the_next_opening_does_what_was_left_to_do() {
    let rig = Rig::new();
    let mut queue = rig.queue();
    write(&mut queue, 1, 1);
    rig.begin(1, true);
    assert_eq!(poll(&mut queue), [1]);
    write(&mut queue, 2, 2);
    assert_eq!(poll(&mut queue), [2]);
    // As a kill leaves it: the old layer is neither synced nor closed.
    rig.control.abandon_tasks();
    let Rig { folder, volume, .. } = rig;
    drop((queue, volume));
    let [old, new] = ["0", "1"].map(|name| folder.path().join(name));
    let contents = |layer: &Arc<Layer<BlockingEngine>>| {
        let mut queue = layer.queue(BlockingEngine::new().unwrap());
        [1, 2, 3].map(|block| read(&mut queue, block))
    };
    let reader = open(&new, true).unwrap();
    assert_eq!(contents(&reader), [1, 2, 0]);
    drop(reader);
    assert!(!open(&old, true).unwrap().info().clean, "who reads changes nothing");
    let writer = open(&new, false).unwrap();
    assert_eq!(contents(&writer), [1, 2, 0]);
    assert!(open(&old, true).unwrap().info().clean);
    let io = io();
    block_on(&io.clone(), async move { writer.close(&io).await.unwrap() });
    // Now it is recognised by more than its id.
    let changed = open(&old, false).unwrap();
    let io = self::io();
    block_on(&io.clone(), async move { changed.close(&io).await.unwrap() });
    let refused = open(&new, false).map(drop).unwrap_err();
    assert!(refused.to_string().contains("opened for writing since"), "{refused}");
}

#[test]
fn a_queue_that_sleeps_over_the_end_of_one_switch_and_the_beginning_of_the_next_holds_nobody_up() {
    let rig = Rig::new();
    let (mut q0, mut q1) = (rig.queue(), rig.queue());
    write(&mut q0, 0, 1);
    write(&mut q1, 1, 1);
    poll(&mut q1);
    rig.begin(1, true);
    write(&mut q1, 2, 2);
    poll(&mut q1);
    poll(&mut q0);
    rig.end().unwrap();
    assert_eq!(rig.number(), "1");
    // Nobody has polled this one since: what it holds waits for the first switch still.
    write(&mut q0, 3, 3);
    rig.begin(2, true);
    poll(&mut q0);
    poll(&mut q1);
    rig.end().unwrap();
    assert_eq!(rig.number(), "2");
    assert_eq!((read(&mut q0, 0), read(&mut q1, 1), read(&mut q1, 2), read(&mut q0, 3)), (1, 1, 2, 3));
}
