//! Checking: whether the catalog is in itself as it should be, and the files are there that it names, without reading data.
//!
//! The invariants are those of `docs/store.md`. What a [scrub](super::scrub) reads is not read here.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use sapwood_blockdev::engine::Engine;
use sapwood_blockdev::io::Io;
use sapwood_blockdev::storage::{OpenOptions, Storage};
use sapwood_image::ErrorKind;
use sapwood_image::layer::{Layer, StoreBase};
use sapwood_image::sealed::PackKind as Kind;
use sapwood_image::sealed::index::Run;

use crate::catalog::rows::{NodeRow, NodeState, PackKind, VolumeRow};
use crate::catalog::{Child, Look, View};
use crate::collect::roots;
use crate::error::{Result, StoreError};
use crate::id::Id;
use crate::scrub::layers_of;
use crate::store::Store;

/// How bad a problem is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// A leftover of a crash, which opening the store removes or ends.
    Leftover,
    /// Something is missing or wrong.
    Damage,
}

/// Something that is not as it should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// How bad it is.
    pub severity: Severity,
    /// What it is about: a volume or snapshot by name, a file, a row.
    pub subject: String,
    /// What is wrong.
    pub text: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.subject, self.text)
    }
}

/// A layer that a row names.
struct Named {
    layer: Id,
    /// Whose it is.
    by: String,
    /// Size of its disk in bytes, where that cannot change.
    size: Option<u64>,
    /// The node that its owner lies over.
    parent: Option<Id>,
}

/// A check under way.
struct Check<'a> {
    view: &'a View,
    nodes: BTreeMap<Id, NodeRow>,
    volumes: BTreeMap<Id, VolumeRow>,
    problems: Vec<Problem>,
}

