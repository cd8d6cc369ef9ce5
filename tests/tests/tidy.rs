//! Style that a compiler does not check: sizes, documents that name what exists, where `unsafe` may
//! be, and clean text. Each check lists everything it finds.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// Lines of a function, from its `fn` to its closing brace.
const FUNCTION_LINES_MAX: usize = 70;
/// Lines of a file before its unit tests.
const FILE_LINES_MAX: usize = 500;
/// Functions and files above the limits, with the size they have: they may only shrink, and leave
/// the list when they are small enough.
const RATCHET: [(&str, usize); 0] = [];

/// Folders that are made, not written.
const SKIPPED: [&str; 5] = [".git", "target", "corpus", "artifacts", "coverage"];
/// Crates that may use `unsafe` behind safe types.
const UNSAFE_ALLOWED: [&str; 3] = ["blockdev/", "vhost/", "vmm/"];
/// Macros that mark what is not finished.
const UNFINISHED: [&str; 3] = ["todo!(", "unimplemented!(", "dbg!("];

/// A file of the tree.
struct File {
    /// From the root of the tree.
    path: String,
    text: String,
}

impl File {
    fn is_rust(&self) -> bool {
        self.path.ends_with(".rs")
    }

    /// Whether it is only compiled for tests.
    fn is_test(&self) -> bool {
        self.path.contains("/tests/") || self.path.ends_with("/tests.rs") || self.path.starts_with("tests/")
    }

    fn is_document(&self) -> bool {
        self.path.ends_with(".md")
    }

    /// The lines before the unit tests at the end of the file.
    fn production_lines(&self) -> usize {
        let lines: Vec<&str> = self.text.lines().collect();
        let tests = lines.windows(2).position(|pair| pair[0] == "#[cfg(test)]" && pair[1].ends_with('{'));
        tests.unwrap_or(lines.len())
    }
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the tests crate lies in the tree").to_owned()
}

/// Every text file of the tree.
fn files() -> Vec<File> {
    let mut files = Vec::new();
    walk(&root(), "", &mut files);
    assert!(files.len() > 50, "the tree was found");
    files
}

fn walk(folder: &Path, prefix: &str, files: &mut Vec<File>) {
    for entry in fs::read_dir(folder).expect("a folder") {
        let entry = entry.expect("an entry");
        let name = entry.file_name().to_string_lossy().into_owned();
        let path = format!("{prefix}{name}");
        let kind = entry.file_type().expect("a type");
        if kind.is_dir() && !SKIPPED.contains(&name.as_str()) {
            walk(&entry.path(), &format!("{path}/"), files);
        } else if kind.is_file() && [".rs", ".md", ".toml", ".sh"].iter().any(|end| name.ends_with(end)) {
            let text = fs::read_to_string(entry.path()).unwrap_or_else(|error| panic!("{path}: {error}"));
            files.push(File { path, text });
        }
    }
}

#[track_caller]
fn none(what: &str, found: &[String]) {
    assert!(found.is_empty(), "{what}:\n  {}", found.join("\n  "));
}

/// The functions of a file with their lengths. rustfmt puts the closing brace of a function in the
/// column of the line that begins it.
fn functions(file: &File) -> Vec<(String, usize)> {
    let lines: Vec<&str> = file.text.lines().collect();
    let mut functions = Vec::new();
    for (start, line) in lines.iter().enumerate() {
        let Some(name) = function_name(line) else { continue };
        // What ends in a semicolon before a brace opens is a declaration.
        let opens = lines[start..].iter().find(|line| line.ends_with(['{', '}', ';']));
        if !opens.is_some_and(|line| line.ends_with('{')) {
            continue;
        }
        let close = format!("{}}}", &line[..line.len() - line.trim_start().len()]);
        if let Some(end) = lines[start..].iter().position(|line| *line == close) {
            functions.push((format!("{} {name}", file.path), end + 1));
        }
    }
    functions
}

