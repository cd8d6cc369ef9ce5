//! Deliberate breaches of the order of things on disk, for the crash test to notice.

/// A rule to break.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mutation {
    /// The catalog gets its name, and the directory is not synced.
    RenameWithoutDirectorySync,
    /// The catalog names a layer before that is durable.
    CommitBeforeLayer,
    /// Files go before the catalog has let go of them.
    UnlinkBeforeCommit,
    /// A layer that was not closed properly becomes a snapshot as it is.
    SnapshotWithoutSync,
    /// The catalog's syncs do nothing.
    CatalogWithoutSync,
    /// The catalog names packs whose directory was not synced.
    PublishWithoutSync,
    /// A collection forgets what snapshots hold that have no name any more.
    CollectWithoutNameless,
    /// A collection does not ask what seals and imports pin.
    CollectWithoutPins,
    /// The file of a layer that was sealed goes while somebody reads it.
    UnlinkWhileRead,
}

impl Mutation {
    /// Every mutation.
    pub const ALL: [Self; 9] = [
        Self::RenameWithoutDirectorySync,
        Self::CommitBeforeLayer,
        Self::UnlinkBeforeCommit,
        Self::SnapshotWithoutSync,
        Self::CatalogWithoutSync,
        Self::PublishWithoutSync,
        Self::CollectWithoutNameless,
        Self::CollectWithoutPins,
        Self::UnlinkWhileRead,
    ];
}
