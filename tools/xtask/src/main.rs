//! Development tasks: `cargo xtask setup | test | soak | demo`.

mod process;
mod setup;
mod workspace;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

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
    }
}

fn set_up(workspace: &Workspace) -> Result<bool> {
    match setup::ensure(&workspace.guest())? {
        setup::Outcome::Ready(assets) => {
            println!(
                "ready: {} and {}",
                assets.kernel.display(),
                assets.root_image.display()
            );
            Ok(true)
        }
        setup::Outcome::Unable(reason) => {
            println!("skipped: {reason}");
            Ok(false)
        }
    }
}
