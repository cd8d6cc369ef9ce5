//! The serial port: a 16550 whose output goes to a file, and a thread that feeds it what is typed.
//!
//! The port holds 64 bytes for the guest. What is typed beyond that stays where it is (in a pipe, in the terminal) until
//! the guest has read on: nothing is lost, and nothing is kept without bound. What is typed before the guest asks for
//! interrupts for it waits as well, because a driver that starts throws away what it finds in the port.
//!
//! Where the escape is looked for, input is read on all the same, since a guest that hangs takes none: what the guest
//! does not take of the last [`TYPED_BYTES_MAX`] is lost then.

use std::fs::File;
use std::io::{self, Read as _, Write};
use std::sync::{Arc, Mutex, TryLockError};
use std::thread::{self, JoinHandle};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vm_superio::serial::SerialEvents;
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::EventFd;

use super::escape::Escape;
use crate::bus::{Bus, BusDevice};
use crate::config::{Console, Ending};
use crate::event::Event;
use crate::layout::SERIAL_PORTS;
use crate::machine::ending::Verdict;

/// What is read from the input at once.
const INPUT_BYTES: usize = 256;
/// What is kept of input that a guest does not take, where the escape is looked for. A terminal keeps as much.
const TYPED_BYTES_MAX: usize = 4096;
/// Two registers on which it depends whether input can be put into the port: a change lets the thread look again.
const INTERRUPT_ENABLE: u64 = 1;
const MODEM_CONTROL: u64 = 4;
/// Interrupts for received data, and all of those of a 16550. A driver that sets all of them tries the register out.
const RECEIVED_DATA: u8 = 1;
const ALL_INTERRUPTS: u8 = 0xf;
/// How often output that nobody takes is looked at for the end of the machine.
const OUTPUT_POLL: Timespec = Timespec { tv_sec: 0, tv_nsec: 20_000_000 };

/// The port as the guest sees it.
pub struct Port {
    serial: Serial<Line, Arc<Events>, Output>,
    events: Arc<Events>,
}

/// The interrupt line.
struct Line(EventFd);

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// Tells the thread of the input that the port has room.
struct Events {
    room: Event,
}

impl SerialEvents for Events {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}

    fn in_buffer_empty(&self) {
        self.room.signal();
    }
}

