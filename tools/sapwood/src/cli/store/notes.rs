//! `sapwood protect`, `sapwood unprotect`, `sapwood describe` and `sapwood label`.

use std::ffi::{OsStr, OsString};

use clap::Args;
use sapwood_store::Name;

use super::DefaultStore;
use crate::control::wire::Failure;
use crate::host::Host;
use crate::volumes::access::Access;
use crate::volumes::change::{NoteSnapshot, NoteVolume, Notes};

/// Protect volumes and snapshots from being deleted
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  sapwood protect /srv/vms:debian@12")]
pub struct Protect {
    #[command(flatten)]
    store: DefaultStore,

    /// What to protect
    #[arg(value_name = "NAME", required = true)]
    names: Vec<OsString>,
}

/// Let volumes and snapshots be deleted again
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  sapwood unprotect /srv/vms:debian@12")]
pub struct Unprotect {
    #[command(flatten)]
    store: DefaultStore,

    /// What not to protect any more
    #[arg(value_name = "NAME", required = true)]
    names: Vec<OsString>,
}

/// Say what a volume or snapshot is
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  sapwood describe /srv/vms:web 'the shop, since March'
  sapwood describe /srv/vms:web ''")]
pub struct Describe {
    #[command(flatten)]
    store: DefaultStore,

    /// The volume or snapshot
    #[arg(value_name = "NAME")]
    name: OsString,

    /// What it is; an empty text takes the description away
    #[arg(value_name = "TEXT")]
    text: String,
}

/// Put labels on a volume or snapshot, or take them away
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  sapwood label /srv/vms:web owner=anna tier=gold
  sapwood label --remove tier /srv/vms:web")]
pub struct Label {
    #[command(flatten)]
    store: DefaultStore,

    /// Take the label with this key away
    #[arg(long, value_name = "KEY")]
    remove: Vec<String>,

    /// The volume or snapshot
    #[arg(value_name = "NAME")]
    name: OsString,

    /// Labels: a key and its value
    #[arg(value_name = "KEY=VALUE", required_unless_present = "remove")]
    labels: Vec<String>,
}

fn note(host: &Host, store: &DefaultStore, name: &OsStr, notes: Notes) -> anyhow::Result<()> {
    let address = store.address(name)?;
    let access = Access::to(*host, &address.store)?;
    match address.name {
        Name::Volume(volume) => access.ask(NoteVolume { volume, notes })?,
        Name::Snapshot(name) => {
            access.ask(NoteSnapshot { volume: name.volume, snapshot: name.snapshot, notes })?
        }
    };
    Ok(())
}

impl Protect {
    pub fn run(self, host: &Host) -> anyhow::Result<()> {
        let notes = Notes { protected: Some(true), ..Notes::default() };
        self.names.iter().try_for_each(|name| note(host, &self.store, name, notes.clone()))
    }
}

impl Unprotect {
    pub fn run(self, host: &Host) -> anyhow::Result<()> {
        let notes = Notes { protected: Some(false), ..Notes::default() };
        self.names.iter().try_for_each(|name| note(host, &self.store, name, notes.clone()))
    }
}

impl Describe {
    pub fn run(self, host: &Host) -> anyhow::Result<()> {
        let notes = Notes { description: Some(self.text), ..Notes::default() };
        note(host, &self.store, &self.name, notes)
    }
}

impl Label {
    pub fn run(self, host: &Host) -> anyhow::Result<()> {
        let mut notes = Notes::default();
        notes.labels.extend(self.remove.into_iter().map(|key| (key, None)));
        for label in self.labels {
            let Some((key, value)) = label.split_once('=') else {
                return Err(Failure::new("invalid", format!("{label}: write KEY=VALUE")).into());
            };
            notes.labels.insert(key.to_owned(), Some(value.to_owned()));
        }
        note(host, &self.store, &self.name, notes)
    }
}
