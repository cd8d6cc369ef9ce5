//! Random operations on a disk, and what it must contain after them.
//!
//! The model keeps for each sector the hashes of the contents that it may have:
//! - a completed write or zeroing leaves one;
//! - a discard leaves two, the old and zeroes, except where whole 4 KiB blocks read as zeroes for
//!   sure ([`Model::discards_zero`]);
//! - a request that was cut short (its server died) leaves the old and the new;
//! - none means unknown: whatever is read first is learned.
//!
//! Requests in flight never overlap, unless all of them read; so what each one must find is known
//! whatever the order they are performed in. A seed makes a run: the same operations, though the
//! server decides their order.

use std::fmt;
use std::hash::{DefaultHasher, Hasher};
use std::io;
use std::ops::Range;
use std::time::{Duration, Instant};

use smallvec::{SmallVec, smallvec};

use crate::frontend::{Command, Frontend};

const SECTOR: usize = 512;
const BLOCK_SECTORS: u64 = 8;

/// How long nothing at all may finish.
const STALL: Duration = Duration::from_secs(30);

/// A run of random operations.
#[derive(Clone, Debug)]
pub struct Run {
    /// Where the random numbers begin.
    pub seed: u64,
    /// Requests to make.
    pub operations: usize,
    /// Requests in flight at most, on all queues together.
    pub depth: usize,
    /// Sectors in one request at most.
    pub sectors_max: u64,
}

impl Default for Run {
    fn default() -> Self {
        Self { seed: 1, operations: 2000, depth: 32, sectors_max: 128 }
    }
}

/// What went wrong.
#[derive(Debug)]
pub enum Failure {
    /// A sector has contents it cannot have.
    Mismatch {
        /// The sector.
        sector: u64,
        /// The operation, counted from the run's begin, that found it.
        operation: u64,
        /// The run's seed.
        seed: u64,
    },
    /// A request failed.
    Request(String, io::Error),
    /// The connection failed, or nothing finished for long.
    Connection(io::Error),
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Mismatch { sector, operation, seed } => {
                write!(f, "sector {sector} has wrong contents (operation {operation} of seed {seed})")
            }
            Self::Request(what, error) => write!(f, "{what}: {error}"),
            Self::Connection(error) => write!(f, "connection: {error}"),
        }
    }
}

impl std::error::Error for Failure {}

/// What was done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Reads, writes, flushes, discards, zeroings.
    pub counts: [u64; 5],
    /// The most requests that were in flight.
    pub depth: usize,
}

/// What a disk may contain.
#[derive(Clone, Debug)]
pub struct Model {
    sectors: Vec<SmallVec<[u64; 2]>>,
    flights: Vec<Flight>,
    /// Whether a discarded 4 KiB block reads as zeroes for sure.
    pub discards_zero: bool,
}

#[derive(Clone, Debug)]
struct Flight {
    tag: u64,
    sectors: Range<u64>,
    kind: Kind,
}

#[derive(Clone, Debug)]
enum Kind {
    Read,
    Write(Vec<u64>),
    Flush,
    Discard,
    Zeroes,
}

/// splitmix64 (Steele, Lea, Flood 2014).
#[derive(Clone, Debug)]
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let a = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let b = (a ^ (a >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        b ^ (b >> 31)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound.max(1)
    }

    fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len / 8).flat_map(|_| self.next().to_le_bytes()).collect()
    }
}

fn hash(sector: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    hasher.write(sector);
    hasher.finish()
}

fn hashes(data: &[u8]) -> Vec<u64> {
    data.chunks_exact(SECTOR).map(hash).collect()
}

fn zero() -> u64 {
    hash(&[0; SECTOR])
}

impl Model {
    /// A disk of `size` bytes of which nothing is known.
    pub fn unknown(size: u64) -> Self {
        let sectors = vec![SmallVec::new(); size as usize / SECTOR];
        Self { sectors, flights: Vec::new(), discards_zero: false }
    }

