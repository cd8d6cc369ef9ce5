//! How the board looks.

use ratatui::Frame;
use ratatui::layout::{Constraint, Layout};
use ratatui::style::{Modifier, Style};
use ratatui::widgets::{Cell, Paragraph, Row as Line, Table, TableState};

use super::board::{Board, COLUMNS, Rate, Row, Subject};
use crate::cli::{limits, size};

/// Signs of a small chart, from the lowest to the highest.
const SIGNS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
/// Widths of the columns; after these come the small chart and the group, and limits take the rest.
const WIDTHS: [u16; 14] = [20, 8, 10, 8, 8, 8, 10, 8, 8, 8, 6, 6, 20, 12];

/// A number of requests.
fn count(value: f64) -> String {
    if value < 9.95 { format!("{value:.1}") } else { format!("{value:.0}") }
}

/// A time in the unit in which it is short.
fn time(micros: Option<f64>) -> String {
    match micros {
        None => "-".to_owned(),
        Some(micros) if micros < 1000.0 => format!("{micros:.0} µs"),
        Some(micros) if micros < 1e6 => format!("{:.1} ms", micros / 1e3),
        Some(micros) => format!("{:.1} s", micros / 1e6),
    }
}

/// A small chart. Its highest sign is the highest of its values.
pub fn chart(values: &[u64]) -> String {
    let top = values.iter().copied().max().unwrap_or(0).max(1);
    values.iter().map(|value| SIGNS[(value * 7).div_ceil(top).min(7) as usize]).collect()
}

fn cells(row: &Row) -> Vec<String> {
    let rate = |rate: &Rate| {
        [count(rate.operations), size::short(rate.bytes as u64), time(rate.p50_us), time(rate.p99_us)]
    };
    let name = match row.kind {
        Subject::Disk => row.name.clone(),
        Subject::Group => format!("({})", row.name),
    };
    let mut cells = vec![name];
    cells.extend(rate(&row.read));
    cells.extend(rate(&row.write));
    cells.extend([count(row.other.operations), row.in_flight.to_string(), row.errors.to_string()]);
    cells
}

/// The group that a row is in, and its limits.
fn bounds(row: &Row) -> [String; 2] {
    let group = row.group.as_ref().map_or_else(|| "-".to_owned(), |group| format!("({group})"));
    let limits = limits::short(&row.limits);
    [group, if limits.is_empty() { "-".to_owned() } else { limits }]
}

/// The board as a table of text.
pub fn lines(board: &Board) -> Vec<Vec<String>> {
    let head = COLUMNS.iter().chain(&["GROUP", "LIMITS"]).map(|name| (*name).to_owned()).collect();
    let rows = board.rows().iter().map(|row| cells(row).into_iter().chain(bounds(row)).collect());
    [head].into_iter().chain(rows).collect()
}

/// What is said of the row that is chosen, where there is more than its numbers.
fn chosen(board: &Board) -> String {
    let Some(row) = board.rows().get(board.chosen()) else { return String::new() };
    let group = row.group.as_ref().map(|group| format!(" in ({group})")).unwrap_or_default();
    let limits = limits::short(&row.limits);
    match (group.is_empty(), limits.is_empty()) {
        (true, true) => String::new(),
        (_, true) => format!("  {}{group}", row.name),
        _ => format!("  {}{group}: {limits}", row.name),
    }
}

/// Draws it.
pub fn draw(frame: &mut Frame<'_>, board: &Board) {
    let [body, foot] = Layout::vertical([Constraint::Min(1), Constraint::Length(1)]).areas(frame.area());
    let head = COLUMNS.iter().chain(&["BUSY", "GROUP", "LIMITS"]).enumerate().map(|(column, name)| {
        let is_sorted = column == board.column();
        Cell::from(*name).style(if is_sorted { Modifier::REVERSED } else { Modifier::BOLD })
    });
    let rows = board.rows().iter().map(|row| {
        let style = if row.frontend_connected { Style::new() } else { Modifier::DIM.into() };
        Line::new(cells(row).into_iter().chain([chart(&row.history)]).chain(bounds(row))).style(style)
    });
    // In a narrow terminal limits are what goes first: the last line has those of the row that is chosen.
    let widths = WIDTHS.map(Constraint::Length).into_iter().chain([Constraint::Fill(1)]);
    let table = Table::new(rows, widths).header(Line::new(head)).row_highlight_style(Modifier::REVERSED);
    let mut state = TableState::new().with_selected(board.chosen());
    frame.render_stateful_widget(table, body, &mut state);
    let said = match (board.failure(), board.is_new(), board.rows().len()) {
        (Some(failure), ..) => format!("no answer: {failure}"),
        (None, true, _) => "the first interval...".to_owned(),
        (None, false, 0) => "no disk is served".to_owned(),
        (None, false, _) => {
            let disks = board.rows().iter().filter(|row| row.kind == Subject::Disk).count();
            format!("{disks} disks  ↑↓ row  ←→ sort  q end{}", chosen(board))
        }
    };
    frame.render_widget(Paragraph::new(said), foot);
}
