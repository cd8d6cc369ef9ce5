//! Files that the process which started this one has left open for it.

use std::fs::{self, File};
use std::io;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd};

use rustix::io::{FdFlags, fcntl_getfd, fcntl_setfd};

/// The first number behind those of the standard streams.
const FIRST: RawFd = 3;

/// Takes over the inherited file with this number, which closes when it is dropped. Each can be taken once. For a process
/// whose own files all close on exec, as those of Rust's library do, and that has one thread yet.
///
/// # Errors
/// `number` is a standard stream, is not open, was taken already, or is a file of this process's own.
pub fn take(number: RawFd) -> io::Result<File> {
    if number < FIRST {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: the borrow ends before anything else could close it; that it may not be open is what the first call finds out.
    #[allow(unsafe_code)]
    let file = unsafe { BorrowedFd::borrow_raw(number) };
    // What this process has opened itself, and what was taken, is closed on exec; what came through one is not.
    if fcntl_getfd(file)?.contains(FdFlags::CLOEXEC) {
        return Err(io::ErrorKind::ResourceBusy.into());
    }
    fcntl_setfd(file, FdFlags::CLOEXEC)?;
    // SAFETY: it is open, and nobody owns it: it was inherited, and has not been taken before.
    #[allow(unsafe_code)]
    let file = unsafe { OwnedFd::from_raw_fd(number) };
    Ok(file.into())
}

/// Closes all inherited files that nobody has taken. What whoever started this process had open is none of a guest's
/// business, should it break into the process.
///
/// # Errors
/// The open files cannot be listed.
pub fn close_others() -> io::Result<()> {
    let names: Vec<_> = fs::read_dir("/proc/self/fd")?.flatten().map(|entry| entry.file_name()).collect();
    for number in names.iter().filter_map(|name| name.to_str()?.parse().ok()) {
        // A file of our own stays.
        drop(take(number));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::fd::{AsRawFd, IntoRawFd};

    use super::*;

    #[test]
    fn an_inherited_file_is_taken_once() {
        let file = tempfile::tempfile().unwrap();
        let number = file.as_raw_fd();
        assert_eq!(take(number).unwrap_err().kind(), io::ErrorKind::ResourceBusy, "it is our own");
        fcntl_setfd(&file, FdFlags::empty()).unwrap();
        // As if it had come through an exec: nobody owns it.
        assert_eq!(file.into_raw_fd(), number);
        let taken = take(number).unwrap();
        assert_eq!(taken.as_raw_fd(), number);
        assert_eq!(take(number).unwrap_err().kind(), io::ErrorKind::ResourceBusy, "it was taken");
        for number in [-1, 0, 2, i32::MAX] {
            assert!(take(number).is_err(), "{number}");
        }
    }
}
