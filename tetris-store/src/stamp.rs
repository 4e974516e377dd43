//! When a model or an object was last seen in use, kept as the modification time of its file.
//!
//! The time base is CLOCK_BOOTTIME: it never jumps, runs on while the machine sleeps, and is the
//! same for all processes outside time namespaces. The last three digits carry one mark.

use std::fs::{File, FileTimes};
use std::io;
use std::time::{Duration, SystemTime};

use nix::time::{ClockId, clock_gettime};

/// A moment since boot, to the microsecond, and whether there was a lease at that moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Stamp {
    /// Time since boot.
    pub(crate) at: Duration,
    /// Whether somebody held a lease then: the idle time begins when that is first seen to be over.
    pub(crate) leased: bool,
}

/// Time since boot.
pub(crate) fn since_boot() -> io::Result<Duration> {
    let now = clock_gettime(ClockId::CLOCK_BOOTTIME)?;
    Ok(Duration::from(now))
}

impl Stamp {
    /// Now.
    pub(crate) fn now(leased: bool) -> io::Result<Self> {
        Ok(Self {
            at: since_boot()?,
            leased,
        })
    }

    /// What `file` was stamped with.
    pub(crate) fn of(modified: SystemTime) -> Self {
        // A time before 1970 cannot come from us: as old as can be.
        let raw = modified
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap_or_default();
        Self {
            at: Duration::from_micros(raw.as_micros() as u64),
            leased: raw.subsec_nanos() % 1000 == 1,
        }
    }

    /// Stamps `file`, which needs its owner's rights.
    pub(crate) fn put(self, file: &File) -> io::Result<()> {
        let raw = Duration::from_micros(self.at.as_micros() as u64);
        let raw = raw + Duration::from_nanos(u64::from(self.leased));
        file.set_times(FileTimes::new().set_modified(SystemTime::UNIX_EPOCH + raw))
    }

    /// How long ago that was at `now`; none at all for a stamp that lies in the future.
    pub(crate) fn age(self, now: Duration) -> Duration {
        now.saturating_sub(self.at)
    }
}
