//! How operations start, take effect and complete.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use sapwood_blockdev::Errno;
use sapwood_blockdev::engine::{Completion, Op, Transfer};

use super::faults::{Fate, Kind};
use super::medium::{SECTOR, Stamp};
use super::storage::SimFile;
use super::world::{EngineId, Flight, State};

/// The file of an operation, if it has one.
pub(super) fn file_of(op: &Op<SimFile>) -> Option<&SimFile> {
    match op {
        Op::Read(transfer) | Op::Write(transfer) => Some(&transfer.file),
        Op::Sync { file }
        | Op::SyncAll { file }
        | Op::Allocate { file, .. }
        | Op::Punch { file, .. }
        | Op::Discard { file, .. }
        | Op::Truncate { file, .. } => Some(file),
        Op::Rename { .. } | Op::Unlink { .. } | Op::SyncDirectory { .. } => None,
    }
}

fn range_of(transfer: &Transfer<SimFile>) -> Range<u64> {
    let start = transfer.offset.0 + transfer.done as u64;
    start..start + transfer.wanted() as u64
}

fn describe(op: &Op<SimFile>) -> String {
    match op {
        Op::Read(t) => format!("read {:?} {:?}", t.file, range_of(t)),
        Op::Write(t) => format!("write {:?} {:?}", t.file, range_of(t)),
        Op::Sync { file } => format!("sync {file:?}"),
        Op::SyncAll { file } => format!("sync all of {file:?}"),
        Op::Allocate { file, offset, len } => format!("allocate {file:?} {offset}+{len}"),
        Op::Punch { file, offset, len } => format!("punch {file:?} {offset}+{len}"),
        Op::Discard { file, offset, len } => format!("discard {file:?} {offset}+{len}"),
        Op::Truncate { file, size } => format!("truncate {file:?} to {size}"),
        Op::Rename { from, to } => format!("rename {} to {}", from.display(), to.display()),
        Op::Unlink { path } => format!("unlink {}", path.display()),
        Op::SyncDirectory { path } => format!("sync directory {}", path.display()),
    }
}

impl State {
    /// Starts an operation: decides when it completes and what becomes of it.
    ///
    /// # Panics
    /// On operations that a real file would refuse at once, misaligned ones for example: they
    /// are bugs of whoever submits them.
    pub fn start(&mut self, engine: EngineId, token: u64, submitted: Stamp, op: Op<SimFile>) {
        if self.is_dead(engine) {
            if self.dead_are_told {
                self.tell(engine, Completion { token, result: Err(Errno::IO), op });
            }
            return;
        }
        let mut unit = 1;
        if let Op::Read(transfer) | Op::Write(transfer) = &op {
            unit = self.check_alignment(transfer, matches!(op, Op::Write(_)));
        }
        let missing = self.missing(&op);
        let full =
            self.config.capacity.is_some_and(|capacity| missing > 0 && self.used() + missing > capacity);
        let fate = if full {
            Fate::Failed(Errno::NOSPC)
        } else {
            self.faults.draw(&op, unit.max(SECTOR as usize), missing > 0, &mut self.luck)
        };
        let id = self.next_id();
        let due = (self.now + self.latency(&op), id);
        let now = self.now;
        self.trace.add(now, || format!("e{engine} start {} {fate:?} #{id}", describe(&op)));
        self.flights.insert(due, Flight { engine, token, submitted, fate, op, orphan: false });
    }

    fn check_alignment(&self, transfer: &Transfer<SimFile>, write: bool) -> usize {
        use sapwood_blockdev::storage::StorageFile;
        let alignment = transfer.file.alignment();
        let range = range_of(transfer);
        // At the end of a file Linux reports 0 bytes before it looks at the alignment; that is
        // how a reader finds out that a short read was the last one.
        let at_end = range.start >= self.files[transfer.file.description().file].medium.size();
        assert!(
            (at_end && !write)
                || transfer.memory.is_aligned(alignment.memory)
                    && range.start.is_multiple_of(alignment.offset as u64)
                    && range.end.is_multiple_of(alignment.offset as u64),
            "misaligned transfer of {range:?} on {:?}",
            transfer.file
        );
        alignment.offset
    }

