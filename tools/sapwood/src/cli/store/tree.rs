//! `sapwood tree`.
//!
//! What lies over a snapshot stands below it. One of these goes on in the same column, so that many snapshots of one
//! volume do not run out of the page; all others branch off before it, one step to the right.

use std::collections::BTreeMap;

use clap::Args;

use super::{Scope, age, table};
use crate::cli::output::{self, Output};
use crate::cli::size;
use crate::host::Host;
use crate::volumes::answer::{Entry, Forest, State};
use crate::volumes::look::ShowTree;

/// Show volumes and snapshots as they lie over one another
///
/// A filled circle is a snapshot, an empty one a volume. What stands below it in the same column, or branches off
/// from there, was made over it.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  sapwood tree /srv/vms
  sapwood tree /srv/vms:web
  sapwood tree --output=json --store /srv/vms")]
pub struct Tree {
    /// human or json
    #[arg(long, value_enum, value_name = "KIND", default_value_t)]
    output: Output,

    #[command(flatten)]
    scope: Scope,
}

impl Tree {
    pub fn run(self, host: &Host) -> anyhow::Result<()> {
        let (access, volume) = self.scope.access(host)?;
        let mut forest = access.ask(ShowTree {})?;
        if let Some(volume) = &volume {
            // So that the error is the same as everywhere.
            access.ask(crate::volumes::look::ShowVolume { volume: volume.clone() })?;
            forest = tree_of(volume, forest);
        }
        match self.output {
            Output::Human => output::print(&text(&forest, volume.is_none())),
            Output::Json => output::print_json(&forest),
        }
    }
}

/// The tree that a volume is in.
fn tree_of(volume: &str, forest: Forest) -> Forest {
    let Forest { entries, nameless } = forest;
    let roots = roots(&entries);
    let of = entries.iter().position(|entry| entry.name == volume).map(|index| roots[index]);
    let kept = entries.into_iter().zip(&roots).filter(|(_, root)| Some(**root) == of);
    Forest { entries: kept.map(|(entry, _)| entry).collect(), nameless }
}

/// For each entry the index of the one at the bottom of its tree: each stands after what it lies over.
fn roots(entries: &[Entry]) -> Vec<usize> {
    let mut found = BTreeMap::<&str, usize>::new();
    let mut roots = Vec::new();
    for (index, entry) in entries.iter().enumerate() {
        let root = entry.parent.as_deref().and_then(|parent| found.get(parent).copied()).unwrap_or(index);
        found.insert(&entry.name, root);
        roots.push(root);
    }
    roots
}

fn text(forest: &Forest, is_all: bool) -> String {
    let mut lines = vec![["NAME", "SIZE", "EXCLUSIVE", "SHARED", "AGE", "STATE"].map(str::to_owned).to_vec()];
    lines.extend(draw(&forest.entries).into_iter().map(|(drawn, entry)| match entry {
        Some(entry) => line(&drawn, entry),
        None => vec![drawn],
    }));
    let mut text = table(&lines);
    if is_all && forest.nameless > 0 {
        let what = if forest.nameless == 1 { "snapshot is" } else { "snapshots are" };
        text.push_str(&format!("{} deleted {what} kept for what was made over it\n", forest.nameless));
    }
    text
}

fn line(drawn: &str, entry: &Entry) -> Vec<String> {
    let bytes = |bytes: Option<u64>| bytes.map_or_else(|| "-".to_owned(), size::short);
    let mut state = match (entry.state, &entry.attached) {
        (State::Volume, Some(_)) => "attached".to_owned(),
        (State::Volume, None) => String::new(),
        (state, Some(_)) => format!("{}, attached", state.name()),
        (state, None) => state.name().to_owned(),
    };
    if entry.protected {
        state.push_str(if state.is_empty() { "protected" } else { ", protected" });
    }
    vec![
        drawn.to_owned(),
        size::short(entry.virtual_size),
        bytes(entry.exclusive_bytes),
        bytes(entry.shared_bytes),
        age(entry.created_ms),
        state,
    ]
}

