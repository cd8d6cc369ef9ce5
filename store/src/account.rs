//! Accounts: what each snapshot and volume takes alone, and what it shares.
//!
//! One rule: what is *exclusive* to something would be free if that alone were gone, after the next collection; what is *shared*, others need,
//! too. Of a sealed snapshot both are found by the walk over its tree: what no other sealed snapshot reaches, and what another
//! does. A snapshot that is not sealed, and a volume, take the bytes that their layer's file occupies, all of them exclusive; what
//! the snapshot below them holds is that one's, and not counted again. Equal snapshots have nothing alone.

use std::collections::BTreeMap;
use std::sync::Arc;

use sapwood_blockdev::engine::Engine;
use sapwood_blockdev::io::Io;
use sapwood_blockdev::storage::Storage;
use sapwood_image::sealed::Root;
use sapwood_image::sealed::collect::{Accounts, Detail, Pace, RootAccount, account};

use crate::catalog::rows::{AccountRow, NodeRow, NodeState, Space, VolumeRow};
use crate::catalog::{Look, View};
use crate::collect::roots;
use crate::error::Result;
use crate::id::Id;
use crate::store::Store;

/// What an account has found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Account {
    /// Of each snapshot, deleted ones that others need included.
    pub nodes: BTreeMap<Id, Space>,
    /// Of each volume.
    pub volumes: BTreeMap<Id, Space>,
    /// Of each sealed snapshot, in blocks and nodes.
    pub sealed_nodes: BTreeMap<Id, RootAccount>,
    /// Of everything that is sealed.
    pub sealed: AccountRow,
}

impl<S: Storage, E: Engine<File = S::File>> Store<S, E> {
    /// Finds out what every snapshot and volume takes, and writes it into the catalog, with the time when this began. With
    /// [`Detail::Exclusive`], what sealed snapshots share stays what it was when that was last counted, or 0.
    ///
    /// # Errors
    /// Another account or a collection is under way; something that a snapshot needs cannot be read;
    /// [`Cancelled`](sapwood_image::ErrorKind::Cancelled); what the storage says.
    pub async fn account(&self, io: &Io<E>, pace: &Arc<Pace>, detail: Detail) -> Result<Account> {
        let _accounting = self.only_one("account")?;
        // Nodes that are read are where they are as long as no collection moves them.
        let _still = self.only_one("collection")?;
        let found_ms = self.now_ms();
        let view = self.catalog.view()?;
        let stored = roots(&view)?;
        let all: Vec<Root> = stored.iter().map(|stored| stored.root).collect();
        let mut finder = self.finder(io, pace)?;
        let accounts = account(&mut finder, &all, detail).await?;
        let old: BTreeMap<Id, NodeRow> = view.nodes()?.into_iter().collect();
        let mut nodes = self.of_layers(&view, found_ms)?;
        for (stored, found) in stored.iter().zip(&accounts.roots) {
            let before = old.get(&stored.node).and_then(|row| row.space).map_or(0, |space| space.shared);
            let shared = found.shared.map_or(before, |shared| shared.stored_bytes());
            let space = nodes.entry(stored.node).or_insert(Space { exclusive: 0, shared: 0, found_ms });
            // Of a layer that is sealed in part there is both.
            space.exclusive += found.exclusive.stored_bytes();
            space.shared += shared;
        }
        let mut volumes = BTreeMap::new();
        for (id, row) in view.volumes()? {
            let exclusive = row.layer.map_or(Ok(0), |layer| self.allocated(&self.directory.layer(layer)))?;
            volumes.insert(id, Space { exclusive, shared: 0, found_ms });
        }
        drop(view);
        let whole_roots = stored.iter().zip(&accounts.roots).filter(|(stored, _)| stored.is_whole);
        let sealed_nodes = whole_roots.map(|(stored, found)| (stored.node, *found)).collect();
        let account = Account { nodes, volumes, sealed_nodes, sealed: whole(&accounts, found_ms) };
        self.note_account(&account)?;
        Ok(account)
    }

    /// What snapshots take in layers.
    fn of_layers(&self, view: &View, found_ms: u64) -> Result<BTreeMap<Id, Space>> {
        let mut nodes = BTreeMap::new();
        for (id, row) in view.nodes()? {
            let exclusive = match row.state {
                NodeState::Frozen { layer, .. } => self.allocated(&self.directory.layer(layer))?,
                NodeState::Bare | NodeState::Sealed(_) => 0,
            };
            nodes.insert(id, Space { exclusive, shared: 0, found_ms });
        }
        Ok(nodes)
    }

    /// Writes an account into the rows that are still there.
    fn note_account(&self, account: &Account) -> Result<()> {
        self.catalog.change(|change| {
            for (id, space) in &account.nodes {
                if let Some(row) = change.node(*id)? {
                    change.put_node(*id, Some(&NodeRow { space: Some(*space), ..row }))?;
                }
            }
            for (id, space) in &account.volumes {
                if let Some(row) = change.volume(*id)? {
                    change.put_volume(*id, Some(&VolumeRow { space: Some(*space), ..row }))?;
                }
            }
            change.put_account_row(&account.sealed)
        })
    }
}

/// What is said of everything together.
fn whole(accounts: &Accounts, found_ms: u64) -> AccountRow {
    let referenced = accounts.roots.iter().map(|root| {
        let shared = root.shared?;
        Some(root.exclusive.logical_bytes() + shared.logical_bytes())
    });
    AccountRow {
        found_ms,
        referenced_bytes: referenced.sum(),
        unique_bytes: accounts.total.logical_bytes(),
        stored_bytes: accounts.total.stored_bytes(),
    }
}
