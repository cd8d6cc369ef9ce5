#![no_main]
//! See `sapwood_fuzz::virtio_request`.

libfuzzer_sys::fuzz_target!(|data: &[u8]| sapwood_fuzz::virtio_request::run(data));
