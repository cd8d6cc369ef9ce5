//! Real Debian guests on Sapwood disks: what they wrote is there after a restart, a killed guest, a
//! backend stopped under load and a killed backend; and `sapwood convert` agrees with what they saw.
//! With a frontend that connects again, the guest goes on over kills of its backend.
//!
//! Each test boots guests for a minute or more, so that a plain `cargo test` leaves them out:
//! `cargo xtask test --only guests` runs them.

use std::process::Command;
use std::thread;
use std::time::Duration;

use anyhow::Result;
use sapwood_tests::guest::lab::{Lab, Served, output};
use sapwood_tests::guest::{Backend, BackendSpec, Disk, Guest, GuestReport};

/// How long a guest may take until its writers are at work.
const READY_LIMIT: Duration = Duration::from_secs(240);
/// The size of the data disks in MiB.
const DATA_MIB: u32 = 256;

/// Fills a file system, has fio write and verify it and a part without a file system, trims.
const FILL: &str = r#"
value cache $(cat /sys/block/vdb/queue/write_cache)
mkfs.ext4 -q -E lazy_itable_init=0,lazy_journal_init=0 /dev/vdb 160m
mount /dev/vdb /mnt
for i in 1 2 3 4 5 6 7 8; do
    head -c 6000000 /dev/urandom >/mnt/fill.$i
done
quietly fio --name=files --directory=/mnt --size=8m --numjobs=3 --ioengine=libaio --iodepth=16 \
    --direct=1 --rw=randwrite --bs=4k --verify=crc32c --verify_fatal=1 --fsync=64
value fio files
rm /mnt/fill.2 /mnt/fill.4 /mnt/fill.6
quietly fstrim -v /mnt
for i in 2 4; do
    head -c 3000000 /dev/urandom >/mnt/fill.$i
done
(cd /mnt && sha256sum fill.* files.* >sums)
umount /mnt
quietly e2fsck -fn /dev/vdb
value fsck clean

# Behind the file system: writes of every size from a sector on, zeroes, discards.
sector=$(blockdev --getss /dev/vdb)
raw="--filename=/dev/vdb --ioengine=libaio --iodepth=16 --direct=1 --verify=crc32c --verify_fatal=1"
quietly fio --name=sizes $raw --offset=160m --size=12m --numjobs=2 --offset_increment=16m \
    --rw=randwrite --bsrange=$sector-32k --blockalign=$sector
value fio sizes
quietly fio --name=trims $raw --offset=200m --size=16m --rw=randtrimwrite --bs=8k
value fio trims
blkdiscard -o $((220 << 20)) -l $((4 << 20)) /dev/vdb
head -c $((8 << 20)) /dev/urandom | dd of=/dev/vdb bs=1M seek=224 oflag=direct iflag=fullblock status=none
blkdiscard -z -o $((226 << 20)) -l $((3 << 20)) /dev/vdb
dd if=/dev/vdb bs=1M skip=226 count=3 iflag=direct status=none | cmp -n $((3 << 20)) - /dev/zero
value zeroes read back
sync
value sum $(sha256sum </dev/vdb)
"#;

/// Looks at what `FILL` left; the third disk gets a copy of all that the guest sees.
const LOOK_AND_COPY: &str = r#"
value sum $(sha256sum </dev/vdb)
dd if=/dev/vdb of=/dev/vdc bs=1M conv=fsync status=none
quietly e2fsck -fn /dev/vdb
mount -o ro /dev/vdb /mnt
(cd /mnt && quietly sha256sum -c sums)
value files $(wc -l </mnt/sums)
umount /mnt
quietly fio --name=sizes --filename=/dev/vdb --ioengine=libaio --iodepth=16 --direct=1 \
    --verify=crc32c --verify_fatal=1 --offset=160m --size=12m --numjobs=2 --offset_increment=16m \
    --rw=randwrite --bsrange=$(blockdev --getss /dev/vdb)-32k --blockalign=$(blockdev --getss /dev/vdb) --verify_only
"#;

