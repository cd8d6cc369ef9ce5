//! A second reader: the `qcow2-rs` crate and we read the same from what it can read, which is zlib, no
//! subclusters, no external data, clusters from 4 KiB, and qcow2 all the way down.

#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::pin::pin;
use std::task::{Context, Poll, Waker};

use qcow2_rs::dev::Qcow2DevParams;
use qcow2_rs::utils::qcow2_setup_dev_sync;
use sapwood_tests::damage::lab::HostLab;
use sapwood_tests::qcow2::qemu::{Made, Qemu};
use sapwood_tests::qcow2::reader::{Reader, trusting};
use sapwood_tests::sim::rng::Rng;

const SIZE: u64 = (9 << 20) + 1536;

/// What the crate does with system calls is done at once.
fn now<T>(future: impl Future<Output = T>) -> T {
    match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(value) => value,
        Poll::Pending => panic!("it waits for nobody"),
    }
}

/// What it reads; or why it does not open the image.
fn second_reader(path: &Path) -> Result<Vec<u8>, String> {
    let params = Qcow2DevParams::new(9, None, None, true, false);
    let disk = qcow2_setup_dev_sync(path, &params).map_err(|error| error.to_string())?;
    now(disk.qcow2_prep_io()).unwrap();
    let mut bytes = vec![0; disk.info.virtual_size() as usize];
    for (i, chunk) in bytes.chunks_mut(1 << 16).enumerate() {
        now(disk.read_at(chunk, (i as u64) << 16)).unwrap();
    }
    Ok(bytes)
}

#[test]
fn the_second_reader_agrees() {
    let qemu = Qemu::default();
    let mut rng = Rng::new(40);
    let mut agreed = 0;
    for (cluster, options) in [
        (4096, "compat=0.10"),
        (65_536, "lazy_refcounts=on"),
        (65_536, "compat=1.1"),
        (2 << 20, "compat=1.1"),
    ] {
        let made = Made { size: SIZE, cluster, packs: true };
        let create = format!("create -q -f qcow2 -o cluster_size={cluster},{options}");
        qemu.img(&format!("{create} low {SIZE}"));
        qemu.io("qcow2", "low", &qemu.history(&mut rng, &made, 30));
        qemu.img(&format!("{create} -b {} -F qcow2 top {SIZE}", qemu.path("low").display()));
        qemu.io("qcow2", "top", &qemu.history(&mut rng, &made, 15));
        qemu.img("snapshot -c one top");
        for name in ["low", "top"] {
            let path = qemu.path(name);
            let what = format!("{name}: {options}, clusters of {cluster}");
            match second_reader(&path) {
                Ok(theirs) => {
                    assert!(theirs.iter().any(|byte| *byte != 0));
                    let mut reader = Reader::open(&HostLab, &path, &trusting()).unwrap();
                    reader.expect(&what, &theirs);
                    agreed += 1;
                }
                Err(error) => println!("SKIPPED {what}: {error}"),
            }
        }
    }
    assert!(agreed >= 6, "it opens {agreed} of 8");
}
