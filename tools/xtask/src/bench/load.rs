//! The client: one queue, a fixed number of requests in flight, sleeping when there is nothing to
//! do, as a guest does.

use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use sapwood_tests::frontend::{Command, Frontend, Options};

/// Within which any request must be answered.
const ANSWER_LIMIT: Duration = Duration::from_secs(30);
/// The tag of a flush.
const FLUSH: u64 = u64::MAX;

/// The order of addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Any, again and again.
    Random,
    /// Any, but four in five of them in the first fifth of the disk.
    Skewed,
    /// Rising by so many units.
    Strided(u64),
    /// Each once, in random order.
    EachOnce,
    /// Rising, from the start again at the end.
    Sequential,
}

/// What the client does.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    /// Whether requests are writes; else reads.
    pub writes: bool,
    /// The order of addresses.
    pub order: Order,
    /// Bytes in a request.
    pub bytes: usize,
    /// Requests in flight.
    pub depth: usize,
    /// After so many writes all of them are awaited, and a flush after them.
    pub flush_every: Option<usize>,
    /// Requests in a turn at most.
    pub operations_max: u64,
}

/// A connected client and its place in the order of addresses.
pub struct Client {
    frontend: Frontend,
    data: Vec<u8>,
    /// Addresses in units of a request.
    units: u64,
    shuffled: Vec<u32>,
    next: u64,
    random: u64,
}

impl Client {
    /// Connects to the server of a disk of `size` bytes.
    ///
    /// # Errors
    /// What the connection says.
    pub fn connect(socket: &Path, load: &Load, size: u64) -> Result<Self> {
        let options =
            Options { queue_size: 256, slots: load.depth, slot_bytes: load.bytes, ..Options::default() };
        let frontend = Frontend::connect(socket, &options).context("connecting to the server")?;
        let mut client = Self {
            frontend,
            data: Vec::new(),
            units: size / load.bytes as u64,
            shuffled: Vec::new(),
            next: 0,
            random: 0x9e37_79b9_7f4a_7c15,
        };
        let words = (0..load.bytes / 8).map(|_| client.random().to_le_bytes());
        client.data = words.collect::<Vec<_>>().concat();
        if load.order == Order::EachOnce {
            client.shuffle();
        }
        Ok(client)
    }

    /// xorshift64.
    fn random(&mut self) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random
    }

    fn shuffle(&mut self) {
        self.shuffled = (0..self.units as u32).collect();
        for i in (1..self.shuffled.len()).rev() {
            let j = self.random() % (i as u64 + 1);
            self.shuffled.swap(i, j as usize);
        }
    }

    fn offset(&mut self, load: &Load) -> u64 {
        let unit = match load.order {
            Order::Random => self.random() % self.units,
            Order::Skewed if self.random() % 5 < 4 => self.random() % (self.units / 5),
            Order::Skewed => self.units / 5 + self.random() % (self.units - self.units / 5),
            Order::Strided(step) => self.next * step % self.units,
            Order::Sequential => self.next % self.units,
            Order::EachOnce => u64::from(self.shuffled[(self.next % self.units) as usize]),
        };
        self.next += 1;
        unit * load.bytes as u64
    }

    /// Does what the load says for `time`; the number of requests finished, without flushes.
    ///
    /// # Errors
    /// A request fails or is not answered.
    pub fn drive(&mut self, load: &Load, time: Duration) -> Result<u64> {
        let end = Instant::now() + time;
        let (mut submitted, mut finished, mut since_flush) = (0, 0, 0);
        loop {
            let goes_on = submitted < load.operations_max && Instant::now() < end;
            let flush_due = load.flush_every.is_some_and(|every| since_flush == every);
            if flush_due && self.outstanding() == 0 {
                self.frontend.queues[0].submit(FLUSH, Command::Flush)?;
                since_flush = 0;
            } else if goes_on && !flush_due {
                let room = load.depth - self.outstanding();
                let room = load.flush_every.map_or(room, |every| room.min(every - since_flush));
                let count = room.min((load.operations_max - submitted) as usize);
                self.submit(load, submitted, count)?;
                submitted += count as u64;
                since_flush += count;
            }
            if self.outstanding() == 0 && !goes_on {
                return Ok(finished);
            }
            finished += self.reap()?;
        }
    }

    fn outstanding(&self) -> usize {
        self.frontend.queues[0].outstanding()
    }

    fn submit(&mut self, load: &Load, tag: u64, count: usize) -> Result<()> {
        for tag in tag..tag + count as u64 {
            let offset = self.offset(load);
            let command = if load.writes {
                Command::Write(offset, &self.data)
            } else {
                Command::Read(offset, load.bytes)
            };
            self.frontend.queues[0].submit(tag, command)?;
        }
        Ok(())
    }

    /// Waits until something has finished; the number of reads and writes that have.
    fn reap(&mut self) -> Result<u64> {
        let queue = &mut self.frontend.queues[0];
        queue.kick()?;
        let (mut finished, mut failed) = (0, None);
        loop {
            let any = queue.poll(|done| {
                finished += u64::from(done.tag != FLUSH);
                if let Err(error) = done.result {
                    failed = Some(error);
                }
            });
            if let Some(error) = failed {
                return Err(error).context("a request failed");
            }
            if any > 0 {
                return Ok(finished);
            }
            if !queue.wait(ANSWER_LIMIT)? {
                bail!(io::Error::from(io::ErrorKind::TimedOut));
            }
        }
    }

    /// Makes what was written durable.
    ///
    /// # Errors
    /// As for [`Client::drive`].
    pub fn flush(&mut self) -> Result<()> {
        self.frontend.run(Command::Flush).map(drop).context("flushing")
    }
}
