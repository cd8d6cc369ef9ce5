//! Small guests, assembled from their sources, in a process of their own: the example `boot`.
#![allow(dead_code, reason = "each test file uses a part")]

use std::fs;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// What any guest here may take; most end at once.
const LIMIT: Duration = Duration::from_secs(120);
const POLL: Duration = Duration::from_millis(2);

/// Whether there is a KVM to try; otherwise says that `test` is skipped.
pub fn kvm(test: &str) -> bool {
    let opened = fs::File::options().read(true).write(true).open("/dev/kvm");
    if let Err(error) = &opened {
        // The harness shows what is written here and not what is printed.
        let _ = writeln!(std::io::stderr(), "skipped: {test}: /dev/kvm: {error}");
    }
    opened.is_ok()
}

/// A guest's kernel; the folder goes with it.
pub struct Guest {
    folder: tempfile::TempDir,
    kernel: PathBuf,
}

impl Guest {
    /// Assembles `tests/guests/NAME.S`.
    pub fn assemble(name: &str) -> Self {
        let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/guests");
        let folder = tempfile::tempdir().unwrap();
        let (object, kernel) = (folder.path().join("guest.o"), folder.path().join("guest.elf"));
        run(Command::new("as")
            .arg("--64")
            .arg("-I")
            .arg(&sources)
            .arg("-o")
            .arg(&object)
            .arg(sources.join(name).with_extension("S")));
        run(Command::new("ld")
            .args(["-m", "elf_x86_64", "--no-warn-rwx-segments", "-T"])
            .arg(sources.join("link.ld"))
            .arg("-o")
            .arg(&kernel)
            .arg(&object));
        Self { folder, kernel }
    }

    /// A folder for what belongs to it.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Starts it.
    pub fn start(&self, options: &[&str]) -> Process {
        self.start_by(Command::new(program()), options)
    }

    /// Starts it where a process may have only so many open files, unless it asks for more.
    pub fn start_limited(&self, files: u32, options: &[&str]) -> Process {
        let mut command = Command::new("sh");
        command.arg("-c").arg(format!("ulimit -Sn {files}; exec \"$0\" \"$@\"")).arg(program());
        self.start_by(command, options)
    }

    fn start_by(&self, mut command: Command, options: &[&str]) -> Process {
        command.arg(&self.kernel).args(["--mem", "64"]).args(options);
        let child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        Process { child: Some(child), started: Instant::now() }
    }

    /// Runs it to its end, with `input` on its console.
    pub fn run(&self, options: &[&str], input: &str) -> Ended {
        let mut process = self.start(options);
        process.input().write_all(input.as_bytes()).unwrap();
        process.end()
    }
}

/// The example lies beside the tests.
fn program() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let program = test.parent().and_then(Path::parent).unwrap().join("examples/boot");
    assert!(
        program.is_file(),
        "{} is missing: run `cargo build --workspace --examples --profile test`",
        program.display()
    );
    program
}

fn run(command: &mut Command) {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}: install binutils"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// A machine that runs. It is killed when this is dropped.
pub struct Process {
    child: Option<Child>,
    started: Instant,
}

/// How it ended.
#[derive(Debug)]
pub struct Ended {
    /// What the guest wrote.
    pub output: String,
    /// What the program said.
    pub messages: String,
    /// Its exit status; `None`: a signal.
    pub status: Option<i32>,
}

impl Process {
    fn child(&mut self) -> &mut Child {
        self.child.as_mut().unwrap()
    }

    /// Its id.
    pub fn id(&self) -> u32 {
        self.child.as_ref().unwrap().id()
    }

    /// How long ago it was started.
    pub fn age(&self) -> Duration {
        self.started.elapsed()
    }

    /// The console's input.
    pub fn input(&mut self) -> &mut ChildStdin {
        self.child().stdin.as_mut().unwrap()
    }

    /// The console's output.
    pub fn output(&mut self) -> &mut ChildStdout {
        self.child().stdout.as_mut().unwrap()
    }

    /// Waits for its end.
    pub fn end(mut self) -> Ended {
        let deadline = Instant::now() + LIMIT;
        while self.child().try_wait().unwrap().is_none() {
            if Instant::now() > deadline {
                let _ = self.child().kill();
                let output = self.child.take().unwrap().wait_with_output().unwrap();
                panic!("it does not end: {:?}", Ended::from(output));
            }
            thread::sleep(POLL);
        }
        Ended::from(self.child.take().unwrap().wait_with_output().unwrap())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl From<Output> for Ended {
    fn from(output: Output) -> Self {
        Self {
            output: String::from_utf8_lossy(&output.stdout).into_owned(),
            messages: String::from_utf8_lossy(&output.stderr).into_owned(),
            status: output.status.code(),
        }
    }
}

/// What a process has computed so far, all its threads together.
pub fn cpu_time(process: u32) -> Duration {
    let tasks = fs::read_dir(format!("/proc/{process}/task")).unwrap();
    let times = tasks.map(|task| {
        let times = fs::read_to_string(task.unwrap().path().join("schedstat")).unwrap();
        times.split(' ').next().unwrap().parse::<u64>().unwrap()
    });
    Duration::from_nanos(times.sum())
}

/// Bytes of memory of a process but for the guest's: what is there, and what of that belongs to no file.
pub fn own_bytes(process: u32) -> (u64, u64) {
    let maps = fs::read_to_string(format!("/proc/{process}/smaps")).unwrap();
    let (mut guests, mut resident, mut anonymous) = (false, 0, 0);
    for line in maps.lines() {
        let first = line.split(' ').next().unwrap_or_default();
        if !first.ends_with(':') {
            guests = line.contains("memfd:guest-memory");
        } else if !guests && ["Rss:", "Anonymous:"].contains(&first) {
            let bytes = line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024;
            *(if first == "Rss:" { &mut resident } else { &mut anonymous }) += bytes;
        }
    }
    (resident, anonymous)
}

/// Reads from a pipe until so many bytes have come.
pub fn read(pipe: &mut impl Read, count: usize) -> String {
    let mut bytes = vec![0; count];
    pipe.read_exact(&mut bytes).unwrap();
    String::from_utf8_lossy(&bytes).into_owned()
}