    /// A disk of `size` zero bytes.
    pub fn zeroes(size: u64) -> Self {
        let sectors = vec![smallvec![zero()]; size as usize / SECTOR];
        Self { sectors, ..Self::unknown(0) }
    }

    /// Makes random requests on all queues and checks what comes back.
    ///
    /// # Errors
    /// The first thing that is not as it must be; requests may be in flight still. After an error
    /// of the connection [`interrupted`](Self::interrupted) makes the model fit again.
    pub fn run(&mut self, frontend: &mut Frontend, run: &Run) -> Result<Report, Failure> {
        let mut rng = Rng(run.seed);
        let mut report = Report::default();
        let (mut next, mut last) = (0, Instant::now());
        while next < run.operations as u64 || !self.flights.is_empty() {
            let mut submitted = false;
            while next < run.operations as u64 && self.flights.len() < run.depth {
                if !self.submit(frontend, next, run, &mut rng, &mut report)? {
                    break;
                }
                (next, submitted) = (next + 1, true);
                report.depth = report.depth.max(self.flights.len());
            }
            if submitted {
                frontend.queues.iter_mut().try_for_each(|queue| queue.kick()).map_err(Failure::Connection)?;
            }
            if self.collect(frontend, run.seed)? > 0 {
                last = Instant::now();
            } else if last.elapsed() > STALL {
                return Err(Failure::Connection(io::ErrorKind::TimedOut.into()));
            } else if !submitted && !self.flights.is_empty() {
                let queues = frontend.queues.len();
                let queue = &mut frontend.queues[rng.below(queues as u64) as usize];
                let patience = if queues == 1 { Duration::from_secs(1) } else { Duration::from_micros(100) };
                queue.wait(patience).map_err(Failure::Connection)?;
            }
        }
        Ok(report)
    }

    /// Reads the whole disk and compares; what is unknown is learned.
    ///
    /// # Errors
    /// The first difference, or a request that failed.
    pub fn verify(&mut self, frontend: &mut Frontend) -> Result<(), Failure> {
        const STEP: usize = 128;
        for start in (0..self.sectors.len()).step_by(STEP) {
            let count = STEP.min(self.sectors.len() - start);
            let read = Command::Read((start * SECTOR) as u64, count * SECTOR);
            let data = frontend
                .run(read)
                .map_err(|error| Failure::Request(format!("reading sector {start}"), error))?;
            self.check(start as u64, &data, 0, 0)?;
        }
        Ok(())
    }

    /// The server died: what was in flight may or may not have happened.
    pub fn interrupted(&mut self) {
        for flight in std::mem::take(&mut self.flights) {
            let Range { start, end } = flight.sectors;
            for sector in start..end {
                let new = match &flight.kind {
                    Kind::Write(hashes) => hashes[(sector - start) as usize],
                    Kind::Discard | Kind::Zeroes => zero(),
                    Kind::Read | Kind::Flush => continue,
                };
                self.also(sector, new);
            }
        }
    }

    /// One more thing that a sector may contain, unless nothing is known of it.
    fn also(&mut self, sector: u64, content: u64) {
        let may = &mut self.sectors[sector as usize];
        if !may.is_empty() && !may.contains(&content) {
            may.push(content);
        }
    }

