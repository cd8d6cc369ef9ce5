//! `sapwood boot --print-qemu`: what it prints, and that a shell and QEMU take it.

use std::fs;
use std::process::Command;

use sapwood_tests::guest::Assets;
use sapwood_tests::guest::cpio::Archive;

use super::{LIMIT, processes};
use crate::harness::{Answer, Place, SAPWOOD};

#[test]
fn every_part_of_the_machine_is_in_the_line() {
    let place = Place::new();
    let disks = "vm.layer --disk data.raw,format=raw,queues=3,readonly --disk socket=/run/a,,b.sock";
    let more = "--cpus 2 --memory 2G --no-reboot --timeout 9 --console file=log --kernel k --initrd i";
    let mut command = place.command(SAPWOOD, &format!("boot --print-qemu {disks} {more} --cmdline"));
    let text = Answer::of(command.arg("it's = \"a\" $b").output().unwrap()).text();
    for part in [
        "sapwood serve --queues=2 --socket=sapwood-disk0.sock -- vm.layer & server0=$!\n",
        "sapwood serve --format=raw --readonly --queues=3 --socket=sapwood-disk1.sock -- data.raw & server1=$!\n",
        "timeout --foreground 9 qemu-system-x86_64 \\\n",
        "memory-backend-memfd,id=memory,size=2048M,share=on",
        "-smp 2",
        "socket,id=disk2,path=/run/a,,b.sock,reconnect=1",
        "vhost-user-blk-pci,chardev=disk1,num-queues=3",
        "vhost-user-blk-pci,chardev=disk2,num-queues=2",
        "virtio-rng-pci",
        "-serial file:log",
        "-no-reboot",
        "-kernel k",
        "-initrd i",
        "-append 'it'\\''s = \"a\" $b'\n",
        "kill $server0 $server1;",
    ] {
        assert!(text.contains(part), "no {part} in\n{text}");
    }
    assert!(!text.contains("server2"), "{text}");
    // Without a kernel it is QEMU's firmware that starts something.
    let text = place.sapwood("boot --print-qemu vm.layer").text();
    assert!(text.contains("# QEMU starts the boot loader") && !text.contains(" -kernel "), "{text}");
    assert!(text.contains("-serial mon:stdio"), "{text}");
    assert_eq!(fs::read_dir(place.path("")).unwrap().count(), 0, "nothing was started or made");
}

/// Runs under QEMU's translator: it is to show that the line is right, whatever the host's KVM can do.
#[test]
fn a_kernel_boots_by_it_and_writes_to_its_disk() {
    let assets = match Assets::locate() {
        Ok(assets) => assets,
        Err(error) => return println!("skipped: a_kernel_boots_by_it_and_writes_to_its_disk: {error}"),
    };
    let place = Place::new();
    fs::copy(&assets.kernel, place.path("vm linuz")).unwrap();
    let mut initrd = fs::read(&assets.initramfs).unwrap();
    initrd.extend(init());
    fs::write(place.path("initrd"), initrd).unwrap();
    place.sapwood("create disk.layer 64M").text();
    place.raw_disk("data.raw");
    let line = "boot --print-qemu disk.layer --disk data.raw,format=raw,readonly --memory 256M --no-reboot \
                --timeout 50 --initrd initrd --append panic=-1 --kernel";
    let text = Answer::of(place.command(SAPWOOD, line).arg("vm linuz").output().unwrap()).text();
    let text = text.replace("    -accel kvm \\\n", "");
    let folder = std::path::Path::new(SAPWOOD).parent().unwrap().display();
    let path = format!("{folder}:{}", std::env::var("PATH").unwrap_or_default());
    let mut shell = Command::new("timeout");
    shell.args(["--kill-after=5", &LIMIT.as_secs().to_string(), "sh", "-c", &text]);
    let answer = Answer::of(shell.current_dir(place.path("")).env("PATH", path).output().expect("it runs"));
    assert_eq!(answer.code, 0, "{text}\n{answer:?}");
    assert!(answer.stdout.contains("read-only 01"), "{text}\n{answer:?}");
    assert!(!place.exists("sapwood-disk0.sock"), "the servers have ended");
    let here = place.path("").display().to_string();
    assert!(!processes().iter().any(|process| process.line.contains(&here)));
    assert_eq!(place.sapwood("info --output=json disk.layer").json()["dirty-flag"], false);
    place.sapwood("convert -O raw disk.layer disk.raw").text();
    assert!(place.bytes("disk.raw").starts_with(b"written by the guest\n"));
}

/// The guest's first process: says what it finds, writes, powers off.
fn init() -> Vec<u8> {
    let script = "#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin
mount -t devtmpfs dev /dev
mount -t sysfs sys /sys
for module in $(cat /modules/order); do insmod /modules/$module.ko; done
tries=0
while [ ! -b /dev/vdb ] && [ $tries -lt 100 ]; do tries=$((tries + 1)); sleep 0.1; done
echo written by the guest > /dev/vda
sync
echo read-only $(cat /sys/block/vda/ro /sys/block/vdb/ro | tr -d '\\n')
poweroff -f
";
    let mut archive = Archive::new();
    archive.file("init", 0o755, script.as_bytes());
    archive.finish()
}
