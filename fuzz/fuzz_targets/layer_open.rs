#![no_main]
//! See `sapwood_fuzz::layer_open`.

libfuzzer_sys::fuzz_target!(|data: &[u8]| sapwood_fuzz::layer_open::run(data));
