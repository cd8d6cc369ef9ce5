//! Damage by name, and what becomes of each: which error, naming which field, or what is still
//! there. On host files, with the blocking engine.
#![allow(missing_docs, clippy::unwrap_used)]

use std::path::{Path, PathBuf};

use sapwood_blockdev::device::DeviceError;
use sapwood_image::{ErrorKind, ImageError};
use sapwood_tests::damage::corrupt::{self, Image};
use sapwood_tests::damage::format::{self, BLOCK, base, header, node, record, slot};
use sapwood_tests::damage::lab::{Bench, HostLab, check};
use sapwood_tests::damage::meter::{Meter, metered};
use sapwood_tests::damage::seal;
use sapwood_tests::damage::specimen::{self, Specimen};
use sapwood_tests::damage::walk;

#[global_allocator]
static METER: Meter = Meter;

/// Memory that no specimen needs, in bytes.
const MEMORY_MAX: usize = 64 << 20;

/// A folder with a layer file in it.
struct Scene {
    folder: tempfile::TempDir,
    path: PathBuf,
}

fn scene(image: &Image) -> Scene {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk");
    std::fs::write(&path, image).unwrap();
    Scene { folder, path }
}

/// How opening ends, the same for readers and writers; the file as it was.
fn refusal(image: &Image) -> ImageError {
    let scene = scene(image);
    let refusal = refusal_at(&scene.path);
    assert!(std::fs::read(&scene.path).unwrap() == *image, "a refused layer is not changed");
    refusal
}

fn refusal_at(path: &Path) -> ImageError {
    let open = |read_only| {
        let (result, peak) = metered(MEMORY_MAX, || Bench::open(&HostLab, path, read_only));
        let error = result.err().expect("it was opened");
        assert!(peak < MEMORY_MAX, "{peak} bytes of memory");
        assert_eq!(error.path, path, "the error names the file");
        error
    };
    let (reader, writer) = (open(true), open(false));
    assert_eq!(reader.to_string(), writer.to_string());
    writer
}

/// Damages a specimen; opening must fail with this field and offset, and `check` must say so.
#[track_caller]
fn refused(specimen: &Specimen, damage: impl FnOnce(&mut Image), field: &str, at: impl Into<Option<usize>>) {
    let mut image = specimen.bytes.clone();
    damage(&mut image);
    let error = refusal(&image);
    let ErrorKind::Corrupt { field: named, offset, .. } = &error.kind else { panic!("{error}") };
    assert_eq!(*named, field, "{error}");
    if let Some(at) = at.into() {
        assert_eq!(*offset, at as u64, "{error}");
    }
    let report = check(&HostLab, &scene(&image).path).unwrap();
    assert_eq!(report.errors, [error.kind.to_string()]);
}

/// Damages a part of a specimen's map; what is mapped there must be refused to readers and writers,
/// and `check` must say so with this field and offset. The rest goes on.
#[track_caller]
fn refused_there(
    specimen: &Specimen,
    damage: impl FnOnce(&mut Image),
    field: &str,
    at: impl Into<Option<usize>>,
) {
    let mut image = specimen.bytes.clone();
    damage(&mut image);
    let scene = scene(&image);
    std::fs::write(scene.folder.path().join("base"), specimen::base()).unwrap();
    let report = check(&HostLab, &scene.path).unwrap();
    let expected = match at.into() {
        Some(at) => format!("{field} at offset {at:#x} is damaged"),
        None => format!("{field} at offset "),
    };
    assert!(report.errors[0].starts_with(&expected), "{:?} instead of {expected}", report.errors);
    for read_only in [true, false] {
        let mut bench = Bench::open(&HostLab, &scene.path, read_only).unwrap();
        assert_eq!(bench.read(0, specimen::SIZE as usize).err(), Some(DeviceError::Corrupt));
        if !read_only {
            assert_eq!(bench.write(0, &[1; 512]).unwrap_err(), DeviceError::Corrupt);
            bench.close().unwrap();
        }
    }
    assert_ne!(check(&HostLab, &scene.path).unwrap().errors, [""; 0], "it is still known");
}

