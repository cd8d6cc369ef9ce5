//! What a disk promises its guest, checked sector by sector.
//!
//! - A read returns the latest write reported before it began, or one that overlaps it.
//! - After a kill every sector holds the last reported write or one not yet reported.
//! - After a power cut every sector holds the last flushed write or a later one.
//! - A sector is never torn, and what a recovery showed stays, durably.
//! - A discard zeroes the whole blocks inside it; the rest of it may go either way.
//! - What lies past the end is gone: a disk that grows again reads as zeroes there.
//!   A reported resize is durable.
//! - With the write cache off, a reported write is a flushed one.

use std::collections::BTreeSet;
use std::fmt;

use super::content::{Contents, SECTOR_BYTES, Value, ZERO};
use super::cut::Ledger;
use super::register::{Crash, Register, Tick};

/// Sectors in a block.
pub const BLOCK_SECTORS: u64 = 8;

/// What the guest asks for. Sectors are counted from the disk's start.
#[derive(Clone, Debug)]
pub enum Action {
    /// Reads so many sectors.
    Read(u64, u64),
    /// Writes values from a sector.
    Write(u64, Vec<Value>),
    /// Zeroes so many sectors.
    Zeroes(u64, u64),
    /// Discards so many sectors.
    Discard(u64, u64),
    /// Flushes.
    Flush,
    /// Sets the size in sectors.
    Resize(u64),
}

/// One version of one sector that an action makes.
#[derive(Debug)]
struct Change {
    sector: u64,
    version: u64,
    certain: bool,
}

/// An action that was submitted and not reported.
#[derive(Debug)]
pub struct Ticket {
    action: Action,
    submitted: Tick,
    changes: Vec<Change>,
    size: Option<u64>,
}

impl fmt::Display for Ticket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} submitted at {}", self.action, self.submitted)
    }
}

/// A disk's history.
#[derive(Debug)]
pub struct Contract {
    /// Gives out and recognises what sectors hold.
    pub contents: Contents,
    sectors: Vec<Register>,
    ledger: Ledger,
    size: Register,
    now: Tick,
    /// When the reads that are not reported were submitted.
    reads: BTreeSet<Tick>,
    write_cache: bool,
    crash: Option<Crash>,
    dropped: bool,
}

impl Contract {
    /// A disk of so many sectors over a base of so many, that never exceeds `most`.
    pub fn new(sectors: u64, base: u64, most: u64) -> Self {
        let initial = |at| if at < base.min(sectors) { Value::base(at) } else { ZERO };
        Self {
            contents: Contents::default(),
            sectors: (0..most).map(|at| Register::new(initial(at))).collect(),
            ledger: Ledger::new((0..most).map(initial)),
            size: Register::new(Value(sectors)),
            now: 1,
            reads: BTreeSet::new(),
            write_cache: true,
            crash: None,
            dropped: false,
        }
    }

    /// Whether writes may be reported before they are durable, from now on.
    pub fn set_write_cache(&mut self, enabled: bool) {
        self.write_cache = enabled;
    }

    fn tick(&mut self) -> Tick {
        self.now += 1;
        self.now
    }

    /// The guest submits.
    pub fn submit(&mut self, action: Action) -> Ticket {
        let now = self.tick();
        let (mut changes, mut size) = (Vec::new(), None);
        match &action {
            Action::Flush => {}
            Action::Read(..) => assert!(self.reads.insert(now)),
            Action::Write(first, values) => {
                for (sector, value) in (*first..).zip(values) {
                    changes.push(self.change(sector, *value, true));
                }
            }
            Action::Zeroes(first, count) => {
                changes.extend((*first..first + count).map(|sector| self.change(sector, ZERO, true)));
            }
            Action::Discard(first, count) => {
                let whole =
                    first.next_multiple_of(BLOCK_SECTORS)..(first + count) / BLOCK_SECTORS * BLOCK_SECTORS;
                let range = *first..first + count;
                changes.extend(range.map(|sector| self.change(sector, ZERO, whole.contains(&sector))));
            }
            Action::Resize(sectors) => {
                size = Some(self.size.submit(Value(*sectors), now));
                let cut = *sectors..self.sectors.len() as u64;
                changes.extend(cut.map(|sector| self.change(sector, ZERO, true)));
            }
        }
        Ticket { action, submitted: now, changes, size }
    }

