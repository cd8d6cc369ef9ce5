//! An ordinary client, over a real socket: the `virtio-driver` crate, which shares no code with
//! this one.
#![allow(clippy::unwrap_used, reason = "tests")]

mod support;

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use sapwood_blockdev::engine::BlockingEngine;
use sapwood_tests::frontend::{Command, Frontend, Options, every_feature};
use sapwood_tests::model::{Model, Run};
use sapwood_vhost::features::Features;
use sapwood_vhost::{Server, ServerError};
use support::ramdisk::RamDisk;
use support::{Served, eventually, serve};

const SIZE: usize = 8 << 20;

fn connect(served: &Served, options: &Options) -> Frontend {
    Frontend::connect(&served.socket, options).unwrap()
}

#[test]
fn requests_of_every_kind() {
    let served = serve(RamDisk::new(SIZE), 1);
    let mut client = connect(&served, &Options::default());
    assert_eq!(client.size().unwrap(), SIZE as u64);
    let data: Vec<u8> = (0..65536u32).map(|i| (i / 7) as u8).collect();
    client.run(Command::Write(512, &data)).unwrap();
    assert_eq!(client.run(Command::Read(512, data.len())).unwrap(), data);
    client.run(Command::Flush).unwrap();
    assert_eq!(served.disk.flushes.load(Ordering::Relaxed), 1);
    client.run(Command::WriteZeroes(1024, 512, true)).unwrap();
    client.run(Command::Discard(4096, 8192)).unwrap();
    let mut expected = data;
    expected[512..1024].fill(0);
    expected[3584..11776].fill(0);
    assert_eq!(client.run(Command::Read(512, expected.len())).unwrap(), expected);
}

#[test]
fn errors_reach_the_guest() {
    let served = serve(RamDisk::new(SIZE), 1);
    let mut client = connect(&served, &Options::default());
    let errno = |result: io::Result<Vec<u8>>| result.unwrap_err().raw_os_error();
    assert_eq!(errno(client.run(Command::Read(SIZE as u64, 512))), Some(5));
    assert_eq!(errno(client.run(Command::Read(0, 100))), Some(5));
    served.disk.fail.store(true, Ordering::Relaxed);
    assert_eq!(errno(client.run(Command::Flush)), Some(5));
    served.disk.fail.store(false, Ordering::Relaxed);
    client.run(Command::Flush).unwrap();
}

#[test]
fn read_only_disks() {
    let served = serve(Arc::new(RamDisk::with(SIZE, true)), 1);
    let mut client = connect(&served, &Options::default());
    assert!(Features(client.features()).has(Features::RO));
    client.run(Command::Read(0, 512)).unwrap();
    assert!(client.run(Command::Write(0, &[1; 512])).is_err());
}

#[test]
fn without_flush_writes_go_through() {
    let served = serve(RamDisk::new(SIZE), 1);
    let features = every_feature() & !Features::FLUSH;
    let mut client = connect(&served, &Options { features, ..Options::default() });
    assert!(!served.disk.write_cache.load(Ordering::Relaxed));
    let error = client.run(Command::Flush).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::Unsupported);
    drop(client);
    connect(&served, &Options::default());
    assert!(served.disk.write_cache.load(Ordering::Relaxed));
}

fn random(queues: u16, options: Options, run: Run) {
    let served = serve(RamDisk::new(SIZE), queues);
    served.disk.delay_us.store(50, Ordering::Relaxed);
    random_on(&served.socket, queues, options, &run);
}

fn random_on(socket: &Path, queues: u16, options: Options, run: &Run) {
    let mut client = Frontend::connect(socket, &Options { queues: queues.into(), ..options }).unwrap();
    let mut model = Model::zeroes(SIZE as u64);
    model.discards_zero = true;
    let report = model.run(&mut client, run).unwrap();
    assert!(report.depth > run.depth / 2, "{report:?}");
    model.verify(&mut client).unwrap();
}

#[test]
fn random_requests_on_one_queue() {
    random(1, Options::default(), Run::default());
}

#[test]
fn random_requests_on_four_queues() {
    random(4, Options::default(), Run { seed: 2, operations: 4000, ..Run::default() });
}

#[test]
fn random_requests_without_io_uring() {
    let disk = Arc::new(RamDisk::<BlockingEngine>::with(SIZE, false));
    disk.delay_us.store(50, Ordering::Relaxed);
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("disk.sock");
    let options = sapwood_vhost::Options { queues: 2, ..sapwood_vhost::Options::new(&socket) };
    let _server = Server::start(disk, options, BlockingEngine::new).unwrap();
    random_on(&socket, 2, Options::default(), &Run { seed: 6, ..Run::default() });
}