/// Damages a specimen; it must open and hold `disk`, also for a writer, who leaves it in order.
#[track_caller]
fn recovered(specimen: &Specimen, damage: impl FnOnce(&mut Image), disk: &[u8]) {
    let mut image = specimen.bytes.clone();
    damage(&mut image);
    let scene = scene(&image);
    std::fs::write(scene.folder.path().join("base"), specimen::base()).unwrap();
    for read_only in [true, false, true] {
        let mut bench = Bench::open(&HostLab, &scene.path, read_only).unwrap();
        let held = bench.read(0, bench.size() as usize).unwrap();
        assert_eq!(held.len(), disk.len());
        assert_eq!(held.iter().zip(disk).position(|(a, b)| a != b), None, "the first byte that differs");
        bench.close().unwrap();
    }
    assert_eq!(check(&HostLab, &scene.path).unwrap().errors, [""; 0]);
}

/// Makes newest and older slot the same but for the generation, so that neither is a way out.
fn in_both_slots(b: &mut Image, mut change: impl FnMut(&mut [u8])) {
    for at in format::slots(b) {
        change(&mut b[at..at + 512]);
    }
    sapwood_tests::damage::seal::seal_slots(b);
}

#[test]
fn a_generation_that_cannot_be_counted_on_is_refused() {
    refused(&specimen::written(), corrupt::huge_generation, "slot.generation", None);
}

#[test]
fn a_size_that_the_root_cannot_describe_is_refused() {
    let size = |slot: &mut [u8]| format::put_u64(slot, slot::SIZE, 64 << 40);
    refused(&specimen::written(), |b| in_both_slots(b, size), "slot.size", None);
}

#[test]
fn a_record_beyond_the_largest_disk_is_not_believed() {
    let specimen = specimen::abandoned();
    let first = specimen.history[0].clone();
    let last_block = (1 << 34) - 1;
    for kind in [record::ZERO, record::ABSENT] {
        recovered(&specimen, |b| corrupt::log_run(b, kind, last_block, 1), &first);
        recovered(&specimen, |b| corrupt::log_run(b, kind, 0, u64::from(u32::MAX)), &first);
    }
    recovered(&specimen, |b| corrupt::log_run(b, record::SIZE, 64 << 40, 0), &first);
}

#[test]
fn a_node_that_is_not_as_long_as_its_reference_is_refused() {
    refused_there(&specimen::written(), corrupt::reference_length, "node.count", None);
    let longer = |slot: &mut [u8]| {
        let len = format::u32_at(slot, slot::ROOT_LEN);
        format::put_u32(slot, slot::ROOT_LEN, len + 8);
    };
    refused(&specimen::written(), |b| in_both_slots(b, longer), "node.count", None);
}

#[test]
fn a_node_that_crosses_segments_is_refused() {
    let specimen = specimen::written();
    let end = specimen::SEGMENT as u64 + 64 * 1024;
    let crossing = |slot: &mut [u8]| format::put_u64(slot, slot::ROOT, end - 8);
    refused(&specimen, |b| in_both_slots(b, crossing), "slot.root", end as usize - 8);
    let crossing = |b: &mut Image| {
        let root = corrupt::first_node(b, &[node::ROOT]);
        let len = format::u64_at(b, root.at + node::ROOT_REFS) & 0xffff;
        corrupt::change_node(b, &root, |n| format::put_u64(n, node::ROOT_REFS, (end - 8) << 16 | len));
    };
    refused(&specimen, crossing, "node.reference", None);
}

#[test]
fn a_log_that_would_overwrite_what_the_map_needs_is_refused() {
    let specimen = specimen::written();
    let looping = |slot: &mut [u8]| {
        let segment = format::u32_at(slot, slot::LOG_SEGMENT);
        format::put_u32(slot, slot::NEXT_SEGMENT, segment);
    };
    refused(&specimen, |b| in_both_slots(b, looping), "slot.next_segment", None);
    let over_data = |slot: &mut [u8]| format::put_u32(slot, slot::NEXT_SEGMENT, 0);
    refused(&specimen, |b| in_both_slots(b, over_data), "map", None);
    refused_there(&specimen, corrupt::leaf_place_future, "leaf.place", None);
}

