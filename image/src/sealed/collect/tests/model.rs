//! Collections beside seals, clones and deletions, in random order.

use std::rc::Rc;

use super::super::*;
use super::store::{Breach, Random, Seal, TestFinder, TestStore};
use crate::sealed::*;

/// A collection that is under way.
enum Step {
    Surveyed(Survey),
    Withdrawn(Withdrawn),
    Marked(Marked),
    Shifted(Shifted),
}

/// One history.
struct History {
    store: Rc<TestStore>,
    random: Random,
    breach: Breach,
    /// Whether the catalog's roots are those of the survey, also for the second mark.
    asks_too_early: bool,
    seals: Vec<(Seal, Vec<u64>)>,
    /// Seals whose packs are published, and whose root is not in the catalog.
    published: Vec<(Seal, Root, Vec<u64>)>,
    /// Clones that have not come into the catalog.
    clones: Vec<(Pin, Root, Vec<u64>)>,
    collection: Option<(TestFinder, Step)>,
    collections: usize,
    /// Those at the end, with nothing beside them.
    last_collections: usize,
}

const HISTORY_STEPS: usize = 120;
/// Collections after which nothing more is dropped.
const COLLECTIONS_MAX: usize = 6;

impl History {
    fn some_root(&mut self) -> Option<(u64, Root, Vec<u64>)> {
        let roots = self.store.roots.borrow();
        let at = self.random.below(roots.len().max(1));
        roots.iter().nth(at).map(|(id, (root, values))| (*id, *root, values.clone()))
    }

    async fn step(&mut self) -> Result<(), String> {
        match self.random.below(13) {
            0 if self.seals.len() < 3 => self.begin_seal().await?,
            1..=3 => self.seal().await,
            4 => self.commit_seal(),
            5 => {
                if let Some((id, ..)) = self.some_root()
                    && self.random.percent(70)
                {
                    self.store.roots.borrow_mut().remove(&id);
                }
            }
            6 => {
                if let Some((_, root, values)) = self.some_root() {
                    self.clones.push((self.store.pins.pin(&[root]), root, values));
                }
            }
            7 => {
                if let Some((pin, root, values)) = self.clones.pop() {
                    self.store.commit(root, values);
                    drop(pin);
                }
            }
            // Work that fails leaves garbage.
            8 if self.random.percent(20) => {
                self.published.pop();
            }
            _ => self.collect().await?,
        }
        Ok(())
    }

    async fn begin_seal(&mut self) -> Result<(), String> {
        let base = self.some_root().filter(|_| self.random.percent(70));
        let len = [20, 100, 300][self.random.below(3)];
        let (base, mut values) = match base {
            Some((_, root, values)) => (Some(root), values),
            None => (None, vec![0; len]),
        };
        let changes = [3, 40, 200][self.random.below(3)];
        for _ in 0..changes {
            let (at, value) = (self.random.below(values.len()), self.random.below(150) as u64);
            values[at] = value;
        }
        let seal = Seal::begin(&self.store, values.clone(), base, self.breach).await;
        self.seals.push((seal.ok_or("a base has lost content")?, values));
        Ok(())
    }

    async fn seal(&mut self) {
        let at = self.random.below(self.seals.len().max(1));
        let Some((seal, _)) = self.seals.get_mut(at) else { return };
        if seal.step(&self.store, 50, &mut self.random).await {
            let root = seal.publish(&self.store, &mut self.random).await;
            let (seal, values) = self.seals.remove(at);
            self.published.push((seal, root, values));
        }
    }

    fn commit_seal(&mut self) {
        if let Some((seal, root, values)) = self.published.pop() {
            self.store.commit(root, values);
            drop(seal);
        }
    }

