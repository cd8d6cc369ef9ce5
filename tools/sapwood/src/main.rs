//! The `sapwood` command: makes, looks at, copies and serves virtual disks.

mod boot;
mod cli;
mod control;
mod host;

use std::process::ExitCode;

use boot::{WORKER, Worker};
use clap::Parser;

/// Exit code of a command line that cannot be understood (`EX_USAGE` of sysexits.h).
const EXIT_USAGE: u8 = 64;

fn main() -> ExitCode {
    // No command for users, and one process for each machine: it does not pay for what the others need.
    if std::env::args_os().nth(1).is_some_and(|first| first == WORKER) {
        return match Worker::try_parse_from(std::env::args_os().skip(1)) {
            Ok(worker) => end("warn", 1, || worker.run()),
            Err(error) => usage(&error),
        };
    }
    match cli::Cli::try_parse() {
        Ok(cli) => {
            let level = if cli.is_server() { "info" } else { "warn" };
            end(level, cli.code_of_failure(), || cli.run())
        }
        Err(error) => usage(&error),
    }
}

/// Prints what clap has to say, which may be the help that was asked for.
fn usage(error: &clap::Error) -> ExitCode {
    // When not even that can be printed there is nobody to tell.
    let _ = error.print();
    if error.use_stderr() { EXIT_USAGE.into() } else { ExitCode::SUCCESS }
}

/// Does the work, notes being shown from `level` on, and says how it ended.
fn end(level: &str, code_of_failure: u8, work: impl FnOnce() -> anyhow::Result<u8>) -> ExitCode {
    env_logger::Builder::from_env(env_logger::Env::new().filter_or("SAPWOOD_LOG", level))
        .format_target(false)
        .init();
    match work() {
        Ok(code) => code.into(),
        Err(error) => match error.downcast::<clap::Error>() {
            Ok(error) => usage(&error),
            Err(error) => {
                eprintln!("sapwood: {error:#}");
                code_of_failure.into()
            }
        },
    }
}

/// A failed assertion ends the process, whatever thread it is in: going on with a state that is
/// known to be wrong is worse than recovering from a stop.
fn abort_on_panic() {
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        report(panic);
        std::process::abort();
    }));
}