#[test]
fn lanes_that_share_segments_or_lie_outside_are_refused() {
    let specimen = specimen::written();
    let lane = |segment: u32, block: u32, next_segment: u32| {
        move |slot: &mut [u8]| {
            format::put_u32(slot, slot::LANES, 1 << 1);
            for (i, value) in [segment, block, next_segment].into_iter().enumerate() {
                format::put_u32(slot, slot::LANE_1 + 4 * i, value);
            }
        }
    };
    let newest = corrupt::newest(&specimen.bytes);
    let head = format::u32_at(&specimen.bytes, newest + slot::LOG_SEGMENT);
    let cases = [
        (lane(head, 0, 1 << 16), "slot.lane"),
        (lane(1 << 16, 0, head), "slot.lane"),
        (lane(1 << 16, 0, 1 << 17), "slot.log_segment"),
        (lane(1 << 16, 17, 1 << 17), "slot.log_block"),
    ];
    for (change, field) in cases {
        refused(&specimen, |b| in_both_slots(b, change), field, None);
    }
    // Of data that is mapped a lane cannot say that it has yet to write it.
    refused(&specimen, |b| in_both_slots(b, lane(0, 0, u32::MAX >> 12)), "slot.log_segment", None);
}

#[test]
fn a_record_that_sends_the_log_elsewhere_is_not_believed() {
    let specimen = specimen::abandoned();
    let log = walk::log(&specimen.bytes, corrupt::newest(&specimen.bytes));
    let inside = (1..log.len()).find(|&i| log[i].segment == log[i - 1].segment).unwrap();
    recovered(&specimen, |b| corrupt::log_turns(b, inside), &specimen.history[inside]);
}

#[test]
fn a_damaged_log_below_the_newest_checkpoint_is_refused() {
    // A checkpoint made while a guest writes names a position before its own nodes; when the log
    // breaks between the two, the nodes must not be overwritten.
    let specimen = specimen::abandoned();
    let turn_back = |b: &mut Image| {
        let root = corrupt::first_node(b, &[node::ROOT]);
        let found = corrupt::record_of(b, root.at);
        let index = b[found.at..found.at + 64].to_vec();
        corrupt::change_slot(b, |slot| {
            format::put_u32(slot, slot::LOG_SEGMENT, found.segment);
            format::put_u32(slot, slot::LOG_BLOCK, found.block as u32);
            format::put_u32(slot, slot::NEXT_SEGMENT, format::u32_at(&index, record::NEXT_SEGMENT));
            format::put_u64(slot, slot::SEQUENCE, format::u64_at(&index, record::SEQUENCE) - 1);
            format::put_u32(slot, slot::CHAIN, format::u32_at(&index, record::PREVIOUS));
        });
        found
    };
    recovered(
        &specimen,
        |b| {
            turn_back(b);
        },
        specimen.history.last().unwrap(),
    );
    let and_break = |b: &mut Image| {
        let found = turn_back(b);
        b[found.at + record::CHECKSUM] ^= 1;
    };
    refused(&specimen, and_break, "map", None);
}

#[test]
fn records_that_say_what_none_would_are_not_believed() {
    let specimen = specimen::abandoned();
    let first = specimen.history[0].clone();
    recovered(&specimen, |b| corrupt::log_run(b, record::SIZE, 1 << 20 | 1, 0), &first);
    recovered(&specimen, corrupt::void_with_runs, &first);
    recovered(&specimen, |b| corrupt::log_run(b, record::NODES, 0, 0), &first);
    recovered(&specimen, |b| corrupt::log_run(b, record::DATA, 0, 1), &first);
    recovered(&specimen, |b| corrupt::log_run(b, 77, 0, 1), &first);
}

/// A layer over a layer whose base is `below`.
fn chain(folder: &Path, name: &str, id: u8, below: Option<(&str, &Image)>) -> Image {
    let mut image = specimen::empty().bytes;
    corrupt::rename_layer(&mut image, [id; 16]);
    if let Some((path, below)) = below {
        corrupt::layer_base(&mut image, path, below, specimen::SIZE);
    }
    std::fs::write(folder.join(name), &image).unwrap();
    image
}

#[test]
fn bases_in_a_loop_are_refused_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let a = chain(folder.path(), "a", 1, None);
    let b = chain(folder.path(), "b", 2, Some(("a", &a)));
    chain(folder.path(), "a", 1, Some(("b", &b)));
    chain(folder.path(), "self", 3, Some(("self", &a)));
    for name in ["a", "b", "self"] {
        let path = folder.path().join(name);
        let error = Bench::open(&HostLab, &path, true).err().unwrap();
        let ErrorKind::Base(text) = &error.kind else { panic!("{error}") };
        assert!(text.contains("its bases form a loop"), "{error}");
        assert!(text.len() < 1000, "{error}");
        assert!(matches!(Bench::open(&HostLab, &path, false).err().unwrap().kind, ErrorKind::Base(_)));
    }
}

