//! What guests did with a disk: requests, bytes, errors, how long they waited.
//!
//! - [`Accounted`]: a device that keeps the account of all its queues;
//! - [`Account`]: what that is at a moment, in plain numbers that can be added up and told apart;
//! - [`Histogram`]: how long requests took.
//!
//! It lies above all else that a request goes through, so the times are those that a server sees. Each queue has counters of its own,
//! which only its thread writes, without locks and without read-modify-write; whoever asks adds them up. The clock is read once for all
//! requests that are submitted between two polls, and once for all that a poll reports.

mod device;
mod histogram;
#[cfg(test)]
mod tests;

use std::ops::{Index, IndexMut};

use sapwood_blockdev::device::Command;
use serde::{Deserialize, Serialize};

pub use device::{Accounted, AccountedQueue};
pub use histogram::Histogram;

/// What requests ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// To read.
    Read,
    /// To write.
    Write,
    /// To make what was written durable.
    Flush,
    /// To let go of what is not needed.
    Discard,
    /// To write zeroes.
    WriteZeroes,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Read, Self::Write, Self::Flush, Self::Discard, Self::WriteZeroes];

    /// That of a command.
    pub fn of(command: &Command) -> Self {
        match command {
            Command::Read(_) => Self::Read,
            Command::Write(_) => Self::Write,
            Command::Flush => Self::Flush,
            Command::Discard => Self::Discard,
            Command::WriteZeroes => Self::WriteZeroes,
        }
    }

    /// Its name, as JSON and metrics have it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Flush => "flush",
            Self::Discard => "discard",
            Self::WriteZeroes => "write-zeroes",
        }
    }
}

/// What requests of one kind did.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Done {
    /// Bytes of those that succeeded.
    pub bytes: u64,
    /// How many failed.
    pub errors: u64,
    /// How long they took, those that failed included; how many there were is its count.
    pub latency: Histogram,
}

impl Done {
    /// How many have ended, with whatever result.
    pub fn operations(&self) -> u64 {
        self.latency.count()
    }

    /// Adds what others did.
    pub fn merge(&mut self, other: &Self) {
        self.bytes = self.bytes.saturating_add(other.bytes);
        self.errors = self.errors.saturating_add(other.errors);
        self.latency.merge(&other.latency);
    }

    /// What was done after `earlier`, an older state of the same; all of it if it is not.
    pub fn since(&self, earlier: &Self) -> Self {
        Self {
            bytes: self.bytes.checked_sub(earlier.bytes).unwrap_or(self.bytes),
            errors: self.errors.checked_sub(earlier.errors).unwrap_or(self.errors),
            latency: self.latency.since(&earlier.latency),
        }
    }
}

/// What was done with a disk since it is served, and is being done.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Account {
    /// Requests that are in flight now.
    pub in_flight: u64,
    read: Done,
    write: Done,
    flush: Done,
    discard: Done,
    write_zeroes: Done,
}

impl Index<Kind> for Account {
    type Output = Done;

    fn index(&self, kind: Kind) -> &Done {
        match kind {
            Kind::Read => &self.read,
            Kind::Write => &self.write,
            Kind::Flush => &self.flush,
            Kind::Discard => &self.discard,
            Kind::WriteZeroes => &self.write_zeroes,
        }
    }
}

impl IndexMut<Kind> for Account {
    fn index_mut(&mut self, kind: Kind) -> &mut Done {
        match kind {
            Kind::Read => &mut self.read,
            Kind::Write => &mut self.write,
            Kind::Flush => &mut self.flush,
            Kind::Discard => &mut self.discard,
            Kind::WriteZeroes => &mut self.write_zeroes,
        }
    }
}

impl Account {
    /// Adds that of others.
    pub fn merge(&mut self, other: &Self) {
        self.in_flight = self.in_flight.saturating_add(other.in_flight);
        Kind::ALL.into_iter().for_each(|kind| self[kind].merge(&other[kind]));
    }

    /// What was done after `earlier`, an older state of the same, and what is in flight now.
    pub fn since(&self, earlier: &Self) -> Self {
        let mut account = Self { in_flight: self.in_flight, ..Self::default() };
        Kind::ALL.into_iter().for_each(|kind| account[kind] = self[kind].since(&earlier[kind]));
        account
    }

    /// How many requests of all kinds have ended.
    pub fn operations(&self) -> u64 {
        Kind::ALL.into_iter().map(|kind| self[kind].operations()).fold(0, u64::saturating_add)
    }

    /// How many of these failed.
    pub fn errors(&self) -> u64 {
        Kind::ALL.into_iter().map(|kind| self[kind].errors).fold(0, u64::saturating_add)
    }
}
