//! What damage touches: the snapshots and volumes over it, and which of their bytes.
//!
//! A sealed snapshot is whole in itself. What has a layer is touched by damage in that, and by what is damaged below it and not covered
//! by its layer; what holds nothing itself is what lies below it.

use std::collections::BTreeMap;
use std::ops::Range;

use sapwood_blockdev::engine::Engine;
use sapwood_blockdev::io::Io;
use sapwood_blockdev::storage::Storage;
use sapwood_blockdev::units::BLOCK_SIZE;
use sapwood_image::layer::Layer;
use sapwood_image::sealed::{Content, FrozenSource, Source};

use crate::catalog::rows::{NodeRow, NodeState, VolumeRow};
use crate::catalog::{Look, View};
use crate::error::Result;
use crate::id::Id;
use crate::store::Store;

/// Damage in a layer or a sealed disk itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Own {
    /// Bytes of the disk.
    pub(crate) ranges: Vec<Range<u64>>,
    /// Whether nothing else lies in them.
    pub(crate) is_exact: bool,
    pub(crate) why: String,
}

/// A snapshot or a volume of which something cannot be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Touched {
    /// Its id.
    pub id: Id,
    /// `volume@snapshot` or `volume`; of a deleted snapshot its id.
    pub name: String,
    /// The bytes of its disk that cannot be read, or would read wrong; in order.
    pub ranges: Vec<Range<u64>>,
    /// Whether nothing else lies in the ranges.
    pub is_exact: bool,
    /// The snapshot that holds what is damaged, if that is not its own.
    pub through: Option<String>,
    /// What is wrong.
    pub why: String,
}

/// What of a node is damaged, itself or below it.
#[derive(Clone)]
struct Damaged {
    own: Own,
    /// The node that holds the first of it, where that is another one.
    through: Option<Id>,
}

/// Goes up the trees, from what is damaged.
pub(crate) struct Touching<'a, S: Storage, E: Engine<File = S::File>> {
    store: &'a Store<S, E>,
    io: &'a Io<E>,
    nodes: BTreeMap<Id, NodeRow>,
    volumes: BTreeMap<Id, VolumeRow>,
    layers: &'a BTreeMap<Id, Own>,
    sealed: &'a BTreeMap<Id, Own>,
    /// Of nodes that were looked at.
    known: BTreeMap<Id, Option<Damaged>>,
}

impl<'a, S: Storage, E: Engine<File = S::File>> Touching<'a, S, E> {
    /// With the damage of layers, by their ids, and that of sealed nodes, by theirs.
    pub(crate) fn new(
        store: &'a Store<S, E>,
        io: &'a Io<E>,
        view: &View,
        layers: &'a BTreeMap<Id, Own>,
        sealed: &'a BTreeMap<Id, Own>,
    ) -> Result<Self> {
        let nodes = view.nodes()?.into_iter().collect();
        let volumes = view.volumes()?.into_iter().collect();
        Ok(Self { store, io, nodes, volumes, layers, sealed, known: BTreeMap::new() })
    }

    /// Everything that is touched: snapshots, then volumes.
    pub(crate) async fn all(mut self) -> Result<Vec<Touched>> {
        if self.layers.is_empty() && self.sealed.is_empty() {
            return Ok(Vec::new());
        }
        let mut touched = Vec::new();
        let nodes: Vec<Id> = self.nodes.keys().copied().collect();
        for id in nodes {
            if let Some(damaged) = self.node(id).await? {
                touched.push(self.touched(id, self.name_of(id), damaged));
            }
        }
        let volumes: Vec<(Id, VolumeRow)> = self.volumes.clone().into_iter().collect();
        for (id, row) in volumes {
            let below = match row.parent {
                Some(parent) => self.node(parent).await?.map(|damaged| (parent, damaged)),
                None => None,
            };
            if let Some(damaged) = self.over(row.layer, row.size, below).await {
                touched.push(self.touched(id, row.name.clone(), damaged));
            }
        }
        Ok(touched)
    }

    fn touched(&self, id: Id, name: String, damaged: Damaged) -> Touched {
        let Damaged { own: Own { ranges, is_exact, why }, through } = damaged;
        Touched { id, name, ranges, is_exact, through: through.map(|id| self.name_of(id)), why }
    }

    fn name_of(&self, id: Id) -> String {
        let named = || {
            let row = self.nodes.get(&id)?;
            Some(format!("{}@{}", self.volumes.get(&row.volume?)?.name, row.name.as_ref()?))
        };
        named().unwrap_or_else(|| format!("{id} (a deleted snapshot)"))
    }

