//! Random writes, flushes and discards on a disk in a file of the host, and what it must hold then:
//! through a queue in this process, with the background work on a thread of its own, as in a server.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use sapwood_blockdev::buffer::SharedBuf;
use sapwood_blockdev::device::{Command, DeviceError, DeviceQueue, Done, Request, drain};
use sapwood_blockdev::engine::Engine;
use sapwood_blockdev::io::{Io, block_on};
use sapwood_blockdev::storage::{HostFile, HostStorage};
use sapwood_blockdev::units::GuestOffset;
use sapwood_image::layer::{self, CreateLayer, Layer, OpenLayer, Tuning};
use sapwood_image::raw::{CreateRaw, RawDevice};
use sapwood_image::{CreateDisk, Disk, DiskQueue, Format, ImageError};

/// Bytes in a block.
const BLOCK: u64 = 4096;
/// Requests in flight at once.
const DEPTH: u64 = 16;

/// Makes an engine for a thread.
pub type Engines<E> = Arc<dyn Fn() -> E + Send + Sync>;

/// How requests have ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// They succeeded.
    pub done: u64,
    /// They were refused for want of space.
    pub no_space: u64,
}

/// A disk under load.
pub struct Load<E: Engine<File = HostFile>> {
    path: PathBuf,
    format: Format,
    tuning: Tuning,
    engines: Engines<E>,
    open: Option<Open<E>>,
    /// For each block what it may hold: the numbers that fill it, 0 for zeroes.
    blocks: Vec<[u64; 2]>,
    number: u64,
    random: u64,
}

struct Open<E: Engine> {
    disk: Arc<Disk<E>>,
    queue: DiskQueue<E>,
    maintenance: JoinHandle<()>,
}

impl<E: Engine<File = HostFile>> Load<E> {
    /// Makes a disk of `size` bytes, and opens it.
    pub fn create(path: &Path, format: Format, size: u64, tuning: Tuning, engines: Engines<E>) -> Self {
        let disk = match format {
            Format::Raw => CreateDisk::Raw(CreateRaw { size, allocate: false }),
            Format::Layer => CreateDisk::Layer(CreateLayer {
                size: Some(size),
                segment_size: 256 << 10,
                ..CreateLayer::default()
            }),
            Format::Qcow2 | Format::Sealed => panic!("{format} is only read"),
        };
        let (io, at) = (Io::new(engines()), path.to_owned());
        let made =
            block_on(&io.clone(), async move { sapwood_image::create(&HostStorage, &io, &at, disk).await });
        made.expect("a new disk");
        let blocks = vec![[0; 2]; (size / BLOCK) as usize];
        let path = path.to_owned();
        let mut load = Self { path, format, tuning, engines, open: None, blocks, number: 0, random: 1 };
        load.open();
        load
    }

    /// A copy of the disk elsewhere, which must hold the same; it is opened.
    pub fn at(&self, path: &Path) -> Self {
        let mut load = Self {
            path: path.to_owned(),
            format: self.format,
            tuning: self.tuning,
            engines: Arc::clone(&self.engines),
            open: None,
            blocks: self.blocks.clone(),
            ..*self
        };
        load.open();
        load
    }

    /// Opens the disk, recovering it where that is needed.
    pub fn open(&mut self) {
        let io = Io::new((self.engines)());
        let (path, format, tuning, inner) = (self.path.clone(), self.format, self.tuning, io.clone());
        let opened = block_on(&io, async move {
            Ok(Arc::new(match format {
                Format::Raw => Disk::Raw(RawDevice::open(&HostStorage, &path, false)?),
                Format::Layer => {
                    let options = OpenLayer { read_only: false, tuning };
                    Disk::Layer(Layer::open(&HostStorage, &inner, &path, &options).await?)
                }
                Format::Qcow2 | Format::Sealed => panic!("{format} is only read"),
            }))
        });
        let disk: Arc<Disk<E>> = opened.unwrap_or_else(|e: ImageError| panic!("{e}"));
        let maintenance = {
            let (disk, engines) = (Arc::clone(&disk), Arc::clone(&self.engines));
            thread::spawn(move || {
                let io = Io::new(engines());
                block_on(&io, disk.maintain(io.clone()));
            })
        };
        let queue = disk.queue_on(Io::new((self.engines)()));
        self.open = Some(Open { disk, queue, maintenance });
    }

    /// Ends it as a server does.
    pub fn close(&mut self) {
        self.try_close().unwrap_or_else(|e| panic!("{e}"));
    }

    /// Ends it as a server does.
    ///
    /// # Errors
    /// When the disk could not be left tidy.
    pub fn try_close(&mut self) -> Result<(), ImageError> {
        let Open { disk, queue, maintenance } = self.open.take().expect("it is open");
        drop(queue);
        let io = Io::new((self.engines)());
        let closed = block_on(&io.clone(), async move { disk.close(&io).await });
        maintenance.join().expect("the maintenance has not panicked");
        closed
    }

