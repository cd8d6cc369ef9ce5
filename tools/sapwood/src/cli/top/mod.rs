//! `sapwood top`.
//!
//! - `board`: rates out of two moments' statistics, and the order of rows;
//! - `view`: how it looks.

mod board;
#[cfg(test)]
mod tests;
mod view;

use std::io::{IsTerminal, stdout};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use clap::Args;
use hyper::Method;
use ratatui::DefaultTerminal;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::flag;

use super::output::{self, Output};
use super::store::table;
use crate::control::client::Client;
use crate::control::wire::Nothing;
use crate::host::Host;
use crate::metrics::Statistics;
use crate::volumes::access::Access;
use crate::volumes::address::default_store;
use crate::volumes::look::ShowStatistics;
use board::Board;

/// How often it looks whether it is to end while it waits for a key.
const LOOK_INTERVAL: Duration = Duration::from_millis(200);

/// Show what virtual machines do with their disks, live
///
/// Of each disk: reads and writes each second with their bytes and latencies (half are faster, 99 % are faster) in the last interval, all
/// other requests, requests in flight, errors since it is served, how busy it was in the last intervals, its group and its limits.
/// Groups, in parentheses, follow the disks. Up and down choose a row, left and right the column that the rows are sorted by, q ends it.
#[derive(Args, Debug)]
#[command(after_help = "Examples:
  sapwood top /srv/vms
  sapwood top --control /run/vm1.control
  sapwood top /srv/vms --once --output=json")]
pub struct Top {
    /// Directory of a store that a daemon serves; by default the environment's SAPWOOD_STORE
    #[arg(value_name = "STORE", conflicts_with = "control")]
    store: Option<PathBuf>,

    /// Ask the server of a disk instead, at the socket that its --control names
    #[arg(long, value_name = "PATH")]
    control: Option<PathBuf>,

    /// Seconds of an interval
    #[arg(long, value_name = "SECONDS", default_value_t = 2)]
    #[arg(value_parser = clap::value_parser!(u64).range(1..=3600))]
    interval: u64,

    /// Print one interval, and end
    #[arg(long)]
    once: bool,

    /// human or json; json prints one interval
    #[arg(long, value_enum, value_name = "KIND", default_value_t)]
    output: Output,
}

/// Whom to ask.
enum Source {
    Served(PathBuf),
    Store(Access),
}

impl Source {
    fn ask(&self) -> anyhow::Result<Statistics> {
        match self {
            Self::Served(socket) => Client::new(socket).read(Method::GET, "/v1/statistics", &Nothing {}),
            Self::Store(access) => access.ask(ShowStatistics {}),
        }
    }
}

impl Top {
    pub fn run(self, host: &Host) -> anyhow::Result<()> {
        let source = self.source(host)?;
        let mut board = Board::default();
        board.update(Instant::now(), source.ask()?);
        let interval = Duration::from_secs(self.interval);
        if self.once || self.output == Output::Json {
            sleep(interval);
            board.update(Instant::now(), source.ask()?);
            return match self.output {
                Output::Human => output::print(&table(&view::lines(&board))),
                Output::Json => output::print_json(&board.rows()),
            };
        }
        if !stdout().is_terminal() {
            bail!("this is no terminal: use --once");
        }
        let is_over = Arc::new(AtomicBool::new(false));
        for signal in [SIGTERM, SIGHUP, SIGINT] {
            flag::register(signal, Arc::clone(&is_over)).context("cannot take signals")?;
        }
        // From here on a panic restores the terminal, too.
        let mut terminal = ratatui::try_init().context("cannot use the terminal")?;
        let shown = show(&mut terminal, &source, &mut board, interval, &is_over);
        ratatui::restore();
        shown
    }

    fn source(&self, host: &Host) -> anyhow::Result<Source> {
        if let Some(socket) = &self.control {
            return Ok(Source::Served(socket.clone()));
        }
        let store = default_store(self.store.as_deref())?;
        match Access::to(*host, &store)? {
            Access::Direct(_) => {
                bail!("{}: no daemon serves the store: there is nothing to see", store.display())
            }
            access => Ok(Source::Store(access)),
        }
    }
}

/// Shows the board until somebody ends it. A server that does not answer may come back.
fn show(
    terminal: &mut DefaultTerminal,
    source: &Source,
    board: &mut Board,
    interval: Duration,
    is_over: &AtomicBool,
) -> anyhow::Result<()> {
    let mut next = Instant::now() + interval;
    loop {
        terminal.draw(|frame| view::draw(frame, board))?;
        if is_over.load(Ordering::Relaxed) {
            return Ok(());
        }
        let left = next.saturating_duration_since(Instant::now());
        if left.is_zero() {
            match source.ask() {
                Ok(statistics) => board.update(Instant::now(), statistics),
                Err(error) => board.fail(format!("{error:#}")),
            }
            next = Instant::now() + interval;
        } else if event::poll(left.min(LOOK_INTERVAL))?
            && let Event::Key(key) = event::read()?
            && !press(board, key)
        {
            return Ok(());
        }
    }
}

/// Does what a key says; false if it ends the program.
fn press(board: &mut Board, key: KeyEvent) -> bool {
    if key.kind == KeyEventKind::Release {
        return true;
    }
    match key.code {
        KeyCode::Char('q') | KeyCode::Esc => return false,
        KeyCode::Char('c') if key.modifiers.contains(KeyModifiers::CONTROL) => return false,
        KeyCode::Left => board.sort_by(-1),
        KeyCode::Right => board.sort_by(1),
        KeyCode::Up => board.choose(-1),
        KeyCode::Down => board.choose(1),
        _ => {}
    }
    true
}
