//! A toy disk: the smallest log that keeps the contract, and ways to break it.
//!
//! It is the simulator's own test. Without a flaw no history may find anything wrong; with each
//! flaw some history must. It serves one request at a time and never reuses anything.
//!
//! The file is a log of records, each a header block and whole blocks of data. A record holds its
//! sequence number, a checksum of its data and the checksum of the previous header, which chains
//! it to a session: each open appends a record with a random number.

mod log;

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use sapwood_blockdev::Errno;
use sapwood_blockdev::buffer::AlignedBuf;
use sapwood_blockdev::device::{BlockDevice, Command, DeviceError, DeviceQueue, Done, Geometry, Request};
use sapwood_blockdev::engine::{Op, Time};
use sapwood_blockdev::io::Io;
use sapwood_blockdev::storage::{Lock, LockError, OpenOptions, Storage, StorageFile};
use sapwood_blockdev::units::FileOffset;

use log::{Header, Kind, Log, Place, crc};

use crate::sim::content::{SECTOR_BYTES, base_image};
use crate::sim::engine::SimEngine;
use crate::sim::medium::SECTOR;
use crate::sim::plan::{Base, Shape};
use crate::sim::storage::{SimFile, SimStorage};
use crate::sim::subject::{Control, Disk, OpenError, Subject, Task, base_path, disk_path};

const BLOCK: u64 = 4096;

/// A way to break the toy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flaw {
    /// A flush is reported without a sync.
    FlushWithoutSync,
    /// A write is reported before its record is written.
    EarlyReport,
    /// Recovery does not look at the data's checksum.
    DataUnchecked,
    /// Recovery does not look at the chain.
    ChainUnchecked,
    /// Recovery serves before it has synced what it found.
    RecoveryWithoutSync,
    /// Recovery does not wait for the last user's operations.
    NoLock,
    /// After a failed sync the next is believed.
    SyncRetried,
    /// A write of part of a block is rounded to the whole.
    Rounded,
    /// Shrinking forgets to zero.
    ShrinkKeeps,
    /// The queue sometimes goes to sleep although requests wait.
    Sleepy,
}

impl Flaw {
    /// Every flaw.
    pub const ALL: [Self; 10] = [
        Self::FlushWithoutSync,
        Self::EarlyReport,
        Self::DataUnchecked,
        Self::ChainUnchecked,
        Self::RecoveryWithoutSync,
        Self::NoLock,
        Self::SyncRetried,
        Self::Rounded,
        Self::ShrinkKeeps,
        Self::Sleepy,
    ];
}

/// The toy, perhaps with a flaw.
#[derive(Clone, Copy, Debug, Default)]
pub struct Toy {
    /// What is wrong with it.
    pub flaw: Option<Flaw>,
}

/// An open toy disk.
pub struct ToyDisk {
    toy: Toy,
    file: SimFile,
    base: Option<SimFile>,
    log: Mutex<Log>,
}

