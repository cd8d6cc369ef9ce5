//! Limits in virtual time: windows, bursts, changes.

use super::*;
use crate::random::random;

const SECOND: u64 = 1_000_000_000;

fn at(ns: u64) -> Duration {
    Duration::from_nanos(ns)
}

fn rate(per_second: u64) -> Option<Rate> {
    Some(Rate { per_second, burst: None })
}

fn bursting(per_second: u64, burst: u64, seconds: u64) -> Option<Rate> {
    let burst = Burst { per_second: burst, length: Duration::from_secs(seconds) };
    Some(Rate { per_second, burst: Some(burst) })
}

fn read(bytes: u64) -> Work {
    Work { direction: Direction::Read, bytes }
}

fn write(bytes: u64) -> Work {
    Work { direction: Direction::Write, bytes }
}

/// Does work as soon as it may, from `now` until `end`, waking up to `late` nanoseconds late: when, and what.
fn drive(
    meter: &mut Meter,
    (mut now, end, late): (u64, u64, u64),
    mut next: impl FnMut(u64) -> Work,
    state: &mut u64,
) -> Vec<(u64, Work)> {
    let mut done = Vec::new();
    loop {
        let work = next(random(state));
        loop {
            let ready = meter.ready_at(work.direction, at(now)).as_nanos() as u64;
            if ready >= end {
                return done;
            }
            if ready == now {
                break;
            }
            now = ready + if late == 0 { 0 } else { random(state) % late };
        }
        meter.take(&work);
        done.push((now, work));
    }
}

/// The most that a limit without a burst lets through in a window of so many nanoseconds: what comes meanwhile and in 10 ms, and never
/// faster than a 64th above the rate, after 2 ms at once.
fn allowed(per_second: u64, window: u64) -> u64 {
    let comes = |time: u64| (u128::from(per_second) * u128::from(time) / u128::from(SECOND)) as u64;
    comes(window + 10_000_000).min(comes(window + window / 64 + 2_000_000) + 1) + 1
}

/// The most that is let through in any window of `window` nanoseconds.
fn most(done: &[(u64, Work)], window: u64, amount: impl Fn(&Work) -> u64) -> u64 {
    let (mut first, mut sum, mut most) = (0, 0, 0);
    for (now, work) in done {
        sum += amount(work);
        while done[first].0 + window <= *now {
            sum -= amount(&done[first].1);
            first += 1;
        }
        most = most.max(sum);
    }
    most
}

#[test]
fn any_window_is_within_the_limit_and_demand_is_met() {
    for seed in 0..60 {
        let mut state = seed;
        let per_second = [1_000, 10_000, 50_000, 7_777][seed as usize % 4];
        let limits = Limits { iops_total: rate(per_second), ..Limits::default() };
        let mut meter = Meter::new(&limits, at(0));
        // Wakes up to a millisecond late, and still loses nothing.
        let end = 2 * SECOND;
        let done = drive(&mut meter, (0, end, 1_000_000), |_| read(4096), &mut state);
        let wanted = per_second * 2;
        assert!(done.len() as u64 >= wanted * 99 / 100, "seed {seed}: {} of {wanted}", done.len());
        for window in [10, 25, 100, 1000].map(|ms| ms * 1_000_000) {
            let (most, allowed) = (most(&done, window, |_| 1), allowed(per_second, window));
            assert!(most <= allowed, "seed {seed}: {most} in {window} ns, {allowed} allowed");
        }
    }
}

#[test]
fn bytes_are_counted_whatever_the_size_of_requests() {
    for seed in 0..40 {
        let mut state = seed;
        let per_second = [10, 100, 500][seed as usize % 3] * 1_000_000;
        let limits = Limits { bps_total: rate(per_second), ..Limits::default() };
        let mut meter = Meter::new(&limits, at(0));
        let any = |n: u64| Work {
            bytes: 512 * (1 + n % 256),
            ..if n.is_multiple_of(3) { write(0) } else { read(0) }
        };
        let done = drive(&mut meter, (0, 2 * SECOND, 500_000), any, &mut state);
        let moved: u64 = done.iter().map(|(_, work)| work.bytes).sum();
        assert!(moved >= per_second * 2 * 99 / 100, "seed {seed}: {moved}");
        let allowed = allowed(per_second, SECOND / 10) + 128 * 1024;
        assert!(most(&done, SECOND / 10, |work| work.bytes) <= allowed, "seed {seed}");
    }
}