impl Check<'_> {
    fn add(&mut self, severity: Severity, subject: impl fmt::Display, text: impl fmt::Display) {
        let (subject, text) = (subject.to_string(), text.to_string());
        self.problems.push(Problem { severity, subject, text });
    }

    fn damage(&mut self, subject: impl fmt::Display, text: impl fmt::Display) {
        self.add(Severity::Damage, subject, text);
    }

    /// A node, for messages.
    fn name_of(&self, id: Id) -> String {
        let named = || {
            let row = self.nodes.get(&id)?;
            Some(format!("{}@{}", self.volumes.get(&row.volume?)?.name, row.name.as_ref()?))
        };
        named().unwrap_or_else(|| format!("node {id}"))
    }

    /// Every name has its row, and every row its name.
    fn names(&mut self) -> Result<()> {
        let view = self.view;
        let mut named = BTreeSet::new();
        for (name, id) in view.volume_names()? {
            if self.volumes.get(&id).is_none_or(|row| row.name != name) {
                self.damage(
                    &name,
                    format!("the name belongs to volume {id}, which is not there or has another"),
                );
            }
            named.insert(id);
        }
        let nameless: Vec<Id> = self.volumes.keys().filter(|id| !named.contains(id)).copied().collect();
        for id in nameless {
            self.damage(format!("volume {id}"), "it is not among the names");
        }
        let mut named = BTreeSet::new();
        let volumes: Vec<Id> = self.volumes.keys().copied().collect();
        for volume in volumes {
            for (name, id) in view.snapshots_of(volume)? {
                let fits = self.nodes.get(&id).is_some_and(|row| {
                    row.name.as_deref() == Some(name.as_str()) && row.volume == Some(volume)
                });
                if !fits {
                    let text = format!("the name belongs to node {id}, which is not there or has another");
                    self.damage(format!("{}@{name}", self.volumes[&volume].name), text);
                }
                named.insert(id);
            }
        }
        let rows: Vec<(Id, bool)> = self.nodes.iter().map(|(id, row)| (*id, row.name.is_some())).collect();
        for (id, has_name) in rows {
            if has_name && !named.contains(&id) {
                self.damage(self.name_of(id), "it is not among the names of snapshots");
            }
        }
        Ok(())
    }

    /// Parents are there, and say what `children` does; no node lies over itself.
    fn trees(&mut self, is_pinned: impl Fn(Id) -> bool) -> Result<()> {
        let mut said: BTreeSet<(Id, Id)> = BTreeSet::new();
        for (parent, child) in self.view.all_children()? {
            let (id, is_so) = match child {
                Child::Node(id) => (id, self.nodes.get(&id).map(|row| row.parent) == Some(Some(parent))),
                Child::Volume(id) => (id, self.volumes.get(&id).map(|row| row.parent) == Some(Some(parent))),
            };
            if !is_so {
                self.damage(self.name_of(parent), format!("{id} is said to lie over it, and does not"));
            }
            said.insert((parent, id));
        }
        let of_nodes = self.nodes.iter().map(|(id, row)| (*id, row.parent));
        let of_volumes = self.volumes.iter().map(|(id, row)| (*id, row.parent));
        let parents: Vec<(Id, Id)> =
            of_nodes.chain(of_volumes).filter_map(|(id, parent)| Some((id, parent?))).collect();
        for (id, parent) in &parents {
            if !self.nodes.contains_key(parent) {
                self.damage(self.name_of(*id), format!("it lies over node {parent}, which is not there"));
            } else if !said.contains(&(*parent, *id)) {
                self.damage(self.name_of(*parent), format!("{id} lies over it, and is not said to"));
            }
        }
        self.cycles();
        let with_children: BTreeSet<Id> = parents.into_iter().map(|(_, parent)| parent).collect();
        let unneeded = |(id, row): (&Id, &NodeRow)| {
            (row.name.is_none() && !with_children.contains(id) && !is_pinned(*id)).then_some(*id)
        };
        let unneeded: Vec<Id> = self.nodes.iter().filter_map(unneeded).collect();
        for id in unneeded {
            self.add(Severity::Leftover, format!("node {id}"), "nothing needs it");
        }
        Ok(())
    }

    fn cycles(&mut self) {
        let mut ends: BTreeSet<Id> = BTreeSet::new();
        let ids: Vec<Id> = self.nodes.keys().copied().collect();
        for id in ids {
            let (mut next, mut passed) = (Some(id), BTreeSet::new());
            while let Some(id) = next.filter(|id| !ends.contains(id)) {
                if !passed.insert(id) {
                    self.damage(self.name_of(id), "it lies over itself");
                    break;
                }
                next = self.nodes.get(&id).and_then(|row| row.parent);
            }
            ends.extend(passed);
        }
    }

    /// Whether a node is `parent`, or below that.
    fn is_below(&self, node: Id, parent: Option<Id>) -> bool {
        let mut next = parent;
        // A line that never ends was said to be one.
        for _ in 0..=self.nodes.len() {
            match next {
                Some(id) if id == node => return true,
                Some(id) => next = self.nodes.get(&id).and_then(|row| row.parent),
                None => return false,
            }
        }
        false
    }

    /// The layers that rows name, each by one row only.
    fn layers(&mut self) -> Vec<Named> {
        let of_nodes = self.nodes.iter().filter_map(|(id, row)| match row.state {
            NodeState::Frozen { layer, .. } => {
                Some(Named { layer, by: self.name_of(*id), size: Some(row.size), parent: row.parent })
            }
            NodeState::Bare | NodeState::Sealed(_) => None,
        });
        let of_volumes = self.volumes.values().filter_map(|row| {
            Some(Named { layer: row.layer?, by: row.name.clone(), size: None, parent: row.parent })
        });
        let layers: Vec<_> = of_nodes.chain(of_volumes).collect();
        let mut seen = BTreeSet::new();
        for Named { layer, by, .. } in &layers {
            if !seen.insert(*layer) {
                self.damage(by, format!("its layer {layer} is also that of another"));
            }
        }
        layers
    }

    /// Numbers that are given out next are above all that were.
    fn counters(&mut self) -> Result<()> {
        let packs = self.view.packs()?.into_iter().map(|(number, _)| number).max();
        let runs = self.view.index_runs()?.into_iter().map(|(number, _)| number).max();
        for (counter, highest) in [("pack", packs), ("index_run", runs)] {
            let next = self.view.counter(counter)?;
            if let Some(highest) = highest.filter(|highest| u64::from(*highest) >= next) {
                let text = format!("it is {next}, and number {highest} was given out");
                self.damage(format!("counter {counter}"), text);
            }
        }
        Ok(())
    }
}

