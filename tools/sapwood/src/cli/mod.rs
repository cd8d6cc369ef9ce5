//! The command line: one file per command.

mod boot;
mod check;
mod commit;
mod compact;
mod compare;
mod convert;
pub mod create;
mod flatten;
pub mod info;
pub mod limits;
mod map;
mod online;
mod options;
mod output;
pub mod progress;
pub mod reading;
mod rebase;
mod resize;
pub mod serve;
mod size;
mod store;
mod top;

use clap::{Parser, Subcommand};

use crate::boot::Worker;
use crate::host::{EngineKind, Host};

/// Copy-on-write disks for virtual machines: make them, look at them, copy them, serve them
/// over vhost-user-blk.
#[derive(Debug, Parser)]
#[command(name = "sapwood", version, propagate_version = true)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,

    /// How bytes are moved; by default io_uring where the kernel allows it
    #[arg(long, global = true, hide = true, value_enum, value_name = "ENGINE")]
    engine: Option<EngineKind>,
}

#[derive(Debug, Subcommand)]
enum Command {
    Create(create::Create),
    Info(info::Info),
    Map(map::Map),
    Check(check::Check),
    Convert(convert::Convert),
    Compare(compare::Compare),
    Resize(resize::Resize),
    Rebase(rebase::Rebase),
    Flatten(flatten::Flatten),
    Commit(commit::Commit),
    Compact(compact::Compact),
    Serve(serve::Serve),
    Top(top::Top),
    Boot(boot::Boot),
    Store(store::Store),
    Daemon(store::daemon::DaemonCommand),
    List(store::list::List),
    Tree(store::tree::Tree),
    Show(store::show::Show),
    Import(store::import::Import),
    Export(store::export::Export),
    Diff(store::diff::Diff),
    Snapshot(store::snapshot::Snapshot),
    Clone(store::clone::Clone),
    Switch(store::switch::Switch),
    Rollback(store::switch::Rollback),
    Rename(store::rename::Rename),
    Delete(store::delete::Delete),
    Protect(store::notes::Protect),
    Unprotect(store::notes::Unprotect),
    Describe(store::notes::Describe),
    Label(store::notes::Label),
    Limit(store::limit::Limit),
    Attach(store::attach::Attach),
    Detach(store::attach::Detach),
    #[command(hide = true)]
    BootWorker(Worker),
}

impl Cli {
    /// Whether the command goes on until it is told to stop.
    pub fn is_server(&self) -> bool {
        matches!(self.command, Command::Serve(_) | Command::Daemon(_))
    }

    /// The exit code when the command could not do its work: 1, except where that is an answer.
    pub fn code_of_failure(&self) -> u8 {
        match self.command {
            Command::Compare(_) => compare::EXIT_FAILED,
            _ => 1,
        }
    }

    /// Does what was asked; the exit code.
    pub fn run(self) -> anyhow::Result<u8> {
        let Self { command, engine } = self;
        // Not for those that need none: it tries what the kernel offers.
        let host = || Host::new(engine);
        match command {
            Command::Create(command) => command.run(&host()).map(|()| 0),
            Command::Info(command) => command.run(&host()).map(|()| 0),
            Command::Map(command) => command.run(&host()).map(|()| 0),
            Command::Check(command) => command.run(&host()),
            Command::Convert(command) => command.run(&host()).map(|()| 0),
            Command::Compare(command) => command.run(&host()),
            Command::Resize(command) => command.run(&host()).map(|()| 0),
            Command::Rebase(command) => command.run(&host()).map(|()| 0),
            Command::Flatten(command) => command.run(&host()).map(|()| 0),
            Command::Commit(command) => command.run(&host()).map(|()| 0),
            Command::Compact(command) => command.run(&host()).map(|()| 0),
            Command::Serve(command) => command.run(&host()).map(|()| 0),
            Command::Top(command) => command.run(&host()).map(|()| 0),
            Command::Boot(command) => command.run(&host()),
            Command::Store(command) => command.run(&host()),
            Command::Daemon(command) => command.run(&host()).map(|()| 0),
            Command::List(command) => command.run(&host()).map(|()| 0),
            Command::Tree(command) => command.run(&host()).map(|()| 0),
            Command::Show(command) => command.run(&host()).map(|()| 0),
            Command::Import(command) => command.run(&host()).map(|()| 0),
            Command::Export(command) => command.run(&host()).map(|()| 0),
            Command::Diff(command) => command.run(&host()).map(|()| 0),
            Command::Snapshot(command) => command.run(&host()).map(|()| 0),
            Command::Clone(command) => command.run(&host()).map(|()| 0),
            Command::Switch(command) => command.run(&host()).map(|()| 0),
            Command::Rollback(command) => command.run(&host()).map(|()| 0),
            Command::Rename(command) => command.run(&host()).map(|()| 0),
            Command::Delete(command) => command.run(&host()).map(|()| 0),
            Command::Protect(command) => command.run(&host()).map(|()| 0),
            Command::Unprotect(command) => command.run(&host()).map(|()| 0),
            Command::Describe(command) => command.run(&host()).map(|()| 0),
            Command::Label(command) => command.run(&host()).map(|()| 0),
            Command::Limit(command) => command.run(&host()).map(|()| 0),
            Command::Attach(command) => command.run(&host()).map(|()| 0),
            Command::Detach(command) => command.run(&host()).map(|()| 0),
            Command::BootWorker(worker) => worker.run(),
        }
    }
}
