//! Operations on the store as a whole: sealing.

use std::sync::Arc;

use sapwood_image::sealed::SealStats;
use sapwood_store::{SealedNode, SnapshotName};
use serde::{Deserialize, Serialize};

use super::answer::{Sealed, SealedOne};
use super::operation::{Long, operation};
use super::service::Service;
use super::transfer::{report, workers};
use crate::control::jobs::Job;
use crate::control::wire::Failure;

/// Seals all snapshots that can be sealed, the oldest first.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct SealAll {}

/// Seals a snapshot, and first those below it that are not sealed.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct SealSnapshot {
    /// The snapshot's volume.
    pub volume: String,
    /// The snapshot.
    pub snapshot: String,
}

operation!(SealAll: Post "/v1/store/seal" -> Sealed);
operation!(SealSnapshot: Post "/v1/volumes/{volume}/snapshots/{snapshot}/seal" -> Sealed);

/// What all do who have sealed something.
pub fn sealed(service: &Service, node: &SealedNode) -> SealedOne {
    let name = node.name.clone();
    let shown = name.as_deref().unwrap_or("a deleted snapshot");
    if node.is_whole {
        service.note("sealed", format!("{shown} is sealed"));
    }
    SealedOne { name, whole: node.is_whole, sealed: (&node.stats).into() }
}

impl Long for SealAll {
    const KIND: &'static str = "seal";

    fn about(&self) -> String {
        "packs".to_owned()
    }

    fn run(self, service: &Arc<Service>, job: &Arc<Job>) -> Result<Sealed, Failure> {
        let (job, mut all) = (Arc::clone(job), Vec::new());
        let workers = Arc::new(workers(None)?);
        loop {
            let (job, workers) = (Arc::clone(&job), Arc::clone(&workers));
            let next = service.run(|store, io| async move {
                store.seal_next(&io, &workers, &mut |stats: &SealStats| report(&job, stats)).await
            })?;
            let Some(node) = next else { break };
            all.push(sealed(service, &node));
            service.after_seal();
        }
        Ok(Sealed { snapshots: all })
    }
}

impl Long for SealSnapshot {
    const KIND: &'static str = "seal";

    fn about(&self) -> String {
        self.volume.clone()
    }

    fn run(self, service: &Arc<Service>, job: &Arc<Job>) -> Result<Sealed, Failure> {
        let (job, workers) = (Arc::clone(job), workers(None)?);
        let name = SnapshotName { volume: self.volume, snapshot: self.snapshot };
        let nodes = service.run(|store, io| async move {
            store.seal(&io, &name, &workers, &mut |stats: &SealStats| report(&job, stats)).await
        })?;
        let snapshots = nodes.iter().map(|node| sealed(service, node)).collect();
        service.after_seal();
        Ok(Sealed { snapshots })
    }
}
