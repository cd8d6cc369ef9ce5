//! A guest of a page of assembler (`guests/blk.S`) under the KVM of this machine drives a disk that Sapwood's own
//! backend serves: the wiring of KVM, interrupts, notifications and vhost-user.
#![allow(clippy::unwrap_used, reason = "tests")]

mod rig;
mod support;

use std::fs::File;
use std::io::Write as _;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use kvm_ioctls::VcpuExit;
use rig::{Guest, kvm};
use sapwood_vhost::features::protocol_offered;
use sapwood_vmm::Disk;
use sapwood_vmm::boot::{self, Payload};
use sapwood_vmm::bus::Bus;
use sapwood_vmm::interrupts::Interrupts;
use sapwood_vmm::layout::PCI_WINDOW;
use sapwood_vmm::machine::Machine;
use sapwood_vmm::virtio::Devices;
use support::eventually;
use support::server::{self, Process};
use vhost::vhost_user::VhostUserProtocolFeatures;

const SIZE: u64 = 4 << 20;
/// What the guest does.
const BLOCKS: u32 = 200;
const BLOCK: usize = 4096;
const REQUESTS: u32 = 2 * BLOCKS + 1;

/// Not a test by itself: the backend's process.
#[test]
fn server_process() {
    server::be_a_server();
}

/// The file holds what the guest wrote.
#[track_caller]
fn check_file(file: &Path) {
    let bytes = std::fs::read(file).unwrap();
    for (number, block) in (0..BLOCKS).zip(bytes.chunks(BLOCK)) {
        for (at, word) in (0..).zip(block.chunks(4)) {
            assert_eq!(u32::from_le_bytes(word.try_into().unwrap()), (number << 16) + at, "block {number}");
        }
    }
    assert!(bytes[BLOCKS as usize * BLOCK..].iter().all(|byte| *byte == 0), "nothing else");
}

/// What the guest says: an interrupt for each request, and at most so many more. A backend that starts a ring cannot know
/// whether the one before it had notified the guest, and one that is killed may do it at the last moment.
#[track_caller]
fn check_output(output: &str, more_max: u32) {
    let sectors = SIZE / 512;
    let expected = |interrupts: u32| {
        format!("sectors {sectors:08x}\n<>\ninterrupts {interrupts:08x}\nall blocks are the same\n")
    };
    assert!((0..=more_max).any(|more| output == expected(REQUESTS + more)), "{output}");
}

/// The whole machine, its filter of system calls included.
#[test]
fn a_guest_drives_a_disk() {
    if !kvm("a_guest_drives_a_disk") {
        return;
    }
    let guest = Guest::assemble("blk");
    let (file, socket) = server::disk(guest.folder(), SIZE);
    let _backend = Process::start(&file, &socket);
    let ended = guest.run(&["--disk", socket.to_str().unwrap(), "--cpus", "2"], "");
    assert_eq!(ended.status, Some(0), "{ended:?}");
    check_output(&ended.output, 1);
    check_file(&file);
}

/// What the guest needed this process for.
#[derive(Debug, Default)]
struct Exits {
    output: String,
    /// All, and those that reached devices on the PCI bus, while requests were made.
    during: (u32, u32),
    /// Those that reached devices on the PCI bus before.
    before: u32,
}

/// Runs the one processor here, counting.
fn count_exits(guest: &Guest, socket: &Path) -> (Exits, u64) {
    let memory_bytes = 64 << 20;
    let mut machine = Machine::new(memory_bytes, 1).unwrap();
    let kernel = File::open(guest.folder().join("guest.elf")).unwrap();
    let mut payload = Payload { kernel, initrd: None, cmdline: String::new() };
    let entry = boot::load(&machine.memory, memory_bytes, 1, &mut payload).unwrap();
    machine.enter(entry).unwrap();
    let interrupts = Interrupts::new(Arc::clone(&machine.vm)).unwrap();
    let disks = [Disk { socket: socket.to_owned() }];
    let devices = Devices::new(Arc::clone(&machine.vm), &machine.memory, &interrupts, &disks, 1).unwrap();
    let (mut ports, mut memory) = (Bus::default(), Bus::default());
    devices.attach(&mut ports, &mut memory);

    let mut exits = Exits::default();
    let mut requests = false;
    let mut vcpu = machine.vcpus.remove(0);
    loop {
        let exit = vcpu.run().unwrap();
        let mut on_bus = false;
        match exit {
            VcpuExit::IoOut(0x3f8, data) => {
                exits.output.push(data[0].into());
                requests = exits.output.ends_with('<');
                if exits.output.ends_with(['<', '>']) {
                    continue;
                }
            }
            VcpuExit::IoOut(0x600, _) => return (exits, devices.notified()),
            VcpuExit::IoIn(port, data) => ports.read(port.into(), data),
            VcpuExit::IoOut(port, data) => ports.write(port.into(), data),
            VcpuExit::MmioRead(address, data) => {
                on_bus = PCI_WINDOW.contains(&address);
                memory.read(address, data);
            }
            VcpuExit::MmioWrite(address, data) => {
                on_bus = PCI_WINDOW.contains(&address);
                memory.write(address, data);
            }
            other => panic!("{other:?}"),
        }
        if requests {
            exits.during.0 += 1;
            exits.during.1 += u32::from(on_bus);
        } else {
            exits.before += u32::from(on_bus);
        }
    }
}