fn function_name(line: &str) -> Option<&str> {
    let mut rest = line.trim_start();
    if rest.starts_with("pub(") {
        rest = rest.split_once(") ")?.1;
    }
    for word in ["pub ", "const ", "async ", "unsafe "] {
        rest = rest.strip_prefix(word).unwrap_or(rest);
    }
    let name = rest.strip_prefix("fn ")?;
    name.split(['(', '<']).next()
}

#[test]
fn functions_and_files_are_small() {
    let mut found = Vec::new();
    let mut listed: BTreeSet<&str> = RATCHET.iter().map(|(name, _)| *name).collect();
    let mut judge = |name: &str, lines: usize, max: usize| {
        let allowed = RATCHET.iter().find(|(listed, _)| *listed == name).map_or(max, |(_, size)| *size);
        if lines > max {
            listed.remove(name);
        }
        if lines > allowed {
            found.push(format!("{name}: {lines} lines, at most {allowed}"));
        }
    };
    for file in files().iter().filter(|file| file.is_rust()) {
        if !file.is_test() {
            judge(&file.path, file.production_lines(), FILE_LINES_MAX);
        }
        for (name, lines) in functions(file) {
            judge(&name, lines, FUNCTION_LINES_MAX);
        }
    }
    none("too long", &found);
    assert!(listed.is_empty(), "small enough now, take off the ratchet: {listed:?}");
}

#[test]
fn text_is_clean() {
    let mut found = Vec::new();
    for file in files() {
        if !file.text.is_empty() && !file.text.ends_with('\n') {
            found.push(format!("{}: no newline at the end", file.path));
        }
        for (i, line) in file.text.lines().enumerate() {
            let tab = line.contains('\t') && !file.path.ends_with(".sh");
            if tab || line.ends_with(' ') {
                found.push(format!("{}:{}: a tab or a space at the end", file.path, i + 1));
            }
        }
    }
    none("unclean text", &found);
}

#[test]
fn every_source_file_says_what_it_is() {
    let found = files().into_iter().filter(|file| {
        let first = file.text.lines().find(|line| !line.starts_with("#!["));
        file.is_rust() && !first.is_some_and(|line| line.starts_with("//!"))
    });
    none("no //! at the top", &found.map(|file| file.path).collect::<Vec<_>>());
}

#[test]
fn nothing_is_left_unfinished() {
    let this = "tests/tests/tidy.rs";
    let mut found = Vec::new();
    for file in files().iter().filter(|file| file.is_rust() && file.path != this) {
        for (i, line) in file.text.lines().enumerate() {
            if UNFINISHED.iter().any(|mark| line.contains(mark)) {
                found.push(format!("{}:{}", file.path, i + 1));
            }
        }
    }
    none("unfinished", &found);
}

#[test]
fn lints_are_inherited_and_formats_are_safe() {
    let manifest = fs::read_to_string(root().join("Cargo.toml")).unwrap();
    let members = manifest.lines().find_map(|line| line.strip_prefix("members = [")).expect("the members");
    for member in members.split('"').skip(1).step_by(2) {
        let manifest = fs::read_to_string(root().join(member).join("Cargo.toml")).unwrap();
        assert!(manifest.contains("[lints]\nworkspace = true\n"), "{member}: does not inherit the lints");
    }
    for member in ["image", "store"] {
        let lib = fs::read_to_string(root().join(member).join("src/lib.rs")).unwrap();
        assert!(lib.contains("#![forbid(unsafe_code)]"), "{member}");
    }
}

