//! The rows of the catalog's tables, stored as JSON.
//!
//! Fields may be added: a row without one gets its default, and what this program does not know of a
//! volume or snapshot is kept when the row is written again.

use std::collections::BTreeMap;

use sapwood_image::sealed::{Child, Hash, Place, Root};
use sapwood_qos::names::Named;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::id::Id;

/// What users say of a volume or snapshot.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Notes {
    /// Not to be deleted.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub protected: bool,
    /// Free text.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub description: String,
    /// Keys and values.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
}

/// What a pass over the store has found that a volume or snapshot takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Space {
    /// Bytes that nothing else needs.
    pub exclusive: u64,
    /// Bytes that others need, too.
    pub shared: u64,
    /// When the pass began, in milliseconds since 1970.
    pub found_ms: u64,
}

/// A volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeRow {
    /// Its name.
    pub name: String,
    /// When it was made, in milliseconds since 1970.
    pub created_ms: u64,
    /// Size of its disk in bytes, as it was last detached; while it has a layer, that knows better.
    pub size: u64,
    /// The snapshot below what the volume holds itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<Id>,
    /// The layer that its guest writes, from the first time that it is attached.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub layer: Option<Id>,
    /// What users say of it.
    #[serde(flatten)]
    pub notes: Notes,
    /// What its guest may do, by name (`sapwood_qos::names`).
    #[serde(default, skip_serializing_if = "Named::is_empty")]
    pub limits: Named,
    /// The group whose limits are its, too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<String>,
    /// What it takes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub space: Option<Space>,
    /// Fields that this program does not know.
    #[serde(flatten)]
    pub more: Map<String, Value>,
}

/// A group of volumes that share limits.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupRow {
    /// What they may do together, by name (`sapwood_qos::names`).
    #[serde(default)]
    pub limits: Named,
    /// The group that it is in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<String>,
}

/// All groups by name.
pub type GroupRows = BTreeMap<String, GroupRow>;

/// What holds the contents of a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum NodeState {
    /// Nothing: it is what its parent is, or zeroes.
    Bare,
    /// A layer that nobody writes any more.
    Frozen {
        /// Its id.
        layer: Id,
        /// Whether it was closed properly after the last write.
        settled: bool,
        /// How far it is sealed.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        sealing: Option<Sealing>,
    },
    /// A sealed disk in the packs, of the node's size.
    Sealed(Top),
}

/// The top of the tree of a sealed disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Top {
    /// Its hash; all zeroes for a disk of zeroes.
    #[serde(with = "hash")]
    pub hash: Hash,
    /// Where it may be: a place's bits.
    pub place: u64,
}

impl Top {
    /// The sealed disk of so many bytes.
    pub fn root(&self, size: u64) -> Root {
        Root { size, tree: Child { hash: self.hash, place: Place::from_bits(self.place) } }
    }
}

impl From<Child> for Top {
    fn from(Child { hash, place }: Child) -> Self {
        Self { hash, place: place.to_bits() }
    }
}

/// How far a layer is sealed: what there is of it is a sealed disk as well, which is as the snapshot below from some block on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sealing {
    /// The top of its tree.
    #[serde(flatten)]
    pub top: Top,
    /// The first block that is not sealed.
    pub next: u64,
}

/// A hash as 64 hexadecimal digits.
mod hash {
    use sapwood_image::sealed::Hash;
    use serde::{Deserialize, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(hash: &Hash, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(hash)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Hash, D::Error> {
        let text = String::deserialize(deserializer)?;
        let (halves, rest) = text.as_bytes().as_chunks::<32>();
        let [first, second] = halves else {
            return Err(serde::de::Error::custom("a hash has 64 hexadecimal digits"));
        };
        let half = |text: &[u8; 32]| std::str::from_utf8(text).ok()?.parse::<crate::Id>().ok();
        match (half(first), half(second), rest.is_empty()) {
            (Some(first), Some(second), true) => {
                let mut hash = [0; Hash::BYTES];
                hash[..16].copy_from_slice(&first.0);
                hash[16..].copy_from_slice(&second.0);
                Ok(Hash(hash))
            }
            _ => Err(serde::de::Error::custom("a hash has 64 hexadecimal digits in lower case")),
        }
    }
}

/// A node of the tree: a snapshot, or what is left of one that was deleted and is needed by others.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeRow {
    /// The volume that it belongs to; none of a deleted one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub volume: Option<Id>,
    /// Its name, without that of the volume; none of a deleted one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The node below.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<Id>,
    /// Size of the disk in bytes.
    pub size: u64,
    /// When it was made, in milliseconds since 1970.
    pub created_ms: u64,
    /// What holds its contents.
    pub state: NodeState,
    /// What users say of it.
    #[serde(flatten)]
    pub notes: Notes,
    /// What it takes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub space: Option<Space>,
    /// Fields that this program does not know.
    #[serde(flatten)]
    pub more: Map<String, Value>,
}

/// What a pack holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PackKind {
    /// Frames of blocks.
    Data,
    /// Nodes of trees.
    Nodes,
}

