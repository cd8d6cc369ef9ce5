//! How guests end, and how the user ends them.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use super::guests::{PANIC, POWER_OFF, RESTART, Then};
use super::{Lab, Running, has_kvm, processes_of, sockets, wait_until};
use crate::harness::{Answer, Place};
use crate::serve::Server;

/// Boots a guest that ends in some way: the exit code and the message.
#[track_caller]
fn ends(name: &str, then: Then, arguments: &str, code: i32, message: &str) {
    if !has_kvm(name) {
        return;
    }
    let lab = Lab::new("hello\n", then);
    let answer = lab.boot(&format!("disk.layer {arguments}"));
    assert_eq!((answer.code, answer.stdout.as_str()), (code, "hello\n"), "{answer:?}");
    assert!(answer.stderr.contains(message), "{answer:?}");
    assert_eq!(answer.stderr.is_empty(), message.is_empty(), "{answer:?}");
    lab.is_clean();
}

#[test]
fn a_guest_powers_off() {
    ends("a_guest_powers_off", POWER_OFF, "", 0, "");
}

#[test]
fn a_guest_panics() {
    ends("a_guest_panics", PANIC, "", 10, "panicked");
}

#[test]
fn a_guest_crashes() {
    ends("a_guest_crashes", Then::TripleFault, "", 11, "triple fault");
}

#[test]
fn a_guest_that_restarts_ends_where_it_may_not() {
    ends("a_guest_that_restarts_ends_where_it_may_not", RESTART, "--no-reboot", 12, "restarted");
}

#[test]
fn time_runs_out() {
    ends("time_runs_out", Then::Halt, "--timeout 1", 124, "time was over");
}

#[test]
fn a_guest_restarts_until_its_time_is_over() {
    if !has_kvm("a_guest_restarts_until_its_time_is_over") {
        return;
    }
    let lab = Lab::new("hello\n", RESTART);
    let start = Instant::now();
    let answer = lab.boot("disk.layer --console file=log --timeout 3");
    assert_eq!((answer.code, answer.stdout.as_str()), (124, ""), "{answer:?}");
    assert!((3..20).contains(&start.elapsed().as_secs()), "{:?}", start.elapsed());
    // The file goes on over restarts.
    let log = String::from_utf8(lab.place.bytes("log")).unwrap();
    assert!(log.lines().count() >= 3, "{log}");
    assert!(log.lines().all(|line| line == "hello"), "{log}");
    lab.is_clean();
}

#[test]
fn several_disks_and_processors_without_a_console() {
    if !has_kvm("several_disks_and_processors_without_a_console") {
        return;
    }
    let lab = Lab::new("hello\n", POWER_OFF);
    lab.place.raw_disk("data.raw");
    lab.place.qemu_img("create -q -f qcow2 tools.qcow2 8M").text();
    lab.place.sapwood("create served.layer 8M").text();
    let (server, _) = Server::start_at(&lab.place, "served.layer", "served.sock");
    let disks = "--disk data.raw,format=raw,queues=2 --disk tools.qcow2,readonly --disk socket=served.sock";
    let answer = lab.boot(&format!("disk.layer {disks} --cpus 2 --console none"));
    assert_eq!((answer.code, answer.stdout.as_str(), answer.stderr.as_str()), (0, "", ""));
    lab.is_clean();
    // That one is not ours to stop.
    server.stops();
}

#[test]
fn a_signal_stops_it() {
    if !has_kvm("a_signal_stops_it") {
        return;
    }
    for signal in [Signal::TERM, Signal::INT, Signal::HUP] {
        let lab = Lab::new("hello\n", Then::Halt);
        let mut running = lab.start("disk.layer");
        assert_eq!(running.line(), "hello\n");
        let sockets = sockets(&lab.place.path("tmp"));
        assert_eq!(sockets.len(), 1, "{sockets:?}");
        let folder = sockets[0].parent().unwrap();
        assert_eq!(folder.metadata().unwrap().permissions().mode() & 0o777, 0o700);
        running.signal(signal);
        assert_eq!(running.ends().code(), Some(130));
        lab.is_clean();
    }
}