#[test]
fn unsafe_is_where_it_may_be_and_explained() {
    let mut found = Vec::new();
    for file in files().iter().filter(|file| file.is_rust() && !file.is_test()) {
        let lines: Vec<&str> = file.text.lines().collect();
        for (i, line) in lines.iter().enumerate() {
            let code = line.trim_start();
            let uses = !code.starts_with("//")
                && ["unsafe {", "unsafe impl "].iter().any(|word| code.contains(word));
            if uses && !UNSAFE_ALLOWED.iter().any(|folder| file.path.starts_with(folder)) {
                found.push(format!("{}:{}: unsafe here", file.path, i + 1));
            }
            if uses && !lines[i.saturating_sub(8)..=i].iter().any(|line| line.contains("SAFETY:")) {
                found.push(format!("{}:{}: unsafe without SAFETY", file.path, i + 1));
            }
        }
    }
    none("unsafe", &found);
}

/// The pieces of a document that are set as code: spans between backticks, and lines of blocks.
fn code(document: &str) -> Vec<&str> {
    let mut pieces = Vec::new();
    let mut in_block = false;
    for line in document.lines() {
        if line.trim_start().starts_with("```") {
            in_block = !in_block;
        } else if in_block {
            pieces.push(line.trim());
        } else {
            pieces.extend(line.split('`').skip(1).step_by(2));
        }
    }
    pieces
}

/// The variants of an enum of commands in a source file, as clap names them.
fn commands(path: &str, name: &str) -> BTreeSet<String> {
    let text = fs::read_to_string(root().join(path)).expect("the file with the commands");
    let body = text.split_once(&format!("enum {name} {{")).expect("the enum of the commands").1;
    let body = body.split_once("\n}").expect("its end").0;
    let variants = body.lines().filter_map(|line| {
        let word = line.strip_prefix("    ").filter(|rest| rest.starts_with(char::is_uppercase))?;
        word.split(|c: char| !c.is_alphanumeric()).next()
    });
    variants.map(str::to_lowercase).collect()
}

#[test]
fn commands_that_documents_name_exist() {
    let tools = [
        ("sapwood ", commands("tools/sapwood/src/cli/mod.rs", "Command")),
        ("cargo xtask ", commands("tools/xtask/src/main.rs", "Task")),
    ];
    let mut found = Vec::new();
    let mut named = 0;
    for file in files().iter().filter(|file| file.is_document()) {
        for piece in code(&file.text) {
            for (tool, commands) in &tools {
                let Some(rest) = piece.trim_start_matches("$ ").strip_prefix(tool) else { continue };
                let command = rest.split(|c: char| !c.is_alphanumeric()).next().unwrap_or("");
                named += 1;
                // In capitals it stands for any command.
                let stands_for_any = command.chars().all(char::is_uppercase);
                if !stands_for_any && command != "help" && !commands.contains(command) {
                    found.push(format!("{}: {piece}", file.path));
                }
            }
        }
    }
    assert!(named > 10, "the documents name commands");
    none("no such command", &found);
}

#[test]
fn paths_that_documents_name_exist() {
    let tops: Vec<String> = fs::read_dir(root())
        .unwrap()
        .map(|entry| entry.unwrap())
        .filter(|entry| entry.file_type().unwrap().is_dir())
        .map(|entry| format!("{}/", entry.file_name().to_string_lossy()))
        .filter(|top| !SKIPPED.contains(&top.trim_end_matches('/')))
        .collect();
    let mut found = Vec::new();
    for file in files().iter().filter(|file| file.is_document()) {
        let folder = root().join(&file.path).parent().expect("in the tree").to_owned();
        for target in file.text.split("](").skip(1).filter_map(|rest| rest.split([')', '#']).next()) {
            let external = target.is_empty() || target.contains("://");
            if !external && !folder.join(target).exists() {
                found.push(format!("{}: link to {target}", file.path));
            }
        }
        let words = code(&file.text).into_iter().flat_map(str::split_whitespace);
        for word in words.filter(|word| tops.iter().any(|top| word.starts_with(top.as_str()))) {
            let path = word.trim_end_matches([',', '.', ':', ';', ')']);
            if !path.contains(['*', '{', '<']) && !root().join(path).exists() {
                found.push(format!("{}: {path}", file.path));
            }
        }
    }
    none("no such path", &found);
}