#[test]
fn a_chain_of_bases_takes_no_stack() {
    let folder = tempfile::tempdir().unwrap();
    let name = |i: u8| i.to_string();
    let mut below = chain(folder.path(), "0", 0, None);
    for i in 1..=u8::MAX {
        below = chain(folder.path(), &name(i), i, Some((&name(i - 1), &below)));
    }
    let path = folder.path().join(name(u8::MAX));
    let opened = std::thread::Builder::new().stack_size(256 << 10).spawn(move || {
        let mut bench = Bench::open(&HostLab, &path, true).unwrap();
        assert_eq!(bench.read(4096, 4096).unwrap(), [0; 4096]);
        bench.extents(0..1 << 20).unwrap();
    });
    opened.unwrap().join().unwrap();
}

#[test]
fn the_cleaner_moves_no_damaged_block() {
    for break_index in [false, true] {
        let mut image = specimen::written().bytes;
        let scene = scene(&image);
        let bench = Bench::open(&HostLab, &scene.path, true).unwrap();
        let places: Vec<usize> = bench
            .extents(0..specimen::SIZE)
            .unwrap()
            .iter()
            .filter_map(|extent| Some(extent.offset? as usize))
            .collect();
        bench.close().unwrap();
        for place in places {
            let found = corrupt::record_of(&image, place);
            let sum = found.at + record::CHECKSUM;
            if break_index { image[sum] = !image[sum] } else { image[place + 100] = 0xff }
        }
        std::fs::write(&scene.path, &image).unwrap();
        let damaged = || {
            let mut errors = check(&HostLab, &scene.path).unwrap().errors;
            errors.retain(|error| error.starts_with("guest block"));
            errors
        };
        let before = damaged();
        assert!(before.len() > 10, "{before:?}");
        let bench = Bench::open(&HostLab, &scene.path, false).unwrap();
        for _ in 0..10 {
            bench.clean().unwrap();
            bench.checkpoint().unwrap();
        }
        bench.close().unwrap();
        assert_eq!(damaged(), before, "the damage is still there to be seen");
    }
}

#[test]
fn a_log_that_goes_on_inside_a_record_is_reported() {
    let mut specimen = specimen::empty();
    let inside = |slot: &mut [u8]| {
        let block = format::u32_at(slot, slot::LOG_BLOCK);
        format::put_u32(slot, slot::LOG_BLOCK, block + 3);
    };
    in_both_slots(&mut specimen.bytes, inside);
    let report = check(&HostLab, &scene(&specimen.bytes).path).unwrap();
    assert!(report.errors[0].contains("where no record ends"), "{:?}", report.errors);
}

#[test]
fn named_damage_of_the_header_is_named() {
    let specimen = specimen::written();
    refused(&specimen, corrupt::header_magic, "header.magic", 0);
    refused(&specimen, corrupt::header_checksum, "header.checksum", header::CHECKSUM);
    refused(&specimen, corrupt::segment_size, "header.segment_blocks", header::SEGMENT_BLOCKS);
}

#[test]
fn named_damage_of_the_base_record_is_named() {
    let specimen = specimen::written();
    let at = corrupt::base_of(&specimen.bytes);
    refused(&specimen, corrupt::no_base_record, "base.magic", at);
    refused(&specimen, corrupt::base_checksum, "base.checksum", at + base::CHECKSUM);
    refused(&specimen, corrupt::base_sequence, "base.sequence", at + base::SEQUENCE);
    refused(&specimen, corrupt::base_path_length, "base.path_len", at + base::PATH_LEN);
    let foreign = |b: &mut Image| corrupt::change_base(b, |base| base[base::LAYER_ID] ^= 1);
    refused(&specimen, foreign, "base.layer_id", at + base::LAYER_ID);
    let too_large = |b: &mut Image| corrupt::raw_base(b, "base", 65 << 40);
    refused(&specimen, too_large, "base.size", at + base::SIZE);
    let not_text = |b: &mut Image| {
        corrupt::raw_base(b, "base", 512);
        corrupt::change_base(b, |base| base[base::PATH] = 0xff);
    };
    refused(&specimen, not_text, "base.path", at + base::PATH);
    let unnamed = |b: &mut Image| corrupt::change_slot(b, |slot| format::put_u64(slot, slot::BASE, 0));
    recovered(&specimen, unnamed, &specimen.disk);
}

