//! What the guest of a served disk may do, for as long as it is served.

use std::sync::{Arc, Mutex, PoisonError};

use sapwood_blockdev::device::BlockDevice;
use sapwood_blockdev::engine::monotonic_now;
use sapwood_qos::arbiter::{Arbiter, NodeId, Settings};
use sapwood_qos::governor::{Governor, IN_FLIGHT_DEFAULT};
use sapwood_qos::limited::Limited;
use sapwood_qos::names::{Named, merge};

use super::wire::{Failure, Limit};

/// See the module's documentation.
pub struct DiskLimits {
    governor: Arc<Governor>,
    node: NodeId,
    named: Mutex<Named>,
}

impl DiskLimits {
    /// A disk that is limited from the first request on.
    pub fn new<D: BlockDevice>(disk: Arc<D>, named: Named) -> Result<(Arc<Limited<D>>, Self), Failure> {
        let settings = check(&named)?;
        let governor = Governor::new(IN_FLIGHT_DEFAULT, monotonic_now());
        let limited = Limited::new(disk, &governor, Arbiter::ROOT, &settings);
        let node = limited.node();
        Ok((limited, Self { governor, node, named: Mutex::new(named) }))
    }

    /// What is set.
    pub fn get(&self) -> Named {
        self.named.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Changes it; what is set then.
    pub fn change(&self, asked: &Limit) -> Result<Named, Failure> {
        let mut named = self.named.lock().unwrap_or_else(PoisonError::into_inner);
        let before = if asked.reset { Named::new() } else { named.clone() };
        check(&asked.limits.keys().map(|name| (name.clone(), 0)).collect())?;
        let after = merge(&before, &asked.limits);
        self.governor.change(self.node, Arbiter::ROOT, &check(&after)?, monotonic_now());
        named.clone_from(&after);
        Ok(after)
    }
}

fn check(named: &Named) -> Result<Settings, Failure> {
    Settings::from_named(named).map_err(|error| Failure::new("invalid", error.to_string()))
}
