//! `sapwood boot` with unmodified Debian kernels under real KVM.
//!
//! The tests of the module `kvm` need a machine where KVM really works. [`in_a_guest_that_has_kvm`] makes one of any machine:
//! it boots a guest in QEMU whose emulated processor has AMD's virtualization (SVM), and runs this program there, with the
//! disks of its own guests below. Where the machine itself has such a KVM, the tests run there as well:
//! `cargo test --package sapwood-tests --test nested -- --ignored --test-threads=1 kvm::`.
//!
//! It takes minutes, so that a plain `cargo test` leaves it out: `cargo xtask test --only nested` runs it, and with
//! `SAPWOOD_NESTED=panic` those tests only whose names hold "panic".

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use sapwood_tests::guest::accelerator::Accelerator;
use sapwood_tests::guest::lab::Lab;
use sapwood_tests::guest::{Assets, Backend, BackendSpec, Disk, Guest, GuestSpec, Vmm, sapwood_program};

/// What is said of a guest that is gone.
const RESET: &str = "the guest ended before its script";
/// All inner tests together may take as long.
const ALL_LIMIT: Duration = Duration::from_secs(1500);
/// Memory of the guest in which the others run, in MiB: theirs, and their layers.
const OUTER_MEMORY_MIB: u32 = 3072;

/// Puts the files of `Assets` where `SAPWOOD_GUEST_DIR` says, and runs the tests. Disks: the root, the disk that boots by
/// itself, the root of the inner guests. Their lines are marked, so that what they say is not taken for what this guest says.
const RUN_INNER: &str = r#"
export SAPWOOD_GUEST_DIR=/tmp/guest SAPWOOD_BIN=/run/sapwood/sapwood RUST_LIB_BACKTRACE=0
for part in kernel root bootable; do mkdir -p /tmp/guest/$part; done
ln -s /run/sapwood/vmlinuz /run/sapwood/initramfs.cpio /tmp/guest/kernel
ln -s /dev/vdb /tmp/guest/bootable/disk.raw
ln -s /dev/vdc /tmp/guest/root/root.raw
if ! test -c /dev/kvm; then echo "KVM does not start here"; exit 1; fi
value program $($SAPWOOD_BIN --version)
value up $(cut -d' ' -f1 /proc/uptime)
mount -t tracefs tracefs /sys/kernel/tracing
echo 1 >/sys/kernel/tracing/events/kvm/enable
# Until a guest's processor cannot go on (SVM_EXIT_SHUTDOWN).
echo 'traceoff if exit_reason == 0x7f' >/sys/kernel/tracing/events/kvm/kvm_exit/trigger
{
    status=0
    /run/sapwood/tests --ignored --test-threads=1 --nocapture INNER_TESTS 2>&1 || status=$?
    # What KVM did before a guest crashed.
    if [ $(cat /sys/kernel/tracing/tracing_on) = 0 ]; then tail -n 400 /sys/kernel/tracing/trace; fi
    echo $status >/tmp/status
} | sed -u 's/^/| /'
exit $(cat /tmp/status)
"#;
/// Names the inner tests that run: a part of their names.
const FILTER: &str = "SAPWOOD_NESTED";