#[test]
fn a_burst_lasts_as_long_as_it_says_and_comes_again_after_idling() {
    let limits = Limits { iops_total: bursting(1_000, 5_000, 3), ..Limits::default() };
    let mut meter = Meter::new(&limits, at(0));
    let mut state = 1;
    for start in [0, 100 * SECOND] {
        let done = drive(&mut meter, (start, start + 6 * SECOND, 0), |_| read(512), &mut state);
        for second in 0..6 {
            let range = start + second * SECOND..start + (second + 1) * SECOND;
            let count = done.iter().filter(|(now, _)| range.contains(now)).count() as i64;
            let expected = if second < 3 { 5_000 } else { 1_000 };
            assert!((count - expected).abs() <= 50 + 5, "second {second} after {start}: {count}");
        }
    }
}

#[test]
fn directions_and_large_requests_count_as_they_should() {
    let iops_size = NonZeroU64::new(8192);
    let limits = Limits { iops_read: rate(100), iops_total: rate(150), iops_size, ..Limits::default() };
    let mut meter = Meter::new(&limits, at(0));
    let mut state = 2;
    let reads = drive(&mut meter, (0, 10 * SECOND, 0), |_| read(512), &mut state).len();
    assert!((1_000..=1_002).contains(&reads), "{reads}");
    let writes = drive(&mut meter, (10 * SECOND, 20 * SECOND, 0), |_| write(512), &mut state).len();
    assert!((1_500..=1_503).contains(&writes), "reads are limited to less: {writes}");
    // Each counts as two and a half.
    let large = drive(&mut meter, (20 * SECOND, 30 * SECOND, 0), |_| write(20_480), &mut state).len();
    assert!((599..=601).contains(&large), "{large}");
}

#[test]
fn changes_while_there_is_demand_neither_stall_nor_flood() {
    for seed in 0..30 {
        let mut state = seed;
        let mut meter = Meter::new(&Limits { iops_total: rate(1_000), ..Limits::default() }, at(0));
        let mut now = 0;
        for _ in 0..40 {
            let per_second = [1, 50, 1_000, 30_000, 200_000][random(&mut state) as usize % 5];
            meter.change(&Limits { iops_total: rate(per_second), ..Limits::default() }, at(now));
            let end = now + SECOND / 2;
            let count = drive(&mut meter, (now, end, 0), |_| read(512), &mut state).len() as u64;
            let (least, most) = (per_second * 495 / 1000, allowed(per_second, SECOND / 2) + 1);
            assert!(
                (least.saturating_sub(1)..=most).contains(&count),
                "seed {seed}: {count} at {per_second}"
            );
            now = end;
        }
    }
}

#[test]
fn limits_without_sense_are_refused_by_name() {
    let none = Limits { bps_read: rate(0), ..Limits::default() };
    assert!(none.check().unwrap_err().to_string().starts_with("bps-read: 0 each second"));
    let slow = Limits { iops_write: bursting(10, 9, 1), ..Limits::default() };
    assert!(slow.check().unwrap_err().to_string().contains("iops-write-max: 9 is less"));
    let short = Limits { iops_total: bursting(10, 90, 0), ..Limits::default() };
    assert!(short.check().unwrap_err().to_string().contains("iops-total-max-length"));
    let good = Limits { bps_total: bursting(RATE_MAX, RATE_MAX, 86_400), ..Limits::default() };
    assert!(good.check().is_ok() && !good.is_empty() && Limits::default().is_empty());
    // The largest of all do not overflow.
    let mut meter = Meter::new(&good, at(0));
    meter.take(&read(u64::MAX));
    assert!(meter.ready_at(Direction::Read, at(0)) > at(0));
}
