#![no_main]
//! See `sapwood_fuzz::layer_record`.

libfuzzer_sys::fuzz_target!(|data: &[u8]| sapwood_fuzz::layer_record::run(data));
