//! What `cargo xtask test` and `cargo xtask soak` run, in order.
//!
//! Every step that runs tests names the whole workspace, and chooses among its targets only. Which
//! features a dependency has depends on the packages that a command names: a command for one
//! package would compile most of what there is again.

use std::cell::OnceCell;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use sapwood_tests::guest::accelerator::tcg_has_svm;

use super::fuzz;
use super::{Step, Verdict};
use crate::images;
use crate::process;
use crate::setup::{self, Outcome};
use crate::workspace::Workspace;

const fn minutes(count: u64) -> Duration {
    Duration::from_secs(count * 60)
}

/// Groups of tests that need root, and what the kernel (a file system) or the environment (a
/// variable) must have for them.
const STORAGE: [(&str, &[&str]); 8] = [
    ("device", &[]),
    ("ext4", &["ext4"]),
    ("ext3", &["ext4"]),
    ("overlay", &["ext4", "overlay"]),
    ("tmpfs", &["tmpfs"]),
    ("vfat", &["vfat"]),
    ("nfs", &["SAPWOOD_NFS_DIR"]),
    ("full", &["ext4"]),
];

/// Why this machine cannot run tests that mount something; `needs` as in [`STORAGE`].
fn missing_for_mounts(needs: &[&str]) -> Result<Option<String>> {
    if !rustix::process::geteuid().is_root() {
        return Ok(Some("mounting and loop devices need root".to_owned()));
    }
    if !Path::new("/dev/loop-control").exists() {
        return Ok(Some("the kernel has no loop devices".to_owned()));
    }
    let known = fs::read_to_string("/proc/filesystems").context("reading /proc/filesystems")?;
    for &need in needs {
        if need.starts_with("SAPWOOD_") {
            if std::env::var_os(need).is_none() {
                return Ok(Some(format!("{need} names no folder for it")));
            }
        } else if !known.split_whitespace().any(|name| name == need) {
            return Ok(Some(format!("the kernel does not know {need}")));
        }
    }
    Ok(None)
}

/// How much is done: the short suite of every change, or a soak.
#[derive(Clone, Copy)]
pub struct Effort {
    /// `None` for the short suite; else the number of simulated histories asked of each
    /// simulation test.
    pub soak_seeds: Option<u64>,
    /// How long each fuzz target runs after its corpus.
    pub fuzz: Duration,
}

/// What the steps share.
pub struct Suite<'a> {
    workspace: &'a Workspace,
    effort: Effort,
    /// Why this machine has no guests; empty when it has them.
    unable: OnceCell<Option<String>>,
}

impl<'a> Suite<'a> {
    /// A suite over `workspace`.
    pub fn new(workspace: &'a Workspace, effort: Effort) -> Self {
        Self { workspace, effort, unable: OnceCell::new() }
    }

    /// The steps, in order.
    ///
    /// # Errors
    /// The fuzz crate's manifest cannot be read.
    pub fn steps(&'a self) -> Result<Vec<Step<'a>>> {
        let mut steps = vec![Step::new("setup", || self.set_up())];
        if self.effort.soak_seeds.is_none() {
            steps.push(Step::new("fmt", || self.format()));
            steps.push(Step::new("clippy", || self.clippy()));
            steps.push(Step::new("docs", || self.docs()));
        }
        steps.push(Step::new("build", || self.build()));
        steps.push(Step::new("tests", || self.tests()));
        if self.effort.soak_seeds.is_none() {
            steps.push(Step::new("doctests", || self.doctests()));
        }
        for (name, needs) in STORAGE {
            steps.push(Step::new(format!("storage/{name}"), move || self.storage(name, needs)));
        }
        steps.push(Step::new("corpus", || self.corpus()));
        steps.extend(fuzz::steps(self.workspace, self.effort)?);
        steps.push(Step::new("guests", || self.guests()));
        steps.push(Step::new("nested", || self.nested()));
        Ok(steps)
    }

    fn unable(&self) -> Result<Option<String>> {
        if let Some(known) = self.unable.get() {
            return Ok(known.clone());
        }
        let unable = match setup::ensure(&self.workspace.guest())? {
            Outcome::Ready(_) => None,
            Outcome::Unable(reason) => Some(reason),
        };
        Ok(self.unable.get_or_init(|| unable).clone())
    }

    fn set_up(&self) -> Result<Verdict> {
        Ok(self.unable()?.map_or(Verdict::Passed, Verdict::Skipped))
    }

    fn cargo(&self, arguments: &[&str], limit: Duration) -> Result<Verdict> {
        let mut command = self.command(arguments);
        process::run(&mut command, limit).map(|()| Verdict::Passed)
    }

    /// cargo with what the tests of this workspace read from their environment.
    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = self.workspace.cargo();
        command.args(arguments);
        command.env("SAPWOOD_BIN", self.program()).env("SAPWOOD_GUEST_DIR", self.workspace.guest());
        command.env("SAPWOOD_CORPUS_DIR", self.workspace.corpus());
        // An error's message says what happened; where it was wrapped does not.
        command.env("RUST_LIB_BACKTRACE", "0");
        if let Some(seeds) = self.effort.soak_seeds {
            command.env("SAPWOOD_SOAK", "1").env("SAPWOOD_SIM_SEEDS", seeds.to_string());
        }
        command
    }

