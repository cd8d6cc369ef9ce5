//! Things that are costly to make, kept under the target directory.
//!
//! Invariant: a directory of the cache is complete or not there. It is made under another name and renamed
//! when finished, and holds the recipe it was made by: a changed recipe makes it anew.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result};

const RECIPE: &str = "recipe";

/// Whether the directory `name` under `cache` is there and made by `recipe`.
pub fn is_fresh(cache: &Path, name: &str, recipe: &str) -> bool {
    fs::read_to_string(cache.join(name).join(RECIPE)).is_ok_and(|made_by| made_by == recipe)
}

/// The directory `name` under `cache`, made by `make` (which fills the directory it is given)
/// when it is missing or was made by another recipe.
///
/// # Errors
/// What `make` returns, or the file system refuses.
pub fn directory(
    cache: &Path,
    name: &str,
    recipe: &str,
    make: impl FnOnce(&Path) -> Result<()>,
) -> Result<PathBuf> {
    let finished = cache.join(name);
    if is_fresh(cache, name, recipe) {
        return Ok(finished);
    }
    let begin = Instant::now();
    println!("  making {name}");
    fs::create_dir_all(cache).with_context(|| format!("making {}", cache.display()))?;
    remove_left_over(cache, name)?;
    let staged = tempfile::Builder::new().prefix(&staged_prefix(name)).tempdir_in(cache)?;
    make(staged.path()).with_context(|| format!("making {}", finished.display()))?;
    fs::write(staged.path().join(RECIPE), recipe)?;
    if finished.exists() {
        fs::remove_dir_all(&finished)?;
    }
    fs::rename(staged.keep(), &finished)?;
    println!("  made {name} in {:.1} s", begin.elapsed().as_secs_f64());
    Ok(finished)
}

fn staged_prefix(name: &str) -> String {
    format!(".{name}.making-")
}

/// Removes what a killed run left half made. The caller holds the cache's lock.
fn remove_left_over(cache: &Path, name: &str) -> Result<()> {
    let prefix = staged_prefix(name);
    for entry in fs::read_dir(cache)? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with(&prefix) {
            fs::remove_dir_all(entry.path())?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn made_once_and_again_for_another_recipe() {
        let cache = tempfile::tempdir().unwrap();
        let make = |recipe: &str, text: &'static str| {
            let fill = |staged: &Path| Ok(fs::write(staged.join("file"), text)?);
            let made = directory(cache.path(), "thing", recipe, fill).unwrap();
            fs::read_to_string(made.join("file")).unwrap()
        };
        assert_eq!(make("a", "1"), "1");
        assert_eq!(make("a", "2"), "1");
        assert_eq!(make("b", "3"), "3");
    }

    #[test]
    fn a_failure_leaves_what_was_there() {
        let cache = tempfile::tempdir().unwrap();
        directory(cache.path(), "thing", "a", |_| Ok(())).unwrap();
        let failed = directory(cache.path(), "thing", "b", |_| anyhow::bail!("no"));
        assert!(failed.is_err());
        assert!(is_fresh(cache.path(), "thing", "a"));
        assert_eq!(fs::read_dir(cache.path()).unwrap().count(), 1);
    }
}