/// No request passes through the process of the machine: while the guest makes hundreds of them, its processor does
/// not leave KVM even once.
#[test]
fn requests_do_not_pass_through_the_machine() {
    if !kvm("requests_do_not_pass_through_the_machine") {
        return;
    }
    let guest = Guest::assemble("blk");
    let (file, socket) = server::disk(guest.folder(), SIZE);
    let (_server, _) = server::serve(&file, &socket, 1, false);
    let (exits, notified) = within(Duration::from_secs(120), || count_exits(&guest, &socket));
    check_output(&exits.output, 1);
    assert!(exits.before > 20, "setting up does: {exits:?}");
    assert_eq!((exits.during, notified), ((0, 0), 0), "{exits:?}");
    check_file(&file);
}

/// Ends the whole process if `action` does not: a processor that does not come back cannot be stopped from here.
fn within<T>(limit: Duration, action: impl FnOnce() -> T) -> T {
    let done = Arc::new(AtomicBool::new(false));
    let seen = Arc::clone(&done);
    let started = Instant::now();
    let thread = std::thread::spawn(move || {
        while !seen.load(Ordering::Relaxed) {
            if started.elapsed() > limit {
                eprintln!("the guest does not end");
                std::process::abort();
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    });
    let result = action();
    done.store(true, Ordering::Relaxed);
    thread.join().unwrap();
    result
}

/// A guest does not notice that its disk's backend dies and comes back: at rest, and with a request in flight.
#[test]
fn a_backend_is_replaced_under_a_running_guest() {
    if !kvm("a_backend_is_replaced_under_a_running_guest") {
        return;
    }
    let guest = Guest::assemble("blk");
    let (file, socket) = server::disk(guest.folder(), SIZE);
    let mut backend = Process::start(&file, &socket);
    let mut machine = guest.start(&["--disk", socket.to_str().unwrap(), "--cmdline", "step"]);
    let start = format!("sectors {:08x}\n<", SIZE / 512);
    assert_eq!(rig::read(machine.output(), start.len()), start);
    let mut left = BLOCKS as usize;
    let mut step = |machine: &mut rig::Process, count: usize| {
        left -= count;
        machine.input().write_all(&vec![b'x'; count]).unwrap();
    };
    let written = |number: usize| std::fs::read(&file).unwrap()[number * BLOCK + 2] == number as u8;
    step(&mut machine, 2);
    eventually("the second block", || written(1));
    // The write may have been seen before it was answered.
    std::thread::sleep(Duration::from_millis(50));
    backend.kill();
    backend = Process::start(&file, &socket);
    step(&mut machine, 2);
    eventually("a block by the new backend", || written(3));

    backend.pause();
    step(&mut machine, 1);
    std::thread::sleep(Duration::from_millis(100));
    backend.kill();
    assert!(!written(4), "it was in flight");
    let _backend = Process::start(&file, &socket);
    if protocol_offered().contains(VhostUserProtocolFeatures::INFLIGHT_SHMFD) {
        step(&mut machine, BLOCKS as usize - 5);
        let ended = machine.end();
        assert_eq!(ended.status, Some(0), "{}", ended.messages);
        check_output(&(start + &ended.output), 8);
        check_file(&file);
    } else {
        let ended = machine.end();
        assert!(ended.status == Some(1) && ended.messages.contains("INFLIGHT"), "{ended:?}");
    }
}
