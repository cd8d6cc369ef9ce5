//! Runs many histories, and reports a failing one so that it can be replayed and understood.

use std::cell::Cell;
use std::fmt::Write;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Once;

use super::history::{Cut, History};
use super::plan::{Plan, Step};
use super::subject::Subject;

/// Runs spent on shortening a failing history.
const SHORTENING_MAX: usize = 300;

/// Lines of the trace that are printed.
const TRACE_LINES_MAX: usize = 500;

/// A history that broke the contract.
#[derive(Clone, Debug)]
pub struct Failure {
    /// The history.
    pub plan: Plan,
    /// Where it was cut.
    pub cut: Option<Cut>,
    /// What went wrong.
    pub message: String,
}

thread_local! {
    static QUIET: Cell<bool> = const { Cell::new(false) };
    static PANIC: Cell<Option<String>> = const { Cell::new(None) };
}

/// Panics of histories are results: they are not printed as they happen.
fn hush_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let usual = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if QUIET.get() {
                PANIC.set(Some(info.to_string().replace('\n', " ")));
            } else {
                usual(info);
            }
        }));
    });
}

/// What running a history showed.
pub struct Run {
    /// Whether the disk kept its contract.
    pub result: Result<(), String>,
    /// The events at which the history can be cut.
    pub cuts: Range<u64>,
    /// What happened, if that was asked for.
    pub trace: Vec<String>,
    /// A hash of what happened.
    pub hash: u64,
}

/// Runs one history. A panic is a violation.
pub fn run<S: Subject>(subject: &S, plan: &Plan, cut: Option<Cut>, trace: bool) -> Run {
    hush_panics();
    let mut history = History::new(subject.clone(), plan, cut, trace);
    let world = history.world.clone();
    QUIET.set(true);
    let caught = catch_unwind(AssertUnwindSafe(|| {
        let result = history.run(plan);
        (result, history.cuts())
    }));
    QUIET.set(false);
    let (result, cuts) = caught.unwrap_or_else(|_| (Err(PANIC.take().unwrap_or_default()), 0..0));
    let (trace, hash) = world.trace();
    Run { result, cuts, trace, hash }
}

/// Runs the history of a seed.
pub fn run_seed<S: Subject>(subject: &S, seed: u64) -> Result<(), Box<Failure>> {
    let plan = Plan::random(seed, subject.queues_max());
    match run(subject, &plan, None, false).result {
        Ok(()) => Ok(()),
        Err(message) => Err(Box::new(Failure { plan, cut: None, message })),
    }
}

/// The first of these seeds whose history fails, and how many were tried.
pub fn first_failure<S: Subject>(
    subject: &S,
    seeds: impl IntoIterator<Item = u64>,
) -> (u64, Option<Box<Failure>>) {
    let mut runs = 0;
    for seed in seeds {
        runs += 1;
        if let Err(failure) = run_seed(subject, seed) {
            return (runs, Some(failure));
        }
    }
    (runs, None)
}

/// What a message says without its numbers: the same for similar failures.
fn kind(message: &str) -> String {
    message
        .split(|c: char| !c.is_alphabetic())
        .filter(|word| !word.is_empty())
        .take(12)
        .collect::<Vec<_>>()
        .join(" ")
}

/// Leaves out steps for as long as the history still fails, and in a similar way.
pub fn shorten<S: Subject>(subject: &S, failure: &Failure) -> Failure {
    let mut best = failure.clone();
    let mut left = SHORTENING_MAX;
    let mut size = best.plan.steps.len() / 2;
    while size > 0 && best.cut.is_none() {
        let mut start = 0;
        while start < best.plan.steps.len() && left > 0 {
            left -= 1;
            let mut plan = best.plan.clone();
            let end = (start + size).min(plan.steps.len());
            plan.steps.drain(start..end);
            match run(subject, &plan, None, false).result {
                Err(message) if kind(&message) == kind(&failure.message) => {
                    best = Failure { plan, cut: None, message };
                }
                _ => start += size,
            }
        }
        size /= 2;
    }
    best
}

/// A failing history as text: what it is, how to replay it, and what happened.
pub fn report<S: Subject>(subject: &S, failure: &Failure, test: &str) -> String {
    let short = shorten(subject, failure);
    let trace = run(subject, &short.plan, short.cut, true).trace;
    let seed = failure.plan.seed;
    let mut text = String::new();
    let _ = writeln!(text, "seed {seed}: {}", failure.message);
    let _ = writeln!(text, "replay: SAPWOOD_SIM_SEED={seed} cargo test -p sapwood-tests --test {test}");
    let _ = writeln!(text, "{:?}\n{:?}\ncut: {:?}", short.plan.shape, short.plan.faults, short.cut);
    let _ = writeln!(text, "shortened to {} steps: {}", short.plan.steps.len(), short.message);
    for step in &short.plan.steps {
        let _ = writeln!(text, "    {step:?}");
    }
    let skipped = trace.len().saturating_sub(TRACE_LINES_MAX);
    let _ = writeln!(text, "({skipped} lines left out)");
    for line in &trace[skipped..] {
        let _ = writeln!(text, "{line}");
    }
    let _ = writeln!(text, "seed {seed}: {}", short.message);
    text
}

/// Runs a short history, then again for every moment at which it can be cut: once with a kill,
/// and with power cuts of several kinds. Returns how many runs that were.
///
/// # Errors
/// The first run that broke the contract.
pub fn cut_everywhere<S: Subject>(
    subject: &S,
    plan: &Plan,
    cuts: &[Option<super::persist::Persistence>],
) -> Result<u64, Box<Failure>> {
    let whole = run(subject, plan, None, false);
    if let Err(message) = whole.result {
        return Err(Box::new(Failure { plan: plan.clone(), cut: None, message }));
    }
    let mut runs = 1;
    for event in whole.cuts {
        for power in cuts {
            let cut = Some(Cut { event, power: *power });
            runs += 1;
            if let Err(message) = run(subject, plan, cut, false).result {
                return Err(Box::new(Failure { plan: plan.clone(), cut, message }));
            }
        }
    }
    Ok(runs)
}

/// The seeds to run: one from `SAPWOOD_SIM_SEED`, or as many as `SAPWOOD_SIM_SEEDS` says, or
/// `usual`; a hundred times as many under `SAPWOOD_SOAK`.
pub fn seeds(usual: u64) -> Range<u64> {
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse().expect(name));
    if let Some(seed) = number("SAPWOOD_SIM_SEED") {
        return seed..seed + 1;
    }
    let factor = if std::env::var_os("SAPWOOD_SOAK").is_some() { 100 } else { 1 };
    let first = number("SAPWOOD_SIM_FIRST").unwrap_or(0);
    first..first + number("SAPWOOD_SIM_SEEDS").unwrap_or(usual * factor)
}

/// The same for histories that are cut at every event, which are hundreds of runs each: one for
/// every thousand seeds asked for.
pub fn few_seeds() -> Range<u64> {
    let seeds = seeds(1);
    seeds.start..seeds.start + (seeds.end - seeds.start).div_ceil(1000)
}

impl Plan {
    /// A history written by hand.
    pub fn written(seed: u64, shape: super::plan::Shape, steps: &[Step]) -> Self {
        Self { seed, shape, faults: super::faults::Faults::default(), steps: steps.to_vec() }
    }
}