#[test]
fn a_disk_takes_orders_beneath_its_guest() {
    if !has_kvm("a_disk_takes_orders_beneath_its_guest") {
        return;
    }
    let lab = Lab::new("hello\n", Then::Halt);
    let mut running = lab.start("disk.layer,control=control");
    assert_eq!(running.line(), "hello\n");
    lab.place.sapwood("resize --control control 128M").text();
    running.signal(Signal::TERM);
    assert_eq!(running.ends().code(), Some(130));
    assert!(!lab.place.path("control").exists());
    assert_eq!(lab.place.sapwood("info --output=json disk.layer").json()["virtual-size"], 128 << 20);
    lab.is_clean();
}

/// As `systemctl stop` does, or a terminal that closes.
#[test]
fn a_signal_to_all_processes_stops_it_cleanly() {
    if !has_kvm("a_signal_to_all_processes_stops_it_cleanly") {
        return;
    }
    for (signal, times) in [(Signal::TERM, 1), (Signal::HUP, 3), (Signal::QUIT, 1)] {
        let lab = Lab::new("hello\n", Then::Halt);
        let mut running = lab.start("disk.layer");
        assert_eq!(running.line(), "hello\n");
        let children = running.children();
        assert_eq!(children.len(), 2, "{children:?}");
        for _ in 0..times {
            running.signal(signal);
        }
        let group = |line: &str| signal == Signal::TERM || line.contains("boot-worker");
        for (pid, _) in children.iter().filter(|(_, line)| group(line)) {
            // It may have ended by now.
            let _ = kill_process(Pid::from_raw(*pid).unwrap(), signal);
        }
        assert_eq!(running.ends().code(), Some(130));
        let mut said = String::new();
        running.child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
        assert!(!said.contains("unexpectedly") && !said.contains("cleanly"), "{said}");
        lab.is_clean();
    }
}

#[test]
fn the_worker_has_only_what_it_needs() {
    if !has_kvm("the_worker_has_only_what_it_needs") {
        return;
    }
    let lab = Lab::new("hello\n", Then::Halt);
    fs::write(lab.place.path("initrd"), "an initial file system").unwrap();
    fs::write(lab.place.path("secret"), "of the user").unwrap();
    // A file that the user's shell has open, too.
    let boot = lab.command("--initrd initrd disk.layer");
    let mut shell = Command::new("sh");
    shell.args(["-c", "exec \"$@\" 9<secret", "sh"]).arg(boot.get_program()).args(boot.get_args());
    shell.current_dir(lab.place.path("")).env("TMPDIR", lab.place.path("tmp"));
    shell.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut running = Running::start(&mut shell);
    assert_eq!(running.line(), "hello\n");
    let (worker, _) = running.children().into_iter().find(|(_, line)| line.contains("boot-worker")).unwrap();
    let open = |pid: i32| -> Vec<String> {
        let files = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten();
        files.filter_map(|file| Some(fs::read_link(file.path()).ok()?.display().to_string())).collect()
    };
    assert!(open(running.child.id() as i32).iter().any(|file| file.ends_with("/secret")), "that is the test");
    // Neither that nor the kernel, which the guest has in its memory.
    for name in ["/secret", "/kernel", "/initrd", "sapwood-handover"] {
        assert!(!open(worker).iter().any(|file| file.contains(name)), "{name} in {:?}", open(worker));
    }
    running.signal(Signal::TERM);
    assert_eq!(running.ends().code(), Some(130));
    lab.is_clean();
}

