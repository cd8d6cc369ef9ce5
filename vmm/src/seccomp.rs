//! The system calls that are left to the process once the guest runs. docs/vmm.md says what each is for.

use std::collections::BTreeMap;

use libc::c_long;
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

/// Why there is no filter.
#[derive(Debug, thiserror::Error)]
#[error("restricting the system calls: {0}")]
pub struct FilterError(#[from] seccompiler::Error);

/// Calls with any arguments.
const CALLS: &[c_long] = &[
    // Events and time.
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_nanosleep,
    libc::SYS_clock_nanosleep,
    libc::SYS_clock_gettime,
    libc::SYS_gettimeofday,
    // Files that are open.
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_close,
    libc::SYS_fcntl,
    libc::SYS_dup,
    libc::SYS_fstat,
    libc::SYS_lseek,
    // Sockets of the backends; making one: see `rules`.
    libc::SYS_socketpair,
    libc::SYS_connect,
    libc::SYS_sendmsg,
    libc::SYS_recvmsg,
    libc::SYS_sendto,
    libc::SYS_recvfrom,
    libc::SYS_shutdown,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    // Memory; what is executable: see `rules`.
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_brk,
    // Threads that are there, their beginning and their end.
    libc::SYS_futex,
    libc::SYS_sched_yield,
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_sched_getaffinity,
    libc::SYS_gettid,
    libc::SYS_getpid,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_restart_syscall,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_getrandom,
];

/// Requests of `ioctl` (linux/kvm.h, asm-generic/ioctls.h).
const IOCTLS: &[u64] = &[
    KVM_RUN,
    KVM_GET_REGS,
    KVM_GET_SREGS,
    KVM_SET_GSI_ROUTING,
    KVM_IRQFD,
    KVM_IOEVENTFD,
    libc::TCGETS,
    libc::TCSETS,
    libc::TCSETSW,
    libc::TCSETSF,
    libc::FIONBIO,
];
const KVM_RUN: u64 = 0xae80;
const KVM_GET_REGS: u64 = 0x8090_ae81;
const KVM_GET_SREGS: u64 = 0x8138_ae83;
const KVM_SET_GSI_ROUTING: u64 = 0x4008_ae6a;
const KVM_IRQFD: u64 = 0x4020_ae76;
const KVM_IOEVENTFD: u64 = 0x4040_ae79;

/// Lets the process, all its threads included, make no other system calls from here on. Any other one ends it (SIGSYS).
///
/// # Errors
/// The host's kernel has no such filters.
pub fn restrict() -> Result<(), FilterError> {
    let program = program().map_err(seccompiler::Error::Backend)?;
    Ok(seccompiler::apply_filter_all_threads(&program)?)
}

fn program() -> Result<BpfProgram, BackendError> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = CALLS.iter().map(|call| (*call, Vec::new())).collect();
    let requests = IOCTLS.iter().map(|request| argument(1, SeccompCmpOp::Eq, *request));
    rules.insert(libc::SYS_ioctl, requests.collect::<Result<_, _>>()?);
    rules.insert(libc::SYS_socket, vec![argument(0, SeccompCmpOp::Eq, libc::AF_UNIX as u64)?]);
    // No other process of the user.
    let own = u64::from(std::process::id());
    rules.insert(libc::SYS_tgkill, vec![argument(0, SeccompCmpOp::Eq, own)?]);
    let name = argument(0, SeccompCmpOp::Eq, libc::PR_SET_NAME as u64)?;
    rules.insert(libc::SYS_prctl, vec![name]);
    // No memory becomes executable.
    let data_only = argument(2, SeccompCmpOp::MaskedEq(libc::PROT_EXEC as u64), 0)?;
    rules.insert(libc::SYS_mmap, vec![data_only.clone()]);
    rules.insert(libc::SYS_mprotect, vec![data_only]);
    SeccompFilter::new(rules, SeccompAction::KillProcess, SeccompAction::Allow, TargetArch::x86_64)?
        .try_into()
}

/// Allows a call whose argument with this number compares so with `value`.
fn argument(number: u8, operator: SeccompCmpOp, value: u64) -> Result<SeccompRule, BackendError> {
    SeccompRule::new(vec![SeccompCondition::new(number, SeccompCmpArgLen::Dword, operator, value)?])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_numbers_are_those_of_the_headers() {
        assert_eq!(KVM_GET_REGS >> 16 & 0x3fff, size_of::<kvm_bindings::kvm_regs>() as u64);
        assert_eq!(KVM_GET_SREGS >> 16 & 0x3fff, size_of::<kvm_bindings::kvm_sregs>() as u64);
        assert_eq!(KVM_SET_GSI_ROUTING >> 16 & 0x3fff, size_of::<kvm_bindings::kvm_irq_routing>() as u64);
        assert_eq!(KVM_IRQFD >> 16 & 0x3fff, size_of::<kvm_bindings::kvm_irqfd>() as u64);
        assert_eq!(KVM_IOEVENTFD >> 16 & 0x3fff, size_of::<kvm_bindings::kvm_ioeventfd>() as u64);
    }

    /// This very test once more, in processes of their own: there the filter is installed and something forbidden done.
    #[test]
    #[allow(unsafe_code)]
    fn what_is_not_allowed_ends_the_process() {
        const ROLE: &str = "SAPWOOD_VMM_TEST_RESTRICTED";
        if let Some(role) = std::env::var_os(ROLE) {
            let parent = std::os::unix::process::parent_id();
            restrict().unwrap();
            if role == "open" {
                let _ = std::fs::File::open("/dev/null");
            } else {
                // SAFETY: the call has no memory; signal 0 only asks whether there is such a thread.
                unsafe { libc::syscall(libc::SYS_tgkill, parent, parent, 0) };
            }
            return;
        }
        for role in ["open", "signal the parent"] {
            let mut again = std::process::Command::new(std::env::current_exe().unwrap());
            again.args(["--exact", "seccomp::tests::what_is_not_allowed_ends_the_process"]).env(ROLE, role);
            let status = again.output().unwrap().status;
            let signal = std::os::unix::process::ExitStatusExt::signal(&status);
            assert_eq!(signal, Some(libc::SIGSYS), "{role}: {status}");
        }
    }

    #[test]
    fn the_filter_is_one() {
        assert!(program().unwrap().len() < 4096);
    }
}
