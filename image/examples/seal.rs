//! Seals raw disks one after the other into packs of one folder, sharing what they share, and says how fast:
//!
//! `cargo run --release --package sapwood-image --example seal -- FOLDER THREADS DISK...`

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use sapwood_blockdev::engine::{Op, UringEngine};
use sapwood_blockdev::io::{Io, block_on};
use sapwood_blockdev::storage::{HostStorage, OpenOptions, Storage, StorageFile};
use sapwood_image::sealed::{
    DiskSource, ExactMap, FRAME_BLOCKS, LEVEL, PACK_BYTES, Packs, SealStats, Sealed, Sealing, Step, Workers,
    pack_name, seal,
};
use sapwood_image::{Format, ImageError, OpenDisk, Side};

type Failure = Box<dyn std::error::Error>;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("seal: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &[String]) -> Result<(), Failure> {
    let [folder, threads, disks @ ..] = arguments else { return Err("FOLDER THREADS DISK...".into()) };
    let workers = Arc::new(Workers::threads_of(threads.parse()?, LEVEL)?);
    let (folder, mut known, mut number) = (PathBuf::from(folder), ExactMap::default(), 0);
    for disk in disks {
        let begin = Instant::now();
        let sealed;
        (sealed, known, number) = seal_one(&folder, Path::new(disk), &workers, known, number)?;
        print_one(disk, &sealed, begin.elapsed().as_secs_f64());
    }
    Ok(())
}

fn packs_of(folder: &Path) -> Arc<Packs<UringEngine>> {
    let directory = folder.to_owned();
    Packs::new(folder, move |number| {
        let path = directory.join(pack_name(number));
        let file = HostStorage.open(&path, OpenOptions::READ).map_err(|e| ImageError::open(&path, e))?;
        let size = file.size().map_err(|e| ImageError::io(&path, "measure", e))?;
        Ok((file, 0..size))
    })
}

/// Seals a disk, durably: with what is known then, and the number of the last pack.
fn seal_one(
    folder: &Path,
    disk: &Path,
    workers: &Arc<Workers>,
    mut known: ExactMap,
    mut number: u32,
) -> Result<(Sealed, ExactMap, u32), Failure> {
    let options = OpenDisk { format: Some(Format::Raw), read_only: true, ..OpenDisk::default() };
    let side = Side::open(&HostStorage, Io::new(UringEngine::new()?), disk, options)?;
    let io = Io::new(UringEngine::new()?);
    let (inner, folder, workers, packs) =
        (io.clone(), folder.to_owned(), Arc::clone(workers), packs_of(folder));
    let (sealed, known, number) = block_on(&io, async move {
        let sealing = Sealing {
            storage: &HostStorage,
            io: &inner,
            directory: &folder,
            packs: &packs,
            dedup: &mut known,
            workers: &workers,
            base: None,
            frame_blocks: FRAME_BLOCKS,
            pack_bytes: PACK_BYTES,
            start: 0,
        };
        let numbers = || {
            number += 1;
            Ok(number)
        };
        let mut source = DiskSource::new(side);
        let sealed = seal(sealing, &mut source, numbers, &mut |_: &SealStats| Step::Go).await;
        let synced = inner.run(Op::SyncDirectory { path: folder }).await.result;
        (sealed.map(|sealed| (sealed, synced)), known, number)
    });
    let (sealed, synced) = sealed?;
    synced?;
    Ok((sealed, known, number))
}

fn print_one(disk: &str, sealed: &Sealed, seconds: f64) {
    let stats = &sealed.stats;
    let mib = |blocks: u64| blocks as f64 / 256.0;
    let (read, nonzero) = (mib(stats.blocks_read), mib(stats.unique + stats.duplicate));
    let stored: u64 = sealed.packs.iter().map(|pack| pack.bytes).sum();
    println!(
        "{disk}: {read:.1} MiB read, {nonzero:.1} not zero, {:.1} new, {:.1} stored, {seconds:.3} s",
        mib(stats.unique),
        stored as f64 / f64::from(1 << 20),
    );
}
