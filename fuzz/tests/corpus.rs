//! The corpus as a test, without a fuzzer; and where its seeds come from.

use std::fs;
use std::path::{Path, PathBuf};

use sapwood_fuzz::{layer_header, layer_node, layer_open, layer_record, pack, qcow2_open, virtio_request};
use sapwood_tests::damage::corrupt::newest;
use sapwood_tests::damage::format::{BLOCK, base, bases, header, put_u32, record, slot, slots, u32_at};
use sapwood_tests::damage::lab::check;
use sapwood_tests::damage::memory::MemoryStorage;
use sapwood_tests::damage::seal::Seal;
use sapwood_tests::damage::specimen::{self, Specimen};
use sapwood_tests::damage::walk;
use sapwood_tests::qcow2::craft::{self, Craft, Kind};
use sapwood_tests::qcow2::reader::{Reader, trusting};

type Target = fn(&[u8]);

const TARGETS: [(&str, Target); 6] = [
    ("layer_header", layer_header::run),
    ("layer_node", layer_node::run),
    ("layer_open", layer_open::run),
    ("layer_record", layer_record::run),
    ("qcow2_open", qcow2_open::run),
    ("virtio_request", virtio_request::run),
];

fn corpus(target: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target)
}

#[test]
fn every_input_of_the_corpus_passes() {
    for (name, run) in TARGETS {
        let mut inputs: Vec<PathBuf> =
            fs::read_dir(corpus(name)).expect("seeds").map(|e| e.expect("an entry").path()).collect();
        inputs.sort();
        assert!(!inputs.is_empty(), "{name} has no seeds");
        for input in inputs {
            println!("{}", input.display());
            run(&fs::read(&input).expect("an input"));
        }
    }
}

#[test]
fn seeds_are_layers_of_this_version() {
    for entry in fs::read_dir(corpus("layer_open")).expect("seeds") {
        let path = entry.expect("an entry").path();
        if path.to_string_lossy().ends_with("-plain") {
            let file = pack::unpack(&fs::read(&path).expect("a seed")).expect("a file");
            let storage = MemoryStorage::new(1000);
            storage.install(&specimen::path(), &file);
            storage.install(Path::new("base"), &specimen::base());
            let report = check(&storage, &specimen::path()).expect("a layer");
            assert_eq!(report.errors, [""; 0], "{}: make the seeds anew", path.display());
        }
    }
}

/// The file without what `Seal` puts there; with the checksums of records if they are to stay.
fn bare(file: &[u8], sealed_records: bool) -> Vec<u8> {
    let mut bare = file.to_vec();
    put_u32(&mut bare, header::CHECKSUM, 0);
    bases(file).into_iter().for_each(|at| put_u32(&mut bare, at + base::CHECKSUM, 0));
    for at in slots(file) {
        put_u32(&mut bare, at + slot::CHECKSUM, 0);
        for node in walk::nodes(file, at) {
            put_u32(&mut bare, node.at + 12, 0);
        }
    }
    for found in walk::records(file).iter().filter(|_| !sealed_records) {
        let runs = u32_at(file, found.at + record::RUN_COUNT) as usize;
        let sums = found.at + record::RUNS + runs * record::RUN_BYTES;
        bare[sums..sums + 4 * found.data_blocks].fill(0);
        put_u32(&mut bare, found.at + record::CHECKSUM, 0);
    }
    bare
}

/// The input for a file. A record cut off keeps the checksums of what it was.
fn packed(file: &[u8], sealed_records: bool) -> Vec<u8> {
    let mut input = pack::pack(file.len(), &bare(file, sealed_records));
    input[0] = if sealed_records { pack::RECORDS_AS_THEY_ARE } else { 0 };
    assert!(pack::unpack(&input).as_deref() == Some(file), "unpacking gives the file back");
    input
}

fn specimens() -> Vec<(&'static str, Specimen)> {
    let mut cut = specimen::abandoned();
    let log = walk::log(&cut.bytes, newest(&cut.bytes));
    cut.bytes.truncate(log[log.len() - 3].at + BLOCK + BLOCK / 2);
    let mut void = specimen::abandoned();
    make_void(&mut void.bytes);
    vec![
        ("empty", specimen::empty()),
        ("written", specimen::written()),
        ("over-base", specimen::over_base()),
        ("abandoned", specimen::abandoned()),
        ("cut", cut),
        ("void", void),
    ]
}

/// Puts a void record in the place of the log's third.
fn make_void(file: &mut [u8]) {
    let found = walk::log(file, newest(file))[2];
    let stood_for = u32_at(file, found.at + record::CHECKSUM);
    file[found.at + record::RUNS..found.at + BLOCK].fill(0);
    for (field, value) in [(record::RUN_COUNT, 0), (record::KIND, 1), (record::STANDS_FOR, stood_for)] {
        put_u32(file, found.at + field, value);
    }
    Seal::CHECKSUMS.apply(file);
}

