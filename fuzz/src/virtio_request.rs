//! A virtio block request: any descriptor table over any guest memory.
//!
//! ```text
//! byte 0..2   first descriptor
//! byte 2      features and read-only
//! byte 3      how many descriptors the table has, less one
//! byte 4..8   size of the disk in sectors
//! then        the descriptor table, then guest memory
//! ```
//!
//! Guest memory is two regions that touch, from 64 KiB on, and one apart.

use sapwood_blockdev::buffer::SharedBuf;
use sapwood_blockdev::device::Done;
use sapwood_tests::damage::format::{u16_at, u32_at};
use sapwood_vhost::features::Features;
use sapwood_vhost::guest::{GuestMap, Place, Region};
use sapwood_vhost::request::chain::DESCRIPTORS_MAX;
use sapwood_vhost::request::finish::{Flight, Flights};
use sapwood_vhost::request::layout::{DESCRIPTOR_BYTES, ID_BYTES, Status};
use sapwood_vhost::request::parse::{DATA_BYTES_MAX, DiskRange, write_id};
use sapwood_vhost::request::{Action, Chain, Limits, parse};

use crate::{MEMORY, bounded};

const HEAD: usize = 8;
/// Guest addresses and lengths of the regions.
const REGIONS: [(u64, usize); 3] = [(0x1_0000, 0x1000), (0x1_1000, 0x3000), (0x8000_0000, 0x1000)];

/// One run.
pub fn run(data: &[u8]) {
    let Some(rest) = data.get(HEAD..) else { return };
    let table_bytes = (usize::from(data[3]) + 1) * DESCRIPTOR_BYTES;
    let (table_data, memory_data) = rest.split_at(rest.len().min(table_bytes));
    let table = SharedBuf::heap(table_bytes);
    table.write_at(0, table_data);
    let map = guest(memory_data);
    let limits = Limits {
        size: u64::from(u32_at(data, 4)) * 512,
        read_only: data[2] & 1 != 0,
        features: features(data[2]),
    };
    bounded(MEMORY, || request(&table, u16_at(data, 0), &map, &limits, data[2] & 2 == 0));
}

fn guest(mut bytes: &[u8]) -> GuestMap {
    let mut map = GuestMap::default();
    for (guest, len) in REGIONS {
        let window = SharedBuf::heap(len);
        let (here, rest) = bytes.split_at(bytes.len().min(len));
        window.write_at(0, here);
        bytes = rest;
        let place = Place { guest, user: guest, len: len as u64 };
        let region = Region::new(place, window).expect("a region that is not empty");
        map.add(region).expect("regions that do not overlap");
    }
    map
}

fn features(bits: u8) -> Features {
    let offered = [Features::FLUSH, Features::DISCARD, Features::WRITE_ZEROES];
    let accepted = offered.iter().enumerate().filter(|(i, _)| bits & (4 << i) == 0);
    Features(accepted.fold(0, |all, (_, feature)| all | feature))
}

fn request(table: &SharedBuf, head: u16, map: &GuestMap, limits: &Limits, indirect: bool) {
    let mut chain = Chain::default();
    let mut ranges: Vec<DiskRange> = Vec::new();
    if chain.walk(table, head, map, indirect).is_err() {
        return;
    }
    let Ok(parsed) = parse(&mut chain, map, limits, &mut ranges) else { return };
    let mut data_len = 0;
    match &parsed.action {
        Action::Read(offset, memory) | Action::Write(offset, memory) => {
            assert!(!memory.is_empty() && memory.len() as u64 <= DATA_BYTES_MAX);
            assert!((memory.len() as u64 | offset.0).is_multiple_of(512));
            assert!(offset.0 + memory.len() as u64 <= limits.size);
            assert!(memory.pieces().len() <= DESCRIPTORS_MAX * REGIONS.len());
            assert!(matches!(parsed.action, Action::Read(..)) || !limits.read_only);
            data_len = memory.len() as u32;
        }
        Action::Discard | Action::WriteZeroes => {
            assert!(!limits.read_only && !ranges.is_empty());
            assert!(ranges.iter().all(|r| r.len > 0 && r.offset.0 + r.len <= limits.size));
        }
        Action::GetId => write_id(&chain, map, &[b'x'; ID_BYTES]).unwrap_or_default(),
        Action::Flush | Action::Answer(_) => {}
    }
    let mut flights = Flights::default();
    let flight = Flight { head, status: parsed.status, data_len, parts: 1, answer: Status::Ok };
    let tag = flights.add(flight);
    let used = flights.done(&Done { tag, result: Ok(()) }, map).expect("its only part");
    assert_eq!((used.head, used.len), (head, data_len + 1), "the status byte was reached before");
    let mut status = [0xff];
    map.read(parsed.status, &mut status).expect("the status byte is there");
    assert_eq!(status, [Status::Ok as u8]);
}
