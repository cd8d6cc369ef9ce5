//! The test suite as a list of named steps. Every step ends as passed, failed or skipped with a
//! reason; nothing is left out silently.

pub mod fuzz;
pub mod steps;

use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// How a step ended when it did not fail.
pub enum Verdict {
    /// It did what it should.
    Passed,
    /// This machine or this tree cannot do it; the text says why.
    Skipped(String),
}

/// One part of the suite.
pub struct Step<'a> {
    /// What `--only` and the summary call it.
    pub name: String,
    run: Box<dyn Fn() -> Result<Verdict> + 'a>,
}

impl<'a> Step<'a> {
    /// A step that does `run`.
    pub fn new(name: impl Into<String>, run: impl Fn() -> Result<Verdict> + 'a) -> Self {
        Self { name: name.into(), run: Box::new(run) }
    }
}

enum Ending {
    Passed,
    Failed(String),
    Skipped(String),
}

/// Keeps the steps that `only` names: by their whole name, or by the part before the slash. An
/// empty `only` keeps all.
///
/// # Errors
/// A name fits no step; the message lists the names.
pub fn select<'a>(steps: Vec<Step<'a>>, only: &[String]) -> Result<Vec<Step<'a>>> {
    let fits = |step: &Step, name: &str| {
        step.name == name || step.name.split_once('/').is_some_and(|(group, _)| group == name)
    };
    for name in only {
        if !steps.iter().any(|step| fits(step, name)) {
            let names: Vec<&str> = steps.iter().map(|step| step.name.as_str()).collect();
            bail!("no step is called {name}; there are: {}", names.join(", "));
        }
    }
    let wanted = |step: &Step| only.is_empty() || only.iter().any(|name| fits(step, name));
    Ok(steps.into_iter().filter(wanted).collect())
}

/// Runs the steps in order, prints a summary whose last line is `N passed, N failed, N skipped`,
/// and says whether none failed.
pub fn run(steps: &[Step]) -> bool {
    let begin = Instant::now();
    let mut endings = Vec::new();
    for step in steps {
        println!("\n== {}", step.name);
        let begin = Instant::now();
        let ending = match (step.run)() {
            Ok(Verdict::Passed) => Ending::Passed,
            Ok(Verdict::Skipped(reason)) => Ending::Skipped(reason),
            Err(error) => Ending::Failed(format!("{error:#}")),
        };
        match &ending {
            Ending::Passed => {}
            Ending::Failed(reason) => println!("failed: {}: {reason}", step.name),
            Ending::Skipped(reason) => println!("skipped: {}: {reason}", step.name),
        }
        endings.push((step.name.as_str(), ending, begin.elapsed()));
    }
    print_summary(&endings, begin.elapsed())
}

fn print_summary(endings: &[(&str, Ending, Duration)], total: Duration) -> bool {
    let (mut passed, mut failed, mut skipped) = (0, 0, 0);
    println!("\n== summary");
    for (name, ending, elapsed) in endings {
        let word = match ending {
            Ending::Passed => {
                passed += 1;
                "passed"
            }
            Ending::Failed(_) => {
                failed += 1;
                "FAILED"
            }
            Ending::Skipped(_) => {
                skipped += 1;
                "skipped"
            }
        };
        println!("  {word:<8} {name:<32} {:>7.1} s", elapsed.as_secs_f64());
    }
    for (name, ending, _) in endings {
        match ending {
            Ending::Passed => {}
            Ending::Failed(reason) => println!("failed: {name}: {}", first_line(reason)),
            Ending::Skipped(reason) => println!("skipped: {name}: {}", first_line(reason)),
        }
    }
    println!("in {:.1} minutes", total.as_secs_f64() / 60.0);
    println!("{passed} passed, {failed} failed, {skipped} skipped");
    failed == 0
}

fn first_line(text: &str) -> &str {
    text.lines().next().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn steps() -> Vec<Step<'static>> {
        let names = ["fmt", "fuzz/header", "fuzz/request"];
        names.map(|name| Step::new(name, || Ok(Verdict::Passed))).into()
    }

    fn names(only: &[&str]) -> Vec<String> {
        let only: Vec<String> = only.iter().map(|&name| name.to_owned()).collect();
        select(steps(), &only).unwrap().into_iter().map(|step| step.name).collect()
    }

    #[test]
    fn steps_are_selected_by_name_or_group() {
        assert_eq!(names(&[]), ["fmt", "fuzz/header", "fuzz/request"]);
        assert_eq!(names(&["fuzz"]), ["fuzz/header", "fuzz/request"]);
        assert_eq!(names(&["fuzz/request", "fmt"]), ["fmt", "fuzz/request"]);
        assert!(select(steps(), &["fuz".to_owned()]).is_err());
    }

    #[test]
    fn one_failure_fails_the_run() {
        assert!(run(&[Step::new("a", || Ok(Verdict::Skipped("no".to_owned())))]));
        let failing = Step::new("b", || bail!("broken"));
        assert!(!run(&[Step::new("a", || Ok(Verdict::Passed)), failing]));
    }
}