#[test]
fn random_requests_without_event_index() {
    let features = every_feature() & !Features::EVENT_IDX;
    random(1, Options { features, ..Options::default() }, Run { seed: 3, ..Run::default() });
}

#[test]
fn random_requests_in_many_segments_out_of_alignment() {
    let options = Options { misalignment: 40, segment_bytes: 1000, queue_size: 1024, ..Options::default() };
    random(1, options, Run { seed: 4, sectors_max: 64, ..Run::default() });
}

#[test]
fn a_small_queue_wraps_often() {
    let served = serve(RamDisk::new(SIZE), 1);
    let run = Run { seed: 5, operations: 70_000, depth: 1, sectors_max: 1 };
    random_on(&served.socket, 1, Options { queue_size: 4, ..Options::default() }, &run);
}

#[test]
fn frontends_come_and_go() {
    let served = serve(RamDisk::new(SIZE), 2);
    let mut model = Model::zeroes(SIZE as u64);
    for (turn, queues) in [1, 2, 1, 2].into_iter().enumerate() {
        let mut client = connect(&served, &Options { queues, ..Options::default() });
        let run = Run { seed: turn as u64, operations: 300, ..Run::default() };
        model.run(&mut client, &run).unwrap();
        model.verify(&mut client).unwrap();
    }
    assert_eq!(served.disk.queues.load(Ordering::Relaxed), 2, "the same threads serve all");
}

#[test]
fn a_frontend_that_goes_under_load_leaves_nothing_behind() {
    let served = serve(RamDisk::new(SIZE), 1);
    served.disk.delay_us.store(20_000, Ordering::Relaxed);
    for _ in 0..3 {
        let mut client = connect(&served, &Options::default());
        for tag in 0..20 {
            client.queues[0].submit(tag, Command::Write(tag * 4096, &[1; 4096])).unwrap();
        }
        client.queues[0].kick().unwrap();
        eventually("requests in flight", || served.disk.outstanding.load(Ordering::Relaxed) > 0);
        drop(client);
        let mut client = connect(&served, &Options::default());
        assert_eq!(served.disk.outstanding.load(Ordering::Relaxed), 0, "drained before the next session");
        client.run(Command::Read(0, 4096)).unwrap();
    }
}

#[test]
fn stopping_under_load_drains() {
    let served = serve(RamDisk::new(SIZE), 4);
    served.disk.delay_us.store(20_000, Ordering::Relaxed);
    let mut client = connect(&served, &Options { queues: 4, ..Options::default() });
    for tag in 0..20 {
        for queue in &mut client.queues {
            queue.submit(tag, Command::Write(tag * 4096, &[1; 4096])).unwrap();
            queue.kick().unwrap();
        }
    }
    eventually("requests in flight", || served.disk.outstanding.load(Ordering::Relaxed) > 0);
    served.server.stop();
    assert_eq!(served.disk.outstanding.load(Ordering::Relaxed), 0);
    assert_eq!(Arc::strong_count(&served.disk), 1, "nobody uses the disk any more");
    assert!(!served.socket.exists());
    served.server.stop();
    // What was taken was reported; the rest never will be.
    let finished: usize = client.queues.iter_mut().map(|queue| queue.poll(|f| f.result.unwrap())).sum();
    assert!(finished > 0);
}

#[test]
fn sockets_of_the_living_and_the_dead() {
    let served = serve(RamDisk::new(SIZE), 1);
    let other = RamDisk::new(SIZE);
    assert!(matches!(support::start(&other, &served.socket, 1), Err(ServerError::InUse(_))));
    connect(&served, &Options::default()).run(Command::Read(0, 512)).unwrap();
    served.server.stop();
    // A socket that nobody listens at, as after a crash.
    drop(std::os::unix::net::UnixListener::bind(&served.socket).unwrap());
    let server = support::start(&other, &served.socket, 1).unwrap();
    drop(server);
    std::fs::write(&served.socket, "precious").unwrap();
    assert!(matches!(support::start(&other, &served.socket, 1), Err(ServerError::NotASocket(_))));
    assert_eq!(std::fs::read(&served.socket).unwrap(), b"precious");
    assert!(matches!(support::start(&other, &served.socket, 0), Err(ServerError::Queues(0))));
}
