//! The machine itself, from the crate that knows it.

use std::fs::File;
use std::os::fd::AsFd;

use sapwood_vmm::{Config, Ending};

/// Finds out whether KVM can run an unmodified kernel here.
pub fn probe() -> anyhow::Result<()> {
    Ok(sapwood_vmm::probe::probe()?)
}

/// Runs a machine until it ends, or `stop` can be read.
pub fn run(config: Config, stop: File) -> anyhow::Result<Ending> {
    Ok(sapwood_vmm::run(config, stop.as_fd())?)
}