#[test]
fn what_is_piped_in_reaches_the_guest() {
    if !has_kvm("what_is_piped_in_reaches_the_guest") {
        return;
    }
    let lab = Lab::new("hello\n", Then::Echo);
    let mut running = lab.start("disk.layer");
    assert_eq!(running.line(), "hello\n");
    // The escape is for terminals only.
    running.child.stdin.as_ref().unwrap().write_all(b"ab\x01xc\n").unwrap();
    assert_eq!(running.line(), "ab\x01xc\n");
    running.signal(Signal::TERM);
    assert_eq!(running.ends().code(), Some(130));
    lab.is_clean();
}

/// Kills a process of a running machine, and gives what the supervisor then says.
fn kill(running: &mut Running, which: &str) -> String {
    let children = running.children();
    let (pid, _) =
        children.iter().find(|(_, line)| line.contains(which)).unwrap_or_else(|| panic!("{children:?}"));
    kill_process(Pid::from_raw(*pid).expect("it runs"), Signal::KILL).expect("it runs");
    assert_eq!(running.ends().code(), Some(1));
    let mut said = String::new();
    running.child.stderr.take().expect("text").read_to_string(&mut said).expect("text");
    said
}

#[test]
fn a_killed_worker_is_reported() {
    if !has_kvm("a_killed_worker_is_reported") {
        return;
    }
    let lab = Lab::new("hello\n", Then::Halt);
    let mut running = lab.start("disk.layer");
    assert_eq!(running.line(), "hello\n");
    let said = kill(&mut running, "boot-worker");
    assert!(said.contains("unexpectedly") && said.contains("SIGKILL"), "{said}");
    lab.is_clean();
}

#[test]
fn a_server_that_ends_soon_after_its_start_ends_the_guest() {
    if !has_kvm("a_server_that_ends_soon_after_its_start_ends_the_guest") {
        return;
    }
    let lab = Lab::new("hello\n", Then::Halt);
    let mut running = lab.start("disk.layer");
    assert_eq!(running.line(), "hello\n");
    let said = kill(&mut running, " serve ");
    assert!(said.contains("disk.layer") && said.contains("SIGKILL"), "{said}");
    assert_eq!(processes_of(&lab.place.path("tmp")), [""; 0]);
}

#[test]
fn a_server_that_was_settled_is_started_again() {
    if !has_kvm("a_server_that_was_settled_is_started_again") {
        return;
    }
    let lab = Lab::new("hello\n", Then::Halt);
    let mut running = lab.start("disk.layer");
    assert_eq!(running.line(), "hello\n");
    std::thread::sleep(Duration::from_secs(11));
    let server =
        |running: &Running| running.children().into_iter().find(|(_, line)| line.contains(" serve "));
    let (first, _) = server(&running).unwrap();
    kill_process(Pid::from_raw(first).unwrap(), Signal::KILL).unwrap();
    wait_until("another server", || server(&running).is_some_and(|(pid, _)| pid != first));
    // The new one recovers the layer, and the machine finds it.
    let socket = sockets(&lab.place.path("tmp")).pop().unwrap().display().to_string();
    let connected = || {
        std::fs::read_to_string("/proc/net/unix")
            .unwrap()
            .lines()
            .any(|l| l.ends_with(&socket) && l.contains(" 03 "))
    };
    wait_until("the machine is connected", connected);
    running.signal(Signal::TERM);
    assert_eq!(running.ends().code(), Some(130));
    lab.is_clean();
}

#[test]
fn a_killed_supervisor_leaves_nothing_behind() {
    if !has_kvm("a_killed_supervisor_leaves_nothing_behind") {
        return;
    }
    let lab = Lab::new("hello\n", Then::Halt);
    lab.place.raw_disk("data.raw");
    let mut running = lab.start("disk.layer --disk data.raw,format=raw");
    assert_eq!(running.line(), "hello\n");
    assert_eq!(running.children().len(), 3);
    running.signal(Signal::KILL);
    running.ends();
    let folder = lab.place.path("tmp");
    wait_until("all processes end", || processes_of(&folder).is_empty());
    lab.is_clean();
}

