//! The serial port with a pipe at each end.

use super::*;

use std::time::{Duration, Instant};

const DATA: u64 = 0x3f8;
const INTERRUPTS: u64 = 0x3f9;
const LINE_STATUS: u64 = 0x3fd;
const MODEM: u64 = 0x3fc;
const LIMIT: Duration = Duration::from_secs(20);

struct Rig {
    ports: Bus,
    input: Option<Input>,
    typed: io::PipeWriter,
    shown: io::PipeReader,
    verdict: Verdict,
}

fn rig(escape: bool) -> Rig {
    let (input, typed) = io::pipe().unwrap();
    let (shown, output) = io::pipe().unwrap();
    let (input, output) = (std::os::fd::OwnedFd::from(input), std::os::fd::OwnedFd::from(output));
    let console = Console { input: Some(input.into()), output: output.into(), escape };
    let (mut ports, verdict) = (Bus::default(), Verdict::new().unwrap());
    let line = EventFd::new(libc::EFD_NONBLOCK).unwrap();
    let input = attach(&mut ports, console, line, &verdict).unwrap();
    Rig { ports, input, typed, shown, verdict }
}

impl Rig {
    fn get(&self, port: u64) -> u8 {
        let mut byte = [0];
        self.ports.read(port, &mut byte);
        byte[0]
    }

    /// Reads as a guest does, until so many bytes have come.
    fn take(&self, count: usize) -> Vec<u8> {
        let deadline = Instant::now() + LIMIT;
        let mut bytes = Vec::new();
        while bytes.len() < count {
            assert!(Instant::now() < deadline, "only {} bytes came", bytes.len());
            if self.get(LINE_STATUS) & 1 == 1 {
                bytes.push(self.get(DATA));
            } else {
                thread::yield_now();
            }
        }
        bytes
    }
}

#[test]
fn input_is_not_lost_when_the_guest_is_slow() {
    let mut rig = rig(false);
    let sent: Vec<u8> = (0..5000u32).map(|n| (n % 251) as u8).collect();
    rig.ports.write(INTERRUPTS, &[RECEIVED_DATA]);
    rig.typed.write_all(&sent).unwrap();
    thread::sleep(Duration::from_millis(50));
    assert_eq!(rig.take(sent.len()), sent);
    rig.input.take().unwrap().stop();
}

#[test]
fn input_waits_while_the_port_talks_to_itself() {
    const LOOP: u8 = 1 << 4;
    let mut rig = rig(false);
    rig.ports.write(INTERRUPTS, &[RECEIVED_DATA]);
    rig.ports.write(MODEM, &[LOOP]);
    rig.typed.write_all(b"later").unwrap();
    thread::sleep(Duration::from_millis(50));
    assert_eq!(rig.get(LINE_STATUS) & 1, 0);
    rig.ports.write(MODEM, &[0]);
    assert_eq!(rig.take(5), b"later");
}

#[test]
fn input_waits_for_a_driver() {
    let mut rig = rig(false);
    rig.typed.write_all(b"early").unwrap();
    // A driver tries the register out, then it throws away what it finds.
    for enabled in [ALL_INTERRUPTS, 0] {
        rig.ports.write(INTERRUPTS, &[enabled]);
        thread::sleep(Duration::from_millis(50));
        assert_eq!(rig.get(LINE_STATUS) & 1, 0);
    }
    rig.ports.write(INTERRUPTS, &[RECEIVED_DATA | 4]);
    assert_eq!(rig.take(5), b"early");
}

#[test]
fn output_and_the_escape() {
    let mut rig = rig(true);
    rig.ports.write(DATA, b"o");
    rig.ports.write(DATA, b"k");
    let mut shown = [0; 2];
    rig.shown.read_exact(&mut shown).unwrap();
    assert_eq!(&shown, b"ok");
    rig.typed.write_all(b"\x01x").unwrap();
    eventually_stops(&rig);
}

#[track_caller]
fn eventually_stops(rig: &Rig) {
    let deadline = Instant::now() + LIMIT;
    while !rig.verdict.said() {
        assert!(Instant::now() < deadline, "the escape is not seen");
        thread::yield_now();
    }
    assert!(matches!(rig.verdict.take(), Some(Ok(Ending::Stopped))));
}

#[test]
fn the_escape_is_seen_where_the_guest_takes_no_input() {
    let mut rig = rig(true);
    rig.typed.write_all(&[b'a'; 3 * TYPED_BYTES_MAX]).unwrap();
    thread::sleep(Duration::from_millis(50));
    rig.typed.write_all(b"\x01x").unwrap();
    eventually_stops(&rig);
}

#[test]
fn the_escape_is_seen_where_nobody_takes_the_output() {
    let mut rig = rig(true);
    rig.ports.write(INTERRUPTS, &[RECEIVED_DATA]);
    let ports = rig.ports.clone();
    // More than a pipe holds.
    let writer = thread::spawn(move || (0..100_000).for_each(|_| ports.write(DATA, b"x")));
    thread::sleep(Duration::from_millis(100));
    rig.typed.write_all(b"a").unwrap();
    thread::sleep(Duration::from_millis(50));
    rig.typed.write_all(b"\x01x").unwrap();
    eventually_stops(&rig);
    writer.join().unwrap();
}

#[test]
fn nobody_who_reads_the_output_does_not_hold_the_end_up() {
    let rig = rig(false);
    let Rig { ports, verdict, .. } = &rig;
    thread::scope(|scope| {
        // More than a pipe holds.
        let writer = scope.spawn(|| (0..100_000).for_each(|_| ports.write(DATA, b"x")));
        thread::sleep(Duration::from_millis(100));
        assert!(!writer.is_finished());
        verdict.end(Ok(Ending::Stopped));
        let deadline = Instant::now() + LIMIT * 10;
        while !writer.is_finished() {
            assert!(Instant::now() < deadline);
            thread::sleep(Duration::from_millis(10));
        }
    });
}
