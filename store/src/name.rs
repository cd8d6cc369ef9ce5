//! Names of volumes and snapshots: `volume` and `volume@snapshot`.

use std::fmt;
use std::str::FromStr;

use crate::error::{Result, StoreError};

/// Longest name of a volume, or of a snapshot without its volume, in bytes.
pub const NAME_MAX: usize = 128;

/// What a name means.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Name {
    /// A volume.
    Volume(String),
    /// A snapshot of a volume.
    Snapshot(SnapshotName),
}

/// A snapshot by name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct SnapshotName {
    /// The volume that it was taken of.
    pub volume: String,
    /// Its own name.
    pub snapshot: String,
}

/// Refuses what cannot be the name of a volume, or of a snapshot without its volume.
///
/// # Errors
/// [`StoreErrorKind::Invalid`](crate::StoreErrorKind::Invalid) says why.
pub fn check(name: &str) -> Result<()> {
    let why = if name.is_empty() {
        "a name must not be empty".to_owned()
    } else if name.len() > NAME_MAX {
        format!("a name has at most {NAME_MAX} bytes, this one has {}", name.len())
    } else if let Some(wrong) = name.chars().find(|c| matches!(c, '/' | '@' | ':') || c.is_control()) {
        format!("a name must not hold {wrong:?}: '/', '@', ':' and control characters are not allowed")
    } else {
        return Ok(());
    };
    let shown: String = name.chars().take(NAME_MAX).flat_map(char::escape_debug).collect();
    Err(StoreError::invalid(shown, why))
}

impl fmt::Display for SnapshotName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}", self.volume, self.snapshot)
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Volume(name) => f.write_str(name),
            Self::Snapshot(name) => name.fmt(f),
        }
    }
}

impl FromStr for Name {
    type Err = StoreError;

    fn from_str(text: &str) -> Result<Self> {
        let Some((volume, snapshot)) = text.split_once('@') else {
            return check(text).map(|()| Self::Volume(text.to_owned()));
        };
        check(volume)?;
        check(snapshot)?;
        Ok(Self::Snapshot(SnapshotName { volume: volume.to_owned(), snapshot: snapshot.to_owned() }))
    }
}

impl FromStr for SnapshotName {
    type Err = StoreError;

    fn from_str(text: &str) -> Result<Self> {
        match text.parse()? {
            Name::Snapshot(name) => Ok(name),
            Name::Volume(name) => Err(StoreError::invalid(
                &name,
                format!("that is a volume, a snapshot is wanted here: say {name}@SNAPSHOT"),
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_mean_volumes_or_snapshots() {
        assert_eq!("web 1".parse::<Name>().unwrap(), Name::Volume("web 1".to_owned()));
        let name: SnapshotName = "web@före".parse().unwrap();
        assert_eq!((name.volume.as_str(), name.snapshot.as_str()), ("web", "före"));
        assert_eq!(name.to_string(), "web@före");
        assert!("web".parse::<SnapshotName>().unwrap_err().to_string().contains("say web@SNAPSHOT"));
    }

    #[test]
    fn what_is_no_name_is_refused_with_a_reason() {
        let long = "x".repeat(NAME_MAX + 1);
        for (text, why) in [
            ("", "empty"),
            ("@s", "empty"),
            ("v@", "empty"),
            ("a/b", "'/'"),
            ("a:b", "':'"),
            ("v@a@b", "'@'"),
            ("a\nb", "'\\n'"),
            (long.as_str(), "at most 128 bytes, this one has 129"),
        ] {
            let error = text.parse::<Name>().unwrap_err();
            assert_eq!(error.kind.name(), "invalid");
            assert!(error.to_string().contains(why), "{text:?}: {error}");
        }
        assert!(check(&"x".repeat(NAME_MAX)).is_ok());
    }
}
