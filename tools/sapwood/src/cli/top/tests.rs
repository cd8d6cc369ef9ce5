//! The board, from statistics to a terminal of text.

use std::time::{Duration, Instant};

use ratatui::Terminal;
use ratatui::backend::TestBackend;
use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyModifiers};
use sapwood_qos::account::{Account, Kind};
use sapwood_qos::names::Named;

use super::board::Board;
use super::{press, view};
use crate::metrics::{DiskStatistics, GroupStatistics, Statistics, Totals};

/// An account of so many reads of 4 KiB in so many microseconds each, and errors.
fn account(reads: u64, micros: u64, errors: u64) -> Account {
    let mut account = Account::default();
    let latency = serde_json::json!({
        "count": 0, "sum-us": (reads * micros) as f64, "p50-us": 0.0, "p99-us": 0.0, "p999-us": 0.0,
        "max-us": 1e6, "buckets": [[micros * 1000, reads]],
    });
    account[Kind::Read].latency = serde_json::from_value(latency).unwrap();
    account[Kind::Read].bytes = reads * 4096;
    account[Kind::Flush].errors = errors;
    account
}

fn statistics(disks: &[(&str, Account)]) -> Statistics {
    let disk = |(name, account): &(&str, Account)| DiskStatistics {
        name: (*name).to_owned(),
        virtual_size: 1 << 30,
        frontend_connected: true,
        group: None,
        limits: Named::new(),
        totals: Totals { account: account.clone(), ..Totals::default() },
        layer: None,
    };
    Statistics::now(disks.iter().map(disk).collect(), Vec::new())
}

fn text(board: &Board) -> String {
    let mut terminal = Terminal::new(TestBackend::new(150, 6)).unwrap();
    terminal.draw(|frame| view::draw(frame, board)).unwrap();
    terminal.backend().to_string()
}

/// Two disks, two seconds apart: one had 100 reads before and 200 after that, the other one is new.
fn board() -> Board {
    let (mut board, begin) = (Board::default(), Instant::now());
    board.update(begin, statistics(&[("web", account(100, 4000, 0))]));
    let mut web = account(100, 4000, 1);
    web.merge(&account(200, 100, 0));
    board.update(begin + Duration::from_secs(2), statistics(&[("web", web), ("db", account(10, 16, 0))]));
    board
}

#[test]
fn rates_are_those_of_the_interval() {
    let board = board();
    let [db, web] = board.rows() else { panic!("two rows") };
    assert_eq!((db.name.as_str(), db.read.operations, db.errors), ("db", 5.0, 0));
    assert_eq!((web.read.operations, web.read.bytes, web.errors), (100.0, 409_600.0, 1));
    // The slow ones were before.
    let slow = web.read.p99_us.unwrap();
    assert!((100.0..=106.3).contains(&slow), "{slow}");
    assert_eq!((web.write.operations, web.write.p50_us, &web.history), (0.0, None, &vec![100]));
}

#[test]
fn a_disk_that_begins_anew_has_no_rates_below_zero() {
    let (mut board, begin) = (Board::default(), Instant::now());
    for (second, reads) in [(0, 1000), (1, 30)] {
        board.update(begin + Duration::from_secs(second), statistics(&[("web", account(reads, 50, 0))]));
    }
    assert_eq!(board.rows()[0].read.operations, 30.0);
    board.update(begin + Duration::from_secs(2), statistics(&[]));
    assert!(board.rows().is_empty());
}

#[test]
fn it_is_drawn_with_its_names_numbers_and_keys() {
    let mut board = board();
    let drawn = text(&board);
    let line = |name: &str| {
        let found = drawn.lines().position(|line| line.contains(name));
        found.unwrap_or_else(|| panic!("no {name}: {drawn}"))
    };
    assert!(line("NAME") < line("db") && line("db") < line("web") && line("web") < line("q end"), "{drawn}");
    let web: Vec<&str> = drawn.lines().nth(line("web")).unwrap().split_whitespace().collect();
    assert_eq!(web[1..6], ["100", "400", "KiB", "100", "µs"], "{drawn}");
    assert!(drawn.contains('█') && drawn.contains("2 disks"), "{drawn}");
    board.fail("gone".to_owned());
    assert!(text(&board).contains("no answer: gone"));
    assert!(text(&Board::default()).contains("the first interval"));
}