    /// The `sapwood` under test: another one can be named in the environment.
    fn program(&self) -> PathBuf {
        let named = std::env::var_os("SAPWOOD_BIN").map(PathBuf::from);
        named.unwrap_or_else(|| self.workspace.target.join("release/sapwood"))
    }

    fn format(&self) -> Result<Verdict> {
        self.cargo(&["fmt", "--all", "--check"], minutes(5))
    }

    fn clippy(&self) -> Result<Verdict> {
        let arguments = ["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"];
        self.cargo(&arguments, minutes(20))
    }

    fn docs(&self) -> Result<Verdict> {
        // Examples need what tests need: with them, dependencies are those that clippy has checked.
        let targets = ["--lib", "--bins", "--examples"];
        let mut command = self.command(&["doc", "--workspace", "--no-deps", "--quiet"]);
        command.args(targets);
        // The readers of these pages read the code too: private items are theirs to see.
        command
            .env("RUSTDOCFLAGS", "-D warnings -A rustdoc::private_intra_doc_links --document-private-items");
        process::run(&mut command, minutes(15)).map(|()| Verdict::Passed)
    }

    fn build(&self) -> Result<Verdict> {
        self.cargo(&["build", "--release", "--package", "sapwood"], minutes(20))
    }

    fn tests(&self) -> Result<Verdict> {
        // Tests of the VMM run one of them.
        self.cargo(&["build", "--workspace", "--examples", "--profile", "test"], minutes(15))?;
        let arguments = ["test", "--workspace", "--lib", "--bins", "--tests", "--no-fail-fast"];
        let limit = if self.effort.soak_seeds.is_some() { minutes(24 * 60) } else { minutes(30) };
        self.cargo(&arguments, limit)
    }

    /// The tests that mount file systems and make block devices, by the start of their names.
    fn storage(&self, name: &str, needs: &[&str]) -> Result<Verdict> {
        if let Some(reason) = missing_for_mounts(needs)? {
            return Ok(Verdict::Skipped(reason));
        }
        self.ignored_tests(&["--tests"], name, &["--test-threads=1"], minutes(15))
    }

    /// Tests that the step `tests` passes over, which has compiled them: those in `targets` whose
    /// names hold `filter`.
    fn ignored_tests(
        &self,
        targets: &[&str],
        filter: &str,
        options: &[&str],
        limit: Duration,
    ) -> Result<Verdict> {
        let mut command = self.command(&["test", "--workspace"]);
        command.args(targets).args(["--", filter, "--ignored"]).args(options);
        process::run(&mut command, limit).map(|()| Verdict::Passed)
    }

    /// What is measured with the corpus, where it was made: it takes a quarter of an hour.
    fn corpus(&self) -> Result<Verdict> {
        if !images::is_there(&self.workspace.corpus()) {
            return Ok(Verdict::Skipped("there is no corpus: `cargo xtask corpus` makes it".to_owned()));
        }
        self.ignored_tests(&["--tests"], "corpus_", &["--test-threads=1", "--show-output"], minutes(15))
    }

    fn doctests(&self) -> Result<Verdict> {
        self.cargo(&["test", "--workspace", "--doc"], minutes(15))
    }

    fn guests(&self) -> Result<Verdict> {
        // One guest at a time: under TCG each takes as many host threads as it has processors.
        self.guest_tests(
            &["--test", "guest", "--test", "guest_store"],
            "",
            &["--test-threads=1", "--show-output"],
        )
    }

    /// `sapwood boot` under KVM, in a guest that has it.
    fn nested(&self) -> Result<Verdict> {
        if let Some(reason) = self.unable()? {
            return Ok(Verdict::Skipped(reason));
        }
        if !tcg_has_svm()? {
            return Ok(Verdict::Skipped("QEMU's emulated processor has no SVM here".to_owned()));
        }
        self.guest_tests(&["--test", "nested"], "in_a_guest_that_has_kvm", &["--exact", "--nocapture"])
    }

    fn guest_tests(&self, targets: &[&str], filter: &str, options: &[&str]) -> Result<Verdict> {
        if let Some(reason) = self.unable()? {
            return Ok(Verdict::Skipped(reason));
        }
        if !self.program().is_file() {
            self.build()?;
        }
        self.ignored_tests(targets, filter, options, minutes(30))
    }
}
