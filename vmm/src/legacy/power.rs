//! The ports through which a guest powers off, starts again, or reports that its kernel panicked.

use std::sync::{Arc, Mutex};

use crate::boot::acpi::{RESET_VALUE, SLEEP_TYPE_OFF};
use crate::bus::{Bus, BusDevice};
use crate::config::Ending;
use crate::layout::{PVPANIC_PORT, RESET_PORT, SLEEP_PORTS};
use crate::machine::ending::Verdict;

/// Command port of the keyboard controller, which resets the processor of a PC.
const KEYBOARD_COMMAND: u64 = 0x64;
/// The command that pulses the processor's reset line.
const KEYBOARD_RESET: u8 = 0xfe;

/// The sleep control register (ACPI 6.5, section 4.8.3.7): the type in bits 2 to 4, and the bit that does it.
const SLEEP_TYPE_SHIFT: u8 = 2;
const SLEEP_TYPE_MASK: u8 = 7;
const SLEEP_ENABLE: u8 = 1 << 5;

/// The kernel panicked and stays so (QEMU's docs/specs/pvpanic.rst).
const PVPANIC_PANICKED: u8 = 1 << 0;
/// The kernel panicked, and its crash kernel takes over: the machine goes on.
const PVPANIC_CRASH_LOADED: u8 = 1 << 1;

/// One of these ports.
pub struct PowerPort {
    verdict: Verdict,
    /// What it reads as.
    reads: u8,
    /// How a value that is written ends the machine.
    judge: fn(u8) -> Option<Ending>,
}

impl PowerPort {
    /// Gives all of them their places.
    pub fn attach(ports: &mut Bus, verdict: &Verdict) {
        let mut place = |port: u64, reads, judge| {
            let device = Self { verdict: verdict.clone(), reads, judge };
            ports.insert(port..port + 1, Arc::new(Mutex::new(device)));
        };
        place(SLEEP_PORTS.start, 0, sleep);
        // The sleep status register: nothing here ever wakes up.
        place(SLEEP_PORTS.start + 1, 0, |_| None);
        place(RESET_PORT, 0, |value| (value == RESET_VALUE).then_some(Ending::Reboot));
        // Reads as a controller that is ready and has nothing to say, so that nobody waits for it.
        place(KEYBOARD_COMMAND, 0, |value| (value == KEYBOARD_RESET).then_some(Ending::Reboot));
        // Reads as the events that it knows.
        let known = PVPANIC_PANICKED | PVPANIC_CRASH_LOADED;
        place(PVPANIC_PORT, known, |events| (events & PVPANIC_PANICKED != 0).then_some(Ending::Panic));
    }
}

fn sleep(value: u8) -> Option<Ending> {
    let off = value >> SLEEP_TYPE_SHIFT & SLEEP_TYPE_MASK == SLEEP_TYPE_OFF;
    (value & SLEEP_ENABLE != 0 && off).then_some(Ending::PowerOff)
}

impl BusDevice for PowerPort {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data[0] = self.reads;
    }

    fn write(&mut self, _offset: u64, data: &[u8]) {
        if let Some(ending) = (self.judge)(data[0]) {
            self.verdict.end(Ok(ending));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(port: u64, value: u8, expected: Option<Ending>) {
        let (verdict, mut ports) = (Verdict::new().unwrap(), Bus::default());
        PowerPort::attach(&mut ports, &verdict);
        ports.write(port, &[value]);
        assert_eq!(verdict.take().map(|ending| ending.unwrap()), expected);
    }

    #[test]
    fn what_ends_the_machine() {
        check(0x600, 5 << 2 | 1 << 5, Some(Ending::PowerOff));
        check(0x600, 5 << 2, None);
        check(0x600, 3 << 2 | 1 << 5, None);
        check(0x601, 0xff, None);
        check(0x604, 1, Some(Ending::Reboot));
        check(0x604, 2, None);
        check(0x64, 0xfe, Some(Ending::Reboot));
        check(0x64, 0xd1, None);
        check(0x505, 1, Some(Ending::Panic));
        check(0x505, 2, None);
    }

    #[test]
    fn what_the_ports_read_as() {
        let mut ports = Bus::default();
        PowerPort::attach(&mut ports, &Verdict::new().unwrap());
        for (port, expected) in [(0x600, 0), (0x604, 0), (0x64, 0), (0x505, 3), (0x506, 0xff)] {
            let mut data = [0];
            ports.read(port, &mut data);
            assert_eq!(data, [expected], "port {port:#x}");
        }
    }
}
