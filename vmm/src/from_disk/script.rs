//! The part of GRUB's scripts (GRUB manual, section Writing full configuration files directly) that `grub-mkconfig` writes:
//! words, quotes, variables, `if`, `menuentry` and `submenu`. Loops and functions are skipped, and so is every
//! command that does not say what is booted. As nothing loops, a script takes time in proportion to its length.

use std::collections::HashMap;

/// How deep blocks and conditions may lie in each other.
const DEPTH_MAX: usize = 16;
/// Bytes of a word once its variables are replaced.
const WORD_BYTES_MAX: usize = 4096;
/// Bytes of all words of a command. A kernel's command line has at most as many.
const COMMAND_BYTES_MAX: usize = 64 << 10;
/// Variables that a script may have.
const VARIABLES_MAX: usize = 64;
/// Entries of a script, and commands for GRUB's memory of them.
const ENTRIES_MAX: usize = super::ENTRIES_MAX;

/// Values of variables.
pub type Variables = HashMap<String, String>;

#[derive(Clone, Debug, PartialEq, Eq)]
enum Piece {
    Text(String),
    Variable(String),
}

/// A word; `quoted` where a part of it was in quotes, so that it counts even when it is empty.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Word {
    pieces: Vec<Piece>,
    quoted: bool,
}

impl Word {
    fn push(&mut self, c: char) {
        match self.pieces.last_mut() {
            Some(Piece::Text(text)) => text.push(c),
            _ => self.pieces.push(Piece::Text(c.to_string())),
        }
    }

