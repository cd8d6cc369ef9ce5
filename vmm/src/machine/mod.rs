//! The machine under the devices: memory, interrupt controllers, processors.

pub mod cpuid;
pub mod ending;
pub mod memory;
pub mod processor;
pub mod registers;

use std::sync::Arc;

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, KVM_PIT_SPEAKER_DUMMY, kvm_pit_config};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use rustix::io::Errno;

use crate::layout::{KVM_IDENTITY_MAP, KVM_TSS};
use cpuid::Processor;
use memory::{GuestMemory, MemoryError};
use registers::Entry;

/// What KVM must be able to do, with the name that messages use.
pub const CAPABILITIES: [(Cap, &str); 9] = [
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::IrqRouting, "KVM_CAP_IRQ_ROUTING"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::SetIdentityMapAddr, "KVM_CAP_SET_IDENTITY_MAP_ADDR"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::Pit2, "KVM_CAP_PIT2"),
];

/// Why there is no machine.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// No KVM.
    #[error("opening /dev/kvm: {0}")]
    Open(kvm_ioctls::Error),
    /// A call of KVM's failed.
    #[error("KVM: {what}: {error}")]
    Kvm {
        /// What it should do.
        what: &'static str,
        /// What it said.
        error: kvm_ioctls::Error,
    },
    /// A KVM that is too old or cut down.
    #[error("this KVM lacks {0}")]
    Capability(&'static str),
    /// The number of processors.
    #[error("a machine here has 1 to {max} processors, not {cpus}")]
    Cpus {
        /// What was asked for.
        cpus: u8,
        /// What KVM can do.
        max: usize,
    },
    /// KVM takes fewer entries than it supports.
    #[error("the table for CPUID: {0:?}")]
    Cpuid(vmm_sys_util::fam::Error),
    /// A register that a processor needs.
    #[error("KVM did not take model-specific register {0:#x}")]
    Msr(u32),
    /// No memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

impl MachineError {
    /// For `map_err`.
    pub(crate) fn kvm(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> Self {
        move |error| Self::Kvm { what, error }
    }
}

/// The processors need the virtual machine, and it needs the memory: fields are dropped in this order.
pub struct Machine {
    /// In the order of their numbers; the first one starts, the others wait for it.
    pub vcpus: Vec<VcpuFd>,
    /// The virtual machine.
    pub vm: Arc<VmFd>,
    /// Its RAM.
    pub memory: GuestMemory,
}

impl Machine {
    /// A machine with RAM, interrupt controllers, a timer, and processors that `start` can make ready.
    ///
    /// # Errors
    /// The numbers are wrong, or KVM refuses.
    pub fn new(memory_bytes: u64, cpus: u8) -> Result<Self, MachineError> {
        let kvm = Kvm::new().map_err(MachineError::Open)?;
        require_capabilities(&kvm)?;
        let max = kvm.get_max_vcpus().min(usize::from(u8::MAX - 1));
        if cpus == 0 || usize::from(cpus) > max {
            return Err(MachineError::Cpus { cpus, max });
        }
        let memory = memory::create(memory_bytes)?;
        let vm = make_vm(&kvm)?;
        memory::attach(&vm, &memory)?;
        set_up_interrupts(&vm)?;

        let supported = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES);
        let supported = supported.map_err(MachineError::kvm("asking for the supported CPUID"))?;
        let tsc_deadline = kvm.check_extension(Cap::TscDeadlineTimer);
        let mut vcpus = Vec::with_capacity(usize::from(cpus));
        for id in 0..cpus {
            let vcpu = vm.create_vcpu(u64::from(id)).map_err(MachineError::kvm("making a processor"))?;
            let table =
                Processor { id, cpus, tsc_deadline }.table(&supported).map_err(MachineError::Cpuid)?;
            vcpu.set_cpuid2(&table).map_err(MachineError::kvm("setting the CPUID"))?;
            registers::set_up(&vcpu)?;
            vcpus.push(vcpu);
        }
        Ok(Self { vcpus, vm: Arc::new(vm), memory })
    }

    /// Where the first processor starts. The others wait until the guest starts them (INIT, SIPI).
    ///
    /// # Errors
    /// KVM refuses.
    pub fn enter(&self, entry: Entry) -> Result<(), MachineError> {
        registers::enter(&self.vcpus[0], &self.memory, entry)
    }
}

/// Whether KVM can do what is needed here.
///
/// # Errors
/// It cannot; the first thing that is missing.
pub fn require_capabilities(kvm: &Kvm) -> Result<(), MachineError> {
    match CAPABILITIES.iter().find(|(capability, _)| !kvm.check_extension(*capability)) {
        Some((_, name)) => Err(MachineError::Capability(name)),
        None => Ok(()),
    }
}

/// How often a call of KVM's is made again that a signal, or work that the kernel has for the thread, interrupted.
const INTERRUPTIONS_MAX: usize = 1000;

/// Makes a virtual machine. KVM gives up at anything that is pending for the thread, whether or not somebody would see it
/// (`mm_take_all_locks`, below KVM_CREATE_VM), so that it has to be asked again.
///
/// # Errors
/// KVM refuses.
pub fn make_vm(kvm: &Kvm) -> Result<VmFd, MachineError> {
    uninterrupted(|| kvm.create_vm()).map_err(MachineError::kvm("making a virtual machine"))
}

fn uninterrupted<T>(mut call: impl FnMut() -> Result<T, kvm_ioctls::Error>) -> Result<T, kvm_ioctls::Error> {
    let is_interrupted = |result: &Result<T, kvm_ioctls::Error>| matches!(result, Err(error) if error.errno() == Errno::INTR.raw_os_error());
    let mut result = call();
    for _ in 0..INTERRUPTIONS_MAX {
        if !is_interrupted(&result) {
            break;
        }
        result = call();
    }
    result
}

fn set_up_interrupts(vm: &VmFd) -> Result<(), MachineError> {
    vm.set_identity_map_address(KVM_IDENTITY_MAP).map_err(MachineError::kvm("placing its identity map"))?;
    vm.set_tss_address(KVM_TSS as usize).map_err(MachineError::kvm("placing its task state"))?;
    vm.create_irq_chip().map_err(MachineError::kvm("making the interrupt controllers"))?;
    // The speaker's port belongs to the timer as well; without the dummy each access would come to us.
    let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
    vm.create_pit2(pit).map_err(MachineError::kvm("making the timer"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_that_was_interrupted_is_made_again_and_no_other_one() {
        let error = |errno: Errno| kvm_ioctls::Error::new(errno.raw_os_error());
        let mut outcomes = [Err(error(Errno::INTR)), Err(error(Errno::INTR)), Ok(7)].into_iter();
        assert_eq!(uninterrupted(|| outcomes.next().expect("two more calls")), Ok(7));
        let mut calls = 0;
        let refused: Result<(), _> = uninterrupted(|| {
            calls += 1;
            Err(error(Errno::NOMEM))
        });
        assert_eq!((refused, calls), (Err(error(Errno::NOMEM)), 1));
        let endless: Result<(), _> = uninterrupted(|| Err(error(Errno::INTR)));
        assert_eq!(endless, Err(error(Errno::INTR)));
    }
}