    /// The next step of a collection. A lost block is an error that the model looks for.
    async fn collect(&mut self) -> Result<(), String> {
        let store = Rc::clone(&self.store);
        let lost = |error: crate::error::ImageError| error.to_string();
        let Some((mut finder, step)) = self.collection.take() else {
            let mut finder = store.finder();
            let survey = begin(&mut finder, &store.pins, &*store, Limits::default()).await.map_err(lost)?;
            *store.old_roots.borrow_mut() = self.asks_too_early.then(|| store.roots().unwrap());
            self.collection = Some((finder, Step::Surveyed(survey)));
            return Ok(());
        };
        if self.random.percent(3) {
            // It is given up, or the program ends: what it has written is garbage.
            *store.old_roots.borrow_mut() = None;
            return Ok(());
        }
        let step = match step {
            Step::Surveyed(survey) => Step::Withdrawn(survey.withdraw()),
            Step::Withdrawn(mut withdrawn) if self.random.percent(30) => {
                withdrawn.again();
                Step::Withdrawn(withdrawn)
            }
            Step::Withdrawn(withdrawn) => {
                let marked = withdrawn.mark(&mut finder, &*store).await.map_err(lost)?;
                *store.old_roots.borrow_mut() = None;
                Step::Marked(marked)
            }
            Step::Marked(marked) => {
                Step::Shifted(marked.shift(&mut finder, &mut store.target()).await.map_err(lost)?)
            }
            Step::Shifted(shifted) => {
                assert!(shifted.kept.is_empty());
                self.store.finish(shifted).await;
                self.collections += 1;
                return Ok(());
            }
        };
        self.collection = Some((finder, step));
        Ok(())
    }

    /// Ends what is under way, and looks at what is there.
    async fn end(&mut self) -> Result<(), String> {
        while !self.seals.is_empty() {
            self.seal().await;
        }
        while !self.published.is_empty() {
            self.commit_seal();
        }
        for (_pin, root, values) in std::mem::take(&mut self.clones) {
            self.store.commit(root, values);
        }
        self.collection = None;
        *self.store.old_roots.borrow_mut() = None;
        self.store.check().await?;
        // Where content is stored twice and places are stale, another copy may be the one that counts after a collection.
        for _ in 0..COLLECTIONS_MAX {
            let (_, dropped) = self.store.collect().await.map_err(|error| error.to_string())?;
            self.store.check().await?;
            self.last_collections += 1;
            if dropped.is_empty() {
                break;
            }
        }
        let mut finder = self.store.finder();
        let roots = self.store.roots().unwrap();
        let marks = mark(&mut finder, &roots).await.map_err(|error| error.to_string())?;
        for number in self.store.packs().unwrap() {
            let live = marks.live(number);
            assert!(live.entries > 0 && live.bytes * 2 >= live.of, "pack {number}: {live:?}");
        }
        Ok(())
    }
}

/// How many collections came to their end beside seals, and after them; or what was lost.
fn history(seed: u64, breach: Breach, asks_too_early: bool) -> Result<(usize, usize), String> {
    let store = TestStore::new();
    let mut history = History {
        store: Rc::clone(&store),
        random: Random(seed),
        breach,
        asks_too_early,
        seals: Vec::new(),
        published: Vec::new(),
        clones: Vec::new(),
        collection: None,
        collections: 0,
        last_collections: 0,
    };
    store.run(async move {
        for _ in 0..HISTORY_STEPS {
            history.step().await?;
        }
        history.end().await?;
        Ok((history.collections, history.last_collections))
    })
}

#[test]
fn nothing_is_lost_when_collections_run_beside_seals() {
    let (mut beside, mut last) = (0, 0);
    for seed in 0..300 {
        let collections = history(seed, Breach::default(), false);
        let collections = collections.unwrap_or_else(|lost| panic!("seed {seed}: {lost}"));
        (beside, last) = (beside + collections.0, last + collections.1);
    }
    assert!(beside > 600, "{beside} collections came to their end beside seals");
    assert!(
        last < 3 * 300,
        "{last} collections until nothing more was dropped, the one that finds nothing included"
    );
}

/// Whether a history of some seed loses something.
fn loses(breach: Breach, asks_too_early: bool) -> bool {
    (0..200).any(|seed| history(seed, breach, asks_too_early).is_err())
}

#[test]
fn each_rule_is_needed() {
    let holds_nothing = Breach { holds_nothing: true, ..Breach::default() };
    assert!(loses(holds_nothing, false), "a seal refers to packs that were withdrawn");
    let pins_no_base = Breach { pins_no_base: true, ..Breach::default() };
    assert!(loses(pins_no_base, false), "a base is deleted beneath a seal");
    assert!(loses(Breach::default(), true), "the roots are asked for before the withdrawal");
}
