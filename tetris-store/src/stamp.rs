//! A [`Moment`] on a file: kept as its modification time, counted from 1970 instead of from boot.
//!
//! Reading one needs no right but to look at the file; writing one needs its owner's.

use std::fs::{File, FileTimes};
use std::io;
use std::time::{Duration, SystemTime};

use nix::time::{ClockId, clock_gettime};

use crate::error::{Error, Result};
use crate::lifecycle::Moment;

/// The present moment.
pub(crate) fn now() -> Result<Moment> {
    let now =
        clock_gettime(ClockId::CLOCK_BOOTTIME).map_err(Error::io("read", "CLOCK_BOOTTIME"))?;
    Ok(Moment::new(Duration::from(now)))
}

/// What a file with this modification time was stamped with.
pub(crate) fn read(modified: SystemTime) -> Moment {
    // Before 1970 nobody stamped: as old as can be.
    let since = modified.duration_since(SystemTime::UNIX_EPOCH);
    Moment::new(since.unwrap_or_default())
}

/// Stamps `file`.
pub(crate) fn write(file: &File, moment: Moment) -> io::Result<()> {
    let modified = SystemTime::UNIX_EPOCH + moment.since_boot();
    file.set_times(FileTimes::new().set_modified(modified))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stamp_reads_back_and_the_clock_runs() {
        let file = tempfile::tempfile().unwrap();
        let before = now().unwrap();
        for moment in [before, Moment::IN_USE] {
            write(&file, moment).unwrap();
            assert_eq!(read(file.metadata().unwrap().modified().unwrap()), moment);
        }
        assert!(now().unwrap() > before);
    }
}
