//! Small guests under the KVM of this machine: how they start, what they see, how they end, what that costs.

#![allow(clippy::unwrap_used)]

mod rig;

use std::io::Write as _;
use std::time::{Duration, Instant};

use rig::{Ended, Guest, cpu_time, kvm, own_bytes, read};

/// Runs `ends.S` with a letter; checks what comes of it.
#[track_caller]
fn check_end(test: &str, letter: &str, status: i32, message: &str) {
    if !kvm(test) {
        return;
    }
    let ended = Guest::assemble("ends").run(&["--cmdline", letter], "");
    assert_eq!((ended.output.as_str(), ended.status), ("on\n", Some(status)), "{ended:?}");
    assert!(ended.messages.contains(message), "{ended:?}");
}

#[test]
fn a_guest_powers_off() {
    check_end("a_guest_powers_off", "o", 0, "PowerOff");
}

/// Each processor needs a descriptor, and each queue several.
#[test]
fn many_processors_have_their_descriptors() {
    if !kvm("many_processors_have_their_descriptors") {
        return;
    }
    let ended = Guest::assemble("ends").start_limited(40, &["--cpus", "64", "--cmdline", "o"]).end();
    assert_eq!((ended.output.as_str(), ended.status), ("on\n", Some(0)), "{ended:?}");
}

#[test]
fn a_guest_starts_again() {
    check_end("a_guest_starts_again", "r", 10, "Reboot");
    check_end("a_guest_starts_again", "k", 10, "Reboot");
}

#[test]
fn a_guest_panics() {
    check_end("a_guest_panics", "p", 11, "Panic");
}

#[test]
fn a_processor_that_faults_three_times() {
    check_end("a_processor_that_faults_three_times", "t", 12, "Crash");
}

#[test]
fn a_guest_that_jumps_to_where_nothing_is() {
    // KVM cannot go on, and the error says where the processor was.
    check_end("a_guest_that_jumps_to_where_nothing_is", "x", 1, "rip=0xd0000000");
}

#[test]
fn a_guest_touches_everything() {
    if !kvm("a_guest_touches_everything") {
        return;
    }
    let ended = Guest::assemble("ports").run(&[], "");
    let expected = "a string of accesses\nall harmless\n";
    assert_eq!((ended.output.as_str(), ended.status), (expected, Some(0)), "{ended:?}");
}

#[test]
fn a_second_processor() {
    if !kvm("a_second_processor") {
        return;
    }
    let ended = Guest::assemble("processors").run(&["--cpus", "2"], "");
    assert_eq!((ended.output.as_str(), ended.status), ("the second processor runs\n", Some(0)), "{ended:?}");
}

#[test]
fn where_a_bios_would_start_again() {
    if !kvm("where_a_bios_would_start_again") {
        return;
    }
    let ended = Guest::assemble("processors").run(&["--cpus", "2", "--cmdline", "b"], "");
    assert_eq!((ended.output.as_str(), ended.status), ("", Some(10)), "{ended:?}");
}

#[test]
fn the_console_loses_nothing() {
    if !kvm("the_console_loses_nothing") {
        return;
    }
    let guest = Guest::assemble("console");
    // Far more than the port holds, before the guest even starts.
    let text = "0123456789abcdef".repeat(300);
    for mode in ["polling", "interrupts"] {
        let ended = guest.run(&["--cmdline", mode], &format!("{text}q"));
        assert_eq!(
            (ended.output, ended.status),
            (format!("ready\n{text}"), Some(0)),
            "{mode}: {}",
            ended.messages
        );
    }
}

#[test]
fn the_escape_ends_a_guest() {
    if !kvm("the_escape_ends_a_guest") {
        return;
    }
    let ended = Guest::assemble("console").run(&["--escape", "--cmdline", "p"], "a\x01\x01\x01x");
    assert_eq!(ended.status, Some(13), "{ended:?}");
}

#[test]
fn a_guest_that_halts_is_stopped() {
    if !kvm("a_guest_that_halts_is_stopped") {
        return;
    }
    let guest = Guest::assemble("ends");
    let mut process = guest.start(&["--escape", "--cpus", "2", "--cmdline", "h"]);
    assert_eq!(read(process.output(), 3), "on\n");
    let asked = Instant::now();
    process.input().write_all(b"\x01x").unwrap();
    let ended = process.end();
    assert_eq!(ended.status, Some(13), "{ended:?}");
    assert!(asked.elapsed() < Duration::from_secs(5), "{:?}", asked.elapsed());
}

#[test]
fn bad_payloads_are_errors() {
    if !kvm("bad_payloads_are_errors") {
        return;
    }
    let guest = Guest::assemble("ends");
    let fails = |ended: Ended, message: &str| {
        assert!(ended.status == Some(1) && ended.messages.contains(message), "{message}: {ended:?}");
    };
    fails(guest.run(&["--cmdline", &"x".repeat(70_000)], ""), "command line has 70000 bytes");
    fails(guest.run(&["--cpus", "0"], ""), "processors, not 0");
    fails(guest.run(&["--mem", "1"], ""), "bytes of memory");
    let large = guest.folder().join("initrd");
    std::fs::File::create(&large).unwrap().set_len(64 << 20).unwrap();
    fails(guest.run(&["--initrd", &large.to_string_lossy()], ""), "does not fit");
}

#[test]
fn every_thread_is_restricted() {
    if !kvm("every_thread_is_restricted") {
        return;
    }
    let guest = Guest::assemble("ends");
    let mut process = guest.start(&["--cpus", "2", "--cmdline", "h"]);
    assert_eq!(read(process.output(), 1), "o");
    let tasks = std::fs::read_dir(format!("/proc/{}/task", process.id())).unwrap();
    let mut restricted = 0;
    for task in tasks {
        let status = std::fs::read_to_string(task.unwrap().path().join("status")).unwrap();
        // A worker of the kernel's may be among them; it makes no system calls.
        if !status.contains("Name:\tkvm") {
            assert!(status.contains("Seccomp:\t2"), "{status}");
            restricted += 1;
        }
    }
    assert_eq!(restricted, 5, "the main thread, the console, random numbers and two processors");
}

#[test]
fn what_a_start_costs() {
    if !kvm("what_a_start_costs") {
        return;
    }
    let guest = Guest::assemble("ends");
    let mut best: Option<(Duration, Duration)> = None;
    let mut memory = (0, 0);
    for _ in 0..5 {
        let mut process = guest.start(&["--cmdline", "h"]);
        assert_eq!(read(process.output(), 1), "o");
        let (wall, cpu) = (process.age(), cpu_time(process.id()));
        best = Some(best.map_or((wall, cpu), |(w, c)| (w.min(wall), c.min(cpu))));
        memory = own_bytes(process.id());
    }
    let (wall, cpu) = best.unwrap();
    let _ = writeln!(
        std::io::stderr(),
        "from exec to the guest's first byte: {:.1} ms, {:.1} ms of CPU; beside the guest's memory {} KiB resident, {} KiB of them private",
        wall.as_secs_f64() * 1e3,
        cpu.as_secs_f64() * 1e3,
        memory.0 >> 10,
        memory.1 >> 10
    );
    assert!(memory.0 < 32 << 20, "{memory:?}");
}
