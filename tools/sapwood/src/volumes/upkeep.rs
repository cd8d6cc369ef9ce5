//! Operations on the store as a whole: sealing, collecting, checking, scrubbing, accounting, backing up.

use std::path::PathBuf;
use std::sync::Arc;

use sapwood_blockdev::engine::BlockingEngine;
use sapwood_image::sealed::SealStats;
use sapwood_image::sealed::collect::{Detail, Limits, Pace};
use sapwood_store::{Scrubbed, SealedNode, Severity, SnapshotName};
use serde::{Deserialize, Serialize};

use super::answer::{
    Accounted, BackedUp, Checked, Collected, Problem, Range, Scrub, Sealed, SealedOne, Touched,
};
use super::operation::{Long, operation};
use super::service::{Service, system};
use super::transfer::{check_absolute, report, workers};
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

/// Frees what no snapshot needs: packs of which little is needed go, and what of them is needed is moved.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Collect {
    /// Packs are rewritten of which less than this part is needed, in percent; by default 50.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub live_percent: Option<u32>,
}

/// Compares what the catalog says with itself and with the files, without reading data.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct CheckStore {}

/// Reads everything that the store has written, and says what is damaged and which volumes and snapshots that touches.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct ScrubStore {}

/// Finds out what every snapshot and volume takes.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Account {}

/// Copies the store to another directory, while it is used: the copy is a store with the same snapshots.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct BackUp {
    /// The directory of the copy, an absolute path; it is empty or does not exist.
    pub path: PathBuf,
}

operation!(Collect: Post "/v1/store/gc" -> Collected);
operation!(CheckStore: Post "/v1/store/check" -> Checked);
operation!(ScrubStore: Post "/v1/store/scrub" -> Scrub);
operation!(Account: Post "/v1/store/account" -> Accounted);
operation!(BackUp: Post "/v1/backup" -> BackedUp);
operation!(SealAll: Post "/v1/store/seal" -> Sealed);
operation!(SealSnapshot: Post "/v1/volumes/{volume}/snapshots/{snapshot}/seal" -> Sealed);

