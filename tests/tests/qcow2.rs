//! qcow2 images made by QEMU, read by us: byte for byte what QEMU reads.

#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;

use sapwood_blockdev::device::{BlockDevice, Command, DeviceError};
use sapwood_blockdev::engine::{BlockingEngine, UringEngine};
use sapwood_blockdev::io::{Io, block_on};
use sapwood_blockdev::storage::{HostStorage, Lock, OpenOptions, Storage, StorageFile};
use sapwood_image::below::ChainDisk;
use sapwood_image::compare::compare;
use sapwood_image::layer::{self, BaseSpec, CreateLayer, Tuning};
use sapwood_image::probe::{Guess, probe};
use sapwood_image::qcow2::{self, Qcow2Info};
use sapwood_image::{ErrorKind, Extent, ExtentKind, Format, OpenBelow, OpenDisk, Side};
use sapwood_tests::damage::lab::{Bench, HostLab, Lab, check as layer_check, create, wait};
use sapwood_tests::qcow2::craft::{Craft, Kind, field, put64, specimen};
use sapwood_tests::qcow2::qemu::{Made, Qemu};
use sapwood_tests::qcow2::reader::{Reader, expect_at_random, trusting};
use sapwood_tests::sim::faults::Faults;
use sapwood_tests::sim::rng::Rng;
use sapwood_tests::sim::world::{Config, World};

/// Random operations that make the contents of an image.
const OPERATIONS: usize = 40;
/// Rounds of 16 random requests for each disk.
const ROUNDS: usize = 6;

/// An image of some options with random contents; `None`, said by name, when this QEMU cannot.
fn make(qemu: &Qemu, name: &str, options: &str, made: Made, seed: u64) -> Option<()> {
    let Made { size, cluster, .. } = made;
    let line = format!("create -q -f qcow2 -o cluster_size={cluster},{options} {name} {size}");
    if let Err(error) = qemu.try_img(&line) {
        println!("SKIPPED {options}: {error}");
        return None;
    }
    qemu.io("qcow2", name, &qemu.history(&mut Rng::new(seed), &made, OPERATIONS));
    Some(())
}

/// Reads a disk in several ways and compares it with what QEMU reads.
fn agree(qemu: &Qemu, what: &str, image: &str, options: &OpenBelow, expected: &[u8]) {
    let mut reader = Reader::open(&HostLab, &qemu.path(image), options).unwrap();
    reader.expect_at_random(what, expected, &mut Rng::new(1), ROUNDS);
    reader.expect(what, expected);
    let covered: u64 = reader.extents().unwrap().iter().map(|extent| extent.len).sum();
    assert_eq!(covered, expected.len() as u64, "{what}");
    drop(reader);
    agree_below_a_layer(qemu, what, image, options, expected);
}

