#![no_main]
//! See `sapwood_fuzz::qcow2_open`.

libfuzzer_sys::fuzz_target!(|data: &[u8]| sapwood_fuzz::qcow2_open::run(data));
