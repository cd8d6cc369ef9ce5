//! `sapwood boot`, tried with guests of a few instructions under `/dev/kvm`, and without it.

mod cost;
mod ends;
mod from_disk;
mod guests;
mod qemu;
mod terminal;

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use guests::Then;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, Signal, kill_process};

use crate::harness::{Answer, Place, SAPWOOD};

/// How long anything here may take.
const LIMIT: Duration = Duration::from_secs(60);

/// Whether there is a `/dev/kvm` for these guests; says so where there is none.
fn has_kvm(test: &str) -> bool {
    let open = fs::OpenOptions::new().read(true).write(true).open("/dev/kvm");
    if let Err(error) = &open {
        println!("skipped: {test}: /dev/kvm: {error}");
    }
    open.is_ok()
}

/// A place with a kernel, a layer, and a folder for what is temporary.
struct Lab {
    place: Place,
}

impl Lab {
    fn new(text: &str, then: Then) -> Self {
        let place = Place::new();
        fs::write(place.path("kernel"), guests::kernel(text, then)).expect("a file");
        fs::create_dir(place.path("tmp")).expect("a folder");
        place.sapwood("create disk.layer 64M").text();
        Self { place }
    }

    /// `sapwood boot` of that kernel with these arguments.
    fn command(&self, arguments: &str) -> Command {
        let line = format!("boot --skip-probe --kernel kernel --memory 32M {arguments}");
        let mut command = self.place.command(SAPWOOD, &line);
        command.env("TMPDIR", self.place.path("tmp"));
        command
    }

    /// Runs it to its end.
    fn boot(&self, arguments: &str) -> Answer {
        let command = self.command(arguments);
        let words: Vec<&str> = command.get_args().skip(1).filter_map(|word| word.to_str()).collect();
        self.boot_any(&words.join(" "))
    }

    /// Runs `sapwood boot` with these arguments only.
    fn boot_any(&self, arguments: &str) -> Answer {
        // A limit beside its own, so that nothing hangs.
        let mut bounded = Command::new("timeout");
        bounded.args(["--kill-after=5", "60", SAPWOOD, "boot"]).args(arguments.split_whitespace());
        bounded.current_dir(self.place.path("")).env("TMPDIR", self.place.path("tmp")).stdin(Stdio::null());
        Answer::of(bounded.output().expect("it runs"))
    }

    fn start(&self, arguments: &str) -> Running {
        let mut command = self.command(arguments);
        Running::start(command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()))
    }

    /// Nothing of it is left: no process, no socket, and the layer was closed.
    #[track_caller]
    fn is_clean(&self) {
        let left = processes_of(&self.place.path("tmp"));
        assert!(left.is_empty(), "{left:?}");
        let left: Vec<_> = fs::read_dir(self.place.path("tmp")).expect("a folder").collect();
        assert!(left.is_empty(), "{left:?}");
        let info = self.place.sapwood("info --output=json disk.layer").json();
        assert_eq!(info["dirty-flag"], false);
        self.place.sapwood("check disk.layer").text();
    }
}

/// A running `sapwood boot`; killed when the test is over.
struct Running {
    child: Child,
    stdout: ChildStdout,
}

impl Running {
    fn start(command: &mut Command) -> Self {
        let mut child = command.spawn().expect("it starts");
        let stdout = child.stdout.take().expect("piped");
        Self { child, stdout }
    }

    /// The guest's next line.
    #[track_caller]
    fn line(&mut self) -> String {
        let (deadline, mut line) = (Instant::now() + LIMIT, Vec::new());
        while !line.ends_with(b"\n") {
            let second = Timespec { tv_sec: 1, tv_nsec: 0 };
            let mut fds = [PollFd::new(&self.stdout, PollFlags::IN)];
            if poll(&mut fds, Some(&second)).expect("it can be waited for") > 0 {
                let mut byte = [0];
                let n = self.stdout.read(&mut byte).expect("it can be read");
                assert!(n > 0, "it ended after {:?}", String::from_utf8_lossy(&line));
                line.push(byte[0]);
            }
            assert!(Instant::now() < deadline, "only {:?}", String::from_utf8_lossy(&line));
        }
        String::from_utf8(line).expect("text")
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).expect("it runs");
    }

    /// Waits for its end.
    #[track_caller]
    fn ends(&mut self) -> std::process::ExitStatus {
        let mut status = None;
        wait_until("sapwood boot ends", || {
            status = self.child.try_wait().expect("its status");
            status.is_some()
        });
        status.expect("it has ended")
    }

    /// Its children, each with its command line.
    fn children(&self) -> Vec<(i32, String)> {
        let id = self.child.id().to_string();
        processes().into_iter().filter(|process| process.parent == id).map(|p| (p.pid, p.line)).collect()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A process of this machine.
struct Process {
    pid: i32,
    parent: String,
    line: String,
    environment: Vec<u8>,
}

/// All that there are, but for those that have ended and wait for their parent.
fn processes() -> Vec<Process> {
    let mut all = Vec::new();
    for entry in fs::read_dir("/proc").expect("a folder").flatten() {
        let Ok(pid) = entry.file_name().to_string_lossy().parse() else { continue };
        let read = |name: &str| fs::read(entry.path().join(name)).unwrap_or_default();
        let line = String::from_utf8_lossy(&read("cmdline")).replace('\0', " ");
        let status = String::from_utf8_lossy(&read("status")).into_owned();
        let parent =
            status.lines().find_map(|line| line.strip_prefix("PPid:")).unwrap_or("").trim().to_owned();
        if !line.is_empty() {
            all.push(Process { pid, parent, line, environment: read("environ") });
        }
    }
    all
}

/// The processes that were given this folder for what is temporary.
fn processes_of(folder: &Path) -> Vec<String> {
    let wanted = format!("TMPDIR={}", folder.display()).into_bytes();
    let has = |process: &Process| process.environment.split(|byte| *byte == 0).any(|entry| entry == wanted);
    processes().into_iter().filter(has).map(|process| process.line).collect()
}

/// Waits for something, within [`LIMIT`].
#[track_caller]
fn wait_until(what: &str, mut happened: impl FnMut() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !happened() {
        assert!(Instant::now() < deadline, "too long: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Sockets below a folder.
fn sockets(folder: &Path) -> Vec<PathBuf> {
    let inner = fs::read_dir(folder).expect("a folder").flatten().map(|entry| entry.path());
    inner
        .filter(|path| path.is_dir())
        .flat_map(|path| fs::read_dir(path).expect("a folder").flatten())
        .map(|e| e.path())
        .collect()
}