/// Lays a layer over the image, and compares what it reads, before and after random changes.
fn agree_below_a_layer(qemu: &Qemu, what: &str, image: &str, options: &OpenBelow, expected: &[u8]) {
    let what = format!("below a layer: {what}");
    let (path, mut rng, mut disk) = (qemu.path("over.layer"), Rng::new(2), expected.to_vec());
    let base = BaseSpec { options: options.clone(), ..BaseSpec::new(image, Format::Qcow2) };
    create(&HostLab, &path, &CreateLayer { base: Some(base), ..CreateLayer::default() }).unwrap();
    for round in 0..3 {
        let mut bench = Bench::open(&HostLab, &path, false).unwrap();
        let mut queue = bench.layer.queue_on(Io::new(HostLab.engine()));
        expect_at_random(&mut queue, &what, &disk, &mut rng, ROUNDS);
        drop(queue);
        for start in (0..disk.len()).step_by(1 << 20) {
            let end = disk.len().min(start + (1 << 20));
            assert!(bench.read(start as u64, end - start).unwrap() == disk[start..end], "{what}: at {start}");
        }
        for extent in bench.extents(0..disk.len() as u64).unwrap() {
            if matches!(extent.kind, ExtentKind::Zero | ExtentKind::Absent) {
                let bytes = &disk[extent.start as usize..][..extent.len as usize];
                assert!(bytes.iter().all(|byte| *byte == 0), "{what}: {extent:?}");
            }
        }
        for _ in 0..if round == 2 { 0 } else { 10 } {
            let start = rng.below(disk.len() as u64 / 512) as usize * 512;
            let end = disk.len().min(start + 512 * rng.between(1, 40) as usize);
            rng.fill(&mut disk[start..end]);
            bench.write(start as u64, &disk[start..end]).unwrap();
        }
        bench.close().unwrap();
        if round == 1 {
            // Without a base it holds all of it.
            let path = path.clone();
            wait(&HostLab, async move |storage, io| {
                layer::rebase(&storage, &io, &path, None, Tuning::default(), &mut |_, _| {}).await
            })
            .unwrap();
        }
    }
    assert_eq!(layer_check(&HostLab, &path).unwrap().errors, Vec::<String>::new(), "{what}");
    std::fs::remove_file(path).unwrap();
}

fn agree_with_qemu(qemu: &Qemu, what: &str, image: &str) {
    agree(qemu, what, image, &trusting(), &qemu.contents("-f qcow2", image));
}

const MIB: u64 = 1 << 20;

#[test]
fn options_of_one_image() {
    let qemu = Qemu::default();
    let sizes = [(512, 3 * MIB), (4096, 9 * MIB), (65_536, 13 * MIB), (2 * MIB, 21 * MIB)];
    let mut seed = 0;
    for (cluster, size) in sizes {
        for options in ["compat=0.10", "compression_type=zlib", "compression_type=zstd", "extended_l2=on"] {
            if options == "extended_l2=on" && cluster < 16_384 {
                continue;
            }
            seed += 1;
            // Odd in sectors, so that the last cluster is cut.
            let made = Made { size: size - 512 * (seed % 7), cluster, packs: true };
            if make(&qemu, "disk", options, made, seed).is_some() {
                let what = format!("{options}, clusters of {cluster}");
                agree_with_qemu(&qemu, &what, "disk");
                let report = wait(&HostLab, check(qemu.path("disk"))).unwrap();
                assert_eq!((report.errors, report.warnings), (vec![], vec![]), "{what}");
            }
        }
    }
    assert!(seed >= 14);
}

fn check(
    path: PathBuf,
) -> impl AsyncFnOnce(HostStorage, Io<BlockingEngine>) -> Result<qcow2::CheckReport, sapwood_image::ImageError>
{
    async move |storage, io| qcow2::check(&storage, &io, &path).await
}

fn info(path: PathBuf) -> Qcow2Info {
    wait(&HostLab, async move |storage, io| qcow2::info(&storage, &io, &path).await).unwrap()
}

#[test]
fn other_options() {
    let qemu = Qemu::default();
    for (seed, options) in [
        "lazy_refcounts=on",
        "preallocation=metadata",
        "preallocation=falloc",
        "preallocation=full",
        "refcount_bits=1",
        "refcount_bits=64",
        "extended_l2=on,compression_type=zstd,preallocation=metadata",
        "extended_l2=on,lazy_refcounts=on",
        "data_file=disk.data",
        "data_file=disk.data,data_file_raw=on",
        "data_file=disk.data,extended_l2=on",
    ]
    .into_iter()
    .enumerate()
    {
        // QEMU compresses into clusters of the image itself that hold nothing yet.
        let packs = !options.contains("data_file") && !options.contains("preallocation");
        let made = Made { size: 11 * MIB + 1536, cluster: 65_536, packs };
        if make(&qemu, "disk", options, made, 100 + seed as u64).is_some() {
            agree_with_qemu(&qemu, options, "disk");
        }
    }
}

