//! Operations on the contents of whole disks: importing, exporting, comparing.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use sapwood_image::sealed::{Archive, ArchiveInfo, DiskSource, LEVEL, SealStats, Step, Workers};
use sapwood_image::{ErrorKind, Format, ImageError, OpenBelow, OpenDisk, Side};
use sapwood_store::catalog::Look;
use sapwood_store::{Exporting, Importing, SnapshotName};
use serde::{Deserialize, Serialize};

use super::answer::{Diff, Exported, Imported, Range};
use super::operation::{Long, operation};
use super::service::{Service, system};
use crate::control::jobs::Job;
use crate::control::wire::Failure;

/// Threads that hash and compress, at most.
const WORKERS_MAX: usize = 8;

/// The first bytes of an archive (docs/format-sealed.md).
const ARCHIVE_MAGIC: [u8; 8] = *b"SAPWARCH";

/// The snapshot of an imported disk, unless another name is given.
const SNAPSHOT: &str = "imported";

/// Makes a volume over a sealed snapshot of a disk that is not in the store, or of one in an archive. An increment needs the
/// snapshot that it was made over, and may go to a volume that lies over that and holds nothing itself.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Import {
    /// The new volume.
    pub volume: String,
    /// Its snapshot that holds what is imported, without the volume's name; by default that of an archive, or `imported`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<String>,
    /// The disk or archive, an absolute path.
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

/// Writes a snapshot to a new file, an archive, whole or as an increment.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Export {
    /// The snapshot's volume.
    pub volume: String,
    /// The snapshot.
    pub snapshot: String,
    /// The file, an absolute path; it must not exist.
    pub path: PathBuf,
    /// For an increment: a snapshot that the other side has, `volume@snapshot`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since: Option<String>,
}

/// Finds the bytes in which a snapshot differs from another one.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct DiffSnapshot {
    /// The snapshot's volume.
    pub volume: String,
    /// The snapshot, the newer one as a rule.
    pub snapshot: String,
    /// The other one, `volume@snapshot`; none: what is not zero.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<String>,
}

operation!(Import: Post "/v1/import" -> Imported);
operation!(Export: Post "/v1/volumes/{volume}/snapshots/{snapshot}/export" -> Exported);
operation!(DiffSnapshot: Post "/v1/volumes/{volume}/snapshots/{snapshot}/diff" -> Diff);

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

/// Whether a file says that it is an archive. One that cannot be read does not.
fn begins_as_archive(path: &Path) -> bool {
    let mut begin = [0; ARCHIVE_MAGIC.len()];
    std::fs::File::open(path).and_then(|mut file| file.read_exact(&mut begin)).is_ok()
        && begin == ARCHIVE_MAGIC
}

/// The archive at a path, if that is one. Where a format was given, it is none.
fn archive(service: &Service, import: &Import) -> Result<Option<ArchiveInfo>, Failure> {
    if import.format.is_some() {
        return Ok(None);
    }
    let (path, storage) = (import.path.clone(), service.host().storage());
    service.run_in_background(|_, io| async move {
        match Archive::open(&storage, &io, &path).await {
            Ok(archive) => Ok(Some(archive.info().clone())),
            // It is something else, unless it says that it is one: then it is damaged or cut off.
            Err(ImageError {
                kind: ErrorKind::Corrupt { field: "archive header" | "archive", .. }, ..
            }) if !begins_as_archive(&path) => Ok(None),
            Err(error) => Err(error),
        }
    })
}

impl Long for Import {
    const KIND: &'static str = "import";

    fn about(&self) -> String {
        self.volume.clone()
    }

