//! Sealing: a snapshot whose contents are a layer becomes one in the packs.
//!
//! A layer is sealed over what lies below it, which is sealed already, so the snapshots of a line are sealed from the oldest on.
//! After each so many bytes what there is so far is published as a root of its own, which the node keeps beside its layer: after
//! a crash sealing goes on there.
//!
//! Order: packs and index ([`super::publish`]); the commit that says that the node is sealed; its layer's file goes, once nobody
//! reads it any more.

use std::sync::Arc;

use sapwood_blockdev::device::BlockDevice;
use sapwood_blockdev::engine::Engine;
use sapwood_blockdev::io::Io;
use sapwood_blockdev::storage::Storage;
use sapwood_image::sealed::collect::Pin;
use sapwood_image::sealed::{
    BoundedDedup, FRAME_BLOCKS, FrozenSource, Root, SealStats, Sealed, Sealing, Source, Step, Watch, Workers,
    seal,
};
use sapwood_image::{ErrorKind, ImageError};

use crate::catalog::rows::{self, NodeRow, NodeState};
use crate::catalog::{Change, Look};
use crate::error::{Result, StoreError, StoreErrorKind};
use crate::id::Id;
use crate::name::SnapshotName;
use crate::resolve::holder;
use crate::store::{Store, breaks, snapshot};

/// A snapshot that was sealed, or a part of it.
#[derive(Clone, Debug)]
pub struct SealedNode {
    /// The node.
    pub id: Id,
    /// Its name, `volume@snapshot`; none of a deleted one.
    pub name: Option<String>,
    /// Whether all of it is sealed; else whoever watched has stopped it.
    pub is_whole: bool,
    /// Counts.
    pub stats: SealStats,
}

/// What is to be sealed.
pub(crate) struct Job<'a> {
    pub(crate) workers: &'a Workers,
    /// Pins its base.
    pub(crate) pin: &'a Arc<Pin>,
    pub(crate) base: Option<Root>,
    /// The first block that is asked of the source.
    pub(crate) start: u64,
}

/// Stops for a publication now and then.
struct InParts<'a, W> {
    watch: &'a mut W,
    /// Bytes of packs after which what is sealed is published.
    bytes: u64,
    /// Whoever watches has stopped it.
    is_stopped: bool,
}

impl<W: Watch> Watch for InParts<'_, W> {
    async fn between(&mut self, stats: &SealStats) -> Step {
        let step = self.watch.between(stats).await;
        self.is_stopped |= step == Step::Stop;
        match step {
            Step::Go if stats.stored_bytes >= self.bytes => Step::Stop,
            step => step,
        }
    }
}

impl<S: Storage, E: Engine<File = S::File>> Store<S, E> {
    /// Seals the oldest snapshot that can be sealed: one whose layer is closed and over nothing, or over a sealed
    /// snapshot. None, when there is none, or others are at work on them. One that cannot be sealed keeps no younger
    /// one from it.
    ///
    /// # Errors
    /// When none can be sealed, of the oldest: what reading the layer or writing packs says. At once, whatever there is besides:
    /// [`Cancelled`](ErrorKind::Cancelled); there is no room left.
    pub async fn seal_next(
        &self,
        io: &Io<E>,
        workers: &Workers,
        watch: &mut impl Watch,
    ) -> Result<Option<SealedNode>> {
        let view = self.catalog.view()?;
        let mut ready: Vec<(u64, Id)> = Vec::new();
        for (id, row) in view.nodes()? {
            let is_frozen = matches!(row.state, NodeState::Frozen { settled: true, .. });
            if is_frozen && self.is_ready(&view, &row)? {
                ready.push((row.created_ms, id));
            }
        }
        drop(view);
        ready.sort_unstable();
        let mut failed = None;
        for (_, id) in ready {
            match self.seal_node(io, id, workers, watch).await {
                Ok(Some(sealed)) => return Ok(Some(sealed)),
                Ok(None) => {}
                Err(error) if self.ends_all(&error) => return Err(error),
                Err(error) => {
                    let view = self.catalog.view()?;
                    let row = view.node(id)?;
                    let name = row.map(|row| name_of(&view, &row)).transpose()?.flatten();
                    let name = name.unwrap_or_else(|| format!("{id} (a deleted snapshot)"));
                    log::warn!("{name} cannot be sealed, others may: {error}");
                    failed = failed.or(Some(error));
                }
            }
        }
        failed.map_or(Ok(None), Err)
    }