#[test]
fn whole_images_compressed() {
    let qemu = Qemu::default();
    let made = Made { size: 9 * MIB + 512, cluster: 65_536, packs: false };
    make(&qemu, "source", "compat=1.1", made, 7).unwrap();
    for options in [
        "compression_type=zlib",
        "compression_type=zstd",
        "compression_type=zlib,cluster_size=512",
        "compression_type=zstd,cluster_size=4k",
        "compression_type=zlib,cluster_size=2M",
        "compression_type=zstd,cluster_size=2M",
        "compression_type=zstd,extended_l2=on",
    ] {
        let line = format!("convert -f qcow2 -O qcow2 -c -o {options} source disk");
        match qemu.try_img(&line) {
            Ok(_) => agree_with_qemu(&qemu, options, "disk"),
            Err(error) => println!("SKIPPED compressed {options}: {error}"),
        }
    }
}

#[test]
fn chains() {
    let qemu = Qemu::default();
    let mut rng = Rng::new(5);
    // Each longer or shorter than the one below.
    for (bottom, middle, top) in
        [(9, 6, 12), (6, 9, 7), (5, 5, 5)].map(|(a, b, c)| (a * MIB, b * MIB, c * MIB))
    {
        qemu.img(&format!("create -q -f raw bottom {}", bottom + 512));
        let raw = Made { size: bottom + 512, cluster: 4096, packs: false };
        qemu.io("raw", "bottom", &qemu.history(&mut rng, &raw, OPERATIONS));
        let mut below = ("bottom", "raw");
        for (name, options, size, cluster) in [
            ("low", "compat=0.10", bottom, 4096),
            ("middle", "extended_l2=on", middle, 65_536),
            ("top", "compression_type=zstd", top, 512),
        ] {
            let (base, format) = below;
            let line = "create -q -f qcow2 -o";
            qemu.img(&format!("{line} cluster_size={cluster},{options} -b {base} -F {format} {name} {size}"));
            let made = Made { size, cluster, packs: true };
            qemu.io("qcow2", name, &qemu.history(&mut rng, &made, 20));
            agree_with_qemu(&qemu, &format!("{name}, {top} over {middle} over {bottom}"), name);
            below = (name, "qcow2");
        }
        the_map_is_qemus(&qemu, "top");
    }
}

/// The map without names and without what joins neighbours.
fn the_map_is_qemus(qemu: &Qemu, image: &str) {
    let said = qemu.img(&format!("map -f qcow2 --output=json {image}"));
    let mut theirs = Vec::new();
    for line in said.lines() {
        let number = |name: &str| -> u64 {
            let rest = line.split_once(&format!("\"{name}\": ")).unwrap().1;
            rest.split([',', '}']).next().unwrap().trim().parse().unwrap()
        };
        let flag = |name: &str| line.contains(&format!("\"{name}\": true"));
        let kind = match (flag("present"), flag("data"), flag("compressed")) {
            (true, true, true) => ExtentKind::Compressed,
            (true, true, false) => ExtentKind::Data,
            (true, false, _) => ExtentKind::Zero,
            (false, ..) => ExtentKind::Absent,
        };
        let offset = (kind == ExtentKind::Data).then(|| number("offset"));
        let (start, len, depth) = (number("start"), number("length"), number("depth") as u32);
        Extent::push_to(&mut theirs, Extent { start, len, kind, depth, offset, file: None });
    }
    let mut ours = Vec::new();
    for extent in Reader::open(&HostLab, &qemu.path(image), &trusting()).unwrap().extents().unwrap() {
        let offset = extent.offset.filter(|_| extent.kind == ExtentKind::Data);
        Extent::push_to(&mut ours, Extent { file: None, offset, ..extent });
    }
    assert_eq!(ours, theirs);
}

