//! Development tasks: `cargo xtask setup | test | soak | demo | bench | corpus`.

mod bench;
mod demo;
mod images;
mod process;
mod setup;
mod suite;
mod workspace;

use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use clap::{Parser, Subcommand};

use suite::steps::{Effort, Suite};
use workspace::Workspace;

#[derive(Parser)]
#[command(about = "Development tasks of Sapwood")]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Install what tests and demo need, make the guest's kernel and root file system
    Setup,
    /// Boot two guests from two layers over one base and show what each sees
    Demo,
    /// Run every check and test that this machine can run
    Test {
        /// Run only this step, or the steps before a slash of this name; may be given again
        #[arg(long, value_name = "NAME")]
        only: Vec<String>,
        /// How long each fuzz target runs, in seconds
        #[arg(long, value_name = "SECONDS", default_value_t = 10)]
        fuzz_seconds: u64,
    },
    /// Measure `sapwood serve` beside `qemu-storage-daemon`
    Bench(bench::Bench),
    /// Make the images that deduplication and compression are measured with
    Corpus(images::Corpus),
    /// Run the tests for long: more simulated histories, longer fuzzing
    Soak {
        /// As for `test`
        #[arg(long, value_name = "NAME")]
        only: Vec<String>,
        /// How many histories each simulation test tries
        #[arg(long, value_name = "COUNT", default_value_t = 20_000)]
        seeds: u64,
        /// How long each fuzz target runs, in seconds
        #[arg(long, value_name = "SECONDS", default_value_t = 600)]
        fuzz_seconds: u64,
    },
}

fn main() -> ExitCode {
    match perform(&Arguments::parse().task) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Whether the task succeeded.
fn perform(task: &Task) -> Result<bool> {
    let workspace = Workspace::locate()?;
    match task {
        Task::Setup => set_up(&workspace),
        Task::Demo => demo::run(&workspace),
        Task::Bench(options) => bench::run(&workspace, options),
        Task::Corpus(options) => images::run(&workspace, options),
        Task::Test { only, fuzz_seconds } => {
            let fuzz = Duration::from_secs(*fuzz_seconds);
            run_suite(&workspace, Effort { soak_seeds: None, fuzz }, only)
        }
        Task::Soak { only, seeds, fuzz_seconds } => {
            let fuzz = Duration::from_secs(*fuzz_seconds);
            run_suite(&workspace, Effort { soak_seeds: Some(*seeds), fuzz }, only)
        }
    }
}

fn run_suite(workspace: &Workspace, effort: Effort, only: &[String]) -> Result<bool> {
    let suite = Suite::new(workspace, effort);
    Ok(suite::run(&suite::select(suite.steps()?, only)?))
}

fn set_up(workspace: &Workspace) -> Result<bool> {
    match setup::ensure(&workspace.guest())? {
        setup::Outcome::Ready(assets) => {
            println!("ready: {} and {}", assets.kernel.display(), assets.root_image.display());
            Ok(true)
        }
        setup::Outcome::Unable(reason) => {
            println!("skipped: {reason}");
            Ok(false)
        }
    }
}