    fn change(&mut self, sector: u64, value: Value, certain: bool) -> Change {
        let version = self.sectors[sector as usize].submit(value, self.now);
        self.ledger.submit(sector, version, value, self.now);
        Change { sector, version, certain }
    }

    /// The device reports success; `data` is what a read returned.
    ///
    /// # Errors
    /// A read that returned what it must not.
    pub fn done(&mut self, ticket: &Ticket, data: &[u8]) -> Result<(), String> {
        let now = self.tick();
        let durable = !self.write_cache || ticket.size.is_some();
        for change in &ticket.changes {
            let register = &mut self.sectors[change.sector as usize];
            if change.certain {
                register.reported(change.version, now, durable);
                self.ledger.reported(change.sector, change.version, now);
            } else {
                register.reported_optional(change.version, now);
            }
        }
        if let Some(version) = ticket.size {
            self.size.reported(version, now, true);
        }
        self.reads.remove(&ticket.submitted);
        match ticket.action {
            Action::Flush => self.flush(ticket.submitted),
            Action::Read(first, count) => return self.read(first, count, data, ticket.submitted, now),
            _ => {}
        }
        Ok(())
    }

    /// The device reports a failure: the action may have happened, wholly or in part.
    pub fn failed(&mut self, ticket: &Ticket) {
        let now = self.tick();
        self.reads.remove(&ticket.submitted);
        for change in &ticket.changes {
            self.sectors[change.sector as usize].failed(change.version, now);
        }
        if let Some(version) = ticket.size {
            self.size.failed(version, now);
        }
    }

    fn flush(&mut self, submitted: Tick) {
        let oldest = self.reads.first().copied().unwrap_or(self.now);
        for register in self.sectors.iter_mut().chain([&mut self.size]) {
            register.flush(submitted);
            register.forget(oldest);
        }
    }

    fn read(
        &mut self,
        first: u64,
        count: u64,
        data: &[u8],
        submitted: Tick,
        now: Tick,
    ) -> Result<(), String> {
        assert_eq!(data.len() as u64, count * SECTOR_BYTES as u64, "a whole read");
        for (sector, bytes) in (first..).zip(data.chunks_exact(SECTOR_BYTES)) {
            let found = self.contents.recognise(sector, bytes);
            let register = &mut self.sectors[sector as usize];
            let value = found.map_err(|what| format!("read of sector {sector} returned {what}"))?;
            register.read(value, submitted, now).map_err(|allowed| {
                format!("read of sector {sector} returned {value:?}, allowed {allowed:?}")
            })?;
        }
        Ok(())
    }

    /// The moment that is now.
    pub fn now(&self) -> Tick {
        self.now
    }

    /// What was written when, since the last recovery.
    pub fn ledger(&self) -> Ledger {
        self.ledger.clone()
    }

    /// The device shows a size while nothing resizes it.
    ///
    /// # Errors
    /// If it is the wrong one.
    pub fn shows_size(&mut self, sectors: u64) -> Result<(), String> {
        let now = self.tick();
        let shown = self.size.read(Value(sectors), now, now + 1);
        self.now += 1;
        shown.map_err(|allowed| format!("the size is {sectors} sectors, allowed {allowed:?}"))
    }

    /// The device was stopped cleanly: everything reported is durable.
    pub fn stopped(&mut self) {
        let now = self.tick();
        self.flush(now);
        self.crashed(Crash::Kill);
    }

    /// A sync failed: the storage may have dropped what it had accepted.
    pub fn storage_dropped_data(&mut self) {
        self.dropped = true;
    }

    /// The device's process is gone.
    pub fn crashed(&mut self, crash: Crash) {
        let crash = if self.dropped { Crash::Power } else { crash };
        self.crash = self.crash.max(Some(crash));
        self.reads.clear();
    }

