//! How many processes a sandbox has: their numbers, one in each place.

use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};

use nix::errno::Errno;
use nix::sys::signal::kill;
use nix::unistd::{Pid, getpid};

/// The most processes of one sandbox, its first one left out.
const MOST: usize = 4096;

/// The processes of a sandbox, but for its first.
///
/// Nobody has to say that it ends, which one that is killed could not: where all places are taken,
/// those are found whose processes are no more.
#[derive(Debug)]
#[repr(C)]
pub struct Processes {
    /// First: most of their pages are never touched.
    places: [AtomicI32; MOST],
    /// How many of the places may be taken.
    most: AtomicU64,
    /// Whether one was ever taken.
    used: AtomicU64,
}

impl Processes {
    /// For a clone that may have `most` processes. Says whether others had places before.
    pub(super) fn begin(&self, most: u32) -> bool {
        let used = self.used.swap(0, Ordering::Relaxed) > 0;
        let most = u64::from(most.saturating_sub(1)).min(MOST as u64);
        self.most.store(most, Ordering::Relaxed);
        used
    }

    fn allowed(&self) -> &[AtomicI32] {
        let most = self.most.load(Ordering::Relaxed) as usize;
        &self.places[..most.min(MOST)]
    }

    /// A place for a process that this one is about to make.
    ///
    /// # Errors
    /// EAGAIN where there are as many as may be.
    pub fn claim(&self) -> Result<&AtomicI32, Errno> {
        self.used.store(1, Ordering::Relaxed);
        let by = -getpid().as_raw();
        let free = || {
            self.allowed().iter().find(|place| {
                place
                    .compare_exchange(0, by, Ordering::AcqRel, Ordering::Relaxed)
                    .is_ok()
            })
        };
        if let Some(place) = free() {
            return Ok(place);
        }
        for place in self.allowed() {
            let there = place.load(Ordering::Acquire);
            // Its own number, or that of who was about to make it.
            let pid = Pid::from_raw(there.wrapping_abs());
            if there != 0 && kill(pid, None) == Err(Errno::ESRCH) {
                let _taken = place.compare_exchange(there, 0, Ordering::AcqRel, Ordering::Relaxed);
            }
        }
        free().ok_or(Errno::EAGAIN)
    }
}