    fn missing(&self, op: &Op<SimFile>) -> u64 {
        let (file, offset, len) = match op {
            Op::Write(transfer) => {
                let range = range_of(transfer);
                (&transfer.file, range.start, range.end - range.start)
            }
            Op::Allocate { file, offset, len } => (file, offset.0, *len),
            _ => return 0,
        };
        let file = &self.files[file.description().file];
        if file.is_device {
            assert!(offset + len <= file.medium.size(), "a device does not grow");
            return 0;
        }
        file.medium.missing(offset, len)
    }

    fn used(&self) -> u64 {
        self.files.iter().filter(|file| !file.is_device).map(|file| file.medium.allocated()).sum()
    }

    /// Most operations take tens of microseconds, some a hundred times that; syncs take longer,
    /// so that other things happen meanwhile, and a read may take until everything else is over.
    fn latency(&mut self, op: &Op<SimFile>) -> Duration {
        if Kind::of(op) == Kind::Read && self.timing.percent(6) {
            return Duration::from_micros(self.timing.between(5_000, 300_000));
        }
        let base = if Kind::of(op) == Kind::Sync { 200 } else { 10 };
        let stretch = if self.timing.percent(15) { 100 } else { 5 };
        Duration::from_micros(self.timing.between(base, base * stretch))
    }

    /// Completes the operation that is due next.
    pub fn step(&mut self) -> bool {
        self.cut_if_due();
        let Some((due, mut flight)) = self.flights.pop_first() else { return false };
        self.now = self.now.max(due.0);
        self.events += 1;
        let result = self.land(&mut flight);
        if !flight.orphan {
            self.count(&flight.op, result);
        }
        let (now, event) = (self.now, self.events);
        self.trace.add(now, || format!("event {event}: #{} {} {result:?}", due.1, describe(&flight.op)));
        let Flight { engine, token, op, .. } = flight;
        self.deliver(engine, Completion { token, result, op });
        true
    }

    fn count(&mut self, op: &Op<SimFile>, result: Result<usize, Errno>) {
        if !matches!(result, Ok(_) | Err(Errno::INTR | Errno::AGAIN)) {
            self.failures.0 += 1;
            self.failures.1 += u64::from(Kind::of(op) == Kind::Sync);
        }
    }

    /// Gives an operation its effect and tells its result.
    fn land(&mut self, flight: &mut Flight) -> Result<usize, Errno> {
        if let Some(file) = file_of(&flight.op)
            && !matches!(flight.op, Op::Read(_) | Op::Sync { .. } | Op::SyncAll { .. })
            && !file.description().write
        {
            return Err(Errno::BADF);
        }
        match (&mut flight.op, flight.fate) {
            (Op::Read(_), Fate::Failed(errno)) => Err(errno),
            (Op::Read(transfer), fate) => Ok(self.read(transfer, fate)),
            (Op::Sync { file }, fate) => {
                let file = file.description().file;
                self.sync(file, flight.submitted, fate)
            }
            (Op::SyncAll { file }, fate) => {
                let file = file.description().file;
                let synced = self.sync(file, flight.submitted, fate)?;
                if fate == Fate::Done {
                    self.files[file].mtime_ns_durable = self.files[file].mtime_ns;
                }
                Ok(synced)
            }
            (_, Fate::Failed(Errno::INTR | Errno::AGAIN)) => flight.errno(),
            (Op::Write(_), _) => {
                self.reach(flight);
                flight.moved()
            }
            (_, Fate::Failed(_)) => flight.errno(),
            (Op::Truncate { file, .. }, _) if self.files[file.description().file].is_device => {
                Err(Errno::INVAL)
            }
            (Op::Rename { from, to }, _) => {
                if self.names.rename(from, to) {
                    Ok(0)
                } else {
                    Err(Errno::NOENT)
                }
            }
            (Op::Unlink { path }, _) => {
                if self.names.unlink(path) {
                    Ok(0)
                } else {
                    Err(Errno::NOENT)
                }
            }
            (Op::SyncDirectory { path }, _) => {
                self.names.sync(path);
                Ok(0)
            }
            _ => {
                self.reach(flight);
                Ok(0)
            }
        }
    }

    fn sync(&mut self, file: usize, covered: Stamp, fate: Fate) -> Result<usize, Errno> {
        let medium = &mut self.files[file].medium;
        match fate {
            Fate::Failed(errno) => {
                medium.fail_sync(covered, &mut self.luck);
                Err(errno)
            }
            Fate::Ignored => Ok(0),
            _ => {
                medium.sync(covered);
                Ok(0)
            }
        }
    }