/// What all do who have sealed something.
pub fn sealed(service: &Service, node: &SealedNode) -> SealedOne {
    let name = node.name.clone();
    let shown = name.as_deref().unwrap_or("a deleted snapshot");
    if node.is_whole {
        service.changed();
        service.note("sealed", format!("{shown} is sealed"));
    }
    SealedOne { name, whole: node.is_whole, sealed: service.count_seal(&node.stats) }
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
            let next = service.run_in_background(|store, io| async move {
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
        let nodes = service.run_in_background(|store, io| async move {
            store.seal(&io, &name, &workers, &mut |stats: &SealStats| report(&job, stats)).await
        })?;
        let snapshots = nodes.iter().map(|node| sealed(service, node)).collect();
        service.after_seal();
        Ok(Sealed { snapshots })
    }
}

/// Collects, and says so.
pub fn collect(service: &Service, pace: Arc<Pace>, limits: Limits) -> Result<Collected, Failure> {
    let collected =
        service.run_in_background(|store, io| async move { store.collect(&io, &pace, limits).await })?;
    let done = Collected {
        packs_dropped: collected.packs_dropped,
        packs_rewritten: collected.packs_rewritten,
        bytes_freed: collected.bytes_freed,
        bytes_written: collected.bytes_written,
        packs_held: collected.held.len() as u64,
        packs_kept: collected.kept.iter().map(|(_, error)| error.to_string()).collect(),
        stopped: collected.is_stopped,
    };
    for kept in &done.packs_kept {
        service.warn("damage", format!("a pack is kept because of what is damaged in it: {kept}"));
    }
    if done.bytes_freed > 0 || done.bytes_written > 0 {
        let text =
            format!("{} bytes of packs are freed, {} were written", done.bytes_freed, done.bytes_written);
        service.note("collected", text);
    }
    Ok(done)
}

impl Long for Collect {
    const KIND: &'static str = "gc";

    fn about(&self) -> String {
        "collection".to_owned()
    }

    fn run(self, service: &Arc<Service>, job: &Arc<Job>) -> Result<Collected, Failure> {
        let mut limits = Limits::default();
        limits.live_percent = self.live_percent.unwrap_or(limits.live_percent);
        if limits.live_percent > 100 {
            return Err(Failure::new("invalid", "live-percent is at most 100"));
        }
        let collected = collect(service, job.pace(), limits)?;
        service.sweep();
        Ok(collected)
    }
}

impl Long for CheckStore {
    const KIND: &'static str = "check";

    fn about(&self) -> String {
        "check".to_owned()
    }

    fn run(self, service: &Arc<Service>, job: &Arc<Job>) -> Result<Checked, Failure> {
        let found = service.run_until_cancelled(job, |store, io| async move { store.check(&io).await })?;
        let problems = found.into_iter().map(|problem| Problem {
            damage: problem.severity == Severity::Damage,
            subject: problem.subject,
            text: problem.text,
        });
        let checked = Checked { problems: problems.collect(), watermark: service.store().watermark()? };
        for problem in checked.problems.iter().filter(|problem| problem.damage) {
            service.warn("damage", format!("{}: {}", problem.subject, problem.text));
        }
        Ok(checked)
    }
}

/// Ranges of one volume or snapshot that are listed; more are counted.
const RANGES_MAX: usize = 1000;

fn scrubbed(found: &Scrubbed) -> Scrub {
    let in_packs = found.packs.damage.iter().map(ToString::to_string);
    let in_layers = found
        .damaged_layers
        .iter()
        .flat_map(|layer| layer.errors.iter().map(|error| format!("{}: {error}", layer.path.display())));
    let mut touched: Vec<&sapwood_store::Touched> = found.touched.iter().collect();
    touched.sort_by(|a, b| a.name.cmp(&b.name));
    let touched = touched.into_iter().map(|touched| Touched {
        name: touched.name.clone(),
        ranges: touched.ranges.iter().take(RANGES_MAX).map(Range::from).collect(),
        ranges_left_out: touched.ranges.len().saturating_sub(RANGES_MAX) as u64,
        exact: touched.is_exact,
        through: touched.through.clone(),
        why: touched.why.clone(),
    });
    Scrub {
        sound: found.is_sound(),
        bytes: found.packs.bytes,
        packs: found.packs.packs,
        layers: found.layers,
        in_use: found.in_use.clone(),
        damage: in_packs.chain(in_layers).chain(found.damaged_runs.iter().cloned()).collect(),
        index_mended: found.mended,
        touched: touched.collect(),
    }
}

impl Long for ScrubStore {
    const KIND: &'static str = "scrub";

    fn about(&self) -> String {
        "scrub".to_owned()
    }

    fn run(self, service: &Arc<Service>, job: &Arc<Job>) -> Result<Scrub, Failure> {
        let (pace, job) = (job.pace(), Arc::clone(job));
        let found = service.run_in_background(|store, io| async move {
            // Whether to go on is told by the pace.
            let mut progress = |at: sapwood_store::ScrubProgress| {
                let _ = job.report(at.bytes, at.of);
            };
            store.scrub(&io, &pace, &mut progress).await
        })?;
        let scrub = scrubbed(&found);
        scrub.damage.iter().for_each(|damage| service.warn("damage", damage.clone()));
        for touched in &scrub.touched {
            service.warn("damage", format!("{} cannot be read everywhere: {}", touched.name, touched.why));
        }
        Ok(scrub)
    }
}

/// Finds out what everything takes.
pub fn account(service: &Service, pace: Arc<Pace>) -> Result<Accounted, Failure> {
    let account = service
        .run_in_background(|store, io| async move { store.account(&io, &pace, Detail::Shared).await })?;
    Ok(Accounted {
        snapshots: account.nodes.len() as u64,
        volumes: account.volumes.len() as u64,
        referenced_bytes: account.sealed.referenced_bytes,
        unique_bytes: account.sealed.unique_bytes,
        stored_bytes: account.sealed.stored_bytes,
    })
}

impl Long for Account {
    const KIND: &'static str = "account";

    fn about(&self) -> String {
        "account".to_owned()
    }

    fn run(self, service: &Arc<Service>, job: &Arc<Job>) -> Result<Accounted, Failure> {
        account(service, job.pace())
    }
}

impl Long for BackUp {
    const KIND: &'static str = "backup";

    fn about(&self) -> String {
        "backup".to_owned()
    }

    fn run(self, service: &Arc<Service>, job: &Arc<Job>) -> Result<BackedUp, Failure> {
        check_absolute(&self.path)?;
        let (pace, to) = (job.pace(), self.path.clone());
        let engine = BlockingEngine::new().map_err(system)?;
        let done = service
            .run_in_background(|store, io| async move { store.backup(&io, engine, &to, &pace).await })?;
        service.note("backed-up", format!("the store is copied to {}", self.path.display()));
        let sapwood_store::BackedUp { files, bytes, without_heads } = done;
        Ok(BackedUp { path: self.path, files, bytes, without_heads })
    }
}
