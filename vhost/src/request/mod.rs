//! From a descriptor chain to a checked request, and back.
//!
//! [`chain`] follows the descriptors, [`parse()`] makes a request of the memory they name, the
//! device performs it, [`finish`] writes the status. The first two are pure functions over a
//! [`GuestMap`](crate::guest::GuestMap), which tests and fuzzers make of plain memory.

pub mod chain;
pub mod finish;
pub mod layout;
pub mod parse;

#[cfg(test)]
mod tests;

pub use chain::{Chain, ChainError, Span};
pub use parse::{Action, Limits, Parsed, parse};