#[test]
fn it_does_not_wait_for_a_guest_that_does_not_stop() {
    if !has_kvm("it_does_not_wait_for_a_guest_that_does_not_stop") {
        return;
    }
    let lab = Lab::new("hello\n", Then::Halt);
    let mut running = lab.start("disk.layer");
    assert_eq!(running.line(), "hello\n");
    let (worker, _) = running.children().into_iter().find(|(_, line)| line.contains("boot-worker")).unwrap();
    kill_process(Pid::from_raw(worker).unwrap(), Signal::STOP).unwrap();
    let start = Instant::now();
    running.signal(Signal::TERM);
    std::thread::sleep(Duration::from_millis(100));
    running.signal(Signal::TERM);
    assert_eq!(running.ends().code(), Some(130));
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    lab.is_clean();
}

#[test]
fn what_is_missing_is_named() {
    let lab = Lab::new("", POWER_OFF);
    lab.boot("missing.layer").fails(1, &["missing.layer", "No such file", "did not start"]);
    lab.boot("disk.layer --disk missing.raw,format=raw").fails(1, &["missing.raw", "did not start"]);
    lab.boot("--disk kernel").fails(1, &["kernel: ", "DISK,format=raw", "did not start"]);
    lab.boot("disk.layer --initrd missing.img").fails(1, &["--initrd missing.img", "No such file"]);
    lab.boot("disk.layer --initrd tmp").fails(1, &["--initrd tmp", "not a file"]);
    lab.boot("disk.layer --console file=missing/log").fails(1, &["missing/log", "No such file"]);
    fs::create_dir(lab.place.path(&"x".repeat(100))).unwrap();
    let mut command = lab.command("disk.layer");
    command.env("TMPDIR", lab.place.path(&"x".repeat(100)));
    Answer::of(command.output().unwrap()).fails(1, &["too long", "TMPDIR"]);
    lab.is_clean();
    if has_kvm("what_is_missing_is_named") {
        let answer = lab.boot("--disk socket=missing.sock");
        assert_eq!(answer.stderr.matches("cannot connect").count(), 1, "{answer:?}");
        answer.fails(1, &["missing.sock: cannot connect", "No such file", "sapwood serve"]);
    }
    let place = Place::new();
    place.sapwood("boot --skip-probe --disk socket=s").fails(1, &["s", "--kernel"]);
    place.sapwood("boot --skip-probe --kernel missing").fails(1, &["--kernel missing", "No such file"]);
}

#[test]
fn what_cannot_be_meant_is_refused() {
    let place = Place::new();
    for (arguments, words) in [
        ("x,format=vmdk", "vmdk"),
        ("x,readonly=1", "unknown option"),
        ("x,format=qcow2", "readonly"),
        ("x --cpus 0", "--cpus"),
        ("x --memory 100", "MiB"),
        ("x --memory 0", "MiB"),
        ("x --console pty", "stdio, none or file=PATH"),
        ("x --initrd i", "--kernel"),
        ("x --cmdline c", "--kernel"),
        ("x --kernel k --entry e", "--entry"),
        ("x --timeout 0", "--timeout"),
        ("x --extract-kernel f", "--print-qemu"),
    ] {
        place.sapwood(&format!("boot {arguments}")).fails(64, &[words]);
    }
}

/// Either KVM runs kernels here, and the disk is looked at, or that is said first.
#[test]
fn where_kvm_does_not_work_it_says_so() {
    let place = Place::new();
    let works = place.sapwood("boot --print-qemu --kernel k").text().contains("-accel kvm");
    println!("KVM {} run a kernel here", if works { "can" } else { "cannot" });
    let answer = place.sapwood("boot missing.layer");
    if works {
        answer.fails(1, &["missing.layer"]);
    } else {
        assert_eq!(answer.stderr.lines().count(), 1, "{answer:?}");
        answer.fails(1, &["kvm", "--print-qemu"]);
    }
}
