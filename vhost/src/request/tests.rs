//! Hostile chains, each named, and the layouts that are legal.

use sapwood_blockdev::buffer::SharedBuf;

use super::layout::*;
use super::parse::{DATA_BYTES_MAX, DiskRange, NoStatus, write_id};
use super::*;
use crate::config::{RANGE_SECTORS_MAX, RANGES_MAX};
use crate::features::Features;
use crate::guest::{GuestMap, Outside, Place, Region};
use sapwood_blockdev::units::GuestOffset;

const DISK: u64 = 1 << 20;
const HEADER: u64 = 0x100;
const RANGES: u64 = 0x200;
const INDIRECT: u64 = 0x4000;
const DATA: u64 = 0x8000;
const STATUS: u64 = 0x300;
/// Two regions touch at 0x10000; nothing is mapped from 0x20000 to 0x40000.
const SEAM: u64 = 0x10000;
const HOLE: u64 = 0x20000;

/// What became of a chain, in a form that tables can hold.
#[derive(Debug, PartialEq)]
enum Outcome {
    Chain(ChainError),
    NoStatus(NoStatus),
    Read(u64, Vec<usize>),
    Write(u64, Vec<usize>),
    Flush,
    Discard(Vec<(u64, u64)>),
    Zeroes(Vec<(u64, u64)>),
    GetId,
    Answer(Status),
}
use Outcome::Answer;
const BAD: Outcome = Answer(Status::IoError);
const UNSUPPORTED: Outcome = Answer(Status::Unsupported);

fn map() -> GuestMap {
    let mut map = GuestMap::default();
    for (guest, len) in [(0, SEAM), (SEAM, HOLE - SEAM), (0x40000, 0x1000)] {
        let place = Place { guest, user: guest, len };
        map.add(Region::new(place, SharedBuf::heap(len as usize)).unwrap()).unwrap();
    }
    map
}

struct Case {
    map: GuestMap,
    table: SharedBuf,
    limits: Limits,
    chain: Chain,
}

impl Case {
    fn new() -> Self {
        let limits = Limits { size: DISK, read_only: false, features: Features::offered(false) };
        Self { map: map(), table: SharedBuf::heap(64 * DESCRIPTOR_BYTES), limits, chain: Chain::default() }
    }

    fn header(kind: u32, sector: u64) -> Self {
        let case = Self::new();
        case.map.write(HEADER, &Header { kind, sector }.bytes()).unwrap();
        case
    }

    /// Writes the chain to the table, in order.
    fn chain(mut self, descriptors: &[Descriptor]) -> (Self, Outcome) {
        for (index, descriptor) in descriptors.iter().enumerate() {
            self.table.write_at(index * DESCRIPTOR_BYTES, &descriptor.bytes());
        }
        let outcome = self.outcome(0);
        (self, outcome)
    }

    fn outcome(&mut self, head: u16) -> Outcome {
        let indirect = self.limits.features.has(Features::INDIRECT_DESC);
        if let Err(error) = self.chain.walk(&self.table, head, &self.map, indirect) {
            return Outcome::Chain(error);
        }
        let mut ranges = Vec::new();
        let parsed = match parse(&mut self.chain, &self.map, &self.limits, &mut ranges) {
            Ok(parsed) => parsed,
            Err(error) => return Outcome::NoStatus(error),
        };
        let pieces = |memory: sapwood_blockdev::buffer::Memory| {
            memory.pieces().iter().map(sapwood_blockdev::buffer::Piece::len).collect()
        };
        let ranges = ranges.iter().map(|DiskRange { offset, len }| (offset.0, *len)).collect();
        match parsed.action {
            Action::Read(GuestOffset(offset), memory) => Outcome::Read(offset, pieces(memory)),
            Action::Write(GuestOffset(offset), memory) => Outcome::Write(offset, pieces(memory)),
            Action::Flush => Outcome::Flush,
            Action::Discard => Outcome::Discard(ranges),
            Action::WriteZeroes => Outcome::Zeroes(ranges),
            Action::GetId => Outcome::GetId,
            Action::Answer(status) => Answer(status),
        }
    }
}