    /// Whether what went wrong with one snapshot would with every other.
    fn ends_all(&self, error: &StoreError) -> bool {
        let is_general =
            matches!(error.kind, StoreErrorKind::Image(ErrorKind::Cancelled) | StoreErrorKind::Full(_));
        is_general || self.catalog.is_unknown()
    }

    /// Seals a snapshot, and first those below it that are not sealed.
    ///
    /// # Errors
    /// As of [`Store::seal_next`]; no such snapshot; one that is attached, or that somebody else seals.
    pub async fn seal(
        &self,
        io: &Io<E>,
        name: &SnapshotName,
        workers: &Workers,
        watch: &mut impl Watch,
    ) -> Result<Vec<SealedNode>> {
        let (id, _) = snapshot(&self.catalog.view()?, name)?;
        self.seal_line(io, (name, id), workers, watch).await
    }

    /// The same by the id of a snapshot, whatever its name is by now.
    pub(crate) async fn seal_line(
        &self,
        io: &Io<E>,
        (name, id): (&SnapshotName, Id),
        workers: &Workers,
        watch: &mut impl Watch,
    ) -> Result<Vec<SealedNode>> {
        let view = self.catalog.view()?;
        let mut next = Some(id);
        let mut line = Vec::new();
        while let Some((id, row)) = holder(&view, next)? {
            match row.state {
                NodeState::Frozen { settled: true, .. } => line.push(id),
                NodeState::Frozen { .. } => {
                    let text = "its layer is still being closed: try again in a moment".to_owned();
                    return Err(StoreError::new(name, StoreErrorKind::InUse(text)));
                }
                _ => break,
            }
            next = row.parent;
        }
        drop(view);
        let mut sealed = Vec::new();
        for id in line.into_iter().rev() {
            let text = "it is being sealed by somebody else: wait for the end of that".to_owned();
            let Some(node) = self.seal_node(io, id, workers, watch).await? else {
                // Somebody may just have finished it.
                match self.catalog.view()?.node(id)?.map(|row| row.state) {
                    Some(NodeState::Sealed(_)) => continue,
                    _ => return Err(StoreError::new(name, StoreErrorKind::InUse(text))),
                }
            };
            let is_whole = node.is_whole;
            sealed.push(node);
            if !is_whole {
                break;
            }
        }
        Ok(sealed)
    }

    /// Whether what lies below a node is sealed.
    fn is_ready(&self, look: &impl Look, row: &NodeRow) -> Result<bool> {
        let below = holder(look, row.parent)?;
        Ok(below.is_none_or(|(_, row)| matches!(row.state, NodeState::Sealed(_))))
    }

    /// Seals a node whose layer is closed, unless somebody else does, or it is something else by now.
    async fn seal_node(
        &self,
        io: &Io<E>,
        id: Id,
        workers: &Workers,
        watch: &mut impl Watch,
    ) -> Result<Option<SealedNode>> {
        let Some(_sealing) = self.usage.sealing(id) else { return Ok(None) };
        // From here on it stays, and so does what lies below it.
        let held = self.catalog.hold_still(|look| {
            let Some(row) = look.node(id)? else { return Ok(None) };
            let NodeState::Frozen { layer, settled: true, .. } = row.state else { return Ok(None) };
            if !self.is_ready(look, &row)? {
                return Ok(None);
            }
            Ok(Some((self.usage.pin(id), self.usage.keep_layer(layer), layer)))
        })?;
        let Some((_node, kept, layer)) = held else { return Ok(None) };
        let opened = self.open_layer(io, layer, true).await?;
        let size = opened.geometry().size;
        let mut source = FrozenSource::new(opened, io);
        let mut total = SealStats::default();
        let (is_whole, name) = loop {
            let bytes = self.options.publish_bytes;
            let mut parts = InParts { watch: &mut *watch, bytes, is_stopped: false };
            let (is_whole, name, stats) =
                self.seal_part(io, (id, layer, size), &mut source, workers, &mut parts).await?;
            let is_stopped = parts.is_stopped;
            total.add(&stats);
            if is_whole || is_stopped {
                break (is_whole, name);
            }
        };
        drop((source, kept));
        if is_whole && !breaks!(self.options, UnlinkBeforeCommit) {
            self.remove_layers(io, &[layer]).await;
        }
        Ok(Some(SealedNode { id, name, is_whole, stats: total }))
    }

