//! Boot Loader Specification (UAPI.1), entries of type 1: small files in `/loader/entries` of the EFI system partition and
//! the extended boot loader partition, or in `/boot/loader/entries` of a root file system.
//!
//! Entries of type 2 (unified kernel images, `/EFI/Linux/*.efi`) are not read; where they are all there is, the
//! message says so.

use std::cmp::Ordering;
use std::collections::HashMap;

use super::{Candidate, ENTRIES_MAX, Place, System, grub, version};

const FOLDERS: [&str; 2] = ["/loader/entries", "/boot/loader/entries"];
/// Bytes of an entry, and of its command line once its variables are replaced.
const ENTRY_BYTES_MAX: usize = 64 << 10;
const IMAGES: &str = "/EFI/Linux";
/// What the specification calls x86-64.
const ARCHITECTURE: &str = "x64";

#[derive(Debug, Default)]
struct Entry {
    /// The file's name without `.conf` and the counters of boots.
    id: String,
    /// Its boot counter has come to zero: it failed too often.
    is_bad: bool,
    title: String,
    version: String,
    machine_id: String,
    sort_key: Option<String>,
    linux: String,
    initrds: Vec<String>,
    options: Vec<String>,
    architecture: Option<String>,
    volume: usize,
    folder: &'static str,
}

/// The entries of all volumes, the default first.
pub fn candidates(system: &mut System) -> Vec<Candidate> {
    let mut entries = Vec::new();
    let mut default = None;
    for volume in 0..system.volumes.len() {
        for folder in FOLDERS {
            let room = ENTRIES_MAX - entries.len();
            entries.extend(read_folder(system, volume, folder, room));
            let config = folder.replace("entries", "loader.conf");
            default = default.or_else(|| system.text(volume, &config).and_then(|text| default_of(&text)));
        }
        let images = system.names(volume, IMAGES);
        if let Some(image) = images.iter().find(|name| name.to_ascii_lowercase().ends_with(".efi")) {
            let what =
                format!("{}: {IMAGES}/{image}: unified kernel images are not read", system.volumes[volume]);
            system.try_in_vain(what);
        }
    }
    entries.sort_by(order);
    if let Some(pattern) = default {
        // The sort is stable: among those that match, the first stays the first.
        entries.sort_by_key(|entry| !is_default(&pattern, &entry.id));
    }
    entries.iter().filter_map(|entry| candidate(system, entry)).collect()
}

/// At most `room` of them: what is kept is bounded on a disk with many partitions as well.
fn read_folder(system: &mut System, volume: usize, folder: &'static str, room: usize) -> Vec<Entry> {
    let mut entries = Vec::new();
    for name in system.names(volume, folder) {
        let Some(stem) = name.strip_suffix(".conf") else { continue };
        if entries.len() == room {
            break;
        }
        let Some(text) = system.text(volume, &format!("{folder}/{name}")) else { continue };
        if text.len() > ENTRY_BYTES_MAX {
            let what =
                format!("{}: {folder}/{name}: longer than {ENTRY_BYTES_MAX} bytes", system.volumes[volume]);
            system.try_in_vain(what);
            continue;
        }
        let (id, is_bad) = counted(stem);
        let entry = Entry { id: id.to_owned(), is_bad, volume, folder, ..parse(&text) };
        if let Some(reason) = unusable(&entry) {
            let what = format!("{}: {folder}/{name}: {reason}", system.volumes[volume]);
            system.try_in_vain(what);
            continue;
        }
        entries.push(entry);
    }
    entries
}

/// A name without `+LEFT` or `+LEFT-DONE` (Automatic Boot Assessment), and whether no attempt is left.
fn counted(stem: &str) -> (&str, bool) {
    let Some((id, counters)) = stem.rsplit_once('+') else { return (stem, false) };
    let (left, done) = counters.split_once('-').unwrap_or((counters, "0"));
    match (left.parse::<u32>(), done.parse::<u32>()) {
        (Ok(left), Ok(_)) => (id, left == 0),
        _ => (stem, false),
    }
}

