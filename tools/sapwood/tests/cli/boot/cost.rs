//! What a start costs: time until the guest says something, and the memory of the processes beside the guest's.

use std::fs;
use std::io::Write;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use super::guests::Then;
use super::{Lab, has_kvm};

/// Starts of each machine; a median is printed.
const STARTS: usize = 15;
/// More resident memory than this, in KiB, has no process of an empty machine: something was left there that grows with a disk,
/// a kernel or the guest.
const RESIDENT_KIB_MAX: u64 = 64 << 10;

/// What one process has used when the guest says its first word.
#[derive(Clone, Debug)]
struct Cost {
    name: &'static str,
    cpu: Duration,
    resident_kib: u64,
    private_kib: u64,
}

/// What a process has used; of its threads, those that run.
fn cost(name: &'static str, process: u32) -> Cost {
    let tasks = fs::read_dir(format!("/proc/{process}/task")).expect("it runs").flatten();
    let nanoseconds = tasks.filter_map(|task| {
        let times = fs::read_to_string(task.path().join("schedstat")).ok()?;
        times.split(' ').next()?.parse::<u64>().ok()
    });
    let cpu = Duration::from_nanos(nanoseconds.sum());
    let (mut guests, mut resident_kib, mut private_kib) = (false, 0, 0);
    for line in fs::read_to_string(format!("/proc/{process}/smaps")).expect("it runs").lines() {
        let mut words = line.split_whitespace();
        let first = words.next().unwrap_or_default();
        let number = || line.split_whitespace().nth(1).and_then(|word| word.parse::<u64>().ok()).unwrap_or(0);
        match first {
            _ if !first.ends_with(':') => guests = line.contains("memfd:guest-memory"),
            "Rss:" if !guests => resident_kib += number(),
            "Private_Clean:" | "Private_Dirty:" if !guests => private_kib += number(),
            _ => {}
        }
    }
    Cost { name, cpu, resident_kib, private_kib }
}

/// Starts a machine once: the time until its guest says its first word, and the processes.
fn start(lab: &Lab, arguments: &str) -> (Duration, Vec<Cost>) {
    let begin = Instant::now();
    let mut running = lab.start(arguments);
    assert_eq!(running.line(), "hello\n");
    let wall = begin.elapsed();
    let mut costs = vec![cost("supervisor", running.child.id())];
    for (pid, line) in running.children() {
        let name = if line.contains("boot-worker") { "worker" } else { "server" };
        costs.push(cost(name, pid.unsigned_abs()));
    }
    costs.sort_by_key(|cost| std::cmp::Reverse(cost.name));
    running.signal(Signal::TERM);
    assert_eq!(running.ends().code(), Some(130));
    (wall, costs)
}

fn median<T: Ord>(mut values: Vec<T>) -> T {
    values.sort();
    values.swap_remove(values.len() / 2)
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

#[test]
fn what_a_start_costs() {
    if !has_kvm("what_a_start_costs") {
        return;
    }
    let lab = Lab::new("hello\n", Then::Halt);
    let mut out = std::io::stderr();
    for (machine, arguments, processes) in [("no disk", "", 2), ("a layer", "disk.layer", 3)] {
        let starts: Vec<_> = (0..STARTS).map(|_| start(&lab, arguments)).collect();
        let wall = median(starts.iter().map(|(wall, _)| *wall).collect());
        let cpu = median(starts.iter().map(|(_, costs)| costs.iter().map(|c| c.cpu).sum()).collect());
        let _ = writeln!(
            out,
            "{machine}: from exec to the guest's first word {:.1} ms, processor time of all {:.1} ms",
            milliseconds(wall),
            milliseconds(cpu)
        );
        for index in 0..processes {
            let all: Vec<&Cost> = starts.iter().map(|(_, costs)| &costs[index]).collect();
            let middle = |value: fn(&Cost) -> u64| median(all.iter().map(|cost| value(cost)).collect());
            let resident = middle(|cost| cost.resident_kib);
            let _ = writeln!(
                out,
                "  {}: {:.1} ms of processor time; beside the guest's memory {resident} KiB resident, {} KiB of them its own",
                all[0].name,
                milliseconds(median(all.iter().map(|cost| cost.cpu).collect())),
                middle(|cost| cost.private_kib),
            );
            assert!(all.iter().all(|cost| cost.name == all[0].name), "{all:?}");
            assert!(resident > 0 && resident < RESIDENT_KIB_MAX, "{all:?}");
        }
        assert!(starts.iter().all(|(_, costs)| costs.len() == processes), "{starts:?}");
    }
    lab.is_clean();
}