    fn run(self, service: &Arc<Service>, job: &Arc<Job>) -> Result<Imported, Failure> {
        check_absolute(&self.path)?;
        let options = self.open()?;
        let archive = archive(service, &self)?;
        let from_archive = archive.as_ref().and_then(|info| Some(info.name.split_once('@')?.1.to_owned()));
        let snapshot = self.snapshot.or(from_archive).unwrap_or_else(|| SNAPSHOT.to_owned());
        let name = SnapshotName { volume: self.volume, snapshot };
        let shown = name.to_string();
        // What can be refused at once is.
        let side = match archive {
            Some(_) => None,
            None => {
                service.store().check_import(&name)?;
                Some(Side::open(&service.host().storage(), service.background_io()?, &self.path, options)?)
            }
        };
        // What is not published yet is not found: two at a time would both store what they have in common.
        service.wait_for_turn(job)?;
        let (workers, job) = (workers(self.threads)?, Arc::clone(job));
        let mut watch = move |stats: &SealStats| report(&job, stats);
        let imported = if let Some(side) = side {
            service.run_in_background(|store, io| async move {
                let mut source = DiskSource::new(side);
                let importing = Importing { name: &name, workers: &workers };
                let imported = store.import(&io, &importing, &mut source, &mut watch).await?;
                source.into_side().close()?;
                Ok::<_, Failure>(imported)
            })?
        } else {
            let path = self.path.clone();
            service.run_in_background(|store, io| async move {
                let importing = Importing { name: &name, workers: &workers };
                store.import_archive(&io, &importing, &path, &mut watch).await
            })?
        };
        service.changed();
        service.note("imported", format!("{} is imported as {shown}", self.path.display()));
        Ok(Imported {
            name: shown,
            volume: imported.volume,
            snapshot: imported.snapshot,
            virtual_size: imported.size,
            hash: imported.hash.to_string(),
            pack_bytes: imported.pack_bytes,
            sealed: service.count_seal(&imported.stats),
        })
    }
}

impl Long for Export {
    const KIND: &'static str = "export";

    fn about(&self) -> String {
        self.path.display().to_string()
    }

    fn run(self, service: &Arc<Service>, job: &Arc<Job>) -> Result<Exported, Failure> {
        check_absolute(&self.path)?;
        let (workers, job, path) = (workers(None)?, Arc::clone(job), self.path.clone());
        let since: Option<SnapshotName> = self.since.map(|since| since.parse()).transpose()?;
        let of = SnapshotName { volume: self.volume, snapshot: self.snapshot };
        let shown = of.to_string();
        let exported = service.run_in_background(|store, io| async move {
            let exporting = Exporting { of: &of, since: since.as_ref(), workers: &workers };
            store.export_archive(&io, &exporting, &path, &mut |stats: &SealStats| report(&job, stats)).await
        })?;
        service.changed();
        service.note("exported", format!("{shown} is exported to {}", self.path.display()));
        Ok(Exported {
            name: shown,
            path: self.path,
            bytes: exported.bytes,
            virtual_size: exported.info.size,
            hash: exported.info.root.to_string(),
            base: exported.info.base.map(|base| base.to_string()),
            sealed: (&exported.stats).into(),
        })
    }
}

/// Stretches that one answer has at most.
const EXTENTS_MAX: usize = 4 << 20;

impl Long for DiffSnapshot {
    const KIND: &'static str = "diff";

    fn about(&self) -> String {
        let Self { volume, snapshot, from } = self;
        format!("{volume}@{snapshot} and {}", from.as_deref().unwrap_or("nothing"))
    }

    fn run(self, service: &Arc<Service>, job: &Arc<Job>) -> Result<Diff, Failure> {
        let to = SnapshotName { volume: self.volume, snapshot: self.snapshot };
        let from: Option<SnapshotName> = self.from.map(|from| from.parse()).transpose()?;
        let shown = to.to_string();
        let id = service.snapshot(&to)?;
        let size = service.store().catalog().view()?.needed_node(id)?.size;
        let watched = Arc::clone(job);
        let (found, extents) = service.run_until_cancelled(job, move |store, io| async move {
            let mut extents = Vec::new();
            let mut changed = |range: std::ops::Range<u64>| {
                let _ = watched.report(range.end.min(size), size);
                // One more than there may be says that there are too many.
                if extents.len() <= EXTENTS_MAX {
                    extents.push(Range::from(&range));
                }
            };
            let found = store.diff(&io, from.as_ref(), &to, &mut changed).await?;
            Ok::<_, Failure>((found, extents))
        })?;
        if extents.len() > EXTENTS_MAX {
            let text = format!(
                "{shown}: it differs in {} stretches, at most {EXTENTS_MAX} are listed",
                found.extents
            );
            return Err(Failure::new("unsupported", text));
        }
        Ok(Diff { from_size: found.from_size, to_size: found.to_size, bytes: found.bytes, extents })
    }
}
