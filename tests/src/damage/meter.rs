//! Counts and bounds the memory that a thread allocates: what reads hostile bytes must not be
//! talked into more than they are worth.
#![allow(unsafe_code)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

thread_local! {
    // Constant and without destructors: an allocator may use them at any time.
    static LIVE: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
    static LIMIT: Cell<isize> = const { Cell::new(isize::MAX) };
}

/// An allocator to be declared `#[global_allocator]`: the system's, counted by thread.
pub struct Meter;

/// Runs `f` and returns the most memory, in bytes, that this thread held meanwhile beyond what it
/// held before. Beyond `limit` allocations fail, which aborts the process.
pub fn metered<T>(limit: usize, f: impl FnOnce() -> T) -> (T, usize) {
    let before = LIVE.get();
    PEAK.set(before);
    LIMIT.set(before.saturating_add(isize::try_from(limit).unwrap_or(isize::MAX)));
    let result = f();
    LIMIT.set(isize::MAX);
    (result, usize::try_from(PEAK.get() - before).unwrap_or(0))
}

/// Counts a change; says whether it is within the limit.
fn count(change: isize) -> bool {
    let live = LIVE.get() + change;
    if change > 0 && live > LIMIT.get() {
        return false;
    }
    LIVE.set(live);
    PEAK.set(PEAK.get().max(live));
    true
}

// SAFETY: everything is passed on to the system's allocator with the same layouts; refusing an
// allocation by a null pointer is allowed.
unsafe impl GlobalAlloc for Meter {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        match count(layout.size() as isize) {
            // SAFETY: the caller's promise about the layout.
            true => unsafe { System.alloc(layout) },
            false => std::ptr::null_mut(),
        }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        match count(layout.size() as isize) {
            // SAFETY: the caller's promise about the layout.
            true => unsafe { System.alloc_zeroed(layout) },
            false => std::ptr::null_mut(),
        }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        count(-(layout.size() as isize));
        // SAFETY: the caller's promise: it was allocated here, so by the system's allocator.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        match count(size as isize - layout.size() as isize) {
            // SAFETY: the caller's promise about pointer, layout and size.
            true => unsafe { System.realloc(pointer, layout, size) },
            false => std::ptr::null_mut(),
        }
    }
}