    /// Lets an operation's effect reach its file: all of it, or what its fate or the death of its
    /// process leaves.
    pub fn reach(&mut self, flight: &Flight) {
        let Some(file) = file_of(&flight.op).map(|file| file.description().file) else {
            return self.reach_names(flight);
        };
        self.stamp += 1;
        let stamp = self.stamp;
        let keep = match flight.fate {
            Fate::Failed(_) => self.luck.pick(&[0, 50, 100]),
            // What a device has dropped reads as anything: here as zeroes, or as before.
            _ if self.files[file].is_device && matches!(flight.op, Op::Discard { .. }) => {
                self.luck.pick(&[0, 50, 100])
            }
            _ if flight.orphan => self.luck.pick(&[50, 100, 100]),
            _ => 100,
        };
        let luck = &mut self.luck;
        let reaches = |_| keep == 100 || luck.percent(keep);
        let now_ns = self.now.as_nanos() as u64;
        let target = &mut self.files[file];
        match &flight.op {
            Op::Write(transfer) => {
                let (at, bytes) = bytes_of(transfer, flight.fate);
                target.medium.write_some(stamp, at, &bytes, reaches);
            }
            Op::Punch { offset, len, .. } | Op::Discard { offset, len, .. } => {
                target.medium.punch(stamp, offset.0, *len, reaches);
            }
            Op::Allocate { offset, len, .. } => target.medium.allocate(stamp, offset.0, *len),
            Op::Truncate { size, .. } => target.medium.truncate(stamp, *size),
            _ => return,
        }
        target.mtime_ns = now_ns;
    }

    fn reach_names(&mut self, flight: &Flight) {
        match &flight.op {
            Op::Rename { from, to } => drop(self.names.rename(from, to)),
            Op::Unlink { path } => drop(self.names.unlink(path)),
            _ => {}
        }
    }

    /// A read sees what has reached the file, and of writes in flight any sectors.
    fn read(&mut self, transfer: &mut Transfer<SimFile>, fate: Fate) -> usize {
        let range = range_of(transfer);
        let mut len = (range.end - range.start) as usize;
        if let Fate::Short(short) = fate {
            len = short;
        }
        let id = transfer.file.description().file;
        let medium = &self.files[id].medium;
        let mut bytes = vec![0; medium.size().saturating_sub(range.start).min(len as u64) as usize];
        medium.read(range.start, &mut bytes);
        self.overlay(id, range.start, &mut bytes);
        transfer.memory.write_at(transfer.done, &bytes);
        bytes.len()
    }

    /// Mixes sectors of writes in flight into what was read.
    fn overlay(&mut self, file: usize, start: u64, bytes: &mut [u8]) {
        let luck = &mut self.luck;
        for flight in self.flights.values() {
            let Op::Write(write) = &flight.op else { continue };
            let range = range_of(write);
            let both = range.start.max(start)..range.end.min(start + bytes.len() as u64);
            if write.file.description().file != file || both.is_empty() {
                continue;
            }
            let (_, data) = bytes_of(write, Fate::Done);
            for at in both.step_by(SECTOR as usize) {
                let n = SECTOR.min(range.end - at).min(start + bytes.len() as u64 - at) as usize;
                if luck.percent(30) {
                    let (from, to) = ((at - range.start) as usize, (at - start) as usize);
                    bytes[to..to + n].copy_from_slice(&data[from..from + n]);
                }
            }
        }
    }
}

/// Where a write's data goes, and the data.
fn bytes_of(transfer: &Transfer<SimFile>, fate: Fate) -> (u64, Arc<[u8]>) {
    let range = range_of(transfer);
    let mut len = (range.end - range.start) as usize;
    if let Fate::Short(short) = fate {
        len = short;
    }
    let mut bytes = vec![0; len];
    transfer.memory.read_at(transfer.done, &mut bytes);
    (range.start, Arc::from(bytes))
}

impl Flight {
    fn errno(&self) -> Result<usize, Errno> {
        match self.fate {
            Fate::Failed(errno) => Err(errno),
            _ => Ok(0),
        }
    }

    fn moved(&self) -> Result<usize, Errno> {
        match (self.fate, &self.op) {
            (Fate::Failed(errno), _) => Err(errno),
            (Fate::Short(len), _) => Ok(len),
            (_, Op::Write(transfer)) => Ok(transfer.wanted()),
            _ => Ok(0),
        }
    }
}