fn parse(text: &str) -> Entry {
    let mut entry = Entry::default();
    for line in text.lines().map(str::trim) {
        let Some((key, value)) = line.split_once(char::is_whitespace) else { continue };
        let value = value.trim().to_owned();
        match key {
            "title" => entry.title = value,
            "version" => entry.version = value,
            "machine-id" => entry.machine_id = value,
            "sort-key" => entry.sort_key = Some(value),
            "linux" => entry.linux = value,
            "initrd" => entry.initrds.extend(value.split_whitespace().map(str::to_owned)),
            "options" => entry.options.push(value),
            "architecture" => entry.architecture = Some(value),
            _ => {} // comments, and what a boot loader of firmware would want
        }
    }
    entry
}

fn unusable(entry: &Entry) -> Option<&'static str> {
    if entry.architecture.as_ref().is_some_and(|found| !found.eq_ignore_ascii_case(ARCHITECTURE)) {
        return Some("for another architecture");
    }
    entry.linux.is_empty().then_some("names no kernel of Linux")
}

/// The specification, section Sorting: what comes first is the default.
fn order(a: &Entry, b: &Entry) -> Ordering {
    let by_key = match (&a.sort_key, &b.sort_key) {
        (Some(key), Some(other)) => key
            .cmp(other)
            .then_with(|| a.machine_id.cmp(&b.machine_id))
            .then_with(|| version::compare(&b.version, &a.version)),
        (Some(_), None) => Ordering::Less,
        (None, Some(_)) => Ordering::Greater,
        (None, None) => Ordering::Equal,
    };
    a.is_bad.cmp(&b.is_bad).then(by_key).then_with(|| version::compare(&b.id, &a.id))
}

/// The pattern in `loader.conf` (loader.conf(5)); names that begin with `@` are for systemd-boot's own memory.
fn default_of(text: &str) -> Option<String> {
    let mut lines = text.lines().filter_map(|line| line.trim().split_once(char::is_whitespace));
    let found = lines.rfind(|(key, _)| *key == "default")?;
    let pattern = found.1.trim();
    (!pattern.is_empty() && !pattern.starts_with('@')).then(|| pattern.to_owned())
}

fn is_default(pattern: &str, id: &str) -> bool {
    matches_pattern(pattern, id) || matches_pattern(pattern, &format!("{id}.conf"))
}

/// Whether a pattern of `*`, `?` and plain characters fits: in time bounded by the product of the lengths.
fn matches_pattern(pattern: &str, text: &str) -> bool {
    let (pattern, text): (Vec<char>, Vec<char>) = (pattern.chars().collect(), text.chars().collect());
    let (mut p, mut t) = (0, 0);
    let mut star = None;
    while t < text.len() {
        match pattern.get(p) {
            Some('*') => {
                star = Some((p, t));
                p += 1;
            }
            Some(&c) if c == '?' || c == text[t] => (p, t) = (p + 1, t + 1),
            _ => {
                let Some((at, taken)) = star else { return false };
                star = Some((at, taken + 1));
                (p, t) = (at + 1, taken + 1);
            }
        }
    }
    pattern[p..].iter().all(|c| *c == '*')
}

