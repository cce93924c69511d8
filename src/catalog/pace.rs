//! How many requests may be in flight: more while the server answers, half as many when it asks for less haste.

use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// A limit that adapts itself. Each success adds a little, each refusal halves it, at most once per [`CALM`], since all
/// requests of one moment are refused together.
#[derive(Debug)]
pub struct Pace {
    state: Mutex<State>,
    free: Condvar,
    most: f64,
}

const CALM: Duration = Duration::from_millis(500);

#[derive(Debug)]
struct State {
    in_flight: usize,
    limit: f64,
    slowed: Option<Instant>,
}

/// The right to have one request in flight.
#[derive(Debug)]
pub struct Permit<'a>(&'a Pace);

impl Pace {
    /// At most `most` in flight.
    pub fn new(most: usize) -> Pace {
        let most = most.max(1) as f64;
        let state = State { in_flight: 0, limit: most, slowed: None };
        Pace { state: Mutex::new(state), free: Condvar::new(), most }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Waits until another request may go.
    pub fn enter(&self) -> Permit<'_> {
        let mut state = self.state();
        while state.in_flight as f64 >= state.limit {
            state = self.free.wait(state).unwrap_or_else(std::sync::PoisonError::into_inner);
        }
        state.in_flight += 1;
        Permit(self)
    }

    /// A request was served.
    pub fn served(&self) {
        let mut state = self.state();
        state.limit = (state.limit + 1.0 / state.limit).min(self.most);
        drop(state);
        self.free.notify_one();
    }

    /// The server asked for less haste.
    pub fn slow_down(&self) {
        let mut state = self.state();
        if state.slowed.is_none_or(|at| at.elapsed() >= CALM) {
            state.limit = (state.limit / 2.0).max(1.0);
            state.slowed = Some(Instant::now());
        }
    }

    #[cfg(test)]
    fn limit(&self) -> usize {
        self.state().limit as usize
    }
}

impl Drop for Permit<'_> {
    fn drop(&mut self) {
        self.0.state().in_flight -= 1;
        self.0.free.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_halve_it_once_a_moment_and_success_brings_it_back() {
        let pace = Pace::new(64);
        for _ in 0..10 {
            pace.slow_down();
        }
        assert_eq!(pace.limit(), 32);
        for _ in 0..10_000 {
            pace.served();
        }
        assert_eq!(pace.limit(), 64);
    }

    #[test]
    fn no_more_than_the_limit_are_in_flight() {
        let pace = Pace::new(3);
        let most = Mutex::new((0, 0));
        std::thread::scope(|s| {
            for _ in 0..12 {
                s.spawn(|| {
                    for _ in 0..20 {
                        let _permit = pace.enter();
                        {
                            let mut counts = most.lock().unwrap();
                            counts.0 += 1;
                            counts.1 = counts.1.max(counts.0);
                        }
                        std::thread::yield_now();
                        most.lock().unwrap().0 -= 1;
                    }
                });
            }
        });
        assert!(most.lock().unwrap().1 <= 3);
    }
}
