//! Tests that need more than one crate, and the tools they share.

pub mod guest;
