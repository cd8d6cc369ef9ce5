//! Commands about stores: one file per command.
//!
//! Each makes an operation of its arguments and has it run by `Access`, which is the daemon of the store or the
//! store itself.

mod account;
pub mod attach;
mod backup;
mod check;
pub mod clone;
pub mod daemon;
pub mod delete;
pub mod diff;
pub mod export;
mod gc;
pub mod import;
mod init;
pub mod limit;
pub mod list;
pub mod notes;
pub mod rename;
mod scrub;
mod seal;
mod set;
pub mod show;
pub mod snapshot;
mod stat;
pub mod switch;
pub mod tree;

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use sapwood_store::Name;
use sapwood_store::directory::Directory;

use crate::control::wire::Failure;
use crate::host::Host;
use crate::volumes::access::Access;
use crate::volumes::address::{Address, default_store};

/// Exit code: something in the store is missing, wrong or damaged.
const EXIT_DAMAGED: u8 = 2;

/// Make stores, and look after them
///
/// A store is a directory that holds volumes, which are disks by name, and the trees of their snapshots. A volume
/// is called STORE:volume, and a snapshot STORE:volume@snapshot, where STORE is the directory.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  sapwood store init /srv/vms
  sapwood store stat /srv/vms")]
pub struct Store {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Init(init::Init),
    Stat(stat::Stat),
    Set(set::Set),
    Seal(seal::Seal),
    Gc(gc::Gc),
    Check(check::CheckCommand),
    Scrub(scrub::ScrubCommand),
    Account(account::AccountCommand),
    Backup(backup::BackupCommand),
}

impl Store {
    /// Does what was asked; the exit code.
    pub fn run(self, host: &Host) -> anyhow::Result<u8> {
        match self.command {
            Command::Init(command) => command.run(host).map(|()| 0),
            Command::Stat(command) => command.run(host),
            Command::Set(command) => command.run(host).map(|()| 0),
            Command::Seal(command) => command.run(host).map(|()| 0),
            Command::Gc(command) => command.run(host).map(|()| 0),
            Command::Check(command) => command.run(host),
            Command::Scrub(command) => command.run(host),
            Command::Account(command) => command.run(host).map(|()| 0),
            Command::Backup(command) => command.run(host).map(|()| 0),
        }
    }
}

/// The store of names that do not say it.
#[derive(Args, Clone, Debug)]
pub struct DefaultStore {
    /// Directory of the store of names without one; by default the environment's SAPWOOD_STORE
    #[arg(long, value_name = "DIR")]
    store: Option<PathBuf>,
}

impl DefaultStore {
    /// The directory, if it was given.
    pub fn given(&self) -> Option<&Path> {
        self.store.as_deref()
    }

    /// What a name means.
    pub fn address(&self, text: &OsStr) -> anyhow::Result<Address> {
        Address::parse(text, self.given())
    }

    /// What a name of a volume means, and how to get at its store.
    pub fn volume(&self, host: &Host, text: &OsStr) -> anyhow::Result<(Access, String)> {
        let address = self.address(text)?;
        let access = Access::to(*host, &address.store)?;
        Ok((access, address.volume()?))
    }
}

/// A store as a whole.
#[derive(Args, Clone, Debug)]
pub struct Whole {
    /// Directory of the store; by default the environment's SAPWOOD_STORE
    #[arg(long = "store", value_name = "DIR", conflicts_with = "directory")]
    store: Option<PathBuf>,

    /// Directory of the store
    #[arg(value_name = "DIR")]
    directory: Option<PathBuf>,
}

impl Whole {
    /// The directory.
    pub fn root(&self) -> anyhow::Result<PathBuf> {
        default_store(self.directory.as_deref().or(self.store.as_deref()))
    }

    /// How to get at it.
    pub fn access(&self, host: &Host) -> anyhow::Result<Access> {
        Access::to(*host, &self.root()?)
    }
}

/// A store, or one volume of it.
#[derive(Args, Clone, Debug)]
pub struct Scope {
    #[command(flatten)]
    store: DefaultStore,

    /// A volume or snapshot, as STORE:volume, or a whole store, as its directory
    #[arg(value_name = "VOLUME")]
    what: Option<OsString>,
}

impl Scope {
    /// How to get at the store, and the volume if one is meant.
    pub fn access(&self, host: &Host) -> anyhow::Result<(Access, Option<String>)> {
        match self.any(host)? {
            (access, None) => Ok((access, None)),
            (access, Some(Name::Volume(volume))) => Ok((access, Some(volume))),
            (_, Some(Name::Snapshot(name))) => {
                let text = format!("{name}: that is a snapshot, a volume is wanted here");
                Err(Failure::new("invalid", text).into())
            }
        }
    }

    /// How to get at the store, and the volume or snapshot if one is meant.
    pub fn any(&self, host: &Host) -> anyhow::Result<(Access, Option<Name>)> {
        let whole = |root: &Path| Ok((Access::to(*host, root)?, None));
        let Some(what) = &self.what else { return whole(&default_store(self.store.given())?) };
        if Directory::new(Path::new(what)).catalog().exists() {
            return whole(Path::new(what));
        }
        if let Some(root) =
            what.to_str().and_then(|text| text.strip_suffix(':')).filter(|root| !root.is_empty())
        {
            return whole(Path::new(root));
        }
        if !what.as_bytes().contains(&b':') && default_store(self.store.given()).is_err() {
            let text = format!("{}: there is no store here", what.to_string_lossy());
            return Err(Failure::new("not-found", text).into());
        }
        let address = self.store.address(what)?;
        Ok((Access::to(*host, &address.store)?, Some(address.name)))
    }
}

/// The name of another snapshot of the same store, where that of one is known: `@NAME` is one of the same volume.
pub fn other_snapshot(store: &Path, volume: &str, text: &OsStr) -> anyhow::Result<String> {
    let name = Address::name_in(store, text)?;
    Ok(if name.starts_with('@') { format!("{volume}{name}") } else { name })
}

/// Says that a name is one of a volume.
pub fn wants_snapshot(name: &Name) -> anyhow::Error {
    let text = format!("{name}: that is a volume, a snapshot is wanted here: say {name}@SNAPSHOT");
    Failure::new("invalid", text).into()
}

/// How long ago something was, in one unit.
pub fn age(then_ms: u64) -> String {
    let seconds = crate::volumes::service::now_ms().saturating_sub(then_ms) / 1000;
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{} min", seconds / 60),
        3600..86400 => format!("{} h", seconds / 3600),
        _ => format!("{} d", seconds / 86400),
    }
}

/// Lines of a table: the first column as wide as it has to be, and all others but the last aligned to the right.
pub fn table(lines: &[Vec<String>]) -> String {
    let columns = lines.iter().map(Vec::len).max().unwrap_or_default();
    let width = |column: usize| {
        lines
            .iter()
            .filter_map(|line| line.get(column))
            .map(|cell| cell.chars().count())
            .max()
            .unwrap_or_default()
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut text = String::new();
    for line in lines {
        let mut shown = String::new();
        for (column, cell) in line.iter().enumerate() {
            let padding = " ".repeat(widths[column] - cell.chars().count());
            match column {
                0 => shown.push_str(&format!("{cell}{padding}")),
                _ if column + 1 == columns => shown.push_str(&format!("  {cell}")),
                _ => shown.push_str(&format!("  {padding}{cell}")),
            }
        }
        text.push_str(shown.trim_end());
        text.push('\n');
    }
    text
}
