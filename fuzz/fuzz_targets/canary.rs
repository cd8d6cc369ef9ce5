#![no_main]
//! A planted bug, which must be found: else the fuzzers see nothing.

libfuzzer_sys::fuzz_target!(|data: &[u8]| sapwood_fuzz::canary::run(data));
