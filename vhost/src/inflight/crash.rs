//! Where tests get between two stores to shared memory.

use std::cell::RefCell;

use sapwood_blockdev::buffer::SharedBuf;

/// Called after each store with the memory and the offset in it.
pub(crate) type Hook = Box<dyn FnMut(&SharedBuf, usize)>;

thread_local! {
    static HOOK: RefCell<Option<Hook>> = const { RefCell::new(None) };
}

/// What a cut unwinds with.
pub(crate) struct Cut;

pub(crate) fn stored(window: &SharedBuf, offset: usize) {
    let hook = HOOK.with(|place| place.borrow_mut().take());
    let Some(mut hook) = hook else { return };
    hook(window, offset);
    HOOK.with(|place| *place.borrow_mut() = Some(hook));
}

/// Runs `f` with a hook; `None` if the hook cut it.
pub(crate) fn with_hook<R>(hook: Hook, f: impl FnOnce() -> R) -> Option<R> {
    HOOK.with(|place| *place.borrow_mut() = Some(hook));
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(f));
    HOOK.with(|place| place.borrow_mut().take());
    match result {
        Ok(result) => Some(result),
        Err(cut) if cut.is::<Cut>() => None,
        Err(panic) => std::panic::resume_unwind(panic),
    }
}