#[test]
fn snapshots_by_id_and_by_name() {
    let qemu = Qemu::default();
    for (cluster, options) in
        [(4096, "compat=0.10"), (65_536, "extended_l2=on"), (65_536, "compression_type=zstd")]
    {
        let made = Made { size: 6 * MIB, cluster, packs: true };
        make(&qemu, "disk", options, made, 20).unwrap();
        qemu.img("snapshot -c early disk");
        let early = qemu.contents("-f qcow2", "disk");
        let later = Made { packs: false, ..made };
        qemu.io("qcow2", "disk", &qemu.history(&mut Rng::new(21), &later, 20));
        qemu.img("snapshot -c 7 disk");
        if qemu.try_img("resize -q -f qcow2 disk 8M").is_ok() {
            qemu.io("qcow2", "disk", &["write -q -P 9 7M 64k".to_owned()]);
        }
        for (wanted, named) in [("early", "early"), ("1", "early"), ("7", "7"), ("2", "7")] {
            let mut expected = qemu.contents(&format!("-f qcow2 -l snapshot.name={named}"), "disk");
            // QEMU keeps the size that the disk has now.
            expected.truncate(made.size as usize);
            assert!(named != "early" || expected == early);
            let options = OpenBelow { snapshot: Some(wanted.to_owned()), ..trusting() };
            agree(&qemu, &format!("{options:?}"), "disk", &options, &expected);
        }
        agree_with_qemu(&qemu, options, "disk");
        let options = OpenBelow { snapshot: Some("late".to_owned()), ..trusting() };
        let error = Reader::open(&HostLab, &qemu.path("disk"), &options).err().unwrap();
        assert!(error.to_string().contains("late"), "{error}");
        let listed = info(qemu.path("disk")).snapshots;
        let names: Vec<_> = listed.iter().map(|s| (s.id.as_str(), s.name.as_str())).collect();
        assert_eq!(names, [("1", "early"), ("2", "7")]);
        assert!(
            listed
                .iter()
                .all(|s| s.disk_size.is_none_or(|size| size == made.size) && s.date.0 > 1_600_000_000)
        );
    }
}

#[test]
fn an_image_left_dirty_is_read() {
    let qemu = Qemu::default();
    qemu.img("create -q -f qcow2 -o lazy_refcounts=on disk 4M");
    let abort = "write -q -P 5 1M 300k\nflush\nabort\n";
    let mut child = std::process::Command::new("qemu-io")
        .args(["-f", "qcow2"])
        .arg(qemu.path("disk"))
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    std::io::Write::write_all(&mut child.stdin.take().unwrap(), abort.as_bytes()).unwrap();
    assert!(!child.wait().unwrap().success());
    assert!(info(qemu.path("disk")).dirty);
    agree_with_qemu(&qemu, "dirty", "disk");
    let report = wait(&HostLab, check(qemu.path("disk"))).unwrap();
    assert_eq!((report.errors.len(), report.warnings.len()), (0, 1), "{report:?}");
}

#[test]
fn qemu_reads_what_the_tests_craft() {
    let qemu = Qemu::default();
    for kind in KINDS {
        let (file, disk) = specimen(kind);
        std::fs::write(qemu.path("disk"), file).unwrap();
        assert!(qemu.contents("-f qcow2", "disk") == disk, "{kind:?}");
        agree(&qemu, &format!("{kind:?}"), "disk", &trusting(), &disk);
    }
}

const KINDS: [Kind; 6] = [
    Kind { bits: 9, extended: false, zstd: false },
    Kind { bits: 12, extended: false, zstd: true },
    Kind { bits: 14, extended: true, zstd: false },
    Kind { bits: 16, extended: false, zstd: true },
    Kind { bits: 16, extended: true, zstd: true },
    Kind { bits: 21, extended: false, zstd: false },
];

