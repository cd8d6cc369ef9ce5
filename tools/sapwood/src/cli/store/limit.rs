//! `sapwood limit`.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::Args;
use hyper::Method;
use sapwood_qos::names::Named;
use sapwood_store::rows::GroupRow;

use super::{DefaultStore, table};
use crate::cli::limits::{LimitOptions, line};
use crate::cli::output::{self, Output};
use crate::control::client::Client;
use crate::control::wire::{Limit as Asked, Nothing};
use crate::host::Host;
use crate::volumes::access::Access;
use crate::volumes::address::default_store;
use crate::volumes::limit::{DeleteGroup, LimitGroup, LimitVolume, LimitsShown, ShowLimits};

/// Limit what guests may do, share what the host can do, or show that
///
/// Without limits it shows what is set: of a volume, a group, or all. What is set is kept in the store and applies at once,
/// while guests run. What is not named stays as it is.
///
/// A group limits all volumes in it together, each of which may have limits of its own; groups can be in groups. With --control the
/// disk of sapwood serve is limited for as long as that runs.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  sapwood limit /srv/vms:web --iops 5000 --burst-iops 20000 --burst-seconds 10 --bps-write 100M
  sapwood limit /srv/vms:db --weight 200 --reserve-iops 500
  sapwood limit --store /srv/vms --group tenant-a --bps 200M
  sapwood limit /srv/vms:web --in-group tenant-a
  sapwood limit /srv/vms:web --iops 0                no such limit any more
  sapwood limit --store /srv/vms                     show all
  sapwood limit --control /run/vm1.control --iops 1000")]
pub struct Limit {
    #[command(flatten)]
    limits: LimitOptions,

    /// Forget what was set and is not named
    #[arg(long)]
    reset: bool,

    /// The group that it is in from now on, or none
    #[arg(long, value_name = "GROUP", conflicts_with = "control")]
    in_group: Option<String>,

    /// What is limited is this group, which is made if there is none of that name
    #[arg(long, value_name = "GROUP", conflicts_with_all = ["name", "control"])]
    group: Option<String>,

    /// Delete the group, in which nothing is
    #[arg(long, requires = "group", conflicts_with_all = ["reset", "in_group"])]
    delete: bool,

    /// What is limited is the disk of the server whose --control names this socket
    #[arg(long, value_name = "PATH", conflicts_with = "name")]
    control: Option<PathBuf>,

    /// human or json
    #[arg(long, value_enum, value_name = "KIND", default_value_t)]
    output: Output,

    #[command(flatten)]
    store: DefaultStore,

    /// What is limited is this volume
    #[arg(value_name = "VOLUME")]
    name: Option<OsString>,
}

impl Limit {
    pub fn run(self, host: &Host) -> anyhow::Result<()> {
        let limits = self.limits.named()?;
        let is_change = !limits.is_empty() || self.reset || self.in_group.is_some();
        if let Some(socket) = &self.control {
            return self.serve(socket, limits, is_change);
        }
        let group = self.in_group.clone().map(|group| Some(group).filter(|group| group != "none"));
        let shown = match (&self.name, self.group.clone()) {
            (Some(name), _) => {
                let (access, volume) = self.store.volume(host, name)?;
                if is_change {
                    access.ask(LimitVolume { volume, limits, reset: self.reset, group })?
                } else {
                    let mut shown = access.ask(ShowLimits {})?;
                    shown.groups.clear();
                    shown.volumes.retain(|name, _| *name == volume);
                    shown
                }
            }
            (None, Some(group_name)) => {
                let access = self.whole(host)?;
                if self.delete {
                    access.ask(DeleteGroup { group: group_name })?;
                    return Ok(());
                }
                if is_change {
                    access.ask(LimitGroup { group: group_name, limits, reset: self.reset, parent: group })?
                } else {
                    let mut shown = access.ask(ShowLimits {})?;
                    shown.volumes.clear();
                    shown.groups.retain(|name, _| *name == group_name);
                    shown
                }
            }
            (None, None) if is_change => {
                anyhow::bail!("what is to be limited? Name a volume, --group or --control")
            }
            (None, None) => self.whole(host)?.ask(ShowLimits {})?,
        };
        match self.output {
            Output::Human => output::print(&text(&shown)),
            Output::Json => output::print_json(&shown),
        }
    }

    fn whole(&self, host: &Host) -> anyhow::Result<Access> {
        Access::to(*host, &default_store(self.store.given())?)
    }

    /// Asks the server of a disk.
    fn serve(&self, socket: &std::path::Path, limits: Named, is_change: bool) -> anyhow::Result<()> {
        let (client, path) = (Client::new(socket), "/v1/disk/limits");
        let now: Named = if is_change {
            client.read(Method::POST, path, &Asked { limits, reset: self.reset })?
        } else {
            client.read(Method::GET, path, &Nothing {})?
        };
        match self.output {
            Output::Human => output::print(&format!("{}\n", line(&now))),
            Output::Json => output::print_json(&now),
        }
    }
}

fn text(shown: &LimitsShown) -> String {
    let cells = |kind: &str, (name, row): (&String, &GroupRow)| {
        let group = row.group.as_ref().map(|group| format!("in {group}: ")).unwrap_or_default();
        vec![format!("{kind} {name}"), format!("{group}{}", line(&row.limits))]
    };
    let groups = shown.groups.iter().map(|row| cells("group", row));
    let lines: Vec<Vec<String>> =
        groups.chain(shown.volumes.iter().map(|row| cells("volume", row))).collect();
    if lines.is_empty() { "no limits\n".to_owned() } else { table(&lines) }
}
