//! Operations that move whole disks: importing.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use sapwood_image::sealed::{DiskSource, LEVEL, SealStats, Step, Workers};
use sapwood_image::{Format, OpenBelow, OpenDisk};
use sapwood_store::{Importing, SnapshotName};
use serde::{Deserialize, Serialize};

use super::answer::Imported;
use super::operation::{Long, operation};
use super::service::{Service, system};
use crate::control::jobs::Job;
use crate::control::wire::Failure;

/// Threads that hash and compress, at most.
const WORKERS_MAX: usize = 8;

/// Makes a volume over a sealed snapshot of a disk that is not in the store.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Import {
    /// The new volume.
    pub volume: String,
    /// Its snapshot that holds what is imported, without the volume's name.
    pub snapshot: String,
    /// The disk, an absolute path.
    pub path: PathBuf,
    /// Its format; needed unless it is a layer or qcow2.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format: Option<String>,
    /// Of a qcow2 image: read this snapshot of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub read_snapshot: Option<String>,
    /// Of a qcow2 image: open the files that it names.
    #[serde(default)]
    pub allow_backing: bool,
    /// Of a qcow2 image: the format of backing files of which it does not say it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backing_format: Option<String>,
    /// Threads that hash and compress; by default as many as there are processors, at most 8.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub threads: Option<u16>,
}

operation!(Import: Post "/v1/import" -> Imported);

impl Import {
    fn open(&self) -> Result<OpenDisk, Failure> {
        let format = |name: &Option<String>| match name {
            Some(name) => {
                let format = name.parse::<Format>();
                format.map(Some).map_err(|error| Failure::new("invalid", error.to_string()))
            }
            None => Ok(None),
        };
        Ok(OpenDisk {
            format: format(&self.format)?,
            read_only: true,
            below: OpenBelow {
                allow_backing: self.allow_backing,
                backing_format: format(&self.backing_format)?,
                snapshot: self.read_snapshot.clone(),
            },
            ..OpenDisk::default()
        })
    }
}

/// Threads that hash and compress.
pub fn workers(threads: Option<u16>) -> Result<Workers, Failure> {
    let available = || std::thread::available_parallelism().map_or(1, usize::from);
    let threads = threads.map_or_else(available, usize::from).clamp(1, WORKERS_MAX);
    Workers::threads_of(threads, LEVEL).map_err(system)
}

/// Says how far sealing has come.
pub fn report(job: &Job, stats: &SealStats) -> Step {
    const BLOCK_SIZE: u64 = sapwood_blockdev::units::BLOCK_SIZE;
    match job.report(stats.blocks_done * BLOCK_SIZE, stats.blocks_total * BLOCK_SIZE) {
        std::ops::ControlFlow::Continue(()) => Step::Go,
        std::ops::ControlFlow::Break(()) => Step::Cancel,
    }
}

/// Refuses a path whose meaning depends on where a process was started.
pub fn check_absolute(path: &Path) -> Result<(), Failure> {
    match path.is_absolute() {
        true => Ok(()),
        false => Err(Failure::new("invalid", format!("{}: give an absolute path", path.display()))),
    }
}

impl Long for Import {
    const KIND: &'static str = "import";

    fn about(&self) -> String {
        self.volume.clone()
    }

    fn run(self, service: &Arc<Service>, job: &Arc<Job>) -> Result<Imported, Failure> {
        check_absolute(&self.path)?;
        let (options, workers, job) = (self.open()?, workers(self.threads)?, Arc::clone(job));
        let name = SnapshotName { volume: self.volume, snapshot: self.snapshot };
        let shown = name.to_string();
        let side = service.host().side(&self.path, options)?;
        let imported = service.run(|store, io| async move {
            let mut source = DiskSource::new(side);
            let importing = Importing { name: &name, workers: &workers };
            let mut watch = |stats: &SealStats| report(&job, stats);
            let imported = store.import(&io, &importing, &mut source, &mut watch).await?;
            source.into_side().close()?;
            Ok::<_, Failure>(imported)
        })?;
        service.note("imported", format!("{} is imported as {shown}", self.path.display()));
        Ok(Imported {
            name: shown,
            volume: imported.volume,
            snapshot: imported.snapshot,
            virtual_size: imported.size,
            hash: imported.hash.to_string(),
            pack_bytes: imported.pack_bytes,
            sealed: (&imported.stats).into(),
        })
    }
}