    /// Makes one random request; false if it has to wait for others.
    fn submit(
        &mut self,
        frontend: &mut Frontend,
        tag: u64,
        run: &Run,
        rng: &mut Rng,
        report: &mut Report,
    ) -> Result<bool, Failure> {
        let before = rng.clone();
        let queue = rng.below(frontend.queues.len() as u64) as usize;
        let sectors = self.random_range(run, rng);
        let (offset, len) = (sectors.start * SECTOR as u64, (sectors.end - sectors.start) as usize * SECTOR);
        let chosen = rng.below(100);
        let data = if (35..75).contains(&chosen) { rng.bytes(len) } else { Vec::new() };
        let (at, kind, command) = match chosen {
            0..35 => (0, Kind::Read, Command::Read(offset, len)),
            35..75 => (1, Kind::Write(hashes(&data)), Command::Write(offset, &data)),
            75..80 => (2, Kind::Flush, Command::Flush),
            80..90 => (3, Kind::Discard, Command::Discard(offset, len as u64)),
            _ => (4, Kind::Zeroes, Command::WriteZeroes(offset, len as u64, chosen < 95)),
        };
        let reads = |kind: &Kind| matches!(kind, Kind::Read);
        let collides = |flight: &Flight| {
            let meet = flight.sectors.start < sectors.end && sectors.start < flight.sectors.end;
            let both_read = reads(&flight.kind) && reads(&kind);
            meet && !both_read
        };
        if !matches!(kind, Kind::Flush) && self.flights.iter().any(collides) {
            // The same request is tried again when others have finished.
            *rng = before;
            return Ok(false);
        }
        match frontend.queues[queue].submit(tag, command) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                *rng = before;
                return Ok(false);
            }
            Err(error) => return Err(Failure::Request(format!("submitting {command:?}"), error)),
        }
        report.counts[at] += 1;
        let sectors = if matches!(kind, Kind::Flush) { 0..0 } else { sectors };
        self.flights.push(Flight { tag, sectors, kind });
        Ok(true)
    }

    /// Where: anywhere or (half of the time) on block boundaries, short more often than long.
    fn random_range(&self, run: &Run, rng: &mut Rng) -> Range<u64> {
        let size = self.sectors.len() as u64;
        let most = run.sectors_max.min(size);
        let len = 1 + match rng.below(4) {
            0 => rng.below(most),
            1 => rng.below(most.min(BLOCK_SECTORS)),
            _ => most.min(BLOCK_SECTORS) - 1,
        };
        let start = rng.below(size - len + 1);
        let aligned = start / BLOCK_SECTORS * BLOCK_SECTORS;
        let start = if rng.below(2) == 0 { start } else { aligned };
        start..start + len
    }

    /// Takes what has finished and checks it.
    fn collect(&mut self, frontend: &mut Frontend, seed: u64) -> Result<usize, Failure> {
        let mut failure = None;
        let mut count = 0;
        for queue in &mut frontend.queues {
            count += queue.poll(|finished| {
                let at = self.flights.iter().position(|flight| flight.tag == finished.tag);
                let flight = self.flights.swap_remove(at.expect("a request of ours"));
                let outcome = match finished.result {
                    Err(error) => Err(Failure::Request(format!("{flight:?}"), error)),
                    Ok(()) => self.apply(flight, finished.data, seed),
                };
                if let Err(error) = outcome {
                    failure.get_or_insert(error);
                }
            });
        }
        failure.map_or(Ok(count), Err)
    }

    fn apply(&mut self, flight: Flight, data: &[u8], seed: u64) -> Result<(), Failure> {
        let Range { start, end } = flight.sectors;
        match flight.kind {
            Kind::Flush => {}
            Kind::Read => return self.check(start, data, flight.tag, seed),
            Kind::Write(hashes) => {
                for (sector, hash) in (start..end).zip(hashes) {
                    self.sectors[sector as usize] = smallvec![hash];
                }
            }
            Kind::Zeroes => self.sectors[start as usize..end as usize].fill(smallvec![zero()]),
            Kind::Discard => {
                let first_block = start.next_multiple_of(BLOCK_SECTORS);
                let blocks = first_block..(end / BLOCK_SECTORS * BLOCK_SECTORS).max(first_block);
                for sector in start..end {
                    if self.discards_zero && blocks.contains(&sector) {
                        self.sectors[sector as usize] = smallvec![zero()];
                    } else {
                        self.also(sector, zero());
                    }
                }
            }
        }
        Ok(())
    }

    /// Compares what was read, and learns from it.
    fn check(&mut self, start: u64, data: &[u8], operation: u64, seed: u64) -> Result<(), Failure> {
        for (sector, found) in (start..).zip(hashes(data)) {
            let may = &mut self.sectors[sector as usize];
            if !may.is_empty() && !may.contains(&found) {
                return Err(Failure::Mismatch { sector, operation, seed });
            }
            *may = smallvec![found];
        }
        Ok(())
    }
}
