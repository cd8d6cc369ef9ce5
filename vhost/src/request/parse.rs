//! Makes a request of a chain's memory (virtio 1.2, section 5.2.6).
//!
//! The first 16 readable bytes are the header, wherever descriptors begin and end; the last
//! writable byte is the status. What lies between is data.

use sapwood_blockdev::buffer::Memory;
use sapwood_blockdev::units::{GuestOffset, SECTOR_SIZE};
use thiserror::Error;

use super::chain::{Chain, Span, total};
use super::layout::{
    HEADER_BYTES, Header, ID_BYTES, RANGE_BYTES, RANGE_UNMAP, Range, Status, TYPE_DISCARD, TYPE_FLUSH,
    TYPE_GET_ID, TYPE_READ, TYPE_WRITE, TYPE_WRITE_ZEROES,
};
use crate::config::{RANGE_SECTORS_MAX, RANGES_MAX};
use crate::features::Features;
use crate::guest::{GuestMap, Outside};

/// Data bytes in one request; more is refused. The configuration space asks for at most 63 MiB.
pub const DATA_BYTES_MAX: u64 = 64 << 20;

/// What a request is held against.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// The disk's size in bytes.
    pub size: u64,
    /// Whether writes are refused.
    pub read_only: bool,
    /// What the driver accepted.
    pub features: Features,
}

/// What is to be done for a request.
#[derive(Debug)]
pub enum Action {
    /// Read into guest memory.
    Read(GuestOffset, Memory),
    /// Write from guest memory.
    Write(GuestOffset, Memory),
    /// Make what was written durable.
    Flush,
    /// Discard the ranges found.
    Discard,
    /// Write zeroes to the ranges found.
    WriteZeroes,
    /// Copy the device's name to the chain's writable memory (see [`write_id`]).
    GetId,
    /// Nothing: the answer is known.
    Answer(Status),
}

/// A request.
#[derive(Debug)]
pub struct Parsed {
    /// Guest address of the status byte.
    pub status: u64,
    /// What to do.
    pub action: Action,
}

/// A byte range of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskRange {
    /// First byte.
    pub offset: GuestOffset,
    /// Length in bytes.
    pub len: u64,
}

/// A chain in which there is no place for the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum NoStatus {
    /// No writable byte at all.
    #[error("no memory for the status")]
    Missing,
    /// The byte is not in guest memory.
    #[error("status: {0}")]
    Outside(#[from] Outside),
}

/// The answer to give instead of performing a request.
struct Refused(Status);

impl From<Outside> for Refused {
    fn from(_: Outside) -> Self {
        Self(Status::IoError)
    }
}

const BAD: Refused = Refused(Status::IoError);
const UNSUPPORTED: Refused = Refused(Status::Unsupported);

/// Makes a request of a chain that was [walked](Chain::walk). The ranges of a discard or
/// write-zeroes go to `ranges`, which is cleared.
///
/// # Errors
/// When the status byte cannot be found or reached.
pub fn parse(
    chain: &mut Chain,
    map: &GuestMap,
    limits: &Limits,
    ranges: &mut Vec<DiskRange>,
) -> Result<Parsed, NoStatus> {
    ranges.clear();
    let status = take_status(&mut chain.writable)?;
    map.read(status, &mut [0])?;
    let action = request(chain, map, limits, ranges).unwrap_or_else(|Refused(status)| Action::Answer(status));
    Ok(Parsed { status, action })
}

/// Cuts the last byte off the writable memory.
fn take_status(writable: &mut Vec<Span>) -> Result<u64, NoStatus> {
    while writable.pop_if(|span| span.len == 0).is_some() {}
    let last = writable.last_mut().ok_or(NoStatus::Missing)?;
    last.len -= 1;
    let len = u64::from(last.len);
    Ok(last.address.checked_add(len).ok_or(Outside { address: last.address, len })?)
}