    /// Its text, where it is a plain word.
    fn plain(&self) -> Option<&str> {
        match self.pieces.as_slice() {
            [Piece::Text(text)] if !self.quoted => Some(text),
            _ => None,
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Token {
    Word(Word),
    /// A newline or a semicolon.
    End,
    Open,
    Close,
}

/// Takes a script apart.
fn tokens(text: &str) -> Vec<Token> {
    let mut tokens = Vec::new();
    let mut word: Option<Word> = None;
    let mut chars = text.chars().peekable();
    let finish = |word: &mut Option<Word>, tokens: &mut Vec<Token>| {
        let Some(word) = word.take() else { return };
        tokens.push(match word.plain() {
            Some("{") => Token::Open,
            Some("}") => Token::Close,
            _ => Token::Word(word),
        });
    };
    while let Some(c) = chars.next() {
        match c {
            '\n' | ';' => {
                finish(&mut word, &mut tokens);
                tokens.push(Token::End);
            }
            c if c.is_whitespace() => finish(&mut word, &mut tokens),
            '#' if word.is_none() => while chars.next_if(|c| *c != '\n').is_some() {},
            '\\' => {
                // A newline after it joins the lines.
                if let Some(c) = chars.next().filter(|c| *c != '\n') {
                    word.get_or_insert_default().push(c);
                }
            }
            '\'' => {
                let word = word.get_or_insert_default();
                word.quoted = true;
                while let Some(c) = chars.next().filter(|c| *c != '\'') {
                    word.push(c);
                }
            }
            '"' => {
                let word = word.get_or_insert_default();
                word.quoted = true;
                while let Some(c) = chars.next().filter(|c| *c != '"') {
                    match c {
                        '\\' if chars.peek().is_some_and(|c| "\\\"$".contains(*c)) => {
                            word.push(chars.next().unwrap_or_default());
                        }
                        '$' => variable(word, &mut chars),
                        c => word.push(c),
                    }
                }
            }
            '$' => variable(word.get_or_insert_default(), &mut chars),
            c => word.get_or_insert_default().push(c),
        }
    }
    finish(&mut word, &mut tokens);
    tokens
}

/// `$name` or `${name}`, after the `$`.
fn variable(word: &mut Word, chars: &mut std::iter::Peekable<std::str::Chars<'_>>) {
    let mut name = String::new();
    if chars.next_if_eq(&'{').is_some() {
        while let Some(c) = chars.next().filter(|c| *c != '}') {
            name.push(c);
        }
    } else {
        while let Some(c) = chars.next_if(|c| c.is_ascii_alphanumeric() || *c == '_') {
            name.push(c);
        }
    }
    if name.is_empty() { word.push('$') } else { word.pieces.push(Piece::Variable(name)) }
}

/// A statement of a script.
#[derive(Debug)]
pub struct Statement(Kind);

#[derive(Debug)]
enum Kind {
    Command(Vec<Word>),
    /// Conditions and what they guard; an `else` is guarded by none.
    If(Vec<(Vec<Statement>, Vec<Statement>)>),
    Block(Vec<Word>, Vec<Statement>),
}

/// Reads a script.
///
/// # Errors
/// It is nested too deeply.
pub fn parse(text: &str) -> Result<Vec<Statement>, &'static str> {
    let mut parser = Parser { tokens: tokens(text).into_iter().peekable() };
    let mut all = Vec::new();
    while parser.tokens.peek().is_some() {
        all.extend(parser.statements(&[], 0)?);
        // What is closed here was never opened.
        parser.tokens.next();
    }
    Ok(all)
}

struct Parser {
    tokens: std::iter::Peekable<std::vec::IntoIter<Token>>,
}

impl Parser {
    /// Statements up to one of the words `stop`, or to a brace that closes: neither is taken.
    fn statements(&mut self, stop: &[&str], depth: usize) -> Result<Vec<Statement>, &'static str> {
        if depth > DEPTH_MAX {
            return Err("nested too deeply");
        }
        let mut all = Vec::new();
        while let Some(token) = self.tokens.peek() {
            let keyword = match token {
                Token::Close => break,
                Token::End | Token::Open => {
                    self.tokens.next();
                    continue;
                }
                Token::Word(word) => word.plain().unwrap_or_default().to_owned(),
            };
            if stop.contains(&keyword.as_str()) {
                break;
            }
            match keyword.as_str() {
                "if" => all.push(self.condition(depth)?),
                "while" | "until" | "for" => {
                    self.tokens.next();
                    self.statements(&["done"], depth + 1)?;
                    self.tokens.next();
                }
                _ => all.extend(self.command(depth)?),
            }
        }
        Ok(all)
    }

    fn condition(&mut self, depth: usize) -> Result<Statement, &'static str> {
        let mut branches = Vec::new();
        // At `if`, `elif`, `else` or `fi`, or at the end of a script that is cut off.
        while let Some(Token::Word(word)) = self.tokens.next() {
            let guard = match word.plain() {
                Some("fi") => break,
                Some("else") => Vec::new(),
                _ => {
                    let guard = self.statements(&["then"], depth + 1)?;
                    self.tokens.next();
                    guard
                }
            };
            branches.push((guard, self.statements(&["elif", "else", "fi"], depth + 1)?));
        }
        Ok(Statement(Kind::If(branches)))
    }

    fn command(&mut self, depth: usize) -> Result<Option<Statement>, &'static str> {
        let mut words = Vec::new();
        while let Some(token) = self.tokens.next_if(|token| matches!(token, Token::Word(_))) {
            let Token::Word(word) = token else { break };
            words.push(word);
        }
        if self.tokens.next_if_eq(&Token::Open).is_none() {
            return Ok(Some(Statement(Kind::Command(words))));
        }
        let body = self.statements(&[], depth + 1)?;
        self.tokens.next_if_eq(&Token::Close);
        let is_function = words.first().and_then(Word::plain) == Some("function");
        Ok((!is_function).then_some(Statement(Kind::Block(words, body))))
    }
}

/// An entry of a menu.
#[derive(Debug)]
pub struct Item<'a> {
    /// What the menu shows.
    pub title: String,
    /// `--id`, or what follows `$menuentry_id_option`.
    pub id: Option<String>,
    /// What lies in a submenu.
    pub items: Vec<Item<'a>>,
    /// Whether it is a submenu.
    pub is_submenu: bool,
    body: &'a [Statement],
    variables: Variables,
}

/// A kernel or an initial file system: the device that paths are counted from, and the path.
pub type DevicePath = (String, String);