/// Links descriptors one after the other.
fn linked(parts: &[(u64, u32, u16)]) -> Vec<Descriptor> {
    let last = parts.len() - 1;
    let link = |(index, (address, len, flags)): (usize, &(u64, u32, u16))| Descriptor {
        address: *address,
        len: *len,
        flags: flags | if index < last { DESCRIPTOR_NEXT } else { 0 },
        next: index as u16 + 1,
    };
    parts.iter().enumerate().map(link).collect()
}

const R: u16 = 0;
const W: u16 = DESCRIPTOR_WRITE;
const HEAD: (u64, u32, u16) = (HEADER, HEADER_BYTES as u32, R);
const TAIL: (u64, u32, u16) = (STATUS, 1, W);

fn run(kind: u32, sector: u64, parts: &[(u64, u32, u16)]) -> Outcome {
    Case::header(kind, sector).chain(&linked(parts)).1
}

#[test]
fn legal_layouts() {
    for (name, outcome, expected) in [
        ("a read", run(TYPE_READ, 8, &[HEAD, (DATA, 4096, W), TAIL]), Outcome::Read(4096, vec![4096])),
        ("a write", run(TYPE_WRITE, 8, &[HEAD, (DATA, 512, R), TAIL]), Outcome::Write(4096, vec![512])),
        (
            "header in pieces",
            run(
                TYPE_READ,
                1,
                &[(HEADER, 1, R), (HEADER + 1, 14, R), (HEADER + 15, 1, R), (DATA, 512, W), TAIL],
            ),
            Outcome::Read(512, vec![512]),
        ),
        (
            "sectors cut anywhere",
            run(TYPE_READ, 0, &[HEAD, (DATA, 100, W), (DATA + 100, 412, W), TAIL]),
            Outcome::Read(0, vec![100, 412]),
        ),
        (
            "status behind the data in one descriptor",
            run(TYPE_READ, 0, &[HEAD, (DATA, 513, W)]),
            Outcome::Read(0, vec![512]),
        ),
        (
            "data over two regions",
            run(TYPE_READ, 0, &[HEAD, (SEAM - 256, 512, W), TAIL]),
            Outcome::Read(0, vec![256, 256]),
        ),
        (
            "zero-length descriptors",
            run(TYPE_READ, 0, &[(HOLE, 0, R), HEAD, (HOLE, 0, W), (DATA, 512, W), TAIL, (HOLE, 0, W)]),
            Outcome::Read(0, vec![512]),
        ),
        ("no data", run(TYPE_READ, 0, &[HEAD, TAIL]), Answer(Status::Ok)),
        (
            "the last sector",
            run(TYPE_READ, DISK / 512 - 1, &[HEAD, (DATA, 512, W), TAIL]),
            Outcome::Read(DISK - 512, vec![512]),
        ),
        ("a flush", run(TYPE_FLUSH, 77, &[HEAD, TAIL]), Outcome::Flush),
        ("a name", run(TYPE_GET_ID, 0, &[HEAD, (DATA, 20, W), TAIL]), Outcome::GetId),
    ] {
        assert_eq!(outcome, expected, "{name}");
    }
}

#[test]
fn write_data_may_follow_the_header_in_its_descriptor() {
    let case = Case::new();
    case.map.write(DATA - 16, &Header { kind: TYPE_WRITE, sector: 2 }.bytes()).unwrap();
    let (_, outcome) = case.chain(&linked(&[(DATA - 16, 16 + 1024, R), TAIL]));
    assert_eq!(outcome, Outcome::Write(1024, vec![1024]));
}