    /// Checks a layer that is closed: its errors.
    pub fn check(&self) -> Vec<String> {
        let (io, path) = (Io::new((self.engines)()), self.path.clone());
        let report = block_on(&io.clone(), async move { layer::check(&HostStorage, &io, &path).await });
        report.expect("a layer").errors
    }

    /// Blocks of the disk.
    pub fn blocks(&self) -> u64 {
        self.blocks.len() as u64
    }

    fn below(&mut self, n: u64) -> u64 {
        // splitmix64 (Steele, Lea, Flood 2014).
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.random ^ (self.random >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % n
    }

    /// Runs requests on blocks of their own, and tells how they have ended.
    ///
    /// # Panics
    /// When one ends otherwise than well or for want of space.
    fn run(&mut self, requests: Vec<Request>) -> Vec<(u64, bool)> {
        let queue = &mut self.open.as_mut().expect("it is open").queue;
        requests.into_iter().for_each(|request| queue.submit(request));
        let mut done = Vec::new();
        drain(queue, &mut done);
        let ended = |done: Done| match done.result {
            Ok(()) => (done.tag, true),
            Err(DeviceError::NoSpace) => (done.tag, false),
            Err(error) => panic!("block {}: {error}", done.tag),
        };
        done.into_iter().map(ended).collect()
    }

    fn tally(ended: &[(u64, bool)]) -> Tally {
        let done = ended.iter().filter(|(_, well)| *well).count() as u64;
        Tally { done, no_space: ended.len() as u64 - done }
    }

    /// Writes random blocks, all at once, and tells how that went. What was refused may have been
    /// written or not.
    pub fn write(&mut self) -> Tally {
        let mut blocks: Vec<u64> = (0..DEPTH).map(|_| self.below(self.blocks())).collect();
        blocks.sort_unstable();
        blocks.dedup();
        let mut requests = Vec::new();
        let first = self.number + 1;
        for &block in &blocks {
            self.number += 1;
            let buf = SharedBuf::heap(BLOCK as usize);
            buf.write_at(0, &contents(block, self.number));
            requests.push(request(block, 1, Command::Write(buf.into())));
        }
        let ended = self.run(requests);
        for &(block, well) in &ended {
            let number = first + blocks.binary_search(&block).expect("one of them") as u64;
            let old = self.blocks[block as usize][0];
            self.blocks[block as usize] = if well { [number; 2] } else { [old, number] };
        }
        Self::tally(&ended)
    }

    /// Discards blocks.
    pub fn discard(&mut self, first: u64, count: u64) -> Tally {
        let ended = self.run(vec![request(first, count, Command::Discard)]);
        let well = ended.iter().all(|(_, well)| *well);
        for block in &mut self.blocks[first as usize..(first + count) as usize] {
            // A raw disk may have no way to do it.
            *block = if well && self.format == Format::Layer { [0; 2] } else { [block[0], 0] };
        }
        Self::tally(&ended)
    }

    /// Makes everything durable.
    pub fn flush(&mut self) -> Tally {
        let ended = self.run(vec![request(0, 0, Command::Flush)]);
        Self::tally(&ended)
    }

    /// Reads all of the disk.
    ///
    /// # Panics
    /// When a block holds what it cannot hold; what it holds of two contents is learned.
    pub fn verify(&mut self) {
        for first in (0..self.blocks()).step_by(DEPTH as usize) {
            let blocks: Vec<u64> = (first..self.blocks().min(first + DEPTH)).collect();
            let bufs: Vec<SharedBuf> = blocks.iter().map(|_| SharedBuf::heap(BLOCK as usize)).collect();
            let read =
                |(&block, buf): (&u64, &SharedBuf)| request(block, 1, Command::Read(buf.clone().into()));
            let ended = self.run(blocks.iter().zip(&bufs).map(read).collect());
            assert!(ended.iter().all(|(_, well)| *well), "reads need no space");
            for (block, buf) in blocks.into_iter().zip(bufs) {
                let mut bytes = vec![0; BLOCK as usize];
                buf.read_at(0, &mut bytes);
                let may = self.blocks[block as usize];
                let is = may.into_iter().find(|&number| bytes == contents(block, number));
                let is =
                    is.unwrap_or_else(|| panic!("{}: block {block} is none of {may:?}", self.path.display()));
                self.blocks[block as usize] = [is; 2];
            }
        }
    }
}

fn request(block: u64, count: u64, command: Command) -> Request {
    Request { tag: block, offset: GuestOffset(block * BLOCK), len: count * BLOCK, command }
}

/// What a block holds that was filled with a number: no two blocks hold the same, but for zeroes.
fn contents(block: u64, number: u64) -> Vec<u8> {
    let word = |i: u64| if number == 0 { 0 } else { number << 32 | block ^ i.wrapping_mul(0x9e37_79b9) << 8 };
    (0..BLOCK / 8).flat_map(|i| word(i).to_le_bytes()).collect()
}