/// What the commands of an entry ask for.
#[derive(Debug, Default)]
pub struct Boot {
    /// `linux` and its arguments.
    pub linux: Option<(DevicePath, String)>,
    /// `initrd`.
    pub initrds: Vec<DevicePath>,
}

/// Runs scripts.
pub struct Machine<'a> {
    /// The variables now; `root` is the device that paths are counted from.
    pub variables: Variables,
    /// What `load_env` loads; none where there is no such file.
    pub environment: Option<&'a Variables>,
    /// What `search` finds, in small letters. It sets `root` to `UUID=` and the UUID.
    pub uuids: &'a [String],
    /// Whether a word grew too long, or there were too many variables: what was run is not to be trusted.
    pub is_over: bool,
    entries: usize,
    boot: Boot,
}

impl<'a> Machine<'a> {
    /// A machine as GRUB is when it begins with its configuration.
    pub fn new(root: String, environment: Option<&'a Variables>, uuids: &'a [String]) -> Self {
        let given = [
            ("root", root.as_str()),
            ("prefix", "/grub"),
            ("grub_platform", "pc"),
            ("grub_cpu", "x86_64"),
            ("menuentry_id_option", "--id"),
            ("feature_menuentry_id", "y"),
            ("feature_platform_search_hint", "y"),
        ];
        let variables = given.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
        Self { variables, environment, uuids, is_over: false, entries: 0, boot: Boot::default() }
    }

    /// What an entry boots.
    pub fn boot(&mut self, item: &Item<'_>) -> Boot {
        self.variables = item.variables.clone();
        self.boot = Boot::default();
        self.run(item.body, &mut Vec::new());
        std::mem::take(&mut self.boot)
    }

