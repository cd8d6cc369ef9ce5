//! Limits of what guests may do: set on the command line, at the control socket, in a store; kept and applied.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use sapwood_tests::frontend::{Command, Frontend, Options};
use sapwood_tests::pace::Load;

use crate::daemon::{Daemon, connect};
use crate::harness::Place;
use crate::serve::Server;
use crate::store::{about, place};

const BLOCK: usize = 4096;
const SIZE: u64 = 8 << 20;

fn reads(depth: usize) -> Load {
    Load { depth, bytes: BLOCK, write: false, span: SIZE, seed: 1, rest: Duration::ZERO }
}

/// How many requests end in about a second, at most so many more than in that time by the limit; both.
#[track_caller]
fn is_limited(frontend: &mut Frontend, load: Load, per_second: u64) -> u64 {
    let begin = Instant::now();
    let ended = load.run(&mut frontend.queues[0], Duration::from_secs(1)).expect("it goes on").count();
    let most = (begin.elapsed().as_secs_f64() + 0.010) * per_second as f64 + 1.0;
    assert!(ended as f64 <= most, "{ended} ended, and {most} may have");
    // However slow the machine is.
    assert!(ended >= per_second / 4, "{ended} of {per_second}");
    ended
}

#[test]
fn a_served_disk_keeps_its_limit_and_takes_another_one_at_once() {
    let place = Place::new();
    place.sapwood("create disk 8M").text();
    let (server, _) = Server::start(&place, "disk --control control --iops 500 --queues 2");
    let options = Options { queues: 2, ..Options::default() };
    let mut frontend = Frontend::connect(&place.path("socket"), &options).expect("it listens");
    is_limited(&mut frontend, reads(16), 500);
    assert_eq!(place.sapwood("limit --control control").text(), "iops-total=500\n");
    // By bytes, and in one direction only: the other one is free.
    let said = place.sapwood("limit --control control --iops 0 --bps-write 1M").text();
    assert_eq!(said, "bps-write=1048576\n");
    let writes = Load { write: true, bytes: 16 << 10, ..reads(8) };
    is_limited(&mut frontend, writes, 64);
    let free = reads(16).run(&mut frontend.queues[1], Duration::from_secs(1)).expect("it goes on").count();
    assert!(free > 3000, "{free}");
    let said = place.sapwood("limit --control control --reset --iops-read 100 --output json").json();
    assert_eq!(said, serde_json::json!({ "iops-read": 100 }));
    is_limited(&mut frontend, reads(16), 100);
    for (wrong, why) in [
        ("--burst-iops 5", "iops-total-max without iops-total"),
        ("--set iops=5", "there are iops-total, "),
        ("--weight 20000", "weight: 20000"),
        ("--iops-read 10 --burst-iops-read 5", "iops-read-max: 5 is less"),
        ("--burst-seconds 5", "--burst-iops"),
    ] {
        place.sapwood(&format!("limit --control control {wrong}")).fails(1, &[why]);
    }
    assert_eq!(
        place.sapwood("limit --control control").text(),
        "iops-read=100\n",
        "what is refused changes nothing"
    );
    drop(frontend);
    server.stops();
    place
        .sapwood("serve disk --socket socket --burst-iops 5")
        .fails(1, &["iops-total-max without iops-total"]);
}

/// A guest that goes away, or is reset, has not to wait until all that it wanted has passed the limit.
#[test]
fn a_guest_that_stops_does_not_wait_for_its_limit() {
    let place = Place::new();
    place.sapwood("create disk 8M").text();
    let (server, _) = Server::start(&place, "disk --iops 1");
    let mut frontend = Frontend::connect(&place.path("socket"), &Options::default()).expect("it listens");
    for tag in 0..32 {
        frontend.queues[0].submit(tag, Command::Read(0, BLOCK)).expect("there is room");
    }
    frontend.queues[0].kick().expect("it is there");
    let begin = Instant::now();
    drop(frontend);
    server.stops();
    assert!(begin.elapsed() < Duration::from_secs(10), "32 requests at one a second");
}