#[test]
fn malformed_requests_are_answered() {
    let huge = u32::MAX;
    for (name, outcome, expected) in [
        ("an unknown type", run(7, 0, &[HEAD, (DATA, 512, W), TAIL]), UNSUPPORTED),
        ("a header too short", run(TYPE_READ, 0, &[(HEADER, 15, R), (DATA, 512, W), TAIL]), BAD),
        ("no header", run(TYPE_READ, 0, &[(DATA, 512, W), TAIL]), BAD),
        ("a header outside", run(TYPE_READ, 0, &[(HOLE - 8, 16, R), (DATA, 512, W), TAIL]), BAD),
        ("half a sector", run(TYPE_READ, 0, &[HEAD, (DATA, 256, W), TAIL]), BAD),
        ("data outside", run(TYPE_READ, 0, &[HEAD, (HOLE, 512, W), TAIL]), BAD),
        ("data that runs outside", run(TYPE_READ, 0, &[HEAD, (HOLE - 256, 512, W), TAIL]), BAD),
        (
            "data at the end of the address space",
            run(TYPE_READ, 0, &[HEAD, (u64::MAX - 255, 512, W), TAIL]),
            BAD,
        ),
        (
            "lengths whose 32-bit sum is small",
            run(TYPE_READ, 0, &[HEAD, (DATA, huge, W), (DATA, 513, W), TAIL]),
            BAD,
        ),
        ("past the end", run(TYPE_READ, DISK / 512, &[HEAD, (DATA, 512, W), TAIL]), BAD),
        ("over the end", run(TYPE_WRITE, DISK / 512 - 1, &[HEAD, (DATA, 1024, R), TAIL]), BAD),
        ("a sector whose byte address wraps", run(TYPE_READ, 1 << 55, &[HEAD, (DATA, 512, W), TAIL]), BAD),
        ("a range whose end wraps", run(TYPE_READ, (1 << 55) - 1, &[HEAD, (DATA, 512, W), TAIL]), BAD),
        ("a name without data", run(TYPE_GET_ID, 0, &[HEAD, TAIL]), BAD),
        ("a name too short", run(TYPE_GET_ID, 0, &[HEAD, (DATA, 19, W), TAIL]), BAD),
    ] {
        assert_eq!(outcome, expected, "{name}");
    }
}

#[test]
fn more_data_than_a_request_may_have() {
    let mut parts = vec![HEAD];
    for _ in 0..DATA_BYTES_MAX / 0x8000 + 1 {
        parts.push((DATA, 0x8000, W));
    }
    parts.push(TAIL);
    let mut case = Case::header(TYPE_READ, 0);
    case.limits.size = u64::MAX;
    // More descriptors than a direct table of this test holds, too.
    assert!(parts.len() > DESCRIPTORS_IN_TABLE && parts.len() > chain::DESCRIPTORS_MAX);
    case.table = SharedBuf::heap(parts.len() * DESCRIPTOR_BYTES);
    assert_eq!(case.chain(&linked(&parts)).1, Outcome::Chain(ChainError::TooLong));
    let mut case = Case::header(TYPE_READ, 0);
    case.limits.size = u64::MAX;
    let wide = Place { guest: 1 << 32, user: 0, len: DATA_BYTES_MAX + 512 };
    case.map.add(Region::new(wide, SharedBuf::heap(wide.len as usize)).unwrap()).unwrap();
    let too_much = [HEAD, (1 << 32, DATA_BYTES_MAX as u32 + 512, W), TAIL];
    assert_eq!(case.chain(&linked(&too_much)).1, BAD);
}
const DESCRIPTORS_IN_TABLE: usize = 64;

#[test]
fn unreachable_status() {
    let missing = Outcome::NoStatus(NoStatus::Missing);
    let outside = |address, len| Outcome::NoStatus(NoStatus::Outside(Outside { address, len }));
    assert_eq!(run(TYPE_READ, 0, &[HEAD]), missing, "nothing writable");
    assert_eq!(run(TYPE_READ, 0, &[HEAD, (STATUS, 0, W)]), missing, "an empty status");
    assert_eq!(run(TYPE_READ, 0, &[HEAD, (DATA, 512, W), (HOLE, 1, W)]), outside(HOLE, 1));
    assert_eq!(run(TYPE_READ, 0, &[HEAD, (HOLE - 512, 513, W)]), outside(HOLE, 1), "data inside, status not");
    assert_eq!(run(TYPE_READ, 0, &[HEAD, (u64::MAX, 2, W)]), outside(u64::MAX, 1), "an address that wraps");
}

