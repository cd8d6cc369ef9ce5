//! Image formats.
#![forbid(unsafe_code)]