impl ToyDisk {
    fn log(&self) -> MutexGuard<'_, Log> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn flawed(&self, flaw: Flaw) -> bool {
        self.toy.flaw == Some(flaw)
    }

    /// Finds the records that belong to the log, up to the first that does not.
    async fn recover(&self, io: &Io<SimEngine>) -> Result<(), Errno> {
        loop {
            let (end, sequence, previous) = {
                let log = self.log();
                (log.end, log.sequence, log.previous)
            };
            let block = read(io, &self.file, end, BLOCK).await?;
            let Some((header, sum)) = Header::decode(&block) else { return Ok(()) };
            let chained = header.previous == previous || self.flawed(Flaw::ChainUnchecked);
            if header.sequence != sequence + 1 || !chained {
                return Ok(());
            }
            let data = read(io, &self.file, end + BLOCK, header.data_blocks() * BLOCK).await?;
            if crc(&data) != header.data_sum && !self.flawed(Flaw::DataUnchecked) {
                return Ok(());
            }
            let mut log = self.log();
            log.apply(self.toy, &header, end);
            (log.sequence, log.previous) = (header.sequence, sum);
            log.end += BLOCK + header.data_blocks() * BLOCK;
        }
    }

    async fn append(
        self: &Arc<Self>,
        io: &Io<SimEngine>,
        kind: Kind,
        first: u64,
        count: u64,
        data: Vec<u8>,
    ) -> Result<(), DeviceError> {
        let mut data = data;
        data.resize(data.len().next_multiple_of(BLOCK as usize), 0);
        self.turn(io).await;
        let (header, at, mut bytes) = {
            let mut log = self.log();
            if log.latched {
                log.writing = false;
                return Err(DeviceError::Latched);
            }
            if matches!(kind, Kind::Write | Kind::Zero) && first + count > log.sectors {
                log.writing = false;
                return Err(DeviceError::OutOfRange);
            }
            log.sequence += 1;
            let (sequence, previous) = (log.sequence, log.previous);
            let header = Header { sequence, kind, first, count, data_sum: crc(&data), previous };
            let bytes = header.encode();
            log.previous = crc(&bytes[..56]);
            let at = log.end;
            log.end += BLOCK + data.len() as u64;
            (header, at, bytes)
        };
        bytes.extend(data);
        let op = Op::write(self.file.clone(), FileOffset(at), AlignedBuf::from_slice(&bytes));
        let written = io.run(op).await.result;
        self.log().writing = false;
        if written.is_err() {
            self.log().latched = true;
            return Err(DeviceError::Latched);
        }
        self.log().apply(self.toy, &header, at);
        Ok(())
    }

    /// One at a time: of two syncs in flight one may fail, dropping data, and the other succeed.
    async fn sync(&self, io: &Io<SimEngine>) -> Result<(), DeviceError> {
        self.turn(io).await;
        let synced = io.run(Op::Sync { file: self.file.clone() }).await.result;
        let mut log = self.log();
        log.writing = false;
        if log.latched {
            return Err(DeviceError::Latched);
        }
        log.latched = synced.is_err() && !self.flawed(Flaw::SyncRetried);
        synced.map(drop).map_err(DeviceError::from)
    }

    /// Waits until nobody writes or syncs; the next one waits for the caller.
    async fn turn(&self, io: &Io<SimEngine>) {
        while std::mem::replace(&mut self.log().writing, true) {
            io.sleep_until(io.now() + Duration::from_micros(10)).await;
        }
    }

    async fn serve(self: &Arc<Self>, io: &Io<SimEngine>, mut request: Request) -> Result<(), DeviceError> {
        let (first, count) = (request.offset.0 / SECTOR, request.len / SECTOR);
        let (latched, sectors, write_cache) = {
            let log = self.log();
            (log.latched, log.sectors, log.write_cache)
        };
        if let Command::Read(memory) = &mut request.command {
            let bytes = self.read_sectors(io, first, count).await?;
            memory.write_at(0, &bytes);
            return Ok(());
        }
        if latched {
            return Err(DeviceError::Latched);
        }
        if first + count > sectors {
            return Err(DeviceError::OutOfRange);
        }
        match &request.command {
            Command::Write(memory) => {
                let mut data = vec![0; memory.len()];
                memory.read_at(0, &mut data);
                self.write(io, first, count, data).await?;
            }
            Command::Flush if self.flawed(Flaw::FlushWithoutSync) => return Ok(()),
            Command::Flush => return self.sync(io).await,
            _ => self.append(io, Kind::Zero, first, count, Vec::new()).await?,
        }
        if write_cache { Ok(()) } else { self.sync(io).await }
    }

    async fn write(
        self: &Arc<Self>,
        io: &Io<SimEngine>,
        first: u64,
        count: u64,
        mut data: Vec<u8>,
    ) -> Result<(), DeviceError> {
        let mut count = count;
        if self.flawed(Flaw::Rounded) && !count.is_multiple_of(8) {
            count = (count + 1).min(self.log().sectors - first);
            data.resize((count * SECTOR) as usize, 0);
        }
        if self.flawed(Flaw::EarlyReport) {
            let (disk, later) = (Arc::clone(self), io.clone());
            io.spawn(async move {
                let _ = disk.append(&later, Kind::Write, first, count, data).await;
            });
            return Ok(());
        }
        self.append(io, Kind::Write, first, count, data).await
    }

    async fn resize(self: &Arc<Self>, io: &Io<SimEngine>, sectors: u64) -> Result<(), DeviceError> {
        self.append(io, Kind::Resize, 0, sectors, Vec::new()).await?;
        self.sync(io).await
    }

    async fn read_sectors(&self, io: &Io<SimEngine>, first: u64, count: u64) -> Result<Vec<u8>, DeviceError> {
        let mut bytes = Vec::new();
        for sector in first..first + count {
            let place = self.log().map[sector as usize];
            let (file, at) = match (place, &self.base) {
                (Place::At(at), _) => (&self.file, at),
                (Place::Base, Some(base)) => (base, sector * SECTOR),
                _ => {
                    bytes.resize(bytes.len() + SECTOR_BYTES, 0);
                    continue;
                }
            };
            let block = read(io, file, at / BLOCK * BLOCK, BLOCK).await?;
            let skip = (at % BLOCK) as usize;
            bytes.extend_from_slice(&block[skip..skip + SECTOR_BYTES]);
        }
        Ok(bytes)
    }
}