#[test]
fn groups_are_lines_and_limits_are_shown() {
    let (mut board, begin) = (Board::default(), Instant::now());
    for second in 0..2 {
        let mut now = statistics(&[("web", account(second * 100, 50, 0)), ("db", account(0, 1, 0))]);
        let limits = |pairs: &[(&str, u64)]| -> Named {
            pairs.iter().map(|(name, value)| ((*name).to_owned(), *value)).collect()
        };
        now.disks[1].group = Some("web".to_owned());
        now.disks[1].limits = limits(&[("iops-total", 5000), ("iops-total-max", 9000)]);
        now.groups.push(GroupStatistics {
            name: "web".to_owned(),
            group: Some("all".to_owned()),
            limits: limits(&[("bps-total", 200 << 20), ("weight", 7)]),
            disks: 1,
            totals: Totals { account: account(second * 300, 50, 0), ..Totals::default() },
        });
        board.update(begin + Duration::from_secs(second), now);
    }
    for _ in 0..12 {
        // Whatever the order is: a group has more than its disks, and would be on top.
        let names: Vec<_> = board.rows().iter().map(|row| (row.name.as_str(), row.read.operations)).collect();
        assert_eq!(names[2], ("web", 300.0), "{names:?}");
        board.sort_by(1);
    }
    board.sort_by(-20);
    let lines = view::lines(&board);
    let ends: Vec<_> = lines.iter().map(|line| (line[0].as_str(), &line[line.len() - 2..])).collect();
    let row = |name, group: &str, limits: &str| (name, [group.to_owned(), limits.to_owned()]);
    let expected = [
        row("NAME", "GROUP", "LIMITS"),
        row("db", "-", "-"),
        row("web", "(web)", "iops 5000/9000"),
        row("(web)", "(all)", "bps 200 MiB, weight 7"),
    ];
    assert!(
        ends.iter().zip(&expected).all(|(a, b)| a.0 == b.0 && *a.1 == b.1) && ends.len() == 4,
        "{ends:?}"
    );
    let last = |board: &Board| text(board).lines().rfind(|line| line.contains("q end")).unwrap().to_owned();
    assert!(last(&board).contains("2 disks") && !last(&board).contains("iops"), "{}", last(&board));
    board.choose(1);
    assert!(last(&board).contains("web in (web): iops 5000/9000"), "{}", last(&board));
    board.choose(1);
    assert!(last(&board).contains("web in (all): bps 200 MiB, weight 7"), "{}", last(&board));
}

#[test]
fn keys_choose_and_sort_and_end() {
    let mut board = board();
    let mut key = |code| press(&mut board, KeyEvent::new(code, KeyModifiers::NONE));
    assert!(key(KeyCode::Right) && key(KeyCode::Down) && key(KeyCode::Down) && key(KeyCode::Char('x')));
    assert!(!key(KeyCode::Char('q')) && !key(KeyCode::Esc));
    assert_eq!((board.column(), board.chosen(), board.rows()[0].name.as_str()), (1, 1, "web"));
    for _ in 0..20 {
        board.sort_by(1);
    }
    assert_eq!(board.column(), 11, "the last one");
    for _ in 0..20 {
        press(&mut board, KeyEvent::new(KeyCode::Left, KeyModifiers::NONE));
    }
    assert_eq!((board.column(), board.rows()[0].name.as_str()), (0, "db"));
    assert!(!press(&mut board, KeyEvent::new(KeyCode::Char('c'), KeyModifiers::CONTROL)));
}

#[test]
fn a_chart_reaches_from_the_lowest_to_the_highest_sign() {
    assert_eq!(view::chart(&[0, 1, 50, 99, 100]), "▁▂▅██");
    assert_eq!(view::chart(&[0, 0]), "▁▁");
    assert_eq!(view::chart(&[]), "");
}
