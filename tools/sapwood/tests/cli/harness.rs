//! A folder to work in, and programs run in it.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

use tempfile::TempDir;

/// The program under test.
pub const SAPWOOD: &str = env!("CARGO_BIN_EXE_sapwood");

/// A folder of its own for a test, where its programs run.
pub struct Place(TempDir);

/// What a program answered.
#[derive(Debug)]
pub struct Answer {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

impl Answer {
    /// What a program that has ended answered.
    pub fn of(output: Output) -> Self {
        Self {
            code: output.status.code().expect("it ended by itself"),
            stdout: String::from_utf8(output.stdout).expect("text"),
            stderr: String::from_utf8(output.stderr).expect("text"),
        }
    }

    /// The text, of a program that must have succeeded.
    #[track_caller]
    pub fn text(self) -> String {
        assert_eq!(self.code, 0, "{self:?}");
        self.stdout
    }

    /// The JSON, of a program that must have succeeded.
    #[track_caller]
    pub fn json(self) -> serde_json::Value {
        serde_json::from_str(&self.text()).expect("JSON")
    }

    /// Checks the exit code, and that the message says all of `words`.
    #[track_caller]
    pub fn fails(self, code: i32, words: &[&str]) {
        assert_eq!(self.code, code, "{self:?}");
        for word in words {
            assert!(self.stderr.contains(word), "no '{word}' in {self:?}");
        }
        assert!(!self.stderr.contains("panicked"), "{self:?}");
    }
}

impl Place {
    pub fn new() -> Self {
        Self(tempfile::tempdir().expect("a folder"))
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// A command whose arguments are separated by spaces, to be run here.
    pub fn command(&self, program: &str, arguments: &str) -> Command {
        let mut command = Command::new(program);
        command.args(arguments.split_whitespace()).current_dir(self.0.path()).stdin(Stdio::null());
        command
    }

    pub fn sapwood(&self, arguments: &str) -> Answer {
        Answer::of(self.command(SAPWOOD, arguments).output().expect("sapwood runs"))
    }

    pub fn qemu_img(&self, arguments: &str) -> Answer {
        Answer::of(self.command("qemu-img", arguments).output().expect("qemu-img is installed (qemu-utils)"))
    }

    /// Makes a raw disk of 8 MiB with data at both ends and in the middle.
    pub fn raw_disk(&self, name: &str) {
        let file = fs::File::create_new(self.path(name)).expect("a new file");
        file.set_len(8 << 20).expect("a size");
        for (i, at) in [0, 1 << 20, (4 << 20) + 512, (8 << 20) - 4096].into_iter().enumerate() {
            file.write_all_at(&[i as u8 + 1; 4096], at).expect("space");
        }
    }

    /// Damages a file: `bytes` at `offset`.
    pub fn damage(&self, name: &str, offset: u64, bytes: &[u8]) {
        let file = fs::OpenOptions::new().write(true).open(self.path(name)).expect("the file");
        file.write_all_at(bytes, offset).expect("space");
    }

    pub fn bytes(&self, name: &str) -> Vec<u8> {
        fs::read(self.path(name)).expect("the file")
    }

    pub fn exists(&self, name: &str) -> bool {
        self.path(name).exists()
    }
}
