//! Guests on the volumes of a store: one is snapshotted while it writes, and every snapshot is a disk that mounts and holds
//! what was durable.
//!
//! It boots guests for minutes, so that a plain `cargo test` leaves it out: `cargo xtask test --only guests` runs it.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use sapwood_tests::guest::{Assets, Daemon, Disk, Guest, GuestReport, GuestSpec, sapwood_program};
use serde_json::Value;

/// How long a guest may take until its writer is at work.
const READY_LIMIT: Duration = Duration::from_secs(240);
const SNAPSHOTS: usize = 20;
/// Blocks that a guest writes while its daemon is killed now and then: after each of so many.
const BLOCKS: usize = 200;
const EACH: usize = 40;
/// Snapshots that one guest looks at: a disk for each.
const AT_ONCE: usize = 10;

/// Writes files and a log whose lines are durable, until the log has some hundred lines at least and a time is over.
const WRITE: &str = r#"
mkfs.ext4 -q /dev/vdb
mount /dev/vdb /mnt
line() {
    head -c $(($1 % 17 * 9000 + 100)) /dev/urandom >/mnt/file.$(($1 % 40))
    echo "$1" >>/mnt/log
    sync -d /mnt/log
}
line 1
sync
mark writing
n=1
end=$(($(date +%s) + 75))
while [ $(date +%s) -lt $end ]; do
    n=$((n + 1))
    line $n
done
value lines $n
sync
umount /mnt
"#;

/// Mounts each disk after the first, which replays its journal, and checks it.
const LOOK: &str = r#"
for disk in /dev/vd[b-z]; do
    mount $disk /mnt
    value lines $(wc -l </mnt/log) $(tail -n 1 /mnt/log)
    umount /mnt
    quietly e2fsck -fn $disk
    value clean $disk
done
"#;

/// Fills the disk, waits until another one grows, and writes blocks here and there, one after the other, each durable
/// before it is named.
const WRITE_BLOCKS: &str = r#"
dd if=/dev/urandom of=/dev/vdb bs=1M count=64 oflag=direct conv=fsync status=none
mark full
while [ "$(cat /sys/block/vdc/size)" = 2048 ]; do sleep 0.1; done
n=0
while [ $n -lt BLOCKS ]; do
    n=$((n + 1))
    block=$((n * 9973 % 16384))
    dd if=/dev/urandom of=/dev/vdb bs=4k count=1 seek=$block oflag=direct conv=fdatasync,notrunc status=none
    value block $block
    if [ $((n % EACH)) = 0 ]; then mark written-$n; fi
done
"#;

fn guest(daemon: &Daemon, assets: &Assets, root: &str, volumes: &[String], script: &str) -> Result<Guest> {
    let mut disks = vec![daemon.attach(root, 2)?];
    for volume in volumes {
        disks.push(daemon.attach(volume, 1)?);
    }
    Guest::boot(&GuestSpec::new(disks, script), assets)
}

/// Blocks of 4 KiB in which two snapshots of the volume `data` differ.
fn diff(daemon: &Daemon, from: &str, to: &str) -> Result<BTreeSet<u64>> {
    let found: Value =
        serde_json::from_str(&daemon.sapwood(&["diff", "--output=json", &format!("data{from}"), to])?)?;
    let mut blocks = BTreeSet::new();
    for extent in found["extents"].as_array().context("extents")? {
        let (start, length) =
            (extent["start"].as_u64().context("start")?, extent["length"].as_u64().context("length")?);
        ensure!(start % 4096 == 0 && length % 4096 == 0, "an extent of whole blocks: {extent}");
        blocks.extend(start / 4096..(start + length) / 4096);
    }
    Ok(blocks)
}

fn detach(daemon: &Daemon, volumes: &[String]) -> Result<()> {
    volumes.iter().try_for_each(|volume| daemon.sapwood(&["detach", volume]).map(drop))
}

/// What a guest says of the disks that it looked at: lines of the log.
fn lines(report: &GuestReport) -> Result<Vec<u64>> {
    let both = report.values("lines").into_iter().map(|said| {
        let (count, last) = said.split_once(' ').context("two numbers")?;
        ensure!(count == last, "{count} lines end with line {last}");
        Ok(count.parse()?)
    });
    both.collect()
}