impl<S: Storage, E: Engine<File = S::File>> Store<S, E> {
    /// Compares the rows of the catalog with each other and with the files, without reading data. Nothing is changed.
    ///
    /// # Errors
    /// A collection or a merge of the index is under way; what the catalog or the storage says; what is wrong with the store is no error.
    pub async fn check(&self, io: &Io<E>) -> Result<Vec<Problem>> {
        // Packs go by collections alone, and runs by merges; layers that go meanwhile keep their files until then.
        let _still = self.only_one("collection")?;
        let _unmerged = self.only_one("merge of the index")?;
        let (view, _held) = self.catalog.hold_still(|_| {
            let view = self.catalog.view()?;
            let held = layers_of(&view)?.into_iter().map(|(layer, _)| self.usage.keep_layer(layer));
            Ok((view, held.collect::<Vec<_>>()))
        })?;
        let mut check = Check {
            view: &view,
            nodes: view.nodes()?.into_iter().collect(),
            volumes: view.volumes()?.into_iter().collect(),
            problems: Vec::new(),
        };
        check.names()?;
        check.trees(|id| self.usage.is_pinned(id))?;
        check.counters()?;
        self.check_layers(io, &mut check).await;
        self.check_packs(io, &mut check).await?;
        self.check_runs(io, &mut check).await?;
        self.check_tops(io, &mut check).await?;
        let Check { nodes, mut problems, .. } = check;
        let mut leftover = |subject: String, text: &str| {
            problems.push(Problem { severity: Severity::Leftover, subject, text: text.to_owned() });
        };
        for (id, row) in nodes {
            let in_use = row.volume.is_some_and(|volume| self.usage.of_volume(volume).is_some());
            if matches!(row.state, NodeState::Frozen { settled: false, .. }) && !in_use {
                leftover(format!("node {id}"), "its layer was not closed properly");
            }
        }
        drop(view);
        for id in self.orphans()? {
            leftover(self.directory.layer(id).display().to_string(), "nothing names it");
        }
        for path in self.orphaned_files()? {
            leftover(path.display().to_string(), "nothing names it");
        }
        Ok(problems)
    }

    async fn check_layers(&self, io: &Io<E>, check: &mut Check<'_>) {
        for Named { layer, by, size, parent } in check.layers() {
            let path = self.directory.layer(layer);
            let looking = async {
                let opened = Layer::open_alone(&self.storage, io, &path, self.options.tuning).await;
                opened.map(|opened| opened.info())
            };
            let info = match self.unless_wanted(layer, looking).await {
                Some(Ok(info)) => info,
                // In use: then it is there.
                Some(Err(error)) if matches!(error.kind, ErrorKind::Locked { .. }) => continue,
                Some(Err(error)) => {
                    check.damage(by, error);
                    continue;
                }
                // Somebody is about to open it, and will find out what it is.
                None => {
                    if let Err(error) = self.storage.open(&path, OpenOptions::READ) {
                        check.damage(by, StoreError::io(&path, "open", error));
                    }
                    continue;
                }
            };
            if info.id != layer.to_string() {
                check.damage(&by, format!("{}: it is layer {}", path.display(), info.id));
            }
            if let Some(size) = size.filter(|size| *size != info.size) {
                let text = format!("{}: its disk has {} bytes, not {size}", path.display(), info.size);
                check.damage(&by, text);
            }
            let is_strange =
                |base: &StoreBase| base.store != self.id().0 || !check.is_below(Id(base.snapshot), parent);
            if let Some(base) = info.store_base.filter(is_strange) {
                check.damage(&by, format!("{}: its base {base} is not below it", path.display()));
            }
        }
    }

    async fn check_packs(&self, io: &Io<E>, check: &mut Check<'_>) -> Result<()> {
        for (number, row) in check.view.packs()? {
            let pack = match self.content.packs().pack(io, number).await {
                Ok(pack) => pack,
                Err(error) => {
                    check.damage(format!("pack {number}"), error);
                    continue;
                }
            };
            let kind = match pack.kind() {
                Kind::Data => PackKind::Data,
                Kind::Nodes => PackKind::Nodes,
            };
            let found = (kind, pack.bytes(), u64::from(pack.entries()));
            if found != (row.kind, row.bytes, row.entries) {
                let text =
                    format!("it is {found:?}, and the catalog says {:?}", (row.kind, row.bytes, row.entries));
                check.damage(pack.path().display(), text);
            }
        }
        Ok(())
    }

    async fn check_runs(&self, io: &Io<E>, check: &mut Check<'_>) -> Result<()> {
        for (number, row) in check.view.index_runs()? {
            match Run::open(&self.storage, io, &self.directory.index(), number).await {
                Ok(run) if run.entries() != row.entries => {
                    let text =
                        format!("it has {} entries, and the catalog says {}", run.entries(), row.entries);
                    check.damage(run.path().display(), text);
                }
                Ok(_) => {}
                Err(error) => check.damage(format!("run {number} of the index"), error),
            }
        }
        Ok(())
    }

    /// The top node of each sealed disk can be read.
    async fn check_tops(&self, io: &Io<E>, check: &mut Check<'_>) -> Result<()> {
        for stored in roots(check.view)? {
            let top = stored.root.tree;
            if top.hash.is_zero() {
                continue;
            }
            if let Err(error) = self.content.packs().node(io, &top).await {
                check.damage(check.name_of(stored.node), error);
            }
        }
        Ok(())
    }
}
