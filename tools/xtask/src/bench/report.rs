//! The figures: a table as they come, and all of them as JSON.

use std::time::Duration;

use serde_json::{Value, json};

use super::case::{Case, Contestant};

/// One turn of one server.
pub struct Turn {
    /// Requests finished, without flushes.
    pub operations: u64,
    /// From the first request to the last answer.
    pub elapsed: Duration,
    /// Processor time of the server, background work until its next turn included.
    pub cpu: Duration,
    /// Bytes that the disk occupies after the server has stopped.
    pub allocated: Option<u64>,
}

impl Turn {
    fn per_second(&self) -> f64 {
        self.operations as f64 / self.elapsed.as_secs_f64()
    }

    fn cpu_us(&self) -> f64 {
        self.cpu.as_secs_f64() * 1e6 / self.operations as f64
    }
}

/// The turns of one server in one case.
pub struct Row {
    /// The server.
    pub contestant: Contestant,
    /// Its turns.
    pub turns: Vec<Turn>,
}

impl Row {
    fn median(&self, f: impl Fn(&Turn) -> f64) -> f64 {
        median(self.turns.iter().map(f).collect())
    }

    /// The median of our turn's figure divided by that of the peer's turn beside it.
    fn ratio(&self, ours: &Self, f: impl Fn(&Turn) -> f64) -> f64 {
        median(ours.turns.iter().zip(&self.turns).map(|(ours, peer)| f(ours) / f(peer)).collect())
    }

    /// Bytes occupied for each byte written.
    fn space(&self, case: &Case) -> Option<f64> {
        let bytes = case.load.bytes as f64;
        let ratios =
            self.turns.iter().map(|turn| Some(turn.allocated? as f64 / (turn.operations as f64 * bytes)));
        ratios.collect::<Option<Vec<f64>>>().map(median)
    }

    fn json(&self, case: &Case, ours: &Self) -> Value {
        let turn = |turn: &Turn| {
            json!({
                "operations": turn.operations,
                "seconds": turn.elapsed.as_secs_f64(),
                "cpu_seconds": turn.cpu.as_secs_f64(),
                "allocated_bytes": turn.allocated,
            })
        };
        json!({
            "server": self.contestant.name(),
            "operations_per_second": self.median(Turn::per_second),
            "cpu_us_per_operation": self.median(Turn::cpu_us),
            "space_per_byte": self.space(case),
            "ours_to_this_operations": self.ratio(ours, Turn::per_second),
            "ours_to_this_cpu": self.ratio(ours, Turn::cpu_us),
            "turns": self.turns.iter().map(turn).collect::<Vec<_>>(),
        })
    }
}

/// The middle one, or the mean of the two in the middle.
pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let half = values.len() / 2;
    match values.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => values[half],
        _ => f64::midpoint(values[half - 1], values[half]),
    }
}

/// All figures.
#[derive(Default)]
pub struct Report {
    /// Those of stacks.
    pub depth: Value,
    /// What a volume with many snapshots costs.
    pub snapshots: Value,
    cases: Vec<Value>,
}

/// Prints the table's head.
pub fn print_head() {
    println!(
        "{:<20} {:<19} {:>9} {:>11} {:>11}   sapwood / peer: {:>6} {:>6}",
        "case", "server", "I/O per s", "CPU µs/I/O", "space/byte", "I/O", "CPU"
    );
}

impl Report {
    /// Takes and prints the rows of a case; the first is ours.
    pub fn add(&mut self, case: &Case, rows: Vec<Row>) {
        let Some(ours) = rows.first() else { return };
        for (index, row) in rows.iter().enumerate() {
            let space = row.space(case).map_or(String::new(), |space| format!("{space:.2}"));
            print!(
                "{:<20} {:<19} {:>9.0} {:>11.1} {space:>11}",
                if index == 0 { case.name } else { "" },
                row.contestant.name(),
                row.median(Turn::per_second),
                row.median(Turn::cpu_us),
            );
            if index > 0 {
                let io = row.ratio(ours, Turn::per_second);
                print!("   {:>15} {io:>6.2} {:>6.2}", "", row.ratio(ours, Turn::cpu_us));
            }
            println!();
        }
        let servers: Vec<Value> = rows.iter().map(|row| row.json(case, ours)).collect();
        self.cases.push(json!({ "case": case.name, "servers": servers }));
    }

    /// Everything, for programs.
    pub fn json(&self, seconds: f64) -> String {
        let all = json!({ "seconds_per_turn": seconds, "cases": self.cases, "depth": self.depth, "snapshots": self.snapshots });
        format!("{all:#}\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert!((median(vec![3.0, 1.0, 2.0]) - 2.0).abs() < 1e-9);
        assert!((median(vec![4.0, 1.0, 2.0, 3.0]) - 2.5).abs() < 1e-9);
    }

    #[test]
    fn ratios_are_taken_between_neighbours() {
        let row = |operations: [u64; 3]| {
            let turn = |operations| Turn {
                operations,
                elapsed: Duration::from_secs(1),
                cpu: Duration::from_secs(1),
                allocated: None,
            };
            Row { contestant: Contestant::QemuRaw, turns: operations.map(turn).into() }
        };
        let ratio = row([10, 100, 1000]).ratio(&row([20, 200, 3000]), Turn::per_second);
        assert!((ratio - 2.0).abs() < 1e-9);
    }
}