/// Two writers that report each file once it is durable, a third that overwrites in place, and
/// load without any order beside them. Ends with the guest.
const WRITE_UNTIL_KILLED: &str = r#"
value cache $(cat /sys/block/vdb/queue/write_cache)
mkfs.ext4 -q -E lazy_itable_init=0,lazy_journal_init=0 /dev/vdb
mount /dev/vdb /mnt
writer() {
    i=0
    while :; do
        i=$((i + 1))
        file=$1.$i
        head -c $((512 + i * 7919 % 70000)) /dev/urandom >/mnt/$file
        sum=$(sha256sum </mnt/$file)
        sync /mnt/$file /mnt
        value durable "${sum%% *} $file"
        if [ $i = 15 ]; then mark "$1 at work"; fi
    done
}
counter() {
    i=0
    while :; do
        i=$((i + 1))
        printf '%08d' $i | dd of=/mnt/counter bs=8 conv=notrunc,fsync status=none
        value counter $i
    done
}
load() {
    fio --name=load --directory=/mnt --size=24m --rw=randwrite --bs=4k --ioengine=libaio \
        --iodepth=32 --direct=1 --time_based --runtime=600 >/dev/null 2>&1
}
writer oak & writer birch & counter & load &
while :; do
    head -c 4000000 /dev/urandom >/mnt/scratch
    rm /mnt/scratch
    quietly fstrim /mnt
done
"#;

/// Writes and verifies for 45 s, behind the page cache's back. Whatever becomes of the backends
/// meanwhile, the guest must not notice.
const WRITE_AND_VERIFY: &str = r#"
mkfs.ext4 -q -E lazy_itable_init=0,lazy_journal_init=0 /dev/vdb 160m
mount /dev/vdb /mnt
mark "at work"
end=$(($(date +%s) + 45))
rounds=0
while [ $(date +%s) -lt $end ]; do
    rounds=$((rounds + 1))
    quietly fio --name=files --directory=/mnt --size=4m --numjobs=2 --ioengine=libaio --iodepth=32 \
        --direct=1 --rw=randwrite --bs=4k --verify=crc32c --verify_fatal=1 --fsync=64
    quietly fio --name=raw --filename=/dev/vdb --offset=170m --size=8m --ioengine=libaio --iodepth=32 \
        --direct=1 --rw=randtrimwrite --bs=8k --verify=crc32c --verify_fatal=1
    head -c 3000000 /dev/urandom >/mnt/fill
    sha256sum </mnt/fill >/tmp/sum
    sync
    echo 3 >/proc/sys/vm/drop_caches
    sha256sum </mnt/fill | cmp - /tmp/sum
done
value rounds $rounds
umount /mnt
quietly e2fsck -fn /dev/vdb
if dmesg | grep -i "i/o error"; then exit 1; fi
value sum $(sha256sum </dev/vdb)
"#;

/// What is left is a clean file system with every file that was reported durable.
fn look_after_the_crash(before: &GuestReport) -> String {
    let sums: Vec<&str> = before.values("durable");
    let counted = before.value("counter").expect("the counter was reported");
    let lines: String = sums.iter().map(|line| line.replacen(' ', "  ", 1) + "\n").collect();
    format!(
        "mount /dev/vdb /mnt\n\
         cat >/tmp/sums <<'END'\n{lines}END\n\
         (cd /mnt && quietly sha256sum -c /tmp/sums)\n\
         counter=$(sed 's/^0*//' /mnt/counter)\n\
         value counter $counter\n\
         test $counter -ge {counted}\n\
         umount /mnt\n\
         quietly e2fsck -fn /dev/vdb\n\
         value sum $(sha256sum </dev/vdb)\n"
    )
}

/// The first word of the value `sum`.
fn device_sum(report: &GuestReport) -> &str {
    let value = report.value("sum").expect("the guest reported a sum");
    value.split_whitespace().next().expect("a sum has one word")
}

/// A guest that believes in a write-through disk never flushes: a disk that caches must say so.
fn assert_flushes(report: &GuestReport) {
    assert_eq!(report.value("cache"), Some("write back"));
}

/// Runs the writers, lets `crash` end what it wants (it gets the running guest and the backends,
/// and gives back what the guest said), boots again and looks.
fn survives(crash: impl FnOnce(Guest, Served, &Lab) -> Result<(GuestReport, Served)>) -> Result<()> {
    let lab = Lab::new(DATA_MIB)?;
    let served = lab.serve()?;
    let guest = lab.boot(served.disks(), WRITE_UNTIL_KILLED)?;
    for writer in ["oak at work", "birch at work"] {
        guest.wait_for(writer, READY_LIMIT)?;
    }
    thread::sleep(Duration::from_millis(700));
    let (before, served) = crash(guest, served, &lab)?;
    assert_flushes(&before);
    let durable = before.values("durable").len();
    assert!(durable >= 30, "two writers reported 15 files each, at least");
    assert_eq!(before.status(), None, "the script runs until the guest's end");

    let guest = lab.boot(served.disks(), look_after_the_crash(&before))?;
    let after = guest.succeed()?;
    served.stop()?;
    lab.check()?;
    assert_eq!(device_sum(&after), lab.convert_data("data.raw")?);
    println!(
        "{durable} files durable, counter {} of at least {}; boots took {:.1} s and {:.1} s",
        after.value("counter").unwrap_or_default(),
        before.value("counter").unwrap_or_default(),
        before.booted.unwrap_or_default().as_secs_f64(),
        after.booted.unwrap_or_default().as_secs_f64(),
    );
    Ok(())
}