/// What is done in the background shares with guests, and comes to its end beside one that wants everything.
#[test]
fn work_in_the_background_goes_on_beside_guests_that_share() {
    let place = place();
    about(&place, "create :web 8M").text();
    about(&place, "limit :web --weight 200").text();
    let (daemon, _) =
        Daemon::start(&place, "--store vms --no-background --in-flight 2 --background-weight 20");
    about(&place, "attach :web --socket web.sock").text();
    let mut web = connect(&place, "web.sock");
    let fill = Load { write: true, ..reads(16) };
    fill.run(&mut web.queues[0], Duration::from_millis(200)).expect("it goes on");
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let guest = scope.spawn(|| {
            let mut ended = 0;
            // Not for ever, if the commands fail.
            for _ in 0..1200 {
                if is_over.load(Ordering::Relaxed) {
                    break;
                }
                ended +=
                    reads(16).run(&mut web.queues[0], Duration::from_millis(50)).expect("it goes on").count();
            }
            ended
        });
        about(&place, "snapshot :web@one").text();
        about(&place, "store seal --store vms").text();
        about(&place, "store scrub --store vms").text();
        about(&place, "export :web@one one.sapwood").text();
        about(&place, "import one.sapwood :copy").text();
        about(&place, "store gc --store vms").text();
        is_over.store(true, Ordering::Relaxed);
        assert!(guest.join().expect("no panic") > 0);
    });
    about(&place, "tree --store vms").text();
    daemon.stops();
    for wrong in ["--in-flight 0", "--background-weight 0", "--background-weight 10001"] {
        place.sapwood(&format!("daemon --store vms {wrong}")).fails(64, &["invalid value"]);
    }
}

#[test]
fn a_store_keeps_limits_and_its_daemon_applies_them() {
    let place = place();
    for name in ["web", "db", "free"] {
        about(&place, &format!("create :{name} 8M")).text();
    }
    // Before there is a daemon.
    about(&place, "limit :web --iops 300").text();
    about(&place, "limit --store vms --group tenant --iops 400").text();
    about(&place, "limit :db --in-group tenant").text();
    let (daemon, _) = Daemon::start(&place, "--store vms");
    for name in ["web", "db", "free"] {
        about(&place, &format!("attach :{name} --socket {name}.sock")).text();
    }
    let [mut web, mut db, mut free] =
        ["web", "db", "free"].map(|name| connect(&place, &format!("{name}.sock")));
    is_limited(&mut web, reads(16), 300);
    is_limited(&mut db, reads(16), 400);
    let ended = reads(16).run(&mut free.queues[0], Duration::from_secs(1)).expect("it goes on").count();
    assert!(ended > 3000, "{ended}");
    // Both in one group: together they have what the group has, and the tighter limit holds.
    about(&place, "limit :web --in-group tenant --iops 5000").text();
    let begin = Instant::now();
    let ended: u64 = std::thread::scope(|scope| {
        let run = |frontend: &mut Frontend| {
            reads(16).run(&mut frontend.queues[0], Duration::from_secs(1)).expect("it goes on").count()
        };
        let [a, b] = [&mut web, &mut db].map(|frontend| scope.spawn(move || run(frontend)));
        a.join().expect("no panic") + b.join().expect("no panic")
    });
    let most = (begin.elapsed().as_secs_f64() + 0.010) * 400.0 + 1.0;
    assert!((100.0..=most).contains(&(ended as f64)), "{ended}");
    about(&place, "limit --store vms --group tenant --delete").fails(1, &["tenant", "is in it"]);
    about(&place, "limit :none --iops 5").fails(1, &["none", "no such volume"]);
    about(&place, "limit :web --in-group nobody").fails(1, &["nobody", "no such group"]);
    drop([web, db, free]);
    daemon.kill();
    // What was set outlives the daemon, as what was attached does.
    let (daemon, _) = Daemon::start(&place, "--store vms");
    let said = about(&place, "limit --store vms").text();
    assert!(
        said.contains("group tenant  iops-total=400\n") && said.contains("in tenant: iops-total=5000\n"),
        "{said}"
    );
    let mut web = connect(&place, "web.sock");
    is_limited(&mut web, reads(16), 400);
    about(&place, "limit :web --in-group none --iops 200").text();
    about(&place, "limit :db --in-group none").text();
    about(&place, "limit --store vms --group tenant --delete").text();
    is_limited(&mut web, reads(16), 200);
    about(&place, "limit :web --reset").text();
    assert_eq!(about(&place, "limit --store vms").text(), "no limits\n");
    let ended = reads(16).run(&mut web.queues[0], Duration::from_secs(1)).expect("it goes on").count();
    assert!(ended > 3000, "{ended}");
    drop(web);
    daemon.stops();
}
