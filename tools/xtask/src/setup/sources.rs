//! Reads the machine's own apt configuration: where its Debian archive is and which key signs it.
//!
//! Invariant: no mirror host is written down in this project. Every address comes from the
//! one-line (`*.list`) or deb822 (`*.sources`) files that already work on this machine.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

/// One archive of the machine: an address, a suite, its components and its key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    /// The archive's address as apt wrote it, for example `https://mirror.example/debian`.
    pub uri: String,
    /// The suite, for example `bookworm`.
    pub suite: String,
    /// The components, for example `main`.
    pub components: Vec<String>,
    /// The value of `Signed-By`, when the configuration names one (a keyring's path, or a key;
    /// a key has several lines, each but the first indented).
    pub signed_by: Option<String>,
    /// The value of `Trusted`, when the configuration sets one.
    pub trusted: Option<String>,
}

impl Source {
    /// The same archive and key with another suite, component `main` only.
    pub fn with_suite(&self, suite: &str) -> Self {
        let components = vec!["main".to_owned()];
        Self { suite: suite.to_owned(), components, ..self.clone() }
    }

    /// The source as a deb822 stanza.
    pub fn to_deb822(&self) -> String {
        let mut text = format!(
            "Types: deb\nURIs: {}\nSuites: {}\nComponents: {}\n",
            self.uri,
            self.suite,
            self.components.join(" ")
        );
        for (name, value) in [("Signed-By", &self.signed_by), ("Trusted", &self.trusted)] {
            if let Some(value) = value {
                text.push_str(&format!("{name}: {value}\n"));
            }
        }
        text
    }
}

/// All binary-package sources that apt is configured with under `etc_apt` (`/etc/apt`).
///
/// # Errors
/// A file that exists but cannot be read.
pub fn configured(etc_apt: &Path) -> Result<Vec<Source>> {
    let mut files = vec![etc_apt.join("sources.list")];
    let parts = etc_apt.join("sources.list.d");
    if parts.is_dir() {
        let mut listed: Vec<PathBuf> = fs::read_dir(&parts)
            .with_context(|| format!("reading {}", parts.display()))?
            .filter_map(|entry| entry.ok().map(|entry| entry.path()))
            .collect();
        listed.sort();
        files.extend(listed);
    }
    let mut sources = Vec::new();
    for file in files.iter().filter(|file| file.is_file()) {
        let text = || fs::read_to_string(file).with_context(|| format!("reading {}", file.display()));
        match file.extension().and_then(|extension| extension.to_str()) {
            Some("list") => sources.extend(parse_list(&text()?)),
            Some("sources") => sources.extend(parse_deb822(&text()?)),
            _ => {}
        }
    }
    Ok(sources)
}

/// The source of suite `codename` with component `main`: the release this machine runs.
///
/// # Errors
/// None is configured.
pub fn release(sources: &[Source], codename: &str) -> Result<Source> {
    let found = sources
        .iter()
        .find(|source| source.suite == codename && source.components.iter().any(|c| c == "main"));
    match found {
        Some(source) => Ok(source.clone()),
        None => {
            bail!("apt has no source for suite {codename}, component main; add one and run again")
        }
    }
}

fn words(text: &str) -> Vec<String> {
    text.split_whitespace().map(str::to_owned).collect()
}

/// Parses one-line entries: `deb [option=value ...] URI SUITE COMPONENT...`.
fn parse_list(text: &str) -> Vec<Source> {
    text.lines().filter_map(parse_list_line).collect()
}

fn parse_list_line(line: &str) -> Option<Source> {
    let line = line.split('#').next().unwrap_or_default().trim();
    let rest = line.strip_prefix("deb")?;
    if !rest.starts_with([' ', '\t', '[']) {
        return None; // deb-src
    }
    let rest = rest.trim_start();
    let (options, rest) = match rest.strip_prefix('[') {
        Some(tail) => tail.split_once(']')?,
        None => ("", rest),
    };
    let option = |name: &str| {
        options
            .split_whitespace()
            .find_map(|word| word.split_once('=').filter(|(key, _)| *key == name))
            .map(|(_, value)| value.to_owned())
    };
    let mut fields = words(rest).into_iter();
    Some(Source {
        uri: fields.next()?,
        suite: fields.next()?,
        components: fields.collect(),
        signed_by: option("signed-by"),
        trusted: option("trusted"),
    })
}

/// Parses deb822 stanzas; a stanza with several addresses or suites gives one source for each pair.
fn parse_deb822(text: &str) -> Vec<Source> {
    let mut sources = Vec::new();
    let mut stanza: Vec<(String, String)> = Vec::new();
    for line in text.lines().chain([""]) {
        if line.starts_with('#') {
            continue;
        }
        if line.trim().is_empty() {
            sources.extend(stanza_sources(&stanza));
            stanza.clear();
        } else if line.starts_with([' ', '\t']) {
            if let Some((_, value)) = stanza.last_mut() {
                value.push('\n');
                value.push_str(line);
            }
        } else if let Some((name, value)) = line.split_once(':') {
            stanza.push((name.trim().to_ascii_lowercase(), value.trim().to_owned()));
        }
    }
    sources
}

fn stanza_sources(stanza: &[(String, String)]) -> Vec<Source> {
    let field = |name: &str| stanza.iter().find(|(field, _)| field == name).map(|(_, value)| value.clone());
    let list = |name: &str| words(&field(name).unwrap_or_default());
    let enabled = field("enabled").is_none_or(|value| value != "no");
    if !enabled || !list("types").iter().any(|kind| kind == "deb") {
        return Vec::new();
    }
    let mut sources = Vec::new();
    for uri in list("uris") {
        for suite in list("suites") {
            sources.push(Source {
                uri: uri.clone(),
                suite,
                components: list("components"),
                signed_by: field("signed-by"),
                trusted: field("trusted"),
            });
        }
    }
    sources
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_entries() {
        let text = "# deb http://old.example/debian bookworm main\n\
            deb-src http://a.example/debian bookworm main\n\
            deb [arch=amd64 signed-by=/k.gpg] http://a.example/debian bookworm main contrib # c\n";
        let sources = parse_list(text);
        assert_eq!(sources.len(), 1);
        assert_eq!(sources[0].uri, "http://a.example/debian");
        assert_eq!(sources[0].suite, "bookworm");
        assert_eq!(sources[0].components, ["main", "contrib"]);
        assert_eq!(sources[0].signed_by.as_deref(), Some("/k.gpg"));
    }

    #[test]
    fn stanzas_with_two_suites_a_comment_and_an_inline_key() {
        let text = "Types: deb\n# where\nURIs: http://a.example/debian\nSuites: bookworm bookworm-updates\n\
            Components: main\nSigned-By:\n -----BEGIN\n .\n abc\n\nTypes: deb\nEnabled: no\n\
            URIs: http://b.example\nSuites: bookworm\nComponents: main\n";
        let sources = parse_deb822(text);
        assert_eq!(sources.len(), 2);
        let found = release(&sources, "bookworm").unwrap();
        assert_eq!(found.uri, "http://a.example/debian");
        let backports = found.with_suite("bookworm-backports").to_deb822();
        assert_eq!(
            backports,
            "Types: deb\nURIs: http://a.example/debian\nSuites: bookworm-backports\n\
             Components: main\nSigned-By: \n -----BEGIN\n .\n abc\n"
        );
        assert!(release(&sources, "trixie").is_err());
    }
}