#[test]
#[ignore = "boots guests: cargo xtask test --only nested"]
fn in_a_guest_that_has_kvm() -> Result<()> {
    let assets = Assets::locate()?;
    let lab = Lab::new(1)?;
    // A layer, and not the image itself: what the inner guests do to their base is to be seen.
    let base = lab.path("bootable.layer");
    lab.sapwood(&["create", "-f", "layer", "-b", text(&assets.bootable_image)?, "-F", "raw", text(&base)?])?;
    let serve = |spec: BackendSpec, socket: &str| Backend::start(&spec, &lab.path(socket));
    let root = serve(BackendSpec::layer(lab.root(), 2), "root.sock")?;
    let bootable = serve(BackendSpec::layer(&base, 2), "bootable.sock")?;
    let inner_root = serve(
        BackendSpec::Sapwood {
            program: None,
            disk: assets.root_image.clone(),
            format: Some("raw".to_owned()),
            readonly: true,
            queues: 2,
        },
        "inner-root.sock",
    )?;
    let disks = [&root, &bootable, &inner_root].map(|backend| Disk::new(backend.socket()).queues(2));
    let files = [
        ("sapwood", sapwood_program()?),
        ("tests", std::env::current_exe()?),
        ("vmlinuz", assets.kernel.clone()),
        ("initramfs.cpio", assets.initramfs.clone()),
    ];
    let inner = std::env::var(FILTER).unwrap_or_else(|_| "kvm::".to_owned());
    let spec = GuestSpec {
        memory_mib: OUTER_MEMORY_MIB,
        limit: ALL_LIMIT,
        files: files.map(|(name, path)| (name.to_owned(), path)).into(),
        kvm: true,
        ..GuestSpec::new(disks.into(), RUN_INNER.replace("INNER_TESTS", &inner))
    };
    // The emulated machine resets itself at times when a guest starts in it, which no program in it can bring about.
    let mut tries = 1;
    let report = loop {
        match Guest::boot_with(&spec, &assets, &Vmm::Qemu(Accelerator::Tcg))?.finish() {
            Err(error) if tries < 3 && format!("{error:#}").contains(RESET) => {
                println!("try {tries}: the outer machine was reset: {error:#}");
                tries += 1;
            }
            report => break report?,
        }
    };
    println!("{}", report.lines.join("\n"));
    println!(
        "outer guest up in {:.1} s, off after {:.1} s",
        report.booted.unwrap_or_default().as_secs_f64(),
        report.elapsed.as_secs_f64()
    );
    [root, bootable, inner_root].into_iter().try_for_each(Backend::stop)?;
    ensure!(report.status() == Some(0), "a test in the guest failed: its output is above");
    lab.sapwood(&["compare", "-F", "raw", text(&base)?, text(&assets.bootable_image)?])
        .context("the inner guests' base changed")?;
    Ok(())
}

fn text(path: &Path) -> Result<&str> {
    path.to_str().with_context(|| format!("{} is not UTF-8", path.display()))
}

/// What runs where KVM works.
mod kvm {
    use std::path::PathBuf;
    use std::process::Command;
    use std::thread;

    use sapwood_tests::guest::lab::output;
    use sapwood_tests::guest::{BootSpec, GuestReport};

    use super::*;

    /// How long one guest may take.
    const GUEST_LIMIT: Duration = Duration::from_secs(600);
    /// The exit code of `sapwood boot` when the guest's kernel panicked (docs/cli.md).
    const EXIT_PANIC: i32 = 10;
    const DATA_MIB: u32 = 64;
    /// Where the partition of the disk that boots by itself starts, in bytes.
    const PARTITION_OFFSET: u32 = 1 << 20;

    /// Writes to both disks and reboots; then looks at what it wrote and switches off.
    const WRITE_REBOOT_LOOK: &str = r#"
boots=$(cat /srv/boots 2>/dev/null || echo 0)
boots=$((boots + 1))
echo $boots >/srv/boots
value boots $boots
value up $(cut -d' ' -f1 /proc/uptime)
value cpus $(nproc)
value kernel $(uname -r)
value cmdline $(cat /proc/cmdline)
value readonly $(cat /sys/block/vda/ro /sys/block/vdb/ro /sys/block/vdc/ro)
if [ $boots = 1 ]; then
    dd if=/dev/urandom of=/srv/written bs=64k count=64 conv=fsync status=none
    (cd /srv && sha256sum written >sum)
    dd if=/dev/urandom of=/dev/vdb bs=64k count=32 seek=100 oflag=direct status=none
    sync
    echo reboot >/run/sapwood/ending
else
    (cd /srv && quietly sha256sum -c sum)
    value written $(sha256sum </srv/written)
fi
value data $(sha256sum </dev/vdb)
"#;

