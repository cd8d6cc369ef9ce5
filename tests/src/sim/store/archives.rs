//! What the model says of archives.
//!
//! Which snapshots are sealed it does not know, so there is not always one answer to an import of an increment; and of several
//! snapshots that are its base, the store takes any.

use super::action::{Action, Outcome};
use super::model::{Archive, Content, Model, Snapshot};

/// Whether two disks may hold the same.
fn may_be_same(a: &Content, b: &Content) -> bool {
    a.iter().zip(b).all(|(a, b)| !a.is_disjoint(b))
}

impl Model {
    pub(super) fn export(
        &mut self,
        of: &(String, String),
        since: Option<&(String, String)>,
        archive: u64,
    ) -> Outcome {
        let content = self.snapshot(&of.0, &of.1)?.content.clone();
        let base = since.map(|since| self.snapshot(&since.0, &since.1).cloned()).transpose()?;
        self.archives.insert(archive, Archive { content, base, is_durable: true });
        Ok(())
    }

    /// Whatever the store may say to an action, and what there is then.
    pub fn outcomes(&self, action: &Action) -> Vec<(Outcome, Self)> {
        let Action::ImportArchive(volume, snapshot, archive) = action else {
            let mut after = self.clone();
            return vec![(after.apply(action), after)];
        };
        let Archive { content, base, .. } = &self.archives[archive];
        let is_new = !self.volumes.contains_key(volume);
        let refused = |kind| (Err(kind), self.clone());
        let to = (volume.as_str(), snapshot.as_str());
        match base {
            None if !is_new => vec![refused("exists")],
            None => vec![(Ok(()), self.imported(to, content, &[]))],
            Some(base) => {
                let mut outcomes = match is_new {
                    true => self.over_any(to, content, base),
                    false => self.received(to, content, base),
                };
                if !self.snapshots.values().any(|there| there.number == base.number) {
                    outcomes.push(refused("base"));
                }
                outcomes
            }
        }
    }

    /// A new volume over a snapshot over `line`.
    fn imported(&self, (volume, name): (&str, &str), content: &Content, line: &[u64]) -> Self {
        let mut after = self.clone();
        let number = after.number();
        let line = line.to_vec();
        let snapshot = Snapshot { content: content.clone(), number, line, protected: false };
        after
            .add_volume(volume, content.clone(), snapshot.line_over())
            .expect("it was looked whether it is there");
        after.snapshots.insert((volume.to_owned(), name.to_owned()), snapshot);
        after
    }

    /// The same over any snapshot that is as the base.
    fn over_any(&self, to: (&str, &str), content: &Content, base: &Snapshot) -> Vec<(Outcome, Self)> {
        let there = self.snapshots.values().chain(&self.deleted);
        let bases = there.filter(|there| may_be_same(&there.content, &base.content));
        bases.map(|below| (Ok(()), self.imported(to, content, &below.line_over()))).collect()
    }

    /// An increment over what a volume lies over, if that is its base.
    fn received(
        &self,
        (name, snapshot): (&str, &str),
        content: &Content,
        base: &Snapshot,
    ) -> Vec<(Outcome, Self)> {
        let refused = |kind| (Err(kind), self.clone());
        let volume = &self.volumes[name];
        let key = (name.to_owned(), snapshot.to_owned());
        if self.snapshots.contains_key(&key) {
            return vec![refused("exists")];
        }
        let is_over_base = volume.line.last() == Some(&base.number);
        let mut outcomes = Vec::new();
        if !is_over_base || !self.snapshots.values().any(|there| there.number == base.number) {
            outcomes.push(refused("exists"));
        }
        if volume.is_dirty != Some(false) {
            outcomes.push(refused("unsaved"));
        }
        if volume.is_dirty != Some(true) && (is_over_base || may_be_same(&volume.content, &base.content)) {
            let mut after = self.clone();
            let number = after.number();
            let volume = after.volumes.get_mut(name).expect("it is there");
            let line = volume.line.clone();
            volume.line.push(number);
            volume.content.clone_from(content);
            volume.is_dirty = Some(false);
            volume.unsynced.clear();
            let content = content.clone();
            after.snapshots.insert(key, Snapshot { content, number, line, protected: false });
            outcomes.push((Ok(()), after));
        }
        outcomes
    }
}
