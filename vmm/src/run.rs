//! A machine from its beginning to its end.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Barrier};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::boot::{self, BootError, Payload};
use crate::bus::Bus;
use crate::config::{Config, Ending};
use crate::interrupts::{self, Interrupts, borrow};
use crate::layout::SERIAL_IRQ;
use crate::legacy::power::PowerPort;
use crate::legacy::serial;
use crate::machine::ending::Verdict;
use crate::machine::processor::{Cpu, Threads};
use crate::machine::{Machine, MachineError};
use crate::seccomp::{self, FilterError};
use crate::virtio::{self, Devices, Failure};

/// Why a machine could not be started, or could not go on.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The machine under the devices.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// What it should start.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// Interrupts.
    #[error(transparent)]
    Interrupts(#[from] interrupts::Error),
    /// A device, most likely a disk whose backend is not there or has gone.
    #[error(transparent)]
    Device(#[from] virtio::Error),
    /// The filter of system calls.
    #[error(transparent)]
    Filter(#[from] FilterError),
    /// The host lacks something.
    #[error("{what}: {error}")]
    Host {
        /// What was tried.
        what: &'static str,
        /// What happened.
        error: io::Error,
    },
    /// A processor that cannot go on, for a reason that lies in the host.
    #[error("processor {id}: {what}; {state}")]
    Processor {
        /// Its number.
        id: usize,
        /// What happened.
        what: String,
        /// Its registers.
        state: String,
    },
    /// A thread that does not stop.
    #[error("thread {0} does not stop")]
    Stuck(String),
    /// A thread that panicked.
    #[error("a thread of the machine panicked")]
    Thread,
}

impl Error {
    fn host(what: &'static str) -> impl Fn(io::Error) -> Self {
        move |error| Self::Host { what, error }
    }
}

/// Runs a machine until it ends; `stop` ends it from outside once it becomes readable.
///
/// From the moment when the guest starts, the whole process may only make the system calls that [`seccomp`] lists. So a
/// process runs one machine, and another one for the guest that starts again.
///
/// # Errors
/// The machine cannot be made or started, or a processor cannot go on.
pub fn run(config: Config, stop: BorrowedFd<'_>) -> Result<Ending, Error> {
    allow_descriptors();
    let mut machine = Machine::new(config.memory_bytes, config.cpus)?;
    let mut payload = Payload { kernel: config.kernel, initrd: config.initrd, cmdline: config.cmdline };
    let entry = boot::load(&machine.memory, config.memory_bytes, config.cpus, &mut payload)?;
    drop(payload);
    machine.enter(entry)?;

    let interrupts = Interrupts::new(Arc::clone(&machine.vm))?;
    let devices =
        Devices::new(Arc::clone(&machine.vm), &machine.memory, &interrupts, &config.disks, config.cpus)?;

    let verdict = Verdict::new().map_err(Error::host("making an event"))?;
    let (mut ports, mut memory) = (Bus::default(), Bus::default());
    PowerPort::attach(&mut ports, &verdict);
    devices.attach(&mut ports, &mut memory);
    let line = interrupts.line(SERIAL_IRQ)?;
    let input = serial::attach(&mut ports, config.console, line, &verdict);
    let input = input.map_err(Error::host("starting the serial port"))?;

    let vcpus = std::mem::take(&mut machine.vcpus).into_iter().enumerate();
    let cpus: Vec<Cpu> = vcpus
        .map(|(id, vcpu)| Cpu {
            id,
            vcpu,
            ports: ports.clone(),
            memory: memory.clone(),
            verdict: verdict.clone(),
        })
        .collect();
    let ready = Arc::new(Barrier::new(cpus.len() + 1));
    let threads = Threads::start(cpus, &ready).map_err(Error::host("starting the processors"))?;
    ready.wait();
    if let Err(error) = seccomp::restrict() {
        verdict.end(Err(error.into()));
    }
    ready.wait();

    let waited = wait(&verdict, devices.failure(), stop);
    let ending = verdict.take().unwrap_or(Ok(Ending::Stopped));
    // Nothing of the machine may go while a processor still runs: if one is stuck, the rest stays for the process's end.
    verdict.end(Ok(Ending::Stopped));
    if let Err(stuck) = threads.stop() {
        std::mem::forget((machine, devices));
        return Err(stuck);
    }
    input.into_iter().for_each(serial::Input::stop);
    waited?;
    ending
}

/// Allows as many open files as the system lets this process have: the usual limit of 1024 is there for programs that call
/// select(2), and eight disks with 64 queues need more.
pub fn allow_descriptors() {
    let limit = getrlimit(Resource::Nofile);
    let raised = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit });
    if let Err(error) = raised {
        log::debug!("the limit of open files stays {:?}: {error}", limit.current);
    }
}

/// Waits for the end, from inside or outside.
fn wait(verdict: &Verdict, failure: &Failure, stop: BorrowedFd<'_>) -> Result<(), Error> {
    while !verdict.said() {
        let failed = borrow(failure.event());
        let mut ready = [
            PollFd::new(verdict.event(), PollFlags::IN),
            PollFd::new(&stop, PollFlags::IN),
            PollFd::new(&failed, PollFlags::IN),
        ];
        match poll(&mut ready, None) {
            Ok(_) if !ready[2].revents().is_empty() => {
                if let Some(error) = failure.take() {
                    verdict.end(Err(error.into()));
                }
                let _ = failure.event().read();
            }
            Ok(_) if !ready[1].revents().is_empty() => verdict.end(Ok(Ending::Stopped)),
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(Error::host("waiting for the machine's end")(error.into())),
        }
    }
    Ok(())
}
