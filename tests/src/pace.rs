//! A client that keeps so many requests outstanding, and when each of them ended: how well a limit is kept.

use std::collections::HashMap;
use std::io;
use std::thread;
use std::time::{Duration, Instant};

use crate::frontend::{Command, Queue};
use crate::sim::rng::Rng;

/// What a client asks for.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    /// Requests outstanding.
    pub depth: usize,
    /// Bytes of each.
    pub bytes: usize,
    /// Whether it writes.
    pub write: bool,
    /// Bytes of the disk that it uses, from the start.
    pub span: u64,
    /// For the places.
    pub seed: u64,
    /// Time that it rests before each request.
    pub rest: Duration,
}

/// When requests ended, since the client began, and how long each took.
#[derive(Clone, Debug, Default)]
pub struct Ends(Vec<(Duration, Duration)>);

/// How long a client waits for anything.
const STUCK: Duration = Duration::from_secs(20);

impl Load {
    /// Asks for so long, and then waits for what is outstanding.
    ///
    /// # Errors
    /// A request failed, or none ended in 20 s.
    pub fn run(&self, queue: &mut Queue, time: Duration) -> io::Result<Ends> {
        let (begin, mut rng) = (Instant::now(), Rng::new(self.seed));
        let (data, mut tag) = (vec![0x5a; self.bytes], 0);
        let (mut began, mut ends, mut failed) = (HashMap::new(), Ends::default(), None);
        loop {
            let is_over = begin.elapsed() >= time;
            while !is_over && queue.outstanding() < self.depth {
                if !self.rest.is_zero() {
                    thread::sleep(self.rest);
                }
                let at = rng.below(self.span / self.bytes as u64) * self.bytes as u64;
                let command =
                    if self.write { Command::Write(at, &data) } else { Command::Read(at, self.bytes) };
                queue.submit(tag, command)?;
                began.insert(tag, begin.elapsed());
                tag += 1;
            }
            queue.kick()?;
            if is_over && queue.outstanding() == 0 {
                return failed.map_or(Ok(ends), Err);
            }
            let now = begin.elapsed();
            let count = queue.poll(|finished| {
                failed = failed.take().or(finished.result.err());
                let began = began.remove(&finished.tag).unwrap_or(now);
                ends.0.push((now, now.saturating_sub(began)));
            });
            if count == 0 && !queue.wait(STUCK)? {
                return Err(io::ErrorKind::TimedOut.into());
            }
        }
    }
}

impl Ends {
    /// Counts those of another time as well.
    pub fn add(&mut self, other: &Self) {
        self.0.extend(&other.0);
        self.0.sort_unstable();
    }

    /// Requests that ended.
    pub fn count(&self) -> u64 {
        self.0.len() as u64
    }

    /// Those that ended from `from` until before `to`.
    pub fn between(&self, from: Duration, to: Duration) -> u64 {
        let before = |time: Duration| self.0.partition_point(|(at, _)| *at < time) as u64;
        before(to) - before(from)
    }

    /// The fewest and the most that ended in a window of this width, one beginning each millisecond from `from` on until `to`.
    pub fn windows(&self, width: Duration, from: Duration, to: Duration) -> (u64, u64) {
        let starts =
            (0..).map(|ms| from + Duration::from_millis(ms)).take_while(|start| *start + width <= to);
        starts
            .map(|start| self.between(start, start + width))
            .fold((u64::MAX, 0), |(min, max), count| (min.min(count), max.max(count)))
    }

    /// The time within which this share of the requests ended, from 0 to 1.
    pub fn quantile(&self, share: f64) -> Duration {
        let mut times: Vec<Duration> = self.0.iter().map(|(_, took)| *took).collect();
        times.sort_unstable();
        let at = ((times.len() as f64 * share) as usize).min(times.len().saturating_sub(1));
        times.get(at).copied().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_and_quantiles_are_counted_as_they_are_said() {
        let ms = Duration::from_millis;
        let ends = Ends((0..100).map(|n| (ms(10 * n), ms(n))).collect());
        assert_eq!((ends.between(ms(0), ms(100)), ends.between(ms(10), ms(11))), (10, 1));
        assert_eq!(ends.windows(ms(100), ms(0), ms(990)), (10, 10));
        assert_eq!(ends.windows(ms(5), ms(0), ms(990)), (0, 1));
        assert_eq!((ends.quantile(0.5), ends.quantile(1.0)), (ms(50), ms(99)));
    }
}