fn candidate(system: &mut System, entry: &Entry) -> Option<Candidate> {
    let volume = entry.volume;
    // The specification counts paths from the root of the partition. Where /boot is none of its own, some write them
    // from there all the same.
    let place = |path: &str| {
        let path = format!("/{}", path.trim_start_matches('/'));
        let below = format!("/boot{path}");
        let is_below = entry.folder.starts_with("/boot") && !system.volumes[volume].has_file(&path);
        Place { volume, path: if is_below { below } else { path } }
    };
    let kernel = place(&entry.linux);
    let options = entry.options.join(" ");
    let words = options.split_whitespace();
    let mut environment = None;
    // Fedora's entries have variables of GRUB in them ($tuned_initrd), which are empty where they are not set.
    let mut expand = |system: &mut System, word: &str| match word.strip_prefix('$') {
        None => word.to_owned(),
        Some(name) => {
            let known = environment.get_or_insert_with(|| grub::environment(system, volume));
            value_of(known, name)
        }
    };
    let initrds: Vec<Place> = {
        let paths: Vec<&String> = entry.initrds.iter().filter(|path| !path.starts_with('$')).collect();
        paths.into_iter().map(|path| place(path)).collect()
    };
    let mut cmdline: Vec<String> = Vec::new();
    let mut room = ENTRY_BYTES_MAX;
    for word in words {
        let word = expand(system, word);
        let Some(left) = room.checked_sub(word.len()) else {
            let what = format!("{}: {}.conf: its command line is too long", system.volumes[volume], entry.id);
            system.try_in_vain(what);
            return None;
        };
        room = left;
        cmdline.extend((!word.is_empty()).then_some(word));
    }
    let title = match (entry.title.is_empty(), entry.version.is_empty()) {
        (true, _) => entry.id.clone(),
        (false, _) => entry.title.clone(),
    };
    let mut names = vec![entry.id.clone(), format!("{}.conf", entry.id)];
    if !entry.version.is_empty() {
        names.push(entry.version.clone());
    }
    let source = format!(
        "{}: {}/{}.conf, an entry by the Boot Loader Specification",
        system.volumes[volume], entry.folder, entry.id
    );
    Some(Candidate { title, names, source, kernel, initrds, cmdline: cmdline.join(" ") })
}

fn value_of(environment: &HashMap<String, String>, name: &str) -> String {
    let name = name.trim_start_matches('{').trim_end_matches('}');
    environment.get(name).cloned().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(id: &str, text: &str) -> Entry {
        let (id, is_bad) = counted(id);
        Entry { id: id.to_owned(), is_bad, ..parse(text) }
    }

    #[test]
    fn entries_are_sorted_as_the_specification_says() {
        let mut entries = [
            entry("old-1", "linux /a"),
            entry("old-10", "linux /a"),
            entry("bad+0-3", "sort-key a\nversion 99\nlinux /a"),
            entry("b-2", "sort-key b\nversion 2\nlinux /a"),
            entry("a-9", "sort-key a\nversion 6.1.9\nlinux /a"),
            entry("a-10+2", "sort-key a\nversion 6.1.10\nlinux /a"),
            entry("a-m", "sort-key a\nmachine-id 1\nversion 1\nlinux /a"),
        ];
        entries.sort_by(order);
        let ids: Vec<&str> = entries.iter().map(|entry| entry.id.as_str()).collect();
        assert_eq!(ids, ["a-10", "a-9", "a-m", "b-2", "old-10", "old-1", "bad"]);
    }

    #[test]
    fn counters_are_taken_off_names() {
        assert_eq!(counted("debian+3"), ("debian", false));
        assert_eq!(counted("debian+0-3"), ("debian", true));
        assert_eq!(counted("c++"), ("c++", false));
        assert_eq!(counted("a+b"), ("a+b", false));
    }

    #[test]
    fn keys_are_read() {
        let text = "# comment\ntitle  Some OS \nlinux\t/vmlinuz\ninitrd /a\ninitrd /b /c\noptions root=/dev/vda\noptions quiet\nunknown x";
        let entry = parse(text);
        assert_eq!((entry.title.as_str(), entry.linux.as_str()), ("Some OS", "/vmlinuz"));
        assert_eq!(entry.initrds, ["/a", "/b", "/c"]);
        assert_eq!(entry.options, ["root=/dev/vda", "quiet"]);
        assert!(unusable(&parse("efi /shell.efi")).is_some());
        assert!(unusable(&parse("linux /a\narchitecture aa64")).is_some());
        assert!(unusable(&parse("linux /a\narchitecture x64")).is_none());
    }

    #[test]
    fn the_default_is_a_pattern() {
        assert_eq!(default_of("timeout 3\ndefault debian-*\n"), Some("debian-*".to_owned()));
        assert_eq!(default_of("default @saved"), None);
        assert!(is_default("debian-*", "debian-6.1") && is_default("debian-6.?.conf", "debian-6.1"));
        assert!(!is_default("debian", "debian-6.1") && is_default("*", "x"));
        assert!(!matches_pattern(&"*a".repeat(2000), &"a".repeat(1999)));
    }
}