async fn read(io: &Io<SimEngine>, file: &SimFile, at: u64, len: u64) -> Result<Vec<u8>, Errno> {
    if len == 0 {
        return Ok(Vec::new());
    }
    let op = Op::read(file.clone(), FileOffset(at), AlignedBuf::zeroed(len as usize));
    let memory = io.run(op).await.zero_filled()?;
    let mut bytes = vec![0; len as usize];
    memory.read_at(0, &mut bytes);
    Ok(bytes)
}

/// The queue of a toy disk.
pub struct ToyQueue {
    disk: Arc<ToyDisk>,
    io: Io<SimEngine>,
    waiting: VecDeque<Request>,
    busy: Rc<Cell<bool>>,
    done: Rc<RefCell<Vec<Done>>>,
    outstanding: usize,
}

impl BlockDevice for ToyDisk {
    type Engine = SimEngine;
    type Queue = ToyQueue;

    fn geometry(&self) -> Geometry {
        let size = self.log().sectors * SECTOR;
        Geometry { size, read_only: false, physical_block: 512, discard_granularity: 512 }
    }

    fn queue(self: &Arc<Self>, engine: SimEngine) -> ToyQueue {
        self.queue_on(Io::new(engine))
    }

    fn set_write_cache(&self, enabled: bool) {
        self.log().write_cache = enabled;
    }
}

impl DeviceQueue for ToyQueue {
    type Engine = SimEngine;

    fn submit(&mut self, request: Request) {
        self.outstanding += 1;
        self.waiting.push_back(request);
    }

    fn poll(&mut self, done: &mut Vec<Done>) {
        loop {
            let served = {
                let mut log = self.disk.log();
                log.served += 1;
                log.served
            };
            let sleepy = self.disk.flawed(Flaw::Sleepy) && served % 64 > 60;
            if !self.busy.get()
                && !sleepy
                && let Some(request) = self.waiting.pop_front()
            {
                self.busy.set(true);
                let (disk, io) = (Arc::clone(&self.disk), self.io.clone());
                let (busy, finished) = (Rc::clone(&self.busy), Rc::clone(&self.done));
                self.io.spawn(async move {
                    let tag = request.tag;
                    let result = disk.serve(&io, request).await;
                    finished.borrow_mut().push(Done { tag, result });
                    busy.set(false);
                });
            }
            self.io.poll(&mut Vec::new());
            if self.busy.get() || self.waiting.is_empty() || sleepy {
                break;
            }
        }
        self.outstanding -= self.done.borrow().len();
        done.append(&mut self.done.borrow_mut());
    }

    fn wait(&mut self, deadline: Option<Time>) {
        self.io.wait(deadline);
    }

    fn outstanding(&self) -> usize {
        self.outstanding
    }

    fn with_engine<R>(&mut self, f: impl FnOnce(&mut SimEngine) -> R) -> R {
        self.io.with_engine(f)
    }
}

impl Disk for ToyDisk {
    fn queue_on(self: &Arc<Self>, io: Io<SimEngine>) -> ToyQueue {
        ToyQueue {
            disk: Arc::clone(self),
            io,
            waiting: VecDeque::new(),
            busy: Rc::default(),
            done: Rc::default(),
            outstanding: 0,
        }
    }

