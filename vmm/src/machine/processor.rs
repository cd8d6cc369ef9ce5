//! The thread of a processor: it runs the guest, and does for it what it meets among ports and memory that is no RAM.

#![allow(unsafe_code)]

use std::io;
use std::sync::{Arc, Barrier};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use kvm_bindings::{KVM_SYSTEM_EVENT_CRASH, KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN};
use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_sys_util::signal::{Killable as _, SIGRTMIN, register_signal_handler};

use super::ending::Verdict;
use crate::bus::Bus;
use crate::config::Ending;
use crate::run::Error;

/// How often a processor is told to stop: the signal may come just before it enters the guest, and be lost.
const STOP_AGAIN: Duration = Duration::from_millis(2);
/// It is told so for this long; a thread that still runs then hangs in the host's kernel.
const STOP_LIMIT: Duration = Duration::from_secs(5);

/// The signal that makes KVM_RUN return.
pub(crate) fn kick_signal() -> libc::c_int {
    SIGRTMIN()
}

/// Makes that signal do nothing else.
pub(crate) fn register_kick() -> io::Result<()> {
    extern "C" fn nothing(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
    Ok(register_signal_handler(kick_signal(), nothing)?)
}

/// A processor with all that it can reach.
pub struct Cpu {
    /// Its number.
    pub id: usize,
    /// KVM's part of it.
    pub vcpu: VcpuFd,
    /// The ports.
    pub ports: Bus,
    /// Memory that is no RAM.
    pub memory: Bus,
    /// How the machine ended.
    pub verdict: Verdict,
}

/// The threads of all processors.
pub struct Threads {
    threads: Vec<JoinHandle<()>>,
}

/// What to do after an exit.
enum Next {
    Run,
    End(Result<Ending, Error>),
}

impl Threads {
    /// Starts a thread for each processor. They are there when `ready` has been reached by all of them and by one more, and
    /// begin with the guest when that has happened again.
    ///
    /// # Errors
    /// No more threads.
    pub fn start(cpus: Vec<Cpu>, ready: &Arc<Barrier>) -> io::Result<Self> {
        register_kick()?;
        let mut threads = Self { threads: Vec::with_capacity(cpus.len()) };
        for cpu in cpus {
            let ready = ready.clone();
            let name = format!("cpu{}", cpu.id);
            let thread = thread::Builder::new().name(name).spawn(move || {
                let _on_panic = cpu.verdict.on_panic();
                // Once when the thread is there, once when it may begin.
                ready.wait();
                ready.wait();
                cpu.run();
            })?;
            threads.threads.push(thread);
        }
        Ok(threads)
    }

    /// Stops all processors, once the machine has ended.
    ///
    /// # Errors
    /// One does not stop.
    pub fn stop(self) -> Result<(), Error> {
        let deadline = Instant::now() + STOP_LIMIT;
        while let Some(running) = self.threads.iter().find(|thread| !thread.is_finished()) {
            if Instant::now() > deadline {
                let name = running.thread().name().unwrap_or_default().to_owned();
                return Err(Error::Stuck(name));
            }
            for thread in self.threads.iter().filter(|thread| !thread.is_finished()) {
                // A thread that has ended meanwhile needs no signal.
                let _ = thread.kill(kick_signal());
            }
            thread::sleep(STOP_AGAIN);
        }
        for thread in self.threads {
            thread.join().map_err(|_| Error::Thread)?;
        }
        Ok(())
    }
}

impl Cpu {
    /// Runs the guest until the machine has ended.
    fn run(mut self) {
        while !self.verdict.said() {
            if let Next::End(verdict) = self.step() {
                self.verdict.end(verdict);
            }
        }
    }

    /// Runs the guest until it needs something, and does that.
    fn step(&mut self) -> Next {
        let exit = match self.vcpu.run() {
            Ok(exit) => exit,
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => return Next::Run,
            Err(error) => return Next::End(Err(self.failed(format!("KVM_RUN: {error}")))),
        };
        match exit {
            VcpuExit::IoIn(port, data) => {
                let data: *mut [u8] = data;
                let each = self.port_access_bytes();
                // SAFETY: the bytes lie in the page that KVM shares with us, which is mapped as long as the
                // processor; nothing else refers to them until it runs again.
                let data = unsafe { &mut *data };
                data.chunks_mut(each).for_each(|access| self.ports.read(u64::from(port), access));
            }
            VcpuExit::IoOut(port, data) => {
                let data: *const [u8] = data;
                let each = self.port_access_bytes();
                // SAFETY: as above.
                let data = unsafe { &*data };
                data.chunks(each).for_each(|access| self.ports.write(u64::from(port), access));
            }
            VcpuExit::MmioRead(address, data) => self.memory.read(address, data),
            VcpuExit::MmioWrite(address, data) => self.memory.write(address, data),
            VcpuExit::Shutdown => return Next::End(Ok(Ending::Crash)),
            VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_SHUTDOWN, _) => return Next::End(Ok(Ending::PowerOff)),
            VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_RESET, _) => return Next::End(Ok(Ending::Reboot)),
            VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_CRASH, _) => return Next::End(Ok(Ending::Panic)),
            // These need nothing; KVM makes them where interrupt controllers are ours, so not here.
            VcpuExit::Intr | VcpuExit::Hlt | VcpuExit::IrqWindowOpen => {}
            VcpuExit::FailEntry(reason, _) => {
                let what = format!("the host's processor refuses the guest's state, reason {reason:#x}");
                return Next::End(Err(self.failed(what)));
            }
            VcpuExit::InternalError => {
                let what = format!("KVM cannot go on, internal error {}", self.internal_error());
                return Next::End(Err(self.failed(what)));
            }
            other => {
                let what = format!("an exit that is not known here: {other:?}");
                return Next::End(Err(self.failed(what)));
            }
        }
        Next::Run
    }

    /// How wide each access of a string instruction is; KVM hands several of them over at once.
    fn port_access_bytes(&mut self) -> usize {
        // SAFETY: the exit was KVM_EXIT_IO, so that this is the field of the union that is set.
        let io = unsafe { self.vcpu.get_kvm_run().__bindgen_anon_1.io };
        usize::from(io.size).max(1)
    }

    /// KVM's number for what went wrong (`KVM_INTERNAL_ERROR_*` in linux/kvm.h).
    fn internal_error(&mut self) -> u32 {
        // SAFETY: the exit was KVM_EXIT_INTERNAL_ERROR, so that this is the field of the union that is set.
        unsafe { self.vcpu.get_kvm_run().__bindgen_anon_1.internal.suberror }
    }

    /// An error that says where the processor stands.
    fn failed(&self, what: String) -> Error {
        let state = match (self.vcpu.get_regs(), self.vcpu.get_sregs()) {
            (Ok(regs), Ok(sregs)) => format!(
                "rip={:#x} rsp={:#x} rflags={:#x} cs={:#x} cr0={:#x} cr2={:#x} cr3={:#x} cr4={:#x} efer={:#x}",
                regs.rip,
                regs.rsp,
                regs.rflags,
                sregs.cs.selector,
                sregs.cr0,
                sregs.cr2,
                sregs.cr3,
                sregs.cr4,
                sregs.efer
            ),
            _ => "its registers cannot be read".to_owned(),
        };
        Error::Processor { id: self.id, what, state }
    }
}
