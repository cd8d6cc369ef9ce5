//! Whether /dev/kvm is there and runs an unmodified kernel.
//!
//! Some KVMs make virtual machines and do not really run them: paravirtual kinds interpret guests that do not cooperate,
//! instruction by instruction, and a kernel gets nowhere. So a small guest in 64-bit mode does what kernels do all the
//! time, computing, writing memory and loading the page tables' register, six million instructions in all. This process
//! does nearly the same, and its time is the measure: guests of hardware run about as fast as their host, also where
//! that is itself a guest, or translated (QEMU's TCG), or busy. An interpreter is some thousand times slower.

use std::io;
use std::path::Path;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use kvm_bindings::KVM_MAX_CPUID_ENTRIES;
use kvm_ioctls::{Cap, Kvm, VcpuExit, VcpuFd, VmFd};
use rustix::time::{ClockId, clock_gettime};
use vm_memory::{Bytes as _, GuestAddress};
use vmm_sys_util::signal::Killable as _;

use crate::layout::{KVM_IDENTITY_MAP, KVM_TSS};
use crate::machine::cpuid::Processor;
use crate::machine::memory::{self, GuestMemory, RAM_BYTES_MIN};
use crate::machine::processor::{kick_signal, register_kick};
use crate::machine::registers::{self, Entry};
use crate::machine::{MachineError, make_vm, require_capabilities};

const DEVICE: &str = "/dev/kvm";
/// Where the guest's code lies.
const CODE: u64 = 0x10_0000;
/// How often the guest loads CR3, and what it does in between: [`STEPS`] times four instructions.
const ROUNDS: u32 = 1000;
const STEPS: u32 = 1500;
/// How often it does so before its time is taken.
const WARM_UP_ROUNDS: u32 = 5;
/// How many times the time of this process the guest may take.
const SLOWDOWN_MAX: u32 = 20;
/// It may have this much in any case: processors are not that steady.
const CPU_LIMIT_MIN: Duration = Duration::from_millis(300);
/// The same by the wall's clock, on a machine that is busy with other things.
const WALL_LIMIT: Duration = Duration::from_secs(10);
/// How often the limits are looked at.
const TICK: Duration = Duration::from_millis(20);

/// Why KVM is of no use here.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// Not there.
    #[error(
        "this machine has no KVM: {DEVICE} does not exist (no hardware virtualization, or its kernel module is not loaded)"
    )]
    Missing,
    /// Not for this user.
    #[error("{DEVICE} may not be opened by this user: {0} (being in the group `kvm` usually helps)")]
    Denied(io::Error),
    /// Something else is wrong with it.
    #[error("{DEVICE} is of no use: {0}")]
    Unusable(#[from] MachineError),
    /// It interprets.
    #[error(
        "{DEVICE} cannot run an unmodified kernel: it seems to interpret its guests, {times} times slower than this processor runs a program"
    )]
    Slow {
        /// How many times slower than it should be.
        times: u64,
    },
    /// It does something else.
    #[error("{DEVICE} cannot run an unmodified kernel: a test in 64-bit mode ended with {0}")]
    Wrong(String),
}

/// Finds out whether KVM runs an unmodified 64-bit kernel here; in some milliseconds, or in about a second if it does not.
///
/// # Errors
/// It does not; the message is a sentence for the user.
pub fn probe() -> Result<(), ProbeError> {
    let opened = std::fs::File::options().read(true).write(true).open(Path::new(DEVICE));
    match opened {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(ProbeError::Missing),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            return Err(ProbeError::Denied(error));
        }
        _ => {}
    }
    let kvm = Kvm::new().map_err(MachineError::Open)?;
    require_capabilities(&kvm)?;
    let memory = memory::create(RAM_BYTES_MIN).map_err(MachineError::from)?;
    let vm = make_vm(&kvm)?;
    let vcpu = guest(&kvm, &vm, &memory)?;
    run(vcpu)
}

/// The guest: registers and code, without any device.
fn guest(kvm: &Kvm, vm: &VmFd, memory: &GuestMemory) -> Result<VcpuFd, ProbeError> {
    memory::attach(vm, memory).map_err(MachineError::from)?;
    vm.set_identity_map_address(KVM_IDENTITY_MAP).map_err(MachineError::kvm("placing its identity map"))?;
    vm.set_tss_address(KVM_TSS as usize).map_err(MachineError::kvm("placing its task state"))?;
    let vcpu = vm.create_vcpu(0).map_err(MachineError::kvm("making a processor"))?;
    let supported = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES);
    let supported = supported.map_err(MachineError::kvm("asking for the supported CPUID"))?;
    let processor = Processor { id: 0, cpus: 1, tsc_deadline: kvm.check_extension(Cap::TscDeadlineTimer) };
    let table = processor.table(&supported).map_err(MachineError::Cpuid)?;
    vcpu.set_cpuid2(&table).map_err(MachineError::kvm("setting the CPUID"))?;
    memory.write_slice(&code(), GuestAddress(CODE)).expect("there are four MiB");
    registers::enter(&vcpu, memory, Entry::Linux64 { rip: CODE, zero_page: 0 })?;
    Ok(vcpu)
}