    /// Waits for another size, and writes the last MiB that it then has.
    const SEE_ANOTHER_SIZE: &str = r#"
before=$(cat /sys/block/vda/size)
value size $before
mark ready
while [ "$(cat /sys/block/vda/size)" = "$before" ]; do sleep 0.1; done
after=$(cat /sys/block/vda/size)
value size $after
dd if=/dev/urandom of=/dev/vda bs=1M count=1 seek=$((after / 2048 - 1)) conv=fsync
value sum $(sha256sum </dev/vda | cut -c1-64)
"#;

    /// Writes and syncs one block after another.
    const WRITE_MANY: &str = r#"
i=0
while [ $i -lt 150 ]; do
    i=$((i + 1))
    dd if=/dev/urandom of=/dev/vdb bs=64k count=1 seek=$i oflag=direct conv=fsync status=none
    value block $i
    if [ $i = 20 ]; then mark writing; fi
done
value sum $(sha256sum </dev/vdb | cut -c1-64)
"#;

    /// The first word of the last value `key`.
    fn value<'a>(report: &'a GuestReport, key: &str) -> Option<&'a str> {
        report.value(key)?.split_whitespace().next()
    }

    fn words(words: &[&str]) -> Vec<String> {
        words.iter().map(|&word| word.to_owned()).collect()
    }

    /// Says how long a guest took.
    fn say(what: &str, report: &GuestReport) {
        let booted = report.booted.unwrap_or_default().as_secs_f64();
        println!("{what}: script after {booted:.1} s, off after {:.1} s", report.elapsed.as_secs_f64());
    }

    fn boot(vmm: &Vmm, spec: GuestSpec) -> Result<Guest> {
        Guest::boot_with(&GuestSpec { limit: GUEST_LIMIT, ..spec }, &Assets::locate()?, vmm)
    }

    fn sapwood_boot() -> Result<Vmm> {
        Ok(Vmm::Sapwood(sapwood_program()?))
    }

    /// The file `path` of the ext4 file system in the partition of `image`.
    fn read_partition(image: &Path, path: &str, to: &Path) -> Result<Vec<u8>> {
        let mut debugfs = Command::new("debugfs");
        debugfs.args(["-R", &format!("dump {path} {}", text(to)?)]);
        output(debugfs.arg(format!("{}?offset={PARTITION_OFFSET}", text(image)?)))?;
        std::fs::read(to).with_context(|| format!("{path} in {}", image.display()))
    }

    #[test]
    #[ignore = "needs KVM: cargo xtask test --only nested"]
    fn a_disk_with_a_kernel_boots_by_itself_writes_and_reboots() -> Result<()> {
        let lab = Lab::new(DATA_MIB)?;
        let disk = lab.path("boot.layer");
        let base = Assets::locate()?.bootable_image;
        lab.sapwood(&["create", "-f", "layer", "-b", text(&base)?, "-F", "raw", text(&disk)?])?;
        let data = lab.data();
        let mut arguments = words(&[text(&disk)?, "--disk", text(&data)?, "--cpus", "2", "--memory", "512M"]);
        arguments.extend(words(&["--append", "quiet systemd.show_status=no", "--timeout", "590"]));
        let spec = BootSpec { arguments, script: WRITE_REBOOT_LOOK.to_owned(), limit: GUEST_LIMIT };
        let guest = Guest::boot_from_disk(&spec, &sapwood_program()?)?;
        let (code, report, context) = guest.exit()?;
        say("from its own disk, twice", &report);
        println!("{}", report.lines.join("\n"));
        ensure!(code == Some(0), "a power-off is success: {context}");
        ensure!(report.values("boots") == ["1", "2"], "it boots, reboots and comes back");
        ensure!(report.values("cpus") == ["2", "2"] && report.values("readonly") == ["0 0 1", "0 0 1"]);
        let sums = report.values("data");
        ensure!(sums.len() == 2 && sums[0] == sums[1], "the second disk changed over a reboot: {sums:?}");
        lab.check()?;
        ensure!(value(&report, "data") == Some(lab.convert_data("data.raw")?.as_str()), "the second disk");

        // What the first disk's layer holds, read without a guest.
        lab.sapwood(&["check", text(&disk)?])?;
        let raw = lab.path("boot.raw");
        lab.sapwood(&["convert", "-f", "layer", "-O", "raw", text(&disk)?, text(&raw)?])?;
        ensure!(
            read_partition(&raw, "/srv/boots", &lab.path("boots"))? == b"2\n",
            "the layer holds the counter"
        );
        let written = lab.path("written");
        ensure!(read_partition(&raw, "/srv/written", &written)?.len() == 64 << 16);
        let sum = output(Command::new("sha256sum").arg(&written))?;
        ensure!(value(&report, "written") == sum.split_whitespace().next(), "the layer holds the file");
        Ok(())
    }

    #[test]
    #[ignore = "needs KVM: cargo xtask test --only nested"]
    fn a_resized_disk_is_seen() -> Result<()> {
        let lab = Lab::new(DATA_MIB)?;
        let (socket, control): (PathBuf, PathBuf) = (lab.path("data.sock"), lab.path("control"));
        let data = lab.data();
        let arguments = ["serve", text(&data)?, "--socket", text(&socket)?, "--control", text(&control)?];
        let backend = Backend::start_program(text(&sapwood_program()?)?, &words(&arguments), &socket)?;
        let spec = GuestSpec { disks: vec![Disk::new(&socket)], ..GuestSpec::diskless(SEE_ANOTHER_SIZE) };
        let guest = boot(&sapwood_boot()?, spec)?;
        guest.wait_for("ready", GUEST_LIMIT)?;
        lab.sapwood(&["resize", "--control", text(&control)?, "96M"])?;
        let report = guest.succeed()?;
        say("resized", &report);
        backend.stop()?;
        ensure!(report.values("size") == ["131072", "196608"], "sizes: {:?}", report.values("size"));
        ensure!(value(&report, "sum") == Some(lab.convert_data("data.raw")?.as_str()));
        Ok(())
    }

    #[test]
    #[ignore = "needs KVM: cargo xtask test --only nested"]
    fn a_killed_backend_comes_back_while_the_guest_writes() -> Result<()> {
        let lab = Lab::new(DATA_MIB)?;
        let served = lab.serve()?;
        let guest = boot(&sapwood_boot()?, GuestSpec::new(served.disks(), WRITE_MANY))?;
        guest.wait_for("writing", GUEST_LIMIT)?;
        let socket = served.data.socket().to_owned();
        served.data.kill()?;
        thread::sleep(Duration::from_secs(1));
        let before = guest.so_far().values("block").len();
        let again = Backend::start(&BackendSpec::layer(lab.data(), 2), &socket)?;
        let report = guest.succeed()?;
        say("backend killed", &report);
        println!("{before} of {} blocks written when the backend was away", report.values("block").len());
        ensure!(before < report.values("block").len(), "the backend was killed too late for this test");
        again.stop()?;
        served.root.stop()?;
        lab.check()?;
        ensure!(value(&report, "sum") == Some(lab.convert_data("data.raw")?.as_str()));
        Ok(())
    }

    #[test]
    #[ignore = "needs KVM: cargo xtask test --only nested"]
    fn a_panic_has_its_exit_code() -> Result<()> {
        let guest = boot(&sapwood_boot()?, GuestSpec::diskless("echo c >/proc/sysrq-trigger"))?;
        let (code, report, context) = guest.exit()?;
        say("panic", &report);
        ensure!(report.lines.iter().any(|line| line.contains("Kernel panic")), "{context}");
        ensure!(code == Some(EXIT_PANIC), "{context}");
        Ok(())
    }
}
