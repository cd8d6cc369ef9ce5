//! Names on the command line: `STORE:volume` and `STORE:volume@snapshot`.
//!
//! The last `:` ends the store's directory, which may have others in its path; names hold none. Without a
//! directory (`:volume`, or `volume` alone where only names are expected) the default store is meant.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use anyhow::Context;
use sapwood_store::directory::Directory;
use sapwood_store::{Name, SnapshotName};

use crate::control::wire::Failure;

/// The environment variable with the default store.
pub const STORE_VARIABLE: &str = "SAPWOOD_STORE";

/// A volume or snapshot of a store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Address {
    /// The store's directory.
    pub store: PathBuf,
    /// What is meant there.
    pub name: Name,
}

/// The default store: the one given, or the environment's.
pub fn default_store(given: Option<&Path>) -> anyhow::Result<PathBuf> {
    let given = given.map(Path::to_owned);
    let store =
        given.or_else(|| std::env::var_os(STORE_VARIABLE).filter(|v| !v.is_empty()).map(PathBuf::from));
    store.with_context(|| {
        format!("which store? Say DIRECTORY:NAME, or give the directory with --store or {STORE_VARIABLE}")
    })
}

impl Address {
    /// Reads what can be nothing but an address; `store` is the default, as far as one was given.
    pub fn parse(text: &OsStr, store: Option<&Path>) -> anyhow::Result<Self> {
        let (directory, name) = split(text);
        let store = match directory {
            Some(directory) => directory,
            None => default_store(store)?,
        };
        let name = name.to_str().context("a name in a store is UTF-8");
        let name = name.with_context(|| text.to_string_lossy().into_owned())?;
        let name = name.parse().map_err(Failure::from)?;
        Ok(Self { store, name })
    }

    /// Reads what may also be the path of a file. It is an address if a default store was given on the command line,
    /// if it begins with `:`, or if what is before its last `:` is the directory of a store.
    pub fn of_disk(text: &OsStr, store: Option<&Path>) -> anyhow::Result<Option<Self>> {
        let is_address = store.is_some()
            || text.as_bytes().first() == Some(&b':')
            || split(text).0.is_some_and(|directory| Directory::new(&directory).catalog().exists());
        is_address.then(|| Self::parse(text, store)).transpose()
    }

    /// The name in `text`, of which `store` is known already; another store is refused.
    pub fn name_in(store: &Path, text: &OsStr) -> anyhow::Result<String> {
        let (directory, name) = split(text);
        if directory.is_some_and(|directory| !is_same(&directory, store)) {
            let text = format!(
                "{}: that is in another store than {}: both have to be in the same",
                text.to_string_lossy(),
                store.display()
            );
            return Err(Failure::new("invalid", text).into());
        }
        let name = name.to_str().context("a name in a store is UTF-8");
        Ok(name.with_context(|| text.to_string_lossy().into_owned())?.to_owned())
    }

    /// The volume's name, where a volume is wanted.
    pub fn volume(self) -> anyhow::Result<String> {
        match self.name {
            Name::Volume(name) => Ok(name),
            Name::Snapshot(name) => {
                let text = format!("{name}: that is a snapshot, a volume is wanted here");
                Err(Failure::new("invalid", text).into())
            }
        }
    }

    /// The snapshot's name, where a snapshot is wanted.
    pub fn snapshot(self) -> anyhow::Result<SnapshotName> {
        Ok(self.name.to_string().parse::<SnapshotName>().map_err(Failure::from)?)
    }
}

/// Whether two paths are that of one directory.
pub fn is_same(a: &Path, b: &Path) -> bool {
    a == b || a.canonicalize().is_ok_and(|a| b.canonicalize().is_ok_and(|b| a == b))
}

/// The directory, where there is one, and the name.
fn split(text: &OsStr) -> (Option<PathBuf>, &OsStr) {
    let bytes = text.as_bytes();
    let Some(colon) = bytes.iter().rposition(|byte| *byte == b':') else { return (None, text) };
    let (directory, name) = (&bytes[..colon], OsStr::from_bytes(&bytes[colon + 1..]));
    let directory = (!directory.is_empty()).then(|| PathBuf::from(OsStr::from_bytes(directory)));
    (directory, name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> anyhow::Result<(String, String)> {
        let address = Address::parse(OsStr::new(text), Some(Path::new("/default")))?;
        Ok((address.store.display().to_string(), address.name.to_string()))
    }

    #[test]
    fn addresses_are_split_at_the_last_colon() {
        for (text, store, name) in [
            ("/srv/vms:web", "/srv/vms", "web"),
            ("vms:web@monday", "vms", "web@monday"),
            (":web", "/default", "web"),
            ("web@monday", "/default", "web@monday"),
            ("/srv/a:b/vms:web", "/srv/a:b/vms", "web"),
        ] {
            assert_eq!(address(text).unwrap(), (store.to_owned(), name.to_owned()), "{text}");
        }
        assert!(address("/srv/a:b/vms").unwrap_err().to_string().contains("'/'"));
        assert!(address("vms:").is_err());
    }

    #[test]
    fn paths_of_files_stay_paths() {
        let folder = tempfile::tempdir().unwrap();
        let of_disk = |text: &Path, store: Option<&Path>| Address::of_disk(text.as_os_str(), store).unwrap();
        let path = folder.path().join("a:b.layer");
        assert_eq!(of_disk(&path, None), None);
        assert_eq!(of_disk(Path::new("disk.layer"), None), None);
        assert_eq!(of_disk(Path::new("web"), Some(Path::new("s"))).unwrap().store, Path::new("s"));
        // A folder is no store yet, and then it is one.
        let named = PathBuf::from(format!("{}:web", folder.path().display()));
        assert_eq!(of_disk(&named, None), None);
        std::fs::write(folder.path().join("catalog.redb"), "").unwrap();
        assert_eq!(of_disk(&named, None).unwrap().store, folder.path());
    }

    #[test]
    fn what_is_wanted_is_said() {
        let address = |text| Address::parse(OsStr::new(text), None).unwrap();
        assert_eq!(address("s:web").volume().unwrap(), "web");
        assert_eq!(address("s:web@a").snapshot().unwrap().to_string(), "web@a");
        assert!(address("s:web@a").volume().unwrap_err().to_string().contains("a volume is wanted"));
        assert!(address("s:web").snapshot().unwrap_err().to_string().contains("say web@SNAPSHOT"));
    }
}
