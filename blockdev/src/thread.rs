//! How the host's scheduler treats a thread.
#![allow(unsafe_code)]

use rustix::io::Errno;

/// How long a thread that [gives way](give_way) is to run at a time: the most that the kernel takes (kernel/sched/syscalls.c).
const SLICE_NS: u64 = 100_000_000;

/// Has the calling thread, and those that it starts from now on, give way to all others as soon as they have anything to do.
///
/// It runs when others sleep, as soon as they do; it never takes a processor away from one that runs; and where there are too few
/// for all it has its share by `nice`, as of nice(1), from 0 to 19, or by what it has if that is less. It is not starved: it may hold
/// what others need.
///
/// That is `SCHED_BATCH` with a long time slice: from Linux 6.12 on, who wakes does not wait for the slice of a thread whose slices
/// are longer than its own (sched_setattr(2), `PREEMPT_SHORT` in kernel/sched/features.h). Older kernels know of the priority only.
///
/// # Errors
/// As of sched_setattr(2): EPERM where that is not allowed.
pub fn give_way(nice: i32) -> Result<(), Errno> {
    let now = rustix::process::getpriority_process(None)?;
    let attributes = libc::sched_attr {
        size: size_of::<libc::sched_attr>() as u32,
        sched_policy: libc::SCHED_BATCH as u32,
        sched_flags: 0,
        sched_nice: nice.max(now),
        sched_priority: 0,
        sched_runtime: SLICE_NS,
        sched_deadline: 0,
        sched_period: 0,
    };
    // SAFETY: the kernel reads as many bytes of the attributes as they say that they are, and writes nothing where it knows the
    // size, which has been the smallest one since the call exists.
    let result = unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) };
    match result {
        0 => Ok(()),
        _ => Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The policy and the priority of the calling thread: fields 41 and 19 of proc_pid_stat(5).
    fn scheduled() -> (String, String) {
        let stat = std::fs::read_to_string("/proc/thread-self/stat").unwrap();
        // The second field is a name in parentheses.
        let fields: Vec<&str> = stat[stat.rfind(')').unwrap() + 2..].split(' ').collect();
        (fields[41 - 3].to_owned(), fields[19 - 3].to_owned())
    }

    /// The slice of the calling thread in nanoseconds: 0 in kernels that have none of a thread's own.
    fn slice() -> u64 {
        // SAFETY: a list of integers, for which all zeroes are fine.
        let mut attributes: libc::sched_attr = unsafe { std::mem::zeroed() };
        // SAFETY: the kernel writes as many bytes as the third argument says that there are.
        let result = unsafe {
            libc::syscall(libc::SYS_sched_getattr, 0, &raw mut attributes, size_of_val(&attributes), 0)
        };
        assert_eq!(result, 0);
        attributes.sched_runtime
    }

    #[test]
    fn a_thread_and_those_that_it_starts_give_way() {
        let (others, before) = std::thread::spawn(|| (scheduled(), slice())).join().unwrap();
        let these = std::thread::spawn(move || {
            give_way(15).unwrap();
            let slices = [slice(), std::thread::spawn(slice).join().unwrap()];
            assert!(before == 0 && slices == [0; 2] || slices == [SLICE_NS; 2], "{before} {slices:?}");
            // What has less keeps it.
            give_way(0).unwrap();
            [scheduled(), std::thread::spawn(scheduled).join().unwrap()]
        });
        let nice = others.1.parse::<i32>().unwrap().max(15).to_string();
        let batch = (libc::SCHED_BATCH.to_string(), nice);
        assert_eq!(these.join().unwrap(), [batch.clone(), batch.clone()]);
        assert_ne!(others.0, batch.0);
    }
}