    fn maintain(self: Arc<Self>, _io: Io<SimEngine>) -> Task<()> {
        Box::pin(async {})
    }

    fn control(self: Arc<Self>, _: SimStorage, io: Io<SimEngine>, what: Control) -> Task<Result<(), String>> {
        Box::pin(async move {
            let result = match what {
                Control::Checkpoint | Control::Clean | Control::Compact => Ok(()),
                Control::Flatten | Control::Rebase | Control::Commit => Ok(()),
                Control::Snapshot(_) | Control::Seal => Ok(()),
                Control::Resize(size) => self.resize(&io, size / SECTOR).await,
                Control::Close if self.log().latched => Err(DeviceError::Latched),
                Control::Close => self.sync(&io).await,
            };
            result.map_err(|error| error.to_string())
        })
    }
}

impl Subject for Toy {
    type Disk = ToyDisk;

    fn queues_max(&self) -> usize {
        1
    }

    fn spare_sector(&self, _storage: SimStorage, _io: Io<SimEngine>) -> Task<Option<u64>> {
        Box::pin(async { None })
    }

    fn create(&self, storage: SimStorage, io: Io<SimEngine>, shape: Shape) -> Task<Result<(), String>> {
        Box::pin(async move {
            if shape.base != Base::Nothing {
                storage.world().install(&base_path(), &base_image(shape.base.sectors()));
            }
            storage.open(&disk_path(), OpenOptions::CREATE).map_err(|error| error.to_string())?;
            let path = disk_path().parent().expect("a directory").to_owned();
            let synced = io.run(Op::SyncDirectory { path }).await;
            synced.result.map(drop).map_err(|errno| errno.to_string())
        })
    }

    fn open(
        &self,
        storage: SimStorage,
        io: Io<SimEngine>,
        shape: Shape,
    ) -> Task<Result<Arc<ToyDisk>, OpenError>> {
        let toy = *self;
        Box::pin(async move { toy.open_disk(storage, io, shape).await })
    }

    fn check(&self, _storage: SimStorage, _io: Io<SimEngine>) -> Task<Result<Vec<String>, OpenError>> {
        Box::pin(async { Ok(Vec::new()) })
    }
}

impl Toy {
    async fn open_disk(
        self,
        storage: SimStorage,
        io: Io<SimEngine>,
        shape: Shape,
    ) -> Result<Arc<ToyDisk>, OpenError> {
        let failed = |error: &dyn ToString| OpenError::Failed(error.to_string());
        let file = storage.open(&disk_path(), OpenOptions::WRITE).map_err(|error| failed(&error))?;
        match file.lock(Lock::Exclusive) {
            Err(LockError::Held(_)) if self.flaw != Some(Flaw::NoLock) => return Err(OpenError::Locked),
            Err(LockError::Io(error)) => return Err(failed(&error)),
            _ => {}
        }
        let base_sectors = shape.base.sectors().min(shape.sectors);
        let base = (base_sectors > 0).then(|| storage.open(&base_path(), OpenOptions::READ));
        let base = base.transpose().map_err(|error| failed(&error))?;
        let mut map = vec![Place::Zero; shape.sectors_max as usize];
        map[..base_sectors as usize].fill(Place::Base);
        let log = Log {
            map,
            sectors: shape.sectors,
            end: 0,
            sequence: 0,
            previous: 0,
            writing: false,
            latched: false,
            write_cache: shape.write_cache,
            served: 0,
        };
        let disk = Arc::new(ToyDisk { toy: self, file, base, log: Mutex::new(log) });
        disk.recover(&io).await.map_err(|error| failed(&error))?;
        let mut nonce = [0; 8];
        storage.random(&mut nonce).map_err(|error| failed(&error))?;
        let nonce = u64::from_le_bytes(nonce);
        disk.append(&io, Kind::Session, nonce, 0, Vec::new()).await.map_err(|error| failed(&error))?;
        if self.flaw != Some(Flaw::RecoveryWithoutSync) {
            disk.sync(&io).await.map_err(|error| failed(&error))?;
        }
        Ok(disk)
    }
}