#[test]
fn chains_that_make_no_sense() {
    let next = |to, flags| Descriptor { address: DATA, len: 16, flags: flags | DESCRIPTOR_NEXT, next: to };
    let chain = |descriptors: &[Descriptor]| Case::header(TYPE_READ, 0).chain(descriptors).1;
    assert_eq!(chain(&[next(0, R)]), Outcome::Chain(ChainError::TooLong), "a loop of one");
    assert_eq!(chain(&[next(1, R), next(0, R)]), Outcome::Chain(ChainError::TooLong), "a loop of two");
    assert_eq!(chain(&[next(64, R)]), Outcome::Chain(ChainError::Index(64)), "a next beyond the table");
    assert_eq!(Case::new().outcome(64), Outcome::Chain(ChainError::Index(64)), "a head beyond the table");
    let order = run(TYPE_WRITE, 0, &[HEAD, (DATA, 512, W), (DATA, 512, R), TAIL]);
    assert_eq!(order, Outcome::Chain(ChainError::Order));
}

/// A chain of one descriptor that names a table of these.
fn indirect(table: &[Descriptor], len: u32, flags: u16, features: u64) -> Outcome {
    let mut case = Case::header(TYPE_READ, 0);
    case.limits.features = Features(case.limits.features.0 & features);
    for (descriptor, address) in table.iter().zip((INDIRECT..).step_by(DESCRIPTOR_BYTES)) {
        case.map.write(address, &descriptor.bytes()).unwrap();
    }
    let flags = DESCRIPTOR_INDIRECT | flags;
    case.chain(&[Descriptor { address: INDIRECT, len, flags, next: 1 }]).1
}

#[test]
fn indirect_tables() {
    let all = u64::MAX;
    let table = linked(&[HEAD, (DATA, 512, W), TAIL]);
    let good = Outcome::Read(0, vec![512]);
    assert_eq!(indirect(&table, 48, R, all), good);
    assert_eq!(indirect(&table, 48, W, all), good, "the write flag means nothing");
    assert_eq!(indirect(&table, 48, DESCRIPTOR_NEXT, all), Outcome::Chain(ChainError::IndirectNext));
    for len in [0, 8, 40, 49] {
        assert_eq!(indirect(&table, len, R, all), Outcome::Chain(ChainError::TableLength(len)));
    }
    assert_eq!(indirect(&table, 32, R, all), Outcome::Chain(ChainError::TooLong), "a table cut short");
    let without = indirect(&table, 48, R, !Features::INDIRECT_DESC);
    assert_eq!(without, Outcome::Chain(ChainError::NotNegotiated));
    let nested = Descriptor { address: INDIRECT, len: 16, flags: DESCRIPTOR_INDIRECT, next: 0 };
    assert_eq!(indirect(&[nested], 16, R, all), Outcome::Chain(ChainError::Nested));
    let endless = Descriptor { address: DATA, len: 1, flags: DESCRIPTOR_NEXT, next: 0 };
    assert_eq!(indirect(&[endless], 0xffff_fff0, R, all), Outcome::Chain(ChainError::TooLong));
}

#[test]
fn indirect_tables_outside_memory() {
    for address in [HOLE, HOLE - 8, u64::MAX - 8] {
        let table = Descriptor { address, len: 48, flags: DESCRIPTOR_INDIRECT, next: 0 };
        let (_, outcome) = Case::header(TYPE_READ, 0).chain(&[table]);
        assert!(matches!(outcome, Outcome::Chain(ChainError::Table(_))), "{address:#x}: {outcome:?}");
    }
}

#[test]
fn direct_descriptors_may_precede_an_indirect_one() {
    let case = Case::header(TYPE_READ, 0);
    for (descriptor, at) in linked(&[(DATA, 512, W), TAIL]).iter().zip([INDIRECT, INDIRECT + 16]) {
        case.map.write(at, &descriptor.bytes()).unwrap();
    }
    let (_, outcome) = case.chain(&linked(&[HEAD, (INDIRECT, 32, DESCRIPTOR_INDIRECT)]));
    assert_eq!(outcome, Outcome::Read(0, vec![512]));
}

fn with_ranges(kind: u32, ranges: &[Range], len: u32) -> Outcome {
    let case = Case::header(kind, 0);
    for (range, at) in ranges.iter().zip((RANGES..).step_by(RANGE_BYTES)) {
        case.map.write(at, &range.bytes()).unwrap();
    }
    case.chain(&linked(&[HEAD, (RANGES, len, R), TAIL])).1
}

