//! Memory that operations lend to the kernel.
//!
//! - [`AlignedBuf`]: memory of our own, aligned for direct I/O, seen by nobody else;
//! - [`SharedBuf`]: memory that a guest may read and write at any moment, only ever copied;
//! - [`Memory`]: the scatter list of one operation, made of both.

mod aligned;
mod memory;
mod shared;

pub use aligned::{AlignedBuf, BUFFER_ALIGNMENT};
pub use memory::{Memory, Piece};
pub use shared::SharedBuf;