#[test]
fn as_qemu_where_it_is_odd() {
    let qemu = Qemu::default();
    let kind = Kind { bits: 12, extended: false, zstd: false };
    let mut craft = Craft::new(kind, 64 << 10);
    craft.data(1, &[7; 4096]);
    // Beyond the end of the file, and across it.
    craft.set(2, 1 << 63 | 1 << 40);
    craft.data(3, &[8; 4096]);
    let len = craft.file.len() - 1000;
    craft.file.truncate(len);
    // A size that is not one of whole sectors.
    put64(&mut craft.file, field::SIZE, (64 << 10) - 100);
    std::fs::write(qemu.path("disk"), &craft.file).unwrap();
    let expected = qemu.contents("-f qcow2", "disk");
    assert_eq!(expected[4 * 4096 - 1], 0);
    agree(&qemu, "odd", "disk", &trusting(), &expected);
    let report = wait(&HostLab, check(qemu.path("disk"))).unwrap();
    assert_eq!(report.errors.len(), 1, "{report:?}");
}

#[test]
fn threads_share_a_disk() {
    let qemu = Qemu::default();
    let made = Made { size: 9 * MIB, cluster: 65_536, packs: false };
    make(&qemu, "source", "compat=1.1", made, 30).unwrap();
    qemu.img("convert -f qcow2 -O qcow2 -c source packed");
    qemu.img("create -q -f qcow2 -o cluster_size=4k -b packed -F qcow2 disk");
    qemu.io(
        "qcow2",
        "disk",
        &qemu.history(&mut Rng::new(31), &Made { cluster: 4096, packs: true, ..made }, 30),
    );
    let expected = Arc::new(qemu.contents("-f qcow2", "disk"));
    let io = Io::new(UringEngine::new().unwrap());
    let path = qemu.path("disk");
    let opening = {
        let io = io.clone();
        async move { ChainDisk::open(&HostStorage, &io, &path, Format::Qcow2, &trusting()).await }
    };
    let disk = block_on(&io, opening).unwrap();
    let threads: Vec<_> = (0..3)
        .map(|seed| {
            let (disk, expected) = (Arc::clone(&disk), Arc::clone(&expected));
            thread::spawn(move || {
                let mut queue = disk.queue(UringEngine::new().unwrap());
                expect_at_random(&mut queue, "threads", &expected, &mut Rng::new(seed), 40);
            })
        })
        .collect();
    threads.into_iter().for_each(|thread| thread.join().unwrap());
}

#[test]
fn writes_are_refused_and_the_file_is_shared() {
    let qemu = Qemu::default();
    qemu.img("create -q -f qcow2 disk 1M");
    let path = qemu.path("disk");
    let mut reader = Reader::open(&HostLab, &path, &OpenBelow::default()).unwrap();
    assert!(reader.disk.geometry().read_only);
    for command in [
        Command::Write(sapwood_blockdev::buffer::SharedBuf::heap(512).into()),
        Command::Discard,
        Command::WriteZeroes,
    ] {
        assert_eq!(reader.command(0, 512, command), Err(DeviceError::ReadOnly));
    }
    assert_eq!(reader.command(0, 0, Command::Flush), Ok(()));
    let beyond = Command::Read(sapwood_blockdev::buffer::SharedBuf::heap(1024).into());
    assert_eq!(reader.command(MIB - 512, 1024, beyond), Err(DeviceError::OutOfRange));
    Reader::open(&HostLab, &path, &OpenBelow::default()).unwrap();
    let other = HostStorage.open(&path, OpenOptions::WRITE).unwrap();
    assert!(other.lock(Lock::Exclusive).is_err(), "a reader holds it");
    drop(reader);
    other.lock(Lock::Exclusive).unwrap();
    let error = Reader::open(&HostLab, &path, &OpenBelow::default()).err().unwrap();
    assert!(matches!(error.kind, ErrorKind::Locked { .. }), "{error}");
}