/// The lines of a drawing, each with its entry; without one, what separates trees.
fn draw(entries: &[Entry]) -> Vec<(String, Option<&Entry>)> {
    let mut over = BTreeMap::<&str, Vec<usize>>::new();
    let mut bottom = Vec::new();
    let known: BTreeMap<&str, usize> =
        entries.iter().enumerate().map(|(index, entry)| (entry.name.as_str(), index)).collect();
    for (index, entry) in entries.iter().enumerate() {
        match entry.parent.as_deref().filter(|parent| known.contains_key(parent)) {
            Some(parent) => over.entry(parent).or_default().push(index),
            None => bottom.push(index),
        }
    }
    let mut lines = Vec::new();
    let mut was_tree = false;
    for (nth, &root) in bottom.iter().enumerate() {
        let is_tree = over.contains_key(entries[root].name.as_str());
        if nth > 0 && (is_tree || was_tree) {
            lines.push((String::new(), None));
        }
        was_tree = is_tree;
        draw_tree(entries, &over, root, &mut lines);
    }
    lines
}

/// Draws one tree, without recursion: it may be deep.
fn draw_tree<'a>(
    entries: &'a [Entry],
    over: &BTreeMap<&str, Vec<usize>>,
    root: usize,
    lines: &mut Vec<(String, Option<&'a Entry>)>,
) {
    // What is left to draw, the next one last: what stands before it, the same for all that follows in its column, and
    // whether it goes on in that.
    let mut left = vec![(String::new(), String::new(), root)];
    while let Some((before, column, index)) = left.pop() {
        let entry = &entries[index];
        let sign = if entry.state == State::Volume { '○' } else { '●' };
        lines.push((format!("{before}{sign} {}", entry.name), Some(entry)));
        let Some(children) = over.get(entry.name.as_str()) else { continue };
        let trunk = trunk(entries, entry, children);
        left.push((column.clone(), column.clone(), trunk));
        for &branch in children.iter().rev().filter(|&&child| child != trunk) {
            left.push((format!("{column}├─"), format!("{column}│ "), branch));
        }
    }
}

/// Which of those that lie over an entry goes on in its column: the newest of the same volume, or else the newest.
fn trunk(entries: &[Entry], entry: &Entry, children: &[usize]) -> usize {
    let is_same = |child: &Entry| volume_of(&child.name) == volume_of(&entry.name);
    let same = children.iter().rev().find(|&&child| is_same(&entries[child]));
    *same.or(children.last()).expect("an entry with children has some")
}

fn volume_of(name: &str) -> &str {
    name.split_once('@').map_or(name, |(volume, _)| volume)
}

#[cfg(test)]
mod tests {
    use sapwood_store::Id;
    use sapwood_store::rows::Notes;

    use super::*;

    fn entry(name: &str, parent: Option<&str>) -> Entry {
        let state = if name.contains('@') { State::Frozen } else { State::Volume };
        let mut entry = Entry::new(Id([0; 16]), name.to_owned(), state, Notes::default(), None);
        entry.parent = parent.map(str::to_owned);
        entry
    }

    fn drawn(entries: &[Entry]) -> String {
        draw(entries).into_iter().map(|(line, _)| line + "\n").collect()
    }

    #[test]
    fn trees_are_drawn() {
        let entries = [
            entry("web@1", None),
            entry("web@2", Some("web@1")),
            entry("web", Some("web@2")),
            entry("test", Some("web@2")),
            entry("db@first", Some("web@1")),
            entry("db", Some("db@first")),
            entry("old", None),
            entry("new", None),
        ];
        let expected = "\
● web@1
├─● db@first
│ ○ db
● web@2
├─○ test
○ web

○ old
○ new
";
        assert_eq!(drawn(&entries), expected);
    }

    #[test]
    fn a_deep_tree_is_drawn_in_one_column() {
        let name = |n: usize| format!("web@{n}");
        let entries: Vec<Entry> =
            (0..5000).map(|n| entry(&name(n), n.checked_sub(1).map(name).as_deref())).collect();
        let lines = drawn(&entries);
        assert_eq!(lines.lines().count(), 5000);
        assert!(lines.ends_with("● web@4998\n● web@4999\n"));
    }

    #[test]
    fn one_tree_is_found_among_others() {
        let entries =
            vec![entry("a@1", None), entry("a", Some("a@1")), entry("b", None), entry("c", Some("a@1"))];
        let names = |volume| {
            let forest = Forest { entries: entries.clone(), nameless: 0 };
            tree_of(volume, forest).entries.into_iter().map(|entry| entry.name).collect::<Vec<_>>()
        };
        assert_eq!(names("c"), ["a@1", "a", "c"]);
        assert_eq!(names("b"), ["b"]);
    }
}