/// What the guest does as often as ECX says; it ends with `hlt`, which comes here where there is no local APIC.
fn code() -> Vec<u8> {
    let [s0, s1, s2, s3] = STEPS.to_le_bytes();
    vec![
        0x0f, 0x20, 0xd8, //       1:  mov rax, cr3
        0x0f, 0x22, 0xd8, //           mov cr3, rax
        0xba, s0, s1, s2, s3, //       mov edx, STEPS
        0x01, 0xc3, //             2:  add ebx, eax
        0x48, 0x89, 0x1c, 0x24, //     mov [rsp], rbx
        0xff, 0xca, //                 dec edx
        0x75, 0xf6, //                 jnz 2b
        0xff, 0xc9, //                 dec ecx
        0x75, 0xe7, //                 jnz 1b
        0xf4, //                       hlt
    ]
}

/// How the guest's turn ended.
enum Turn {
    /// It did all its rounds.
    Done,
    /// It was kicked out after so many.
    Kicked(u32),
}

/// Runs the guest within the limits.
fn run(mut vcpu: VcpuFd) -> Result<(), ProbeError> {
    register_kick().map_err(|error| ProbeError::Wrong(error.to_string()))?;
    let measure = measure();
    let (sender, receiver) = mpsc::channel();
    let thread = thread::Builder::new().name("probe".to_owned()).spawn(move || {
        // The first time finds everything cold: pages that are not there, code that has to be translated.
        let warm = rounds(&mut vcpu, WARM_UP_ROUNDS);
        let warmed_up = matches!(warm, Ok(Turn::Done));
        // Nobody listens any more where it took too long to stop.
        let _ = sender.send(warm);
        if warmed_up {
            let _ = sender.send(rounds(&mut vcpu, ROUNDS));
        }
    });
    let thread = thread.map_err(|error| ProbeError::Wrong(error.to_string()))?;
    within_limits(&receiver, &thread, measure)?;
    within_limits(&receiver, &thread, measure)
}

/// How long this process takes for what the guest does: for a tenth of it, times ten.
fn measure() -> Duration {
    let started = cpu_time();
    let (mut sum, mut memory) = (0u32, [0u32]);
    for step in 0..ROUNDS * STEPS / 10 {
        sum = sum.wrapping_add(step);
        // Written each time, as the guest does.
        std::hint::black_box(&mut memory)[0] = sum;
    }
    10 * cpu_time().saturating_sub(started)
}

/// Waits for the next result; kicks the guest out when it takes too long.
fn within_limits(
    receiver: &mpsc::Receiver<Result<Turn, ProbeError>>,
    thread: &thread::JoinHandle<()>,
    measure: Duration,
) -> Result<(), ProbeError> {
    let (started, cpu_started) = (Instant::now(), cpu_time());
    let limit = (measure * SLOWDOWN_MAX).max(CPU_LIMIT_MIN);
    loop {
        let ended = receiver.recv_timeout(TICK);
        let cpu = cpu_time().saturating_sub(cpu_started);
        match ended {
            Ok(Ok(Turn::Done)) => {
                log::debug!("probe: {cpu:?} of processor time, {measure:?} for this process");
                return Ok(());
            }
            Ok(Ok(Turn::Kicked(rounds))) => {
                let fair = measure.as_nanos().max(1) * u128::from(rounds.max(1)) / u128::from(ROUNDS);
                return Err(ProbeError::Slow { times: (cpu.as_nanos() / fair.max(1)) as u64 });
            }
            Ok(Err(error)) => return Err(error),
            Err(mpsc::RecvTimeoutError::Disconnected) => return Err(ProbeError::Wrong("a panic".to_owned())),
            Err(mpsc::RecvTimeoutError::Timeout) => {}
        }
        let wall = started.elapsed();
        if wall > 2 * WALL_LIMIT {
            return Err(ProbeError::Wrong("a processor that does not stop".to_owned()));
        }
        if wall > WALL_LIMIT || cpu > limit {
            // A thread that has ended meanwhile needs no signal.
            let _ = thread.kill(kick_signal());
        }
    }
}

/// Makes the guest do so many rounds.
fn rounds(vcpu: &mut VcpuFd, count: u32) -> Result<Turn, ProbeError> {
    let mut regs = vcpu.get_regs().map_err(MachineError::kvm("reading registers"))?;
    (regs.rip, regs.rcx) = (CODE, u64::from(count));
    vcpu.set_regs(&regs).map_err(MachineError::kvm("setting registers"))?;
    match vcpu.run() {
        Ok(VcpuExit::Hlt) => Ok(Turn::Done),
        Ok(other) => Err(ProbeError::Wrong(format!("{other:?}"))),
        Err(error) if error.errno() == libc::EINTR => {
            let left = vcpu.get_regs().map_or(count, |regs| regs.rcx as u32).min(count);
            Ok(Turn::Kicked(count - left))
        }
        Err(error) => Err(ProbeError::Wrong(format!("KVM_RUN: {error}"))),
    }
}

/// What this process has computed so far, its guests included.
fn cpu_time() -> Duration {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    Duration::new(time.tv_sec.unsigned_abs(), time.tv_nsec.unsigned_abs() as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_comes_in_time() {
        let started = Instant::now();
        let answer = probe();
        eprintln!("probe: {answer:?} in {:?}", started.elapsed());
        assert!(started.elapsed() < 3 * WALL_LIMIT);
        if let Err(error) = answer {
            assert!(!error.to_string().contains('\n'), "one sentence: {error}");
        }
    }

    #[test]
    fn jumps_of_the_code_land_on_instructions() {
        let code = code();
        let target = |jump: usize| jump + 2 - usize::from(code[jump + 1].wrapping_neg());
        assert_eq!(code[target(19)..][..2], [0x01, 0xc3]);
        assert_eq!(code[target(23)..][..3], [0x0f, 0x20, 0xd8]);
    }
}
