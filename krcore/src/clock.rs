//! The clock of leases: monotonic, so that it does not jump when somebody sets the time, and coarse,
//! since it is read for every request.

use std::time::{Duration, Instant};

use nix::time::{ClockId, clock_gettime};

/// Time since some fixed moment, to a few milliseconds.
pub(crate) fn coarse() -> Duration {
    match clock_gettime(ClockId::CLOCK_MONOTONIC_COARSE) {
        Ok(now) => Duration::from(now),
        // Cannot be on Linux; the precise clock counts from the same moment on.
        Err(_) => clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(Duration::MAX, Duration::from),
    }
}

/// A moment up to which something is waited for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Deadline {
    end: Option<Instant>,
}

impl Deadline {
    pub(crate) fn after(limit: Duration) -> Self {
        Self {
            end: Instant::now().checked_add(limit),
        }
    }

    /// What is left; `None` when it is over.
    pub(crate) fn left(&self) -> Option<Duration> {
        match self.end {
            None => Some(Duration::from_secs(3600)),
            Some(end) => end
                .checked_duration_since(Instant::now())
                .filter(|left| !left.is_zero()),
        }
    }
}