#[test]
fn what_a_newer_program_made_is_refused_as_such() {
    let unknown_format =
        |b: &mut Image| corrupt::change_base(b, |base| format::put_u32(base, base::FORMAT, 9));
    for damage in [
        corrupt::header_version,
        corrupt::incompatible_feature,
        corrupt::ro_compatible_feature,
        corrupt::base_flags,
        unknown_format,
    ] {
        let mut image = specimen::written().bytes;
        damage(&mut image);
        let error = refusal(&image);
        assert!(matches!(error.kind, ErrorKind::Unsupported(_)), "{error}");
        let text = error.to_string();
        assert!(text.contains("version 77") || text.contains("a newer program"), "{text}");
    }
}

#[test]
fn damaged_slots_are_passed_over_only_when_nothing_is_lost() {
    let written = specimen::written();
    recovered(&written, corrupt::newest_slot, &written.disk);
    refused(&written, corrupt::older_slot, "slot", None);
    refused(&written, corrupt::both_slots, "slot.checksum", None);
    refused(&written, corrupt::no_slots, "slot", BLOCK);
    let abandoned = specimen::abandoned();
    recovered(&abandoned, corrupt::newest_slot, abandoned.history.last().unwrap());
    refused(&abandoned, corrupt::older_slot, "slot", None);
    refused(&abandoned, corrupt::both_slots, "slot.checksum", None);
    // The lost slot's checkpoint is not in the log: writes that were promised may be missing.
    let cut = |b: &mut Image| {
        let first = walk::log(b, format::slots(b)[1])[0];
        corrupt::newest_slot(b);
        b[first.at + record::CHECKSUM] ^= 1;
    };
    refused(&abandoned, cut, "slot", None);
}

#[test]
fn named_damage_of_slot_fields_is_named() {
    let specimen = specimen::written();
    let cases: [(&str, usize, u64, usize); 10] = [
        ("slot.layer_id", slot::LAYER_ID, 7, 8),
        ("slot.size", slot::SIZE, 513, 8),
        ("slot.log_block", slot::LOG_BLOCK, 17, 4),
        ("slot.log_segment", slot::LOG_SEGMENT, 1 << 20, 4),
        ("slot.sequence", slot::SEQUENCE, u64::MAX - 3, 8),
        ("slot.generation", slot::GENERATION, 0, 8),
        ("slot.root", slot::ROOT, 8192, 8),
        ("slot.lanes", slot::LANES, 1, 4),
        ("slot.lanes", slot::LANES, 1 << 5, 4),
        ("slot.next_segment", slot::LANES, 2, 4),
    ];
    for (field, at, value, len) in cases {
        let change = |slot: &mut [u8]| format::put(slot, at, &value.to_le_bytes()[..len]);
        refused(&specimen, |b| in_both_slots(b, change), field, None);
    }
    let outside = |b: &mut Image| {
        let end = b.len() as u64;
        in_both_slots(b, |slot| format::put_u64(slot, slot::ROOT, end));
    };
    refused(&specimen, outside, "slot.root", specimen.bytes.len());
    let swapped = |b: &mut Image| {
        let (first, second) = (format::slot_at(0), format::slot_at(1));
        let slot = b[first..first + 512].to_vec();
        b.copy_within(second..second + 512, first);
        b[second..second + 512].copy_from_slice(&slot);
    };
    refused(&specimen, swapped, "slot.generation", None);
}

#[test]
fn named_damage_of_the_map_is_named() {
    let specimen = specimen::written();
    let leaf = corrupt::first_node(&specimen.bytes, &[node::LEAF_RUNS]);
    let branch = corrupt::first_node(&specimen.bytes, &[node::BRANCH]);
    let root = corrupt::first_node(&specimen.bytes, &[node::ROOT]);
    refused_there(&specimen, corrupt::node_checksum, "node.checksum", leaf.at + node::CHECKSUM);
    refused_there(&specimen, corrupt::leaf_place_outside, "leaf.place", leaf.at + node::BODY);
    refused_there(&specimen, corrupt::leaf_place_header, "leaf.place", leaf.at + node::BODY);
    refused_there(&specimen, corrupt::leaf_run_long, "leaf.run", leaf.at + node::BODY);
    refused_there(&specimen, corrupt::branch_index, "node.index", branch.at + node::INDEX);
    refused_there(&specimen, corrupt::branch_as_leaf, "node.kind", branch.at + node::KIND);
    refused(&specimen, corrupt::reference_to_header, "node.reference", root.at + node::ROOT_REFS);
    refused(&specimen, |b| b[root.at] ^= 1, "node.magic", root.at);
}