/// Writes the seeds anew: `cargo test --test corpus -- --ignored`.
#[test]
#[ignore = "changes the tree"]
fn make_seeds() {
    for (name, _) in TARGETS {
        fs::create_dir_all(corpus(name)).expect("a folder");
    }
    let save = |target: &str, name: &str, bytes: &[u8]| {
        fs::write(corpus(target).join(name), bytes).expect("a seed");
    };
    for (name, specimen) in specimens() {
        let file = &specimen.bytes;
        save("layer_header", name, &layer_header::seed(file));
        let mut input = packed(file, name == "cut");
        for (how, suffix) in [(0x00, "plain"), (0x37, "all")] {
            input[1] = how;
            save("layer_open", &format!("{name}-{suffix}"), &input);
        }
        let is_void = |r: &walk::RecordAt| u32_at(file, r.at + record::KIND) == 1;
        let records = walk::records(file);
        for (i, found) in records.iter().enumerate().filter(|(i, r)| i % 5 == 0 || is_void(r)) {
            let block = &file[found.at..found.at + BLOCK];
            save("layer_record", &format!("{name}-{i}"), &layer_record::seed(block));
        }
        for found in walk::nodes(file, newest(file)) {
            let seed = layer_node::seed(file, found.at, found.len);
            save("layer_node", &format!("{name}-{}", found.kind), &seed);
        }
    }
    for (name, how, file) in qcow2_images() {
        save("qcow2_open", name, &qcow2_open::pack(&file, how));
    }
    requests::make(&|name, bytes| save("virtio_request", name, bytes));
}

/// Small images with something of everything, and over another file.
fn qcow2_images() -> Vec<(&'static str, u8, Vec<u8>)> {
    let kind = |bits, extended, zstd| Kind { bits, extended, zstd };
    let mut over = Craft::new(kind(9, false, false), 64 << 10);
    over.backing("below", None);
    over.data(3, &[5; 512]);
    let mut aside = Craft::new(kind(12, false, false), 64 << 10);
    aside.extension(craft::extension::DATA_FILE, b"below");
    craft::put64(&mut aside.file, craft::field::INCOMPATIBLE, 1 << 2);
    [0, 1, 5].iter().for_each(|&cluster| aside.set(cluster, 1 << 63 | cluster << 12));
    let specimen = |kind| craft::specimen_of(kind, 12, 40).0;
    vec![
        ("small", 0, specimen(kind(9, false, false))),
        ("zlib", 0, specimen(kind(12, false, false))),
        ("zstd", 0, specimen(kind(12, false, true))),
        ("extended", 0, specimen(kind(14, true, true))),
        ("over", 3, over.file),
        ("aside", 1, aside.file),
    ]
}

#[test]
fn qcow2_seeds_are_images() {
    for entry in fs::read_dir(corpus("qcow2_open")).expect("seeds") {
        let path = entry.expect("an entry").path();
        let data = fs::read(&path).expect("a seed");
        let storage = MemoryStorage::new(1000);
        storage.install(Path::new("/disk"), &qcow2_open::unpack(&data).expect("a file"));
        storage.install(Path::new("/below"), &[7; 51_200]);
        let options =
            sapwood_image::OpenBelow { backing_format: Some(sapwood_image::Format::Raw), ..trusting() };
        let mut reader = Reader::open(&storage, Path::new("/disk"), &options).expect("an image");
        let bytes = reader.read(0, reader.size() as usize).expect("a sound one");
        assert!(bytes.iter().any(|byte| *byte != 0), "{}", path.display());
    }
}

/// Seeds of requests, by the constants of the virtio specification.
mod requests {
    const NEXT: u16 = 1;
    const WRITE: u16 = 2;
    const INDIRECT: u16 = 4;
    const MEMORY: u64 = 0x1_0000;
    const STATUS: u64 = MEMORY + 0x800;

    fn descriptor(address: u64, len: u32, flags: u16, next: u16) -> Vec<u8> {
        [&address.to_le_bytes()[..], &len.to_le_bytes(), &flags.to_le_bytes(), &next.to_le_bytes()].concat()
    }

    fn request(kind: u32, sector: u64) -> Vec<u8> {
        [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat()
    }

    /// An input: `table` padded to four descriptors, guest memory from `memory`.
    fn input(table: &[Vec<u8>], memory: &[u8]) -> Vec<u8> {
        let mut data = vec![0, 0, 0, 3];
        data.extend(2048u32.to_le_bytes());
        data.extend(table.concat());
        data.resize(8 + 4 * 16, 0);
        data.extend(memory);
        data
    }

    pub fn make(save: &dyn Fn(&str, &[u8])) {
        let header = descriptor(MEMORY, 16, NEXT, 1);
        let status = descriptor(STATUS, 1, WRITE, 0);
        let data = |flags| descriptor(MEMORY + 0x200, 512, flags | NEXT, 2);
        save("read", &input(&[header.clone(), data(WRITE), status.clone()], &request(0, 3)));
        save("write", &input(&[header.clone(), data(0), status.clone()], &request(1, 3)));
        save("id", &input(&[header.clone(), data(WRITE), status.clone()], &request(8, 0)));
        let no_data = [descriptor(MEMORY, 16, NEXT, 2), vec![0; 16], status.clone()];
        save("flush", &input(&no_data, &request(4, 0)));
        let ranges =
            [9u64.to_le_bytes(), 8u64.to_le_bytes(), 99u64.to_le_bytes(), (1 << 32 | 16u64).to_le_bytes()];
        for (name, kind) in [("discard", 11), ("zeroes", 13)] {
            let table = [descriptor(MEMORY, 48, NEXT, 2), vec![0; 16], status.clone()];
            save(name, &input(&table, &[request(kind, 0), ranges.concat()].concat()));
        }
        let table = [header, data(WRITE), status].concat();
        let memory = [request(0, 1), table].concat();
        save("indirect", &input(&[descriptor(MEMORY + 16, 48, INDIRECT, 0)], &memory));
    }
}
