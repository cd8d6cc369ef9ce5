//! `cargo xtask demo`: a store with one Debian image, and guests from clones of it.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use sapwood_tests::guest::{Assets, Daemon, Guest, GuestReport, GuestSpec, Vmm};

use crate::process;
use crate::setup::{self, Outcome};
use crate::workspace::Workspace;

const COMMAND_LIMIT: Duration = Duration::from_secs(120);
/// How long the first guest may take until it has written.
const READY_LIMIT: Duration = Duration::from_secs(240);
/// The two guests; each writes a file of its own name.
const NAMES: [&str; 2] = ["oak", "birch"];
const WRITTEN_MIB: u32 = 8;

/// Runs the demo; says whether everything was as it should.
///
/// # Errors
/// A program failed or a guest said something else than it must; the message says what.
pub fn run(workspace: &Workspace) -> Result<bool> {
    let assets = match setup::ensure(&workspace.guest())? {
        Outcome::Ready(assets) => assets,
        Outcome::Unable(reason) => {
            println!("skipped: demo: {reason}");
            return Ok(false);
        }
    };
    let demo = Demo::prepare(workspace, assets)?;
    println!("Sapwood: a store, one image, three guests\n");
    let before = checksum(&demo.assets.root_image)?;
    demo.fill()?;
    println!("\noak and birch boot, each from its clone ({})", demo.vmm.name());
    demo.write()?;
    println!("\noak goes back to its snapshot; acorn is a clone of that");
    demo.go_back()?;
    println!("\nall three boot and look");
    demo.look()?;
    demo.show()?;
    let after = checksum(&demo.assets.root_image)?;
    ensure!(before == after, "the image has changed: {before} before, {after} after");
    println!("\nthe image is untouched; the store stays in {}", demo.store.display());
    demo.daemon.stop()?;
    Ok(true)
}

struct Demo {
    assets: Assets,
    vmm: Vmm,
    store: PathBuf,
    daemon: Daemon,
}

impl Demo {
    fn prepare(workspace: &Workspace, assets: Assets) -> Result<Self> {
        let program = workspace.sapwood()?;
        let directory = workspace.target.join("demo");
        if directory.exists() {
            fs::remove_dir_all(&directory)?;
        }
        fs::create_dir_all(&directory)?;
        let vmm = Vmm::preferred(&assets, &program)?;
        let store = directory.join("store");
        Daemon::init(&program, &store)?;
        let daemon = Daemon::start(&program, &store)?;
        Ok(Self { assets, vmm, store, daemon })
    }

    /// Runs a command about the store, shows it and what it says, and how long it took.
    fn say(&self, arguments: &[&str]) -> Result<()> {
        let begin = Instant::now();
        let text = self.daemon.sapwood(arguments)?;
        let took = begin.elapsed().as_secs_f64();
        let shown: Vec<_> =
            arguments.iter().map(|argument| argument.rsplit('/').next().unwrap_or(argument)).collect();
        println!("$ sapwood {:<52} {:>7.0} ms", shown.join(" "), took * 1e3);
        text.lines().for_each(|line| println!("  {line}"));
        Ok(())
    }

    fn fill(&self) -> Result<()> {
        let image = self.assets.root_image.display().to_string();
        self.say(&["import", "-f", "raw", &image, "debian@12"])?;
        self.say(&["clone", "debian@12", NAMES[0], NAMES[1]])
    }

    fn boot(&self, name: &str, script: String) -> Result<Guest> {
        let disk = self.daemon.attach(name, 1)?;
        Guest::boot_with(
            &GuestSpec { cpus: 1, ..GuestSpec::new(vec![disk], script) },
            &self.assets,
            &self.vmm,
        )
    }

    fn end(&self, name: &str, guest: Guest) -> Result<()> {
        let report = guest.succeed().with_context(|| format!("guest {name}"))?;
        print_guest(name, &report);
        self.daemon.sapwood(&["detach", name]).map(drop)
    }

    /// Both guests write; one is snapshotted while it does, and loses what it has written afterwards.
    fn write(&self) -> Result<()> {
        let [oak, birch] = NAMES;
        let guests =
            (self.boot(oak, write_script(oak, ACCIDENT))?, self.boot(birch, write_script(birch, ""))?);
        guests.0.wait_for("written", READY_LIMIT)?;
        println!("oak has written, and goes on:");
        self.say(&["snapshot", "oak@good"])?;
        self.end(oak, guests.0)?;
        self.end(birch, guests.1)
    }

    fn go_back(&self) -> Result<()> {
        self.say(&["rollback", "--discard", "oak"])?;
        self.say(&["clone", "oak@good", "acorn"])
    }

    fn look(&self) -> Result<()> {
        let looks = [("oak", "oak", "birch"), ("acorn", "oak", "birch"), ("birch", "birch", "oak")];
        let mut running = Vec::new();
        for (name, own, other) in looks {
            running.push((name, self.boot(name, look_script(own, other))?));
        }
        running.into_iter().try_for_each(|(name, guest)| self.end(name, guest))
    }

    fn show(&self) -> Result<()> {
        println!();
        self.say(&["store", "seal"])?;
        self.say(&["store", "account"])?;
        self.say(&["tree"])?;
        self.say(&["store", "stat"])?;
        self.say(&["store", "scrub"])
    }
}

/// What befalls a guest after its snapshot was taken.
const ACCIDENT: &str = "i=0\n\
    while [ $i -lt 60 ]; do i=$((i + 1)); head -c 100000 /dev/urandom >>/srv/later; sync -d /srv/later; sleep 0.1; done\n\
    rm -rf /etc/oak /srv/oak\n\
    sync\n\
    value said 'went on writing, then lost /etc/oak and /srv/oak by accident'\n";

fn write_script(own: &str, after: &str) -> String {
    format!(
        "echo 'I am {own}' >/etc/{own}\n\
         dd if=/dev/urandom of=/srv/{own} bs=1M count={WRITTEN_MIB} status=none\n\
         sync\n\
         sha256sum </srv/{own} | cut -c1-64 >/etc/{own}.sum\n\
         sync\n\
         mark written\n\
         value said \"booted $(. /etc/os-release; echo \"$PRETTY_NAME\") on $(uname -r)\"\n\
         value said 'wrote /etc/{own} and {WRITTEN_MIB} MiB into /srv/{own}'\n\
         {after}"
    )
}

fn look_script(own: &str, other: &str) -> String {
    format!(
        "test \"$(cat /etc/{own})\" = 'I am {own}'\n\
         test \"$(sha256sum </srv/{own} | cut -c1-64)\" = \"$(cat /etc/{own}.sum)\"\n\
         test ! -e /etc/{other}\n\
         test ! -e /srv/{other}\n\
         value said \"/srv/{own} is there and has its checksum; no trace of {other}\"\n"
    )
}

fn print_guest(name: &str, report: &GuestReport) {
    let booted = report.booted.unwrap_or_default().as_secs_f64();
    let whole = report.elapsed.as_secs_f64();
    println!("  {name:<6} up in {booted:.1} s, off after {whole:.1} s");
    for line in report.values("said") {
        println!("         {line}");
    }
}

fn checksum(file: &std::path::Path) -> Result<String> {
    let text = process::output(Command::new("sha256sum").arg(file), COMMAND_LIMIT)?;
    Ok(text.split_whitespace().next().unwrap_or_default().to_owned())
}