    /// Seals a node as far as one publication goes: whether that was the rest of it.
    async fn seal_part(
        &self,
        io: &Io<E>,
        (id, layer, size): (Id, Id, u64),
        source: &mut FrozenSource<E>,
        workers: &Workers,
        watch: &mut impl Watch,
    ) -> Result<(bool, Option<String>, SealStats)> {
        let view = self.catalog.view()?;
        let row = view.needed_node(id)?;
        let NodeState::Frozen { sealing, .. } = row.state else { unreachable!("it is taken") };
        let below = match holder(&view, row.parent)? {
            Some((_, NodeRow { state: NodeState::Sealed(top), size, .. })) => Some(top.root(size)),
            _ => None,
        };
        drop(view);
        let (base, start) = match sealing {
            Some(sealing) => (Some(sealing.top.root(size)), sealing.next),
            None => (below, 0),
        };
        let pin = Arc::new(self.content.pins().pin(base.as_slice()));
        let job = Job { workers, pin: &pin, base, start };
        let (sealed, mut dedup) = self.seal_source(io, &job, source, watch).await?;
        if breaks!(self.options, UnlinkBeforeCommit) && sealed.next.is_none() {
            self.remove_files(io, [self.directory.layer(layer)]).await;
        }
        if sealed.next == Some(start) {
            self.remove_files(io, sealed.packs.into_iter().map(|pack| pack.path)).await;
            return Ok((false, None, sealed.stats));
        }
        let top = rows::Top::from(sealed.root.tree);
        let (state, is_whole) = match sealed.next {
            Some(next) => {
                let sealing = Some(rows::Sealing { top, next });
                (NodeState::Frozen { layer, settled: true, sealing }, false)
            }
            None => (NodeState::Sealed(top), true),
        };
        let name = self.publish(io, &sealed.packs, |change| change.put_state(id, state)).await?;
        dedup.publish();
        drop(pin);
        Ok((is_whole, name, sealed.stats))
    }

    /// Seals a disk into new packs, which nobody knows yet. When these are published, what was learned of them is, too.
    pub(crate) async fn seal_source(
        &self,
        io: &Io<E>,
        job: &Job<'_>,
        source: &mut impl Source,
        watch: &mut impl Watch,
    ) -> Result<(Sealed, BoundedDedup)> {
        self.content.learn(io, &self.catalog).await?;
        if source.size() == 0 {
            let text = "a disk of no bytes is none: nothing is imported";
            return Err(StoreError::invalid(self.directory.root().display(), text));
        }
        let (mut refused, mut begun) = (None, Vec::new());
        let numbers = || {
            let number =
                self.check_room(self.options.pack_bytes).and_then(|()| self.content.pack_numbers.next());
            let number = number.map_err(|error| {
                let text = error.to_string();
                refused = Some(error);
                ImageError::invalid(self.directory.root(), text)
            })?;
            job.pin.begin_pack(number);
            begun.push(number);
            Ok(number)
        };
        let mut dedup = BoundedDedup::new(self.content.dedup(), job.pin);
        let sealing = Sealing {
            storage: &self.storage,
            io,
            directory: &self.directory.packs(),
            packs: self.content.packs(),
            dedup: &mut dedup,
            workers: job.workers,
            base: job.base,
            frame_blocks: FRAME_BLOCKS,
            pack_bytes: self.options.pack_bytes,
            start: job.start,
        };
        let sealed = seal(sealing, source, numbers, watch).await;
        // Why there is no number the store says better.
        let sealed = sealed.map_err(|error| {
            // Their files are gone: nothing of them is kept open.
            self.content.packs().withdraw(&begun);
            refused.unwrap_or_else(|| error.into())
        })?;
        Ok((sealed, dedup))
    }
}

impl Change {
    /// Says what holds the contents of a node; its name.
    fn put_state(&mut self, id: Id, state: NodeState) -> Result<Option<String>> {
        let row = self.needed_node(id)?;
        let name = name_of(self, &row)?;
        self.put_node(id, Some(&NodeRow { state, space: None, ..row }))?;
        Ok(name)
    }
}

/// The name of a snapshot, `volume@snapshot`; none of a deleted one.
fn name_of(look: &impl Look, row: &NodeRow) -> Result<Option<String>> {
    let volume = match row.volume {
        Some(volume) => look.volume(volume)?,
        None => None,
    };
    Ok(volume.zip(row.name.as_ref()).map(|(volume, name)| format!("{}@{name}", volume.name)))
}