#[test]
fn failed_and_short_reads_spoil_nothing() {
    for kind in KINDS.into_iter().filter(|kind| kind.bits < 17) {
        let world = World::new(Config::blocking(3));
        let (file, disk) = specimen(kind);
        world.install(Path::new("/packed"), &file);
        world.install(Path::new("/plain"), &disk);
        let side = |path: &str, format| {
            let process = world.process();
            let options = OpenDisk { format: Some(format), read_only: true, ..OpenDisk::default() };
            let io = Io::new(world.engine(process));
            Side::open(&world.storage(process), io, Path::new(path), options).unwrap()
        };
        let (mut failures, faults) = (0, Faults { read_error: 300, short: 2000, ..Faults::default() });
        for _ in 0..20 {
            let (mut packed, mut plain) = (side("/packed", Format::Qcow2), side("/plain", Format::Raw));
            world.set_faults(Faults { interrupted: 1000, ..faults.clone() });
            let found = compare(&mut packed, &mut plain, &mut |_| ());
            failures += u32::from(found.is_err());
            assert!(found.is_err() || found.is_ok_and(|difference| difference.is_none()), "{kind:?}");
            // What the first attempt left in the caches is right.
            world.set_faults(Faults::default());
            drop(plain);
            let again = compare(&mut packed, &mut side("/plain", Format::Raw), &mut |_| ());
            assert_eq!(again.unwrap(), None, "{kind:?}");
        }
        assert!(failures > 0, "{kind:?}: faults come through");
    }
}

/// Why an image is not opened.
fn refusal(path: &Path, options: &OpenBelow) -> String {
    Reader::open(&HostLab, path, options).err().expect("it is refused").to_string()
}

#[test]
fn files_that_an_image_names_need_leave() {
    let qemu = Qemu::default();
    std::fs::write(qemu.path("secret"), [7; 4096]).unwrap();
    qemu.img("create -q -f qcow2 -b secret -F raw over");
    qemu.img("create -q -f qcow2 -b over -F qcow2 twice");
    qemu.img("create -q -f qcow2 -o data_file=data aside 1M");
    for image in ["over", "twice", "aside"] {
        let said = refusal(&qemu.path(image), &OpenBelow::default());
        assert!(said.contains("--allow-backing") && said.contains(image), "{said}");
        Reader::open(&HostLab, &qemu.path(image), &trusting()).unwrap();
    }
    assert_eq!(info(qemu.path("over")).backing.unwrap().name, "secret", "described without being opened");
}

#[test]
fn a_format_is_never_guessed() {
    let qemu = Qemu::default();
    std::fs::write(qemu.path("below"), [7; 4096]).unwrap();
    qemu.img("create -q -f qcow2 -b below -F raw disk");
    // As old images are: without the name of the format.
    let mut file = std::fs::read(qemu.path("disk")).unwrap();
    let at = file.windows(4).position(|bytes| bytes == 0xe279_2aca_u32.to_be_bytes()).unwrap();
    file[at..at + 4].copy_from_slice(&0x1234_5678_u32.to_be_bytes());
    std::fs::write(qemu.path("disk"), file).unwrap();
    let said = refusal(&qemu.path("disk"), &trusting());
    assert!(said.contains("--backing-format raw"), "{said}");
    let stated = OpenBelow { backing_format: Some(Format::Raw), ..trusting() };
    agree(&qemu, "stated", "disk", &stated, &[7; 4096]);
    let path = qemu.path("disk");
    let guess = wait(&HostLab, async move |storage, io| probe(&storage, &io, &path).await).unwrap();
    assert_eq!(guess, Guess::Qcow2);
}

#[test]
fn encryption_is_refused() {
    let qemu = Qemu::default();
    let luks = "create -q --object secret,id=s,data=hush -f qcow2 -o encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10 disk 1M";
    match qemu.try_img(luks) {
        Ok(_) => assert!(refusal(&qemu.path("disk"), &trusting()).contains("LUKS")),
        Err(error) => println!("SKIPPED LUKS: {error}"),
    }
}