    /// A recovery shows this whole disk.
    ///
    /// # Errors
    /// What it must not show.
    ///
    /// # Panics
    /// If nothing crashed.
    pub fn recovered(&mut self, data: &[u8]) -> Result<(), String> {
        let crash = self.crash.take().expect("a crash before the recovery");
        self.dropped = false;
        let now = self.tick();
        let size = (data.len() / SECTOR_BYTES) as u64;
        let found = self.size.recovered(Value(size), crash, now);
        found.map_err(|allowed| format!("after {crash:?}: size {size} sectors, allowed {allowed:?}"))?;
        for (sector, bytes) in (0..).zip(data.chunks_exact(SECTOR_BYTES)) {
            let found = self.contents.recognise(sector, bytes);
            let value = found.map_err(|what| format!("after {crash:?}: sector {sector} holds {what}"))?;
            self.sectors[sector as usize].recovered(value, crash, now).map_err(|allowed| {
                format!("after {crash:?}: sector {sector} holds {value:?}, allowed {allowed:?}")
            })?;
            self.ledger.settle(sector, value);
        }
        for sector in size..self.sectors.len() as u64 {
            self.sectors[sector as usize] = Register::new(ZERO);
            self.ledger.settle(sector, ZERO);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(contract: &Contract, values: &[Value]) -> Vec<u8> {
        contract.contents.bytes(0, values)
    }

    #[test]
    fn discard_promises_whole_blocks_only() {
        let after = |zeroed: &[u64]| {
            let mut contract = Contract::new(24, 24, 24);
            let ticket = contract.submit(Action::Discard(4, 16));
            contract.done(&ticket, &[]).unwrap();
            contract.crashed(Crash::Kill);
            let value = |at| if zeroed.contains(&at) { ZERO } else { Value::base(at) };
            let values: Vec<Value> = (0..24).map(value).collect();
            let data = disk(&contract, &values);
            contract.recovered(&data)
        };
        assert!(after(&[]).unwrap_err().contains("sector 8 "));
        after(&[8, 9, 10, 11, 12, 13, 14, 15]).unwrap();
        after(&[4, 5, 8, 9, 10, 11, 12, 13, 14, 15, 17]).unwrap();
    }

    #[test]
    fn a_regrown_disk_is_zero_and_an_unreported_shrink_may_be_undone() {
        let values: Vec<Value> = (0..16).map(Value::base).collect();
        let mut contract = Contract::new(16, 16, 16);
        let data = disk(&contract, &values);
        contract.submit(Action::Resize(8));
        contract.crashed(Crash::Power);
        contract.recovered(&data).unwrap();
        let shrink = contract.submit(Action::Resize(8));
        contract.done(&shrink, &[]).unwrap();
        let grow = contract.submit(Action::Resize(16));
        contract.done(&grow, &[]).unwrap();
        let read = contract.submit(Action::Read(0, 16));
        assert!(contract.done(&read, &data).unwrap_err().contains("sector 8 "));
        contract.crashed(Crash::Power);
        assert!(contract.recovered(&data).unwrap_err().contains("sector 8 "));
    }

    #[test]
    fn without_a_write_cache_reported_is_durable() {
        let mut contract = Contract::new(8, 0, 8);
        contract.set_write_cache(false);
        let value = contract.contents.fresh();
        let write = contract.submit(Action::Write(0, vec![value]));
        contract.done(&write, &[]).unwrap();
        contract.crashed(Crash::Power);
        let data = disk(&contract, &[ZERO; 8]);
        assert!(contract.recovered(&data).unwrap_err().contains("sector 0 "));
    }

    #[test]
    fn a_failed_sync_makes_a_kill_as_bad_as_a_power_cut() {
        let mut contract = Contract::new(8, 0, 8);
        let value = contract.contents.fresh();
        let write = contract.submit(Action::Write(0, vec![value]));
        contract.done(&write, &[]).unwrap();
        contract.storage_dropped_data();
        contract.crashed(Crash::Kill);
        let data = disk(&contract, &[ZERO; 8]);
        contract.recovered(&data).unwrap();
    }
}