    /// Runs statements; entries are added to `menu`.
    pub fn run<'s>(&mut self, statements: &'s [Statement], menu: &mut Vec<Item<'s>>) {
        for statement in statements {
            match &statement.0 {
                Kind::Command(words) => {
                    let words = self.expand(words);
                    self.command(&words);
                }
                Kind::If(branches) => {
                    let taken = branches.iter().find(|(guard, _)| guard.is_empty() || self.holds(guard));
                    if let Some((_, body)) = taken {
                        self.run(body, menu);
                    }
                }
                Kind::Block(words, body) => self.entry(words, body, menu),
            }
        }
    }

    fn entry<'s>(&mut self, words: &[Word], body: &'s [Statement], menu: &mut Vec<Item<'s>>) {
        let words = self.expand(words);
        let [kind, title, options @ ..] = words.as_slice() else { return };
        if !matches!(kind.as_str(), "menuentry" | "submenu") || self.entries == ENTRIES_MAX {
            return;
        }
        self.entries += 1;
        let is_submenu = kind == "submenu";
        let id = options.iter().enumerate().find_map(|(index, option)| match option.as_str() {
            "--id" => options.get(index + 1).cloned(),
            option => option.strip_prefix("--id=").map(str::to_owned),
        });
        let variables = self.variables.clone();
        let mut items = Vec::new();
        if is_submenu {
            self.run(body, &mut items);
            self.variables.clone_from(&variables);
        }
        menu.push(Item { title: title.clone(), id, items, is_submenu, body, variables });
    }

    fn expand(&mut self, words: &[Word]) -> Vec<String> {
        let mut expanded = Vec::new();
        let mut bytes = 0;
        for word in words {
            let mut text = String::new();
            for piece in &word.pieces {
                match piece {
                    Piece::Text(piece) => text.push_str(piece),
                    Piece::Variable(name) => {
                        text.push_str(self.variables.get(name).map_or("", String::as_str))
                    }
                }
                if text.len() > WORD_BYTES_MAX {
                    self.is_over = true;
                    return Vec::new();
                }
            }
            // The space between words counts, so that empty ones do as well.
            bytes += text.len() + 1;
            if bytes > COMMAND_BYTES_MAX {
                self.is_over = true;
                return Vec::new();
            }
            // Outside quotes, a variable stands for as many words as it has.
            let has_variables = word.pieces.iter().any(|piece| matches!(piece, Piece::Variable(_)));
            if word.quoted || !has_variables {
                expanded.push(text);
            } else {
                expanded.extend(text.split_whitespace().map(str::to_owned));
            }
        }
        expanded
    }

    fn assign(&mut self, name: &str, value: &str) {
        if self.variables.len() >= VARIABLES_MAX && !self.variables.contains_key(name) {
            self.is_over = true;
            return;
        }
        self.variables.insert(name.to_owned(), value.to_owned());
    }

    fn command(&mut self, words: &[String]) {
        let Some((name, arguments)) = words.split_first() else { return };
        match name.as_str() {
            "set" => {
                for (name, value) in arguments.iter().filter_map(|word| word.split_once('=')) {
                    self.assign(name, value);
                }
            }
            "unset" => arguments.iter().for_each(|name| drop(self.variables.remove(name))),
            "load_env" => {
                for (name, value) in self.environment.into_iter().flatten() {
                    self.assign(name, value);
                }
            }
            "search" | "search.fs_uuid" => self.search(name, arguments),
            "linux" | "linux16" | "linuxefi" => {
                if let Some((path, options)) = arguments.split_first() {
                    self.boot.linux = Some((self.path(path), options.join(" ")));
                }
            }
            "initrd" | "initrd16" | "initrdefi" => {
                let room = ENTRIES_MAX.saturating_sub(self.boot.initrds.len());
                let paths: Vec<DevicePath> =
                    arguments.iter().take(room).map(|path| self.path(path)).collect();
                self.boot.initrds.extend(paths);
            }
            name => {
                if let Some((name, value)) = name.split_once('=') {
                    self.assign(name, value);
                }
            }
        }
    }

    /// `(device)/path`, or a path from `root`.
    fn path(&self, path: &str) -> DevicePath {
        let named = path.strip_prefix('(').and_then(|rest| rest.split_once(')'));
        let root = || self.variables.get("root").cloned().unwrap_or_default();
        match named {
            Some((device, path)) => (device.to_owned(), path.to_owned()),
            None => (root(), path.to_owned()),
        }
    }

    /// Searches for a UUID; what is searched by label or file is not found, and `root` stays what it is.
    fn search(&mut self, name: &str, arguments: &[String]) {
        let by_uuid = name == "search.fs_uuid"
            || arguments.iter().any(|word| matches!(word.as_str(), "--fs-uuid" | "-u"));
        let variable = arguments.iter().find_map(|word| word.strip_prefix("--set=")).unwrap_or("root");
        let known = arguments.iter().map(|word| word.to_ascii_lowercase());
        let found = known.into_iter().find(|word| self.uuids.contains(word));
        if let Some(uuid) = found.filter(|_| by_uuid) {
            self.assign(variable, &format!("UUID={uuid}"));
        }
    }

    fn holds(&mut self, guard: &[Statement]) -> bool {
        let Some(Kind::Command(words)) = guard.last().map(|statement| &statement.0) else { return false };
        let words = self.expand(words);
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        match words.as_slice() {
            ["true"] => true,
            ["[", test @ .., "]"] | ["test", test @ ..] => self.test(test),
            _ => false,
        }
    }

    fn test(&self, words: &[&str]) -> bool {
        if let Some(at) = words.iter().position(|word| *word == "-o") {
            return self.test(&words[..at]) || self.test_rest(&words[at + 1..]);
        }
        match words {
            ["!", rest @ ..] => !self.test_rest(rest),
            // The only file that a script asks about which matters here.
            ["-s" | "-f" | "-e", path] => path.ends_with("/grubenv") && self.environment.is_some(),
            ["-n", word] => !word.is_empty(),
            ["-z", word] => word.is_empty(),
            ["-z"] => true,
            [a, "=" | "==", b] => a == b,
            [a, "!=", b] => a != b,
            [word] => !word.is_empty(),
            _ => false,
        }
    }

    /// A test without any part that leads deeper, so that words cannot make it recurse.
    fn test_rest(&self, words: &[&str]) -> bool {
        let deeper = words.iter().any(|word| matches!(*word, "-o" | "!"));
        !deeper && self.test(words)
    }
}

#[cfg(test)]
mod tests;