/// A pack.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PackRow {
    /// What it holds.
    pub kind: PackKind,
    /// Size of the file in bytes.
    pub bytes: u64,
    /// How many blocks or nodes it holds.
    pub entries: u64,
    /// How many bytes of it are estimated to be needed; unknown before the first pass.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub live_bytes: Option<u64>,
}

/// A run of the exact index.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IndexRow {
    /// Its tier.
    pub level: u32,
    /// How many entries it has.
    pub entries: u64,
}

/// Limits of the store's space.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SpaceSettings {
    /// Most bytes that the store may take.
    #[serde(default)]
    pub quota: Option<u64>,
    /// Bytes of the file system that are left to others.
    #[serde(default)]
    pub reserve: Option<u64>,
    /// Shares of the space in percent, in rising order: a warning is given when one is reached.
    #[serde(default)]
    pub watermarks: Vec<u8>,
}

/// What an account has found of everything that is sealed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AccountRow {
    /// When it began, in milliseconds since 1970.
    pub found_ms: u64,
    /// Bytes of the blocks that snapshots hold, each counted once for each snapshot that holds it; where that was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub referenced_bytes: Option<u64>,
    /// Bytes of these blocks, each counted once.
    pub unique_bytes: u64,
    /// Bytes that they take in packs, with the trees over them.
    pub stored_bytes: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_keep_what_they_do_not_know() {
        let text = r#"{"name":"web","created_ms":5,"size":4096,"labels":{"a":"b"},"tier":{"x":[1]}}"#;
        let row: VolumeRow = serde_json::from_str(text).unwrap();
        assert_eq!((row.parent, row.layer, row.notes.protected), (None, None, false));
        assert_eq!(row.notes.labels["a"], "b");
        let again = serde_json::to_value(&row).unwrap();
        assert_eq!(again, serde_json::from_str::<Value>(text).unwrap());
    }

    #[test]
    fn states_that_a_newer_program_knows_are_refused() {
        let text = |state: &str| format!(r#"{{"size":512,"created_ms":1,"state":"{state}"}}"#);
        assert_eq!(serde_json::from_str::<NodeRow>(&text("bare")).unwrap().state, NodeState::Bare);
        assert!(serde_json::from_str::<NodeRow>(&text("molten")).is_err());
    }

    #[test]
    fn sealed_nodes_survive_being_stored() {
        let top = Top { hash: Hash(std::array::from_fn(|i| i as u8 * 7)), place: u64::MAX - 5 };
        let sealing = Some(Sealing { top, next: 77 });
        for state in
            [NodeState::Sealed(top), NodeState::Frozen { layer: crate::Id([9; 16]), settled: true, sealing }]
        {
            let text = serde_json::to_string(&state).unwrap();
            assert!(text.contains("00070e151c23"), "{text}");
            assert_eq!(serde_json::from_str::<NodeState>(&text).unwrap(), state);
        }
        for wrong in ["", "00", &"0".repeat(63), &"g".repeat(64), &"0".repeat(96)] {
            let text = format!(r#"{{"sealed":{{"hash":"{wrong}","place":0}}}}"#);
            assert!(serde_json::from_str::<NodeState>(&text).is_err(), "{wrong}");
        }
    }

    #[test]
    fn nodes_survive_being_stored() {
        let id = "000102030405060708090a0b0c0d0e0f";
        let text = format!(
            r#"{{"name":"s","size":512,"created_ms":1,"protected":true,"age":7,
                "state":{{"frozen":{{"layer":"{id}","settled":false}}}}}}"#
        );
        let row: NodeRow = serde_json::from_str(&text).unwrap();
        let layer = id.parse().unwrap();
        assert_eq!(row.state, NodeState::Frozen { layer, settled: false, sealing: None });
        assert_eq!((row.notes.protected, &row.more["age"]), (true, &Value::from(7)));
        let again = serde_json::to_string(&row).unwrap();
        assert_eq!(serde_json::from_str::<NodeRow>(&again).unwrap(), row);
        assert_eq!(
            serde_json::from_str::<Value>(&again).unwrap(),
            serde_json::from_str::<Value>(&text).unwrap()
        );
    }
}