#[test]
fn blocks_that_are_mapped_twice_are_reported_and_harm_nobody_else() {
    let mut image = specimen::written().bytes;
    corrupt::shared_places(&mut image);
    let scene = scene(&image);
    let errors = check(&HostLab, &scene.path).unwrap().errors;
    assert!(errors.iter().any(|e| e.contains("are mapped to the same block of segment")), "{errors:?}");
    // Its own accounts are wrong, which must not be more than wrong.
    let mut bench = Bench::open(&HostLab, &scene.path, false).unwrap();
    for at in (0..specimen::SIZE).step_by(64 << 10) {
        bench.write(at, &[3; 64 << 10]).unwrap();
    }
    bench.checkpoint().unwrap();
    for _ in 0..8 {
        bench.clean().unwrap();
    }
    assert_eq!(bench.read(0, specimen::SIZE as usize).unwrap(), [3; specimen::SIZE as usize]);
    bench.close().unwrap();
}

#[test]
fn a_log_that_breaks_is_followed_up_to_there() {
    let specimen = specimen::abandoned();
    let log = walk::log(&specimen.bytes, corrupt::newest(&specimen.bytes));
    assert_eq!(log.len() + 1, specimen.history.len());
    for (i, found) in log.iter().enumerate().step_by(3) {
        let before = &specimen.history[i];
        recovered(&specimen, |b| b[found.at + BLOCK + 9] ^= 1, before);
        recovered(&specimen, |b| b[found.at + record::PREVIOUS] ^= 1, before);
        recovered(&specimen, |b| b[found.at..found.at + BLOCK].fill(0), before);
        recovered(&specimen, |b| b.truncate(found.at + BLOCK), before);
        let whole_but_foreign = |b: &mut Image| {
            b[found.at + record::NONCE] ^= 1;
            walk::records(b).iter().for_each(|r| seal::seal_record(b, r));
        };
        recovered(&specimen, whole_but_foreign, before);
    }
}

#[test]
fn a_base_that_is_not_what_it_was_is_refused() {
    let specimen = specimen::over_base();
    let trouble = |prepare: fn(&Path)| {
        let scene = scene(&specimen.bytes);
        prepare(&scene.folder.path().join("base"));
        let error = refusal_at(&scene.path);
        let ErrorKind::Base(text) = error.kind else { panic!("{error}") };
        let report = check(&HostLab, &scene.path).unwrap();
        assert_eq!(report.errors, std::slice::from_ref(&text));
        text
    };
    assert!(trouble(|_| {}).contains("base: cannot open"));
    assert!(trouble(|base| std::fs::write(base, [1; 512]).unwrap()).contains("its size was"));
    assert!(trouble(|base| std::fs::write(base, specimen::base()).unwrap()).contains("it was modified"));
    assert!(trouble(|base| std::fs::create_dir(base).unwrap()).contains("base"));
}

#[test]
fn a_file_cut_anywhere_is_refused_or_reads_short() {
    let specimen = specimen::written();
    let mut lengths: Vec<usize> = (0..specimen.bytes.len()).step_by(4096 + 512).collect();
    lengths.extend([1, 511, 4095, 4096, 4097, 8192, 12287, 12288, 65535, 65536, 65537]);
    for length in lengths {
        let scene = scene(&specimen.bytes[..length].to_vec());
        let (result, peak) = metered(MEMORY_MAX, || Bench::open(&HostLab, &scene.path, true));
        assert!(peak < MEMORY_MAX);
        let Ok(mut bench) = result else {
            let error = Bench::open(&HostLab, &scene.path, true).err().unwrap();
            assert!(matches!(error.kind, ErrorKind::Corrupt { .. }), "{length}: {error}");
            assert!(Bench::open(&HostLab, &scene.path, false).is_err(), "{length}");
            continue;
        };
        // Whatever is gone is an error, never zeroes.
        for (i, block) in specimen.disk.chunks(4096).enumerate() {
            match bench.read(i as u64 * 4096, 4096) {
                Ok(held) => assert!(held == block, "{length}: block {i}"),
                Err(error) => assert_eq!(error, DeviceError::Corrupt, "{length}"),
            }
        }
    }
}
