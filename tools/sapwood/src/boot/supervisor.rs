//! Starts everything, waits for what happens, and ends everything.

use std::fs::File;
use std::io::{self, IsTerminal, PipeWriter, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use sapwood_vmm::Ending;

use super::child::{Running, again, number};
use super::events::{Asked, Events, Wake};
use super::kernel::{self, Payload};
use super::plan::{ConsoleSpec, Machine};
use super::server::Servers;
use super::terminal::RawTerminal;
use super::volume::settle;
use super::worker::{self, Handover};

/// How long a worker may take that was asked to stop.
const STOP_LIMIT: Duration = Duration::from_secs(10);

/// How it all ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The guest powered off.
    PowerOff,
    /// The guest restarted, which ends it here.
    Reboot,
    /// The guest's kernel panicked.
    Panic,
    /// A processor of the guest could not go on.
    Crash,
    /// The user ended it.
    Stopped,
    /// Its time was over.
    TimedOut,
}

/// Runs a machine, over restarts of its guest, until it ends. The daemons of stores have its volumes until then.
pub fn run(machine: &mut Machine) -> anyhow::Result<Outcome> {
    // First: a signal must not leave a volume attached.
    let mut events = Events::new(machine.timeout).context("cannot take signals")?;
    let _leases = settle(machine, machine.host, true)?;
    let machine = &*machine;
    if machine.probe {
        super::machine::probe().map_err(|error| {
            anyhow!("{error:#}; `sapwood boot --print-qemu` prints what does the same in QEMU")
        })?;
    }
    let console = Streams::open(&machine.console)?;
    console.explain();
    loop {
        let ending = run_once(machine, &console, &mut events)?;
        return Ok(match (ending, events.asked()) {
            (Ending::Reboot, None) if !machine.no_reboot => continue,
            (Ending::PowerOff, _) => Outcome::PowerOff,
            (Ending::Panic, _) => Outcome::Panic,
            (Ending::Crash, _) => Outcome::Crash,
            (Ending::Reboot, None) => Outcome::Reboot,
            (_, Some(Asked::ByTimeout)) => Outcome::TimedOut,
            (Ending::Stopped | Ending::Reboot, _) => Outcome::Stopped,
        });
    }
}

/// Boots the guest once, with servers of its own.
fn run_once(machine: &Machine, console: &Streams, events: &mut Events) -> anyhow::Result<Ending> {
    let payload = kernel::open(machine, events.interruption());
    if events.has_happened()? {
        return Ok(Ending::Stopped);
    }
    let payload = payload?;
    let Some(mut servers) = Servers::start(&machine.disks, machine.cpus, events)? else {
        return Ok(Ending::Stopped);
    };
    let ended = guest(machine, payload, console, &mut servers, events);
    let stopped = servers.stop(events);
    if let (Err(_), Err(error)) = (&ended, &stopped) {
        log::error!("{error:#}");
    }
    ended.and_then(|ending| stopped.map(|()| ending))
}

/// Runs the worker until it ends.
fn guest(
    machine: &Machine,
    payload: Payload,
    console: &Streams,
    servers: &mut Servers,
    events: &mut Events,
) -> anyhow::Result<Ending> {
    // Only now: before, and while the servers stop, Ctrl-C is a signal, and the escape would reach nobody.
    let _terminal = console.terminal()?;
    let (mut worker, mut stop) = start_worker(machine, &payload, console, servers)?;
    // The worker has them, and lets them go when they are in the guest's memory.
    drop(payload);
    let mut limit = None;
    let mut killed = false;
    loop {
        let mut watched: Vec<BorrowedFd<'_>> = vec![worker.ended()];
        if events.asked().is_none() {
            // Who told us to end may have told the servers, too: then none is started again.
            watched.extend(servers.ended());
        }
        match events.wait(&watched, limit)? {
            Wake::Ready(0) if killed => return Ok(Ending::Stopped),
            Wake::Ready(0) => return worker::ending(worker.wait()?),
            Wake::Ready(index) => servers.restart(index - 1, events).context("the guest lost a disk")?,
            Wake::Asked => {}
            Wake::Insisted | Wake::Late => {
                worker.signal(rustix::process::Signal::KILL);
                (limit, killed) = (None, true);
            }
        }
        if events.asked().is_some() && limit.is_none() && !killed {
            // It may be about to end by itself.
            let _ = stop.write_all(&[0]);
            limit = Some(Instant::now() + STOP_LIMIT);
        }
    }
}

/// Starts the worker; the pipe tells it to stop.
fn start_worker(
    machine: &Machine,
    payload: &Payload,
    console: &Streams,
    servers: &Servers,
) -> anyhow::Result<(Running, PipeWriter)> {
    let (stopped, stop) = io::pipe()?;
    let handover = Handover {
        memory_bytes: machine.memory_bytes,
        cpus: machine.cpus,
        kernel: number(&payload.kernel),
        initrd: payload.initrd.as_ref().map(number),
        cmdline: payload.cmdline.clone(),
        sockets: servers.sockets().to_vec(),
        input: console.is_interactive(),
        terminal: console.is_terminal(),
        stop: number(&stopped),
    };
    let description = handover.file()?;
    let mut command = again("boot-worker");
    command.arg(number(&description).to_string());
    // With more arenas, glibc looks into /sys for the number of processors when a thread first allocates: too late where
    // the filter forbids to open files.
    command.env("MALLOC_ARENA_MAX", "1");
    console.give(&mut command)?;
    let mut files = vec![payload.kernel.as_fd(), description.as_fd(), stopped.as_fd()];
    files.extend(payload.initrd.as_ref().map(AsFd::as_fd));
    Ok((Running::start(&mut command, &files)?, stop))
}

/// Where the serial port leads, over restarts of the guest.
enum Streams {
    Stdio,
    None,
    File(File),
}

impl Streams {
    fn open(spec: &ConsoleSpec) -> anyhow::Result<Self> {
        Ok(match spec {
            ConsoleSpec::Stdio => Self::Stdio,
            ConsoleSpec::None => Self::None,
            ConsoleSpec::File(path) => {
                let file = File::create(path);
                Self::File(file.with_context(|| format!("--console file={}", path.display()))?)
            }
        })
    }

    fn is_interactive(&self) -> bool {
        matches!(self, Self::Stdio)
    }

    fn is_terminal(&self) -> bool {
        self.is_interactive() && io::stdin().is_terminal()
    }

    /// Says what the keys do on a terminal.
    fn explain(&self) {
        if self.is_terminal() {
            eprintln!("sapwood: Ctrl-A X ends the virtual machine; Ctrl-A Ctrl-A is a Ctrl-A for the guest");
        }
    }

    /// Prepares the terminal, if there is one.
    fn terminal(&self) -> anyhow::Result<Option<RawTerminal>> {
        if !self.is_terminal() {
            return Ok(None);
        }
        RawTerminal::enter().context("cannot switch the terminal to raw mode")
    }

    /// Makes them the standard streams of a command.
    fn give(&self, command: &mut std::process::Command) -> io::Result<()> {
        match self {
            Self::Stdio => {}
            Self::None => drop(command.stdin(Stdio::null()).stdout(Stdio::null())),
            Self::File(file) => drop(command.stdin(Stdio::null()).stdout(file.try_clone()?)),
        }
        Ok(())
    }
}