#[test]
fn discard_and_write_zeroes() {
    let range = |sector, sectors, flags| Range { sector, sectors, flags };
    let two = [range(8, 8, 0), range(32, 1, 0)];
    assert_eq!(with_ranges(TYPE_DISCARD, &two, 32), Outcome::Discard(vec![(4096, 4096), (16384, 512)]));
    let unmap = [range(8, 8, RANGE_UNMAP)];
    assert_eq!(with_ranges(TYPE_WRITE_ZEROES, &unmap, 16), Outcome::Zeroes(vec![(4096, 4096)]));
    assert_eq!(with_ranges(TYPE_DISCARD, &unmap, 16), UNSUPPORTED, "unmap has no meaning for discard");
    for flags in [2, 1 << 31, 3] {
        assert_eq!(with_ranges(TYPE_WRITE_ZEROES, &[range(0, 8, flags)], 16), UNSUPPORTED, "reserved flags");
    }
    let answer = |range, len| with_ranges(TYPE_DISCARD, &[range], len);
    assert_eq!(answer(range(0, 0, 0), 16), Answer(Status::Ok), "nothing to do");
    assert_eq!(answer(range(0, 8, 0), 15), BAD, "a segment cut short");
    assert_eq!(answer(range(0, 8, 0), 17), BAD);
    assert_eq!(with_ranges(TYPE_DISCARD, &[], 0), BAD, "no segment");
    assert_eq!(answer(range(0, 8, 0), (RANGES_MAX + 1) * 16), BAD, "too many segments");
    assert_eq!(answer(range(0, 8, 0), 0xffff_fff0), BAD, "very many segments");
    assert_eq!(answer(range(0, RANGE_SECTORS_MAX + 1, 0), 16), BAD);
    assert_eq!(answer(range(DISK / 512, 1, 0), 16), BAD, "past the end");
    assert_eq!(answer(range(u64::MAX, 1, 0), 16), BAD, "an address that wraps");
}

#[test]
fn what_was_not_negotiated_is_not_done() {
    let without = |kind, feature: u64, parts: &[(u64, u32, u16)]| {
        let mut case = Case::header(kind, 0);
        case.limits.features = Features(case.limits.features.0 & !feature);
        case.chain(&linked(parts)).1
    };
    assert_eq!(without(TYPE_FLUSH, Features::FLUSH, &[HEAD, TAIL]), UNSUPPORTED);
    let ranges = [HEAD, (RANGES, 16, R), TAIL];
    assert_eq!(without(TYPE_DISCARD, Features::DISCARD, &ranges), UNSUPPORTED);
    assert_eq!(without(TYPE_WRITE_ZEROES, Features::WRITE_ZEROES, &ranges), UNSUPPORTED);
}

#[test]
fn read_only_disks_refuse_writes() {
    let read_only = |kind, parts: &[(u64, u32, u16)]| {
        let mut case = Case::header(kind, 0);
        case.limits.read_only = true;
        case.chain(&linked(parts)).1
    };
    assert_eq!(read_only(TYPE_WRITE, &[HEAD, (DATA, 512, R), TAIL]), BAD);
    assert_eq!(read_only(TYPE_WRITE_ZEROES, &[HEAD, (RANGES, 16, R), TAIL]), BAD);
    assert_eq!(read_only(TYPE_READ, &[HEAD, (DATA, 512, W), TAIL]), Outcome::Read(0, vec![512]));
}

#[test]
fn names_are_written_over_descriptors() {
    let (case, outcome) =
        Case::header(TYPE_GET_ID, 0).chain(&linked(&[HEAD, (DATA, 7, W), (DATA + 100, 30, W), TAIL]));
    assert_eq!(outcome, Outcome::GetId);
    write_id(&case.chain, &case.map, b"abcdefghijklmnopqrst").unwrap();
    let mut back = [0xff; 14];
    case.map.read(DATA + 100, &mut back).unwrap();
    assert_eq!(&back, b"hijklmnopqrst\0");
}
