//! The fuzz targets: each first over its corpus, then on its own for a while.
//!
//! The targets are built with coverage instrumentation on the stable compiler and linked with
//! libFuzzer; `cargo fuzz` is not needed. The target named [`CANARY`] has a planted bug: it must
//! be found, or the fuzzers see nothing.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::steps::Effort;
use super::{Step, Verdict};
use crate::process;
use crate::workspace::{self, Workspace};

const CANARY: &str = "canary";
/// How libFuzzer ends after a crash.
const CRASH_STATUS: i32 = 77;
/// What `cargo fuzz` passes too: counters of edges, a table of them, and compared values.
const INSTRUMENT: &str = "--cfg fuzzing -Cpasses=sancov-module \
    -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
    -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares";
const BUILD_LIMIT: Duration = Duration::from_secs(1200);
const QUERY_LIMIT: Duration = Duration::from_secs(60);
/// Beyond the time asked for: to load a corpus and to finish the last input.
const ALLOWANCE: Duration = Duration::from_secs(120);

/// The steps of the fuzz crate; one that says it is skipped where there is none.
///
/// # Errors
/// The crate's manifest cannot be read.
pub fn steps<'a>(workspace: &'a Workspace, effort: Effort) -> Result<Vec<Step<'a>>> {
    let fuzz = Fuzz { workspace, effort };
    if !fuzz.manifest().is_file() {
        let reason = || Ok(Verdict::Skipped("there is no fuzz crate".to_owned()));
        return Ok(vec![Step::new("fuzz", reason)]);
    }
    let targets = fuzz.targets()?;
    let mut steps = Vec::new();
    if effort.soak_seeds.is_none() {
        steps.push(Step::new("fuzz/lint", move || fuzz.lint()));
    }
    if targets.is_empty() {
        let reason = || Ok(Verdict::Skipped("the fuzz crate has no targets".to_owned()));
        steps.push(Step::new("fuzz/targets", reason));
    }
    for target in targets {
        steps.push(Step::new(format!("fuzz/{target}"), move || fuzz.run(&target)));
    }
    Ok(steps)
}

#[derive(Clone, Copy)]
struct Fuzz<'a> {
    workspace: &'a Workspace,
    effort: Effort,
}

impl Fuzz<'_> {
    fn manifest(&self) -> PathBuf {
        self.workspace.root.join("fuzz/Cargo.toml")
    }

    fn work(&self) -> PathBuf {
        self.workspace.target.join("fuzz")
    }

    fn targets(&self) -> Result<Vec<String>> {
        let metadata = workspace::metadata(&self.manifest())?;
        let packages = metadata["packages"].as_array().context("cargo metadata has no packages")?;
        let all = packages.iter().filter_map(|package| package["targets"].as_array()).flatten();
        let is_program = |target: &&serde_json::Value| target["kind"][0] == "bin";
        let names = all.filter(is_program).filter_map(|target| target["name"].as_str());
        let mut names: Vec<String> = names.map(str::to_owned).collect();
        names.sort();
        Ok(names)
    }

    /// cargo on the fuzz crate, which is a workspace of its own.
    fn cargo(&self, arguments: &[&str]) -> Command {
        let mut command = self.workspace.cargo();
        command.args(arguments).arg("--manifest-path").arg(self.manifest());
        command.env("CARGO_TARGET_DIR", self.work());
        command
    }

    fn lint(&self) -> Result<Verdict> {
        process::run(self.cargo(&["fmt"]).args(["--", "--check"]), QUERY_LIMIT)?;
        process::run(self.cargo(&["clippy"]).args(["--", "-D", "warnings"]), BUILD_LIMIT)?;
        Ok(Verdict::Passed)
    }

    /// Builds `target` and returns its program. A target's build also shares what others built.
    fn build(&self, target: &str) -> Result<PathBuf> {
        let triple = host_triple()?;
        // A target platform is named so that the flags do not reach build scripts and macros.
        let mut command = self.cargo(&["build", "--release", "--bin", target, "--target", &triple]);
        command.env("RUSTFLAGS", INSTRUMENT);
        for (name, value) in [
            ("DEBUG_ASSERTIONS", "true"),
            ("OVERFLOW_CHECKS", "true"),
            ("LTO", "off"),
            ("CODEGEN_UNITS", "16"),
        ] {
            command.env(format!("CARGO_PROFILE_RELEASE_{name}"), value);
        }
        process::run(&mut command, BUILD_LIMIT)?;
        Ok(self.work().join(triple).join("release").join(target))
    }

    fn run(&self, target: &str) -> Result<Verdict> {
        let program = self.build(target)?;
        let grown = self.work().join("corpus").join(target);
        let artifacts = self.work().join("artifacts").join(target);
        fs::create_dir_all(&grown)?;
        fs::create_dir_all(&artifacts)?;
        let mut command = Command::new(program);
        command.arg(format!("-max_total_time={}", self.effort.fuzz.as_secs()));
        command.arg(format!("-artifact_prefix={}/", artifacts.display()));
        command.args(["-timeout=20", "-rss_limit_mb=2048", "-print_final_stats=1", "-verbosity=0"]);
        // New inputs go into the first directory; the tree's own corpus is only read.
        command.arg(&grown);
        let corpus = self.workspace.root.join("fuzz/corpus").join(target);
        if corpus.is_dir() {
            command.arg(corpus);
        }
        let canary = target == CANARY;
        if canary {
            command.stdout(Stdio::null()).stderr(Stdio::null());
        }
        let status = process::run_status(&mut command, self.effort.fuzz + ALLOWANCE)?;
        if canary {
            let found = status.code() == Some(CRASH_STATUS);
            ensure!(found, "the planted bug was not found: {status}");
            println!("the planted bug was found, as it must");
        } else {
            let place = artifacts.display();
            ensure!(status.success(), "{target} ended with {status}; the input is in {place}");
        }
        Ok(Verdict::Passed)
    }
}

fn host_triple() -> Result<String> {
    let mut command = Command::new(std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()));
    let text = process::output(command.arg("-vV"), QUERY_LIMIT)?;
    let host = text.lines().find_map(|line| line.strip_prefix("host: "));
    Ok(host.context("rustc -vV names no host")?.to_owned())
}