fn request(
    chain: &mut Chain,
    map: &GuestMap,
    limits: &Limits,
    ranges: &mut Vec<DiskRange>,
) -> Result<Action, Refused> {
    let mut header = [0; HEADER_BYTES];
    take_bytes(&mut chain.readable, map, &mut header)?;
    let Header { kind, sector } = Header::parse(header);
    match kind {
        TYPE_READ => {
            let (offset, memory) = transfer(&chain.writable, map, limits, sector)?;
            Ok(if memory.is_empty() { Action::Answer(Status::Ok) } else { Action::Read(offset, memory) })
        }
        TYPE_WRITE => {
            writable(limits)?;
            let (offset, memory) = transfer(&chain.readable, map, limits, sector)?;
            Ok(if memory.is_empty() { Action::Answer(Status::Ok) } else { Action::Write(offset, memory) })
        }
        TYPE_FLUSH => negotiated(limits, Features::FLUSH).map(|()| Action::Flush),
        TYPE_GET_ID if total(&chain.writable) < ID_BYTES as u64 => Err(BAD),
        TYPE_GET_ID => Ok(Action::GetId),
        TYPE_DISCARD => {
            negotiated(limits, Features::DISCARD)?;
            take_ranges(chain, map, limits, ranges, 0)?;
            Ok(if ranges.is_empty() { Action::Answer(Status::Ok) } else { Action::Discard })
        }
        TYPE_WRITE_ZEROES => {
            negotiated(limits, Features::WRITE_ZEROES)?;
            take_ranges(chain, map, limits, ranges, RANGE_UNMAP)?;
            Ok(if ranges.is_empty() { Action::Answer(Status::Ok) } else { Action::WriteZeroes })
        }
        _ => Err(UNSUPPORTED),
    }
}

fn negotiated(limits: &Limits, feature: u64) -> Result<(), Refused> {
    if limits.features.has(feature) { Ok(()) } else { Err(UNSUPPORTED) }
}

fn writable(limits: &Limits) -> Result<(), Refused> {
    if limits.read_only { Err(BAD) } else { Ok(()) }
}

/// The place on the disk and the memory of a read or write.
fn transfer(
    spans: &[Span],
    map: &GuestMap,
    limits: &Limits,
    sector: u64,
) -> Result<(GuestOffset, Memory), Refused> {
    let len = total(spans);
    if !len.is_multiple_of(SECTOR_SIZE) || len > DATA_BYTES_MAX {
        return Err(BAD);
    }
    let offset = inside(limits, sector, len)?;
    let mut memory = Memory::default();
    for span in spans.iter().filter(|span| span.len > 0) {
        map.share(span.address, u64::from(span.len), &mut memory)?;
    }
    Ok((offset, memory))
}

/// The byte address of a sector from which `len` bytes lie on the disk.
fn inside(limits: &Limits, sector: u64, len: u64) -> Result<GuestOffset, Refused> {
    let start = sector.checked_mul(SECTOR_SIZE).ok_or(BAD)?;
    let end = start.checked_add(len).ok_or(BAD)?;
    if end <= limits.size { Ok(GuestOffset(start)) } else { Err(BAD) }
}

/// Takes the segments of a discard or write-zeroes request; `flags` are those that may be set.
fn take_ranges(
    chain: &mut Chain,
    map: &GuestMap,
    limits: &Limits,
    ranges: &mut Vec<DiskRange>,
    flags: u32,
) -> Result<(), Refused> {
    writable(limits)?;
    let len = total(&chain.readable);
    let most = u64::from(RANGES_MAX) * RANGE_BYTES as u64;
    if len == 0 || len > most || !len.is_multiple_of(RANGE_BYTES as u64) {
        return Err(BAD);
    }
    for _ in 0..len / RANGE_BYTES as u64 {
        let mut bytes = [0; RANGE_BYTES];
        take_bytes(&mut chain.readable, map, &mut bytes)?;
        let range = Range::parse(bytes);
        if range.flags & !flags != 0 {
            return Err(UNSUPPORTED);
        }
        if range.sectors > RANGE_SECTORS_MAX {
            return Err(BAD);
        }
        let len = u64::from(range.sectors) * SECTOR_SIZE;
        let offset = inside(limits, range.sector, len)?;
        if len > 0 {
            ranges.push(DiskRange { offset, len });
        }
    }
    Ok(())
}

/// Moves the first bytes of the readable memory into `to`.
fn take_bytes(spans: &mut Vec<Span>, map: &GuestMap, to: &mut [u8]) -> Result<(), Refused> {
    let (mut done, mut used) = (0, 0);
    for span in spans.iter_mut() {
        let n = (span.len as usize).min(to.len() - done);
        map.read(span.address, &mut to[done..done + n])?;
        done += n;
        // The bytes were inside a region, which does not wrap.
        (span.address, span.len) = (span.address.wrapping_add(n as u64), span.len - n as u32);
        if span.len > 0 {
            break;
        }
        used += 1;
    }
    spans.drain(..used);
    if done == to.len() { Ok(()) } else { Err(BAD) }
}

/// Writes the device's name to the data of a [`Action::GetId`] request.
///
/// # Errors
/// Memory that is not there.
pub fn write_id(chain: &Chain, map: &GuestMap, id: &[u8; ID_BYTES]) -> Result<(), Outside> {
    let mut done = 0;
    for span in &chain.writable {
        let n = (span.len as usize).min(ID_BYTES - done);
        map.write(span.address, &id[done..done + n])?;
        done += n;
    }
    Ok(())
}
