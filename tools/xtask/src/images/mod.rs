//! `cargo xtask corpus`: root images of Debian as deduplication and compression meet them, and what arithmetic says of them.
//!
//! Six images of two releases and different packages, each installed by itself, and one that was aged: packages were
//! upgraded, installed again, removed and added on a copy of another one. They are kept below the target directory; what
//! is there costs nothing.

mod age;
mod build;
mod frames;
mod measure;
mod recipes;

use std::fs;
use std::path::Path;
use std::sync::Mutex;
use std::thread;

use anyhow::{Context, Result};
use clap::Args;
use sapwood_tests::corpus::{AGED, IMAGES};

use self::recipes::Recipe;
use crate::setup::{apt, cache};
use crate::workspace::Workspace;

/// How many images are made at a time.
const WORKERS: usize = 2;

/// Options of the corpus.
#[derive(Args)]
pub struct Corpus {
    /// Print what can be shared, and what frames of each size and level would take
    #[arg(long)]
    measure: bool,
    /// Compress one of so many stretches of 2 MiB for the table
    #[arg(long, value_name = "COUNT", default_value_t = 8, value_parser = clap::value_parser!(u64).range(1..=1024))]
    sample: u64,
}

/// Makes what is missing; says whether it could.
///
/// # Errors
/// An image could not be made or read.
pub fn run(workspace: &Workspace, options: &Corpus) -> Result<bool> {
    let corpus = workspace.corpus();
    fs::create_dir_all(&corpus).with_context(|| format!("making {}", corpus.display()))?;
    let lock = fs::File::create(corpus.join(".lock"))?;
    lock.lock().context("waiting for another run")?;
    if !is_there(&corpus) {
        if let Some(reason) = apt::unable() {
            println!("skipped: {reason}");
            return Ok(false);
        }
        apt::install_missing()?;
        make(&corpus)?;
    }
    println!("ready: {} and {AGED} in {}", IMAGES.join(", "), corpus.display());
    if options.measure {
        measure::run(&corpus, options.sample as usize)?;
    }
    Ok(true)
}

/// Whether the whole corpus is there, as it would be made now.
pub fn is_there(corpus: &Path) -> bool {
    let made = |recipe: &Recipe| cache::is_fresh(corpus, recipe.name, &recipe.text());
    recipes::all().iter().all(made) && cache::is_fresh(corpus, AGED, &age::recipe())
}

/// Makes the images by [`WORKERS`] threads, then the aged one.
fn make(corpus: &Path) -> Result<()> {
    let left = Mutex::new(recipes::all());
    let next = || left.lock().expect("no holder panics").pop();
    let work = || -> Result<()> {
        while let Some(recipe) = next() {
            let made = |into: &Path| build::make(&recipe, corpus, into);
            cache::directory(corpus, recipe.name, &recipe.text(), made)?;
        }
        Ok(())
    };
    thread::scope(|scope| {
        let workers: Vec<_> = (0..WORKERS).map(|_| scope.spawn(work)).collect();
        let results: Vec<Result<()>> =
            workers.into_iter().map(|worker| worker.join().expect("a worker does not panic")).collect();
        results.into_iter().collect::<Result<()>>()
    })?;
    cache::directory(corpus, AGED, &age::recipe(), |into| age::make(corpus, into))?;
    Ok(())
}