#[test]
#[ignore = "boots guests: cargo xtask test --only guests"]
fn every_snapshot_of_a_guest_that_writes_mounts_and_is_clean() -> Result<()> {
    let (assets, program) = (Assets::locate()?, sapwood_program()?);
    let folder = tempfile::tempdir()?;
    let store = folder.path().join("store");
    Daemon::init(&program, &store)?;
    let daemon = Daemon::start(&program, &store)?;
    let image = assets.root_image.display().to_string();
    daemon.sapwood(&["import", "-q", "-f", "raw", &image, "debian"])?;
    let roots = ["root", "look0", "look1"].map(str::to_owned);
    daemon.sapwood(&["clone", "debian@imported", &roots[0], &roots[1], &roots[2]])?;
    daemon.sapwood(&["create", ":data", "256M"])?;

    let data = ["data".to_owned()];
    let writing = guest(&daemon, &assets, "root", &data, WRITE)?;
    writing.wait_for("writing", READY_LIMIT)?;
    let mut clones = Vec::new();
    for n in 0..SNAPSHOTS {
        let (snapshot, clone) = (format!("data@s{n}"), format!("c{n}"));
        daemon.sapwood(&["snapshot", &snapshot])?;
        daemon.sapwood(&["clone", &snapshot, &clone])?;
        clones.push(clone);
    }
    let report = writing.succeed()?;
    let written: u64 = report.value("lines").context("lines")?.parse()?;
    detach(&daemon, &["data".to_owned(), "root".to_owned()])?;

    let mut seen = Vec::new();
    for (some, root) in clones.chunks(AT_ONCE).zip(&roots[1..]) {
        let looking = guest(&daemon, &assets, root, some, LOOK)?;
        let report = looking.succeed()?;
        ensure!(report.values("clean").len() == some.len(), "a disk was not looked at");
        seen.extend(lines(&report)?);
        detach(&daemon, some)?;
        detach(&daemon, std::slice::from_ref(root))?;
    }
    ensure!(seen.is_sorted(), "a later snapshot holds less: {seen:?}");
    ensure!(seen[0] < seen[SNAPSHOTS - 1], "nothing was written between the snapshots: {seen:?}");
    ensure!(*seen.last().unwrap() <= written, "{seen:?}, and {written} were written");
    daemon.stop()?;
    let daemon = Daemon::start(&program, &store)?;
    daemon.sapwood(&["store", "check", &store.display().to_string()])?;
    daemon.stop()
}

#[test]
#[ignore = "boots guests: cargo xtask test --only guests"]
fn a_diff_is_what_a_guest_has_written_after_kills_too() -> Result<()> {
    let (assets, program) = (Assets::locate()?, sapwood_program()?);
    let folder = tempfile::tempdir()?;
    let store = folder.path().join("store");
    Daemon::init(&program, &store)?;
    let mut daemon = Daemon::start(&program, &store)?;
    let image = assets.root_image.display().to_string();
    daemon.sapwood(&["import", "-q", "-f", "raw", &image, "debian"])?;
    daemon.sapwood(&["clone", "debian@imported", "root"])?;
    daemon.sapwood(&["create", ":data", "64M"])?;
    daemon.sapwood(&["create", ":go", "1M"])?;

    let volumes = [("root", 2), ("data", 1), ("go", 1)];
    let attach = |(volume, queues)| Ok(daemon.attach(volume, queues)?.reconnecting());
    let disks = volumes.into_iter().map(attach).collect::<Result<Vec<Disk>>>()?;
    let script = WRITE_BLOCKS.replace("BLOCKS", &BLOCKS.to_string()).replace("EACH", &EACH.to_string());
    let writing = Guest::boot(&GuestSpec::new(disks, script), &assets)?;
    writing.wait_for("full", READY_LIMIT)?;
    daemon.sapwood(&["snapshot", "data@before"])?;
    // The sign for the guest.
    daemon.sapwood(&["resize", ":go", "2M"])?;

    let mut taken = Vec::new();
    for written in (EACH..BLOCKS).step_by(EACH) {
        writing.wait_for(&format!("written-{written}"), READY_LIMIT)?;
        let before = writing.so_far().values("block").len();
        daemon.sapwood(&["snapshot", &format!("data@s{written}")])?;
        let after = writing.so_far().values("block").len();
        taken.push((format!("@s{written}"), before..=after + 1));
        // What was attached is attached again, and the guest goes on.
        daemon = daemon.kill_and_restart()?;
    }
    let report = writing.succeed()?;
    let blocks: Vec<u64> =
        report.values("block").into_iter().map(|block| Ok(block.parse()?)).collect::<Result<_>>()?;
    ensure!(blocks.len() == BLOCKS, "{} of {BLOCKS} blocks", blocks.len());
    daemon.sapwood(&["snapshot", "data@after"])?;
    taken.push(("@after".to_owned(), BLOCKS..=BLOCKS));

    let (mut last, mut known) = ("@before".to_owned(), 0);
    for (snapshot, range) in taken {
        // Where the snapshot cut: after all that was named before it was asked for, and before what came after it was there.
        let found = diff(&daemon, &last, &snapshot)?;
        let cut = known + found.len();
        let written: BTreeSet<u64> = blocks.get(known..cut).context("blocks")?.iter().copied().collect();
        ensure!(found == written && range.contains(&cut), "{snapshot}: {known}..{cut}, {range:?}: {found:?}");
        (last, known) = (snapshot, cut);
    }
    let all: BTreeSet<u64> = blocks.into_iter().collect();
    ensure!(diff(&daemon, "@before", "@after")? == all, "frozen");
    daemon.sapwood(&["store", "seal", "-q", &store.display().to_string()])?;
    ensure!(diff(&daemon, "@before", "@after")? == all, "sealed");
    daemon.stop()
}
