//! The `sapwood` command: makes, looks at, copies and serves virtual disks.

mod boot;
mod cli;
mod control;
mod host;
mod metrics;
mod volumes;

use std::process::ExitCode;

use clap::Parser;

/// Exit code of a command line that cannot be understood (`EX_USAGE` of sysexits.h).
const EXIT_USAGE: u8 = 64;

fn main() -> ExitCode {
    let cli = match cli::Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            let code = if error.use_stderr() { EXIT_USAGE } else { 0 };
            // When not even the help can be printed there is nobody to tell.
            let _ = error.print();
            return code.into();
        }
    };
    let level = if cli.is_server() { "info" } else { "warn" };
    env_logger::Builder::from_env(env_logger::Env::new().filter_or("SAPWOOD_LOG", level))
        .format_target(false)
        .init();
    let code_of_failure = cli.code_of_failure();
    match cli.run() {
        Ok(code) => code.into(),
        Err(error) => match error.downcast::<clap::Error>() {
            Ok(usage) => {
                let _ = usage.print();
                EXIT_USAGE.into()
            }
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
