//! `sapwood show`.

use std::ffi::OsString;
use std::fmt::Write;

use clap::Args;
use sapwood_store::Name;

use super::{DefaultStore, age};
use crate::cli::output::{self, Output};
use crate::cli::size;
use crate::host::Host;
use crate::volumes::access::Access;
use crate::volumes::address::Address;
use crate::volumes::answer::{Entry, State};
use crate::volumes::look::{ShowSnapshot, ShowVolume};

/// Describe a volume or snapshot
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  sapwood show /srv/vms:web
  sapwood show --output=json /srv/vms:web@monday")]
pub struct Show {
    #[command(flatten)]
    store: DefaultStore,

    /// human or json
    #[arg(long, value_enum, value_name = "KIND", default_value_t)]
    output: Output,

    /// The volume or snapshot
    #[arg(value_name = "NAME")]
    name: OsString,
}

impl Show {
    pub fn run(self, host: &Host) -> anyhow::Result<()> {
        show(host, self.store.address(&self.name)?, self.output)
    }
}

/// Describes what an address means.
pub fn show(host: &Host, address: Address, output: Output) -> anyhow::Result<()> {
    let access = Access::to(*host, &address.store)?;
    let entry = match address.name {
        Name::Volume(volume) => access.ask(ShowVolume { volume })?,
        Name::Snapshot(name) => access.ask(ShowSnapshot { volume: name.volume, snapshot: name.snapshot })?,
    };
    match output {
        Output::Human => output::print(&text(&entry)),
        Output::Json => output::print_json(&entry),
    }
}

fn text(entry: &Entry) -> String {
    let what = if entry.state == State::Volume { "volume" } else { "snapshot" };
    let mut text = format!("{what}: {}\nid: {}\n", entry.name, entry.id);
    write(&mut text, entry).expect("writing to a string does not fail");
    text
}

fn write(text: &mut String, entry: &Entry) -> std::fmt::Result {
    if entry.state != State::Volume {
        writeln!(text, "state: {}", entry.state.name())?;
    }
    writeln!(text, "virtual size: {}", size::display(entry.virtual_size))?;
    writeln!(text, "made: {} ago", age(entry.created_ms))?;
    if let Some(parent) = &entry.parent {
        writeln!(text, "lies over: {parent}")?;
    }
    if let Some(snapshots) = entry.snapshots {
        writeln!(text, "snapshots: {snapshots}")?;
    }
    if let (Some(exclusive), Some(shared), Some(then)) =
        (entry.exclusive_bytes, entry.shared_bytes, entry.space_ms)
    {
        let (exclusive, shared) = (size::short(exclusive), size::short(shared));
        writeln!(text, "space: {exclusive} exclusive, {shared} shared ({} ago)", age(then))?;
    }
    if entry.protected {
        writeln!(text, "protected: yes")?;
    }
    if !entry.description.is_empty() {
        writeln!(text, "description: {}", entry.description)?;
    }
    for (key, value) in &entry.labels {
        writeln!(text, "label: {key}={value}")?;
    }
    if let Some(serving) = &entry.attached {
        let connected = if serving.frontend_connected { ", connected" } else { "" };
        writeln!(text, "attached: {} ({} queues{connected})", serving.socket.display(), serving.queues)?;
    }
    if let Some(why) = &entry.attach_failed {
        writeln!(text, "could not be attached again: {why}")?;
    }
    Ok(())
}