    /// What of a node is damaged. Those below it are looked at first, as far down as something sealed.
    async fn node(&mut self, id: Id) -> Result<Option<Damaged>> {
        let mut line = Vec::new();
        let mut next = Some(id);
        while let Some(id) = next.filter(|id| !self.known.contains_key(id)) {
            let Some(row) = self.nodes.get(&id) else { break };
            line.push(id);
            next = row.parent.filter(|_| !matches!(row.state, NodeState::Sealed(_)));
        }
        for id in line.into_iter().rev() {
            let row = self.nodes[&id].clone();
            let below = row.parent.and_then(|parent| Some((parent, self.known.get(&parent)?.clone()?)));
            let damaged = match row.state {
                NodeState::Sealed(_) => {
                    self.sealed.get(&id).map(|own| Damaged { own: own.clone(), through: None })
                }
                NodeState::Bare => self.over(None, row.size, below).await,
                NodeState::Frozen { layer, .. } => self.over(Some(layer), row.size, below).await,
            };
            self.known.insert(id, damaged);
        }
        Ok(self.known.get(&id).cloned().flatten())
    }

    /// What is damaged of a layer over something of which something is.
    async fn over(&self, layer: Option<Id>, size: u64, below: Option<(Id, Damaged)>) -> Option<Damaged> {
        let own = layer.and_then(|layer| self.layers.get(&layer));
        let mut damaged = own.map(|own| Damaged { own: own.clone(), through: None });
        let Some((parent, below)) = below else { return damaged };
        let through = Some(below.through.unwrap_or(parent));
        let Own { ranges, is_exact, why } = below.own;
        let ranges: Vec<Range<u64>> = ranges
            .into_iter()
            .map(|range| range.start.min(size)..range.end.min(size))
            .filter(|range| !range.is_empty())
            .collect();
        let (left, is_known) = match layer {
            Some(layer) => match self.store.unless_wanted(layer, self.uncovered(layer, &ranges)).await {
                Some(Some(left)) => (left, true),
                // In use, or itself damaged: it may cover some of it.
                None | Some(None) => (ranges, false),
            },
            None => (ranges, true),
        };
        if left.is_empty() {
            return damaged;
        }
        let is_exact = is_exact && is_known;
        match &mut damaged {
            Some(damaged) => {
                damaged.own.ranges = joined(std::mem::take(&mut damaged.own.ranges), left);
                damaged.own.is_exact &= is_exact;
            }
            None => damaged = Some(Damaged { own: Own { ranges: left, is_exact, why }, through }),
        }
        damaged
    }

    /// What of ranges of bytes a layer does not hold itself; none when it cannot be asked.
    async fn uncovered(&self, layer: Id, ranges: &[Range<u64>]) -> Option<Vec<Range<u64>>> {
        let (storage, path) = (&self.store.storage, self.store.directory.layer(layer));
        let opened = Layer::open_alone(storage, self.io, &path, self.store.options.tuning).await.ok()?;
        let mut source = FrozenSource::new(opened, self.io);
        let size = source.size();
        let mut left: Vec<Range<u64>> = Vec::new();
        for range in ranges {
            let mut at = range.start / BLOCK_SIZE;
            let end = range.end.min(size).div_ceil(BLOCK_SIZE);
            while at < end {
                let run = source.next(at).await.ok()?;
                let run_end = (at + run.count).min(end);
                if run.content == Content::Same {
                    let bytes = at * BLOCK_SIZE..(run_end * BLOCK_SIZE).min(size);
                    match left.last_mut() {
                        Some(last) if last.end == bytes.start => last.end = bytes.end,
                        _ => left.push(bytes),
                    }
                }
                at = run_end;
            }
        }
        Some(left)
    }
}

/// Two lists of ranges as one, in order.
fn joined(a: Vec<Range<u64>>, b: Vec<Range<u64>>) -> Vec<Range<u64>> {
    let mut all: Vec<Range<u64>> = a.into_iter().chain(b).collect();
    all.sort_unstable_by_key(|range| (range.start, range.end));
    let mut joined: Vec<Range<u64>> = Vec::with_capacity(all.len());
    for range in all {
        match joined.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => joined.push(range),
        }
    }
    joined
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[allow(clippy::single_range_in_vec_init, reason = "they are ranges")]
    fn ranges_are_joined_where_they_meet() {
        assert_eq!(joined(vec![0..4, 10..20], vec![4..6, 12..14, 30..31]), [0..6, 10..20, 30..31]);
        assert_eq!(joined(vec![], vec![5..6]), [5..6]);
    }
}