/// Where the guest's output goes. A reader who is slow makes the guest wait; one who is gone does not.
struct Output {
    file: File,
    verdict: Verdict,
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // A processor that waits here must still see the machine end.
        loop {
            let ended = self.verdict.said();
            let patience = if ended { Timespec::default() } else { OUTPUT_POLL };
            let mut ready = [PollFd::new(&self.file, PollFlags::OUT)];
            match poll(&mut ready, Some(&patience)) {
                Ok(0) | Err(rustix::io::Errno::INTR) if ended => return Ok(bytes.len()),
                Ok(0) | Err(rustix::io::Errno::INTR) => {}
                Ok(_) => match self.file.write(bytes) {
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    other => return other,
                },
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl BusDevice for Port {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        // Registers have one byte; wider accesses go to as many of them, as on the bus of a PC.
        for (register, byte) in (offset..).zip(data) {
            *byte = self.serial.read(register as u8);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        for (register, &byte) in (offset..).zip(data) {
            if let Err(error) = self.serial.write(register as u8, byte) {
                log::debug!("serial port: {error:?}");
            }
            if register == MODEM_CONTROL || register == INTERRUPT_ENABLE {
                self.events.room.signal();
            }
        }
    }
}

/// Gives the port its place, and starts the thread of the input if there is one.
///
/// # Errors
/// No more file descriptors or threads.
pub fn attach(
    ports: &mut Bus,
    console: Console,
    line: EventFd,
    verdict: &Verdict,
) -> io::Result<Option<Input>> {
    let events = Arc::new(Events { room: Event::new()? });
    let output = Output { file: console.output, verdict: verdict.clone() };
    let serial = Serial::with_events(Line(line), events.clone(), output);
    let port = Arc::new(Mutex::new(Port { serial, events: events.clone() }));
    ports.insert(SERIAL_PORTS, port.clone());
    console.input.map(|file| Input::start(file, console.escape, port, events, verdict)).transpose()
}

/// The thread that feeds the port.
pub struct Input {
    thread: JoinHandle<()>,
    stop: Arc<Event>,
}

/// Its state.
struct Feeder {
    /// `None` once it has ended.
    file: Option<File>,
    escape: Option<Escape>,
    port: Arc<Mutex<Port>>,
    events: Arc<Events>,
    stop: Arc<Event>,
    verdict: Verdict,
    /// Read, and not yet in the port.
    waiting: Vec<u8>,
    /// A processor is at the port: it may wait there for somebody who takes its output.
    busy: bool,
}

impl Input {
    fn start(
        file: File,
        escape: bool,
        port: Arc<Mutex<Port>>,
        events: Arc<Events>,
        verdict: &Verdict,
    ) -> io::Result<Self> {
        let stop = Arc::new(Event::new()?);
        let mut feeder = Feeder {
            file: Some(file),
            escape: escape.then(Escape::default),
            port,
            events,
            stop: stop.clone(),
            verdict: verdict.clone(),
            waiting: Vec::new(),
            busy: false,
        };
        let thread = thread::Builder::new().name("console".to_owned()).spawn(move || {
            let _on_panic = feeder.verdict.on_panic();
            if let Err(error) = feeder.run() {
                log::warn!("the console takes no more input: {error}");
            }
        })?;
        Ok(Self { thread, stop })
    }

    /// Ends the thread.
    pub fn stop(self) {
        self.stop.signal();
        // It has nothing to say: its errors have been logged.
        let _ = self.thread.join();
    }
}

impl Feeder {
    fn run(&mut self) -> io::Result<()> {
        loop {
            let (stop, room, readable) = self.wait()?;
            if stop {
                return Ok(());
            }
            if room {
                self.events.room.clear();
            }
            if readable {
                self.read()?;
            }
            self.feed();
        }
    }

    /// Waits for something to do: the end, room in the port, input (as long as none waits, or an escape may come).
    fn wait(&self) -> io::Result<(bool, bool, bool)> {
        let mut ready =
            vec![PollFd::new(&*self.stop, PollFlags::IN), PollFd::new(&self.events.room, PollFlags::IN)];
        if let Some(file) = self.file.as_ref().filter(|_| self.waiting.is_empty() || self.escape.is_some()) {
            ready.push(PollFd::new(file, PollFlags::IN));
        }
        match poll(&mut ready, self.busy.then_some(&OUTPUT_POLL)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let happened = |index: usize| ready.get(index).is_some_and(|fd| !fd.revents().is_empty());
        Ok((happened(0), happened(1), happened(2)))
    }

    fn read(&mut self) -> io::Result<()> {
        let Some(file) = &mut self.file else { return Ok(()) };
        let mut bytes = [0; INPUT_BYTES];
        let read = match file.read(&mut bytes) {
            Ok(0) => {
                self.file = None;
                return Ok(());
            }
            Ok(read) => read,
            Err(error) if matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock) => {
                return Ok(());
            }
            Err(error) => return Err(error),
        };
        match &mut self.escape {
            Some(escape) => {
                if escape.pass(&bytes[..read], &mut self.waiting) {
                    self.verdict.end(Ok(Ending::Stopped));
                }
                self.waiting.truncate(TYPED_BYTES_MAX);
            }
            None => self.waiting.extend_from_slice(&bytes[..read]),
        }
        Ok(())
    }

    /// Puts into the port what has room there.
    fn feed(&mut self) {
        self.busy = false;
        if self.waiting.is_empty() {
            return;
        }
        let mut port = match self.port.try_lock() {
            Ok(port) => port,
            Err(TryLockError::Poisoned(port)) => port.into_inner(),
            Err(TryLockError::WouldBlock) => {
                self.busy = true;
                return;
            }
        };
        let enabled = port.serial.state().interrupt_enable;
        let wanted = enabled & RECEIVED_DATA != 0 && enabled != ALL_INTERRUPTS;
        if !wanted || port.serial.fifo_capacity() == 0 {
            return;
        }
        match port.serial.enqueue_raw_bytes(&self.waiting) {
            Ok(taken) => drop(self.waiting.drain(..taken)),
            Err(error) => log::debug!("serial port: {error:?}"),
        }
    }
}

#[cfg(test)]
mod tests;