#[test]
#[ignore = "boots guests: cargo xtask test --only guests"]
fn filled_verified_and_there_after_a_restart() -> Result<()> {
    let lab = Lab::new(DATA_MIB)?;
    let served = lab.serve()?;
    let first = lab.boot(served.disks(), FILL)?.succeed()?;
    assert_flushes(&first);
    assert_eq!(first.values("fio"), ["files", "sizes", "trims"]);
    served.stop()?;
    lab.check()?;

    // A peer's raw disk takes a copy of what the guest sees, for qemu-img to compare with.
    let copy = lab.path("copy.raw");
    std::fs::File::create(&copy)?.set_len(u64::from(DATA_MIB) << 20)?;
    let format = "raw".to_owned();
    let peer = BackendSpec::Qemu { disk: copy.clone(), format, readonly: false, queues: 1 };
    let peer = Backend::start(&peer, &lab.path("peer.sock"))?;
    let served = lab.serve()?;
    let mut disks = served.disks();
    disks.push(Disk::of_qemu(peer.socket()));
    let second = lab.boot(disks, LOOK_AND_COPY)?.succeed()?;
    served.stop()?;
    peer.stop()?;
    assert_eq!(device_sum(&second), device_sum(&first), "the disk changed over a restart");

    assert_eq!(device_sum(&first), lab.convert_data("data.raw")?);
    let mut compare = Command::new("qemu-img");
    compare.args(["compare", "-f", "raw", "-F", "raw"]).arg(lab.path("data.raw")).arg(&copy);
    let said = output(&mut compare)?;
    assert_eq!(said.trim(), "Images are identical.");
    println!("first guest {:.1} s, second {:.1} s", seconds(&first), seconds(&second));
    Ok(())
}

fn seconds(report: &GuestReport) -> f64 {
    report.elapsed.as_secs_f64()
}

#[test]
#[ignore = "boots guests: cargo xtask test --only guests"]
fn a_killed_guest_finds_what_was_durable() -> Result<()> {
    // The backends go on: their frontend vanishes in the middle of requests and another comes.
    survives(|guest, served, _| Ok((guest.kill()?, served)))
}

#[test]
#[ignore = "boots guests: cargo xtask test --only guests"]
fn a_backend_stopped_under_load_loses_nothing_durable() -> Result<()> {
    survives(|guest, served, lab| {
        served.stop()?;
        let report = guest.kill()?;
        lab.check()?;
        Ok((report, lab.serve()?))
    })
}

#[test]
#[ignore = "boots guests: cargo xtask test --only guests"]
fn a_killed_backend_loses_nothing_durable() -> Result<()> {
    survives(|guest, served, lab| {
        served.kill()?;
        let report = guest.kill()?;
        Ok((report, lab.serve()?))
    })
}

#[test]
#[ignore = "boots guests: cargo xtask test --only guests"]
fn a_guest_does_not_notice_that_its_backends_are_killed_and_started_again() -> Result<()> {
    const KILLS: u32 = 10;
    let lab = Lab::new(DATA_MIB)?;
    let mut served = lab.serve()?;
    let disks = served.disks().into_iter().map(Disk::reconnecting).collect();
    let guest = lab.boot(disks, WRITE_AND_VERIFY)?;
    guest.wait_for("at work", READY_LIMIT)?;
    for _ in 0..KILLS {
        thread::sleep(Duration::from_millis(2500));
        served.kill()?;
        served = lab.serve()?;
    }
    let report = guest.succeed()?;
    served.stop()?;
    lab.check()?;
    assert_eq!(device_sum(&report), lab.convert_data("data.raw")?);
    println!("{KILLS} kills in {} rounds", report.value("rounds").unwrap_or_default());
    Ok(())
}
