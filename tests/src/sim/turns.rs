//! Threads of a simulated process that take turns: one goes on, until it waits for its engine; then the seed says who is next.
//!
//! What a thread does between two waits is done in one piece. So is everything that it does with engines that take no
//! turns: a thread that holds a lock meanwhile, which others may want, needs such a one.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use super::rng::Rng;

/// Turns after which the threads are said to wait for each other for ever.
const TURNS_MAX: u64 = 200_000;

struct State {
    rng: Rng,
    /// Threads that have not ended, and how often each is next, compared with others: some are much slower.
    there: Vec<(usize, u64)>,
    next: usize,
    left: u64,
}

impl State {
    /// One of those that are there.
    fn draw(&mut self) -> usize {
        let mut at = self.rng.below(self.there.iter().map(|(_, often)| often).sum());
        let found = self.there.iter().find(|(_, often)| {
            let is_it = at < *often;
            at = at.saturating_sub(*often);
            is_it
        });
        found.expect("below the sum").0
    }
}

struct Turns {
    state: Mutex<State>,
    passed: Condvar,
}

impl Turns {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says who is next.
    fn pass(&self, state: &mut State) {
        if !state.there.is_empty() {
            state.next = state.draw();
            self.passed.notify_all();
        }
    }
}

/// A thread among those that take turns, until it is dropped.
pub struct Turn {
    turns: Arc<Turns>,
    number: usize,
}

/// So many threads that take turns; at least one.
pub fn turns(mut rng: Rng, count: usize) -> Vec<Turn> {
    let there = (0..count).map(|number| (number, rng.pick(&[1, 8, 64]))).collect();
    let mut state = State { rng, there, next: 0, left: TURNS_MAX };
    state.next = state.draw();
    let turns = Arc::new(Turns { state: Mutex::new(state), passed: Condvar::new() });
    (0..count).map(|number| Turn { turns: Arc::clone(&turns), number }).collect()
}

impl Turn {
    /// Waits for its turn: what a thread begins with.
    pub fn begin(&self) {
        let mut state = self.turns.state();
        while state.next != self.number {
            state = self.turns.passed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Lets somebody go on, perhaps the same thread.
    ///
    /// # Panics
    /// When that was done too often.
    pub fn pass(&self) {
        let mut state = self.turns.state();
        state.left = state.left.saturating_sub(1);
        assert!(state.left > 0, "all threads wait, and none for anything that comes");
        self.turns.pass(&mut state);
        drop(state);
        self.begin();
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let mut state = self.turns.state();
        state.there.retain(|(number, _)| *number != self.number);
        self.turns.pass(&mut state);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Who went on, in this order.
    fn order(seed: u64) -> Vec<usize> {
        let order = Mutex::new(Vec::new());
        std::thread::scope(|scope| {
            for turn in turns(Rng::new(seed), 3) {
                let order = &order;
                scope.spawn(move || {
                    turn.begin();
                    for _ in 0..20 {
                        order.lock().unwrap().push(turn.number);
                        turn.pass();
                    }
                });
            }
        });
        order.into_inner().unwrap()
    }

    #[test]
    fn the_seed_says_who_goes_on() {
        let first = order(1);
        assert_eq!(first.len(), 60);
        assert_eq!(first, order(1));
        assert_ne!(first, order(2));
    }

    #[test]
    fn who_waits_for_ever_is_told() {
        let ended: Vec<bool> = std::thread::scope(|scope| {
            let waiting = turns(Rng::new(1), 2).into_iter().map(|turn| {
                scope.spawn(move || {
                    turn.begin();
                    loop {
                        turn.pass();
                    }
                })
            });
            let waiting: Vec<_> = waiting.collect();
            waiting
                .into_iter()
                .map(|thread: std::thread::ScopedJoinHandle<'_, ()>| thread.join().is_err())
                .collect()
        });
        assert_eq!(ended, [true, true]);
    }
}
