//! Writing: the right to append to the log, and what is appended with it.
//!
//! A change is decided by the catalogue, appended under a lock that dies with its holder, and holds
//! if no later epoch has claimed the pool by then.

use std::sync::Arc;

use carlsbad_types::ByteSize;

use crate::error::{Error, Result};
use crate::host::Epoch;
use crate::layout::{Extent, LOCK_APPEND, Operation, Superblock};
use crate::lock::{self, Kind};
use crate::log::State;
use crate::pool::{PATIENCE, Shared, locked};

/// Live and quarantined extents that the log may hold. A quarter of the arena stays free, so that
/// an arena is begun after many operations, whose cost it shares.
pub(crate) fn most(superblock: &Superblock) -> u64 {
    superblock.entries / 4 * 3
}

/// The right to append, while it is held.
pub(crate) struct Writer<'a> {
    pub(crate) shared: &'a Arc<Shared>,
    pub(crate) state: &'a mut State,
    epoch: Epoch,
}

impl Writer<'_> {
    /// Appends an operation, in a new arena where this one is full.
    pub(crate) fn append(&mut self, operation: Operation) -> Result<()> {
        let log = &self.shared.log;
        if self.state.position >= log.superblock.entries {
            log.begin_turn(self.state, self.shared.host.0, self.epoch)?;
        }
        log.append(self.state, operation)
    }

    /// Takes a namespace away, and frees its extent if nobody is attached.
    pub(crate) fn remove(&mut self, generation: u64, extent: Extent) -> Result<()> {
        self.append(Operation::Remove { generation })?;
        // From here on nobody attaches: whoever did before shows by its lease.
        if !self.shared.is_leased(generation, &self.state.catalog)? {
            self.free(generation, extent)?;
        }
        Ok(())
    }

    /// Frees an extent that was in quarantine, and gives its memory back to the file system: the
    /// namespace that gets it next may be long in coming, and another extent's pages are wanted now.
    pub(crate) fn free(&mut self, generation: u64, extent: Extent) -> Result<()> {
        self.append(Operation::Free { generation, extent })?;
        // The lock keeps it free on this host only: another one may have taken over by now, and given
        // it to a namespace.
        if self.shared.log.superblock.hosts > 1 {
            return Ok(());
        }
        if let Err(why) = self.shared.backend.discard(extent.range()) {
            // It is free, and is zeroed before it is used again.
            tracing::debug!(generation, %why, "the memory of a free extent was not given back");
        }
        Ok(())
    }

    /// Refuses where the log is full; what is in quarantine is looked at first.
    pub(crate) fn room_for_one_more(&mut self) -> Result<()> {
        self.room_within(most(&self.shared.log.superblock))
    }

    /// As [`Writer::room_for_one_more`], with the quarter of the arena that stays free otherwise: for an
    /// eviction, since leases of a dead host may be all that the log is full of, and for what is given
    /// back at once. One entry stays for what is freed.
    pub(crate) fn room_for_a_last_one(&mut self) -> Result<()> {
        self.room_within(self.shared.log.superblock.entries.saturating_sub(1))
    }

    fn room_within(&mut self, most: u64) -> Result<()> {
        if self.state.catalog.weight() >= most {
            self.reclaim()?;
        }
        let used = self.state.catalog.weight();
        if used >= most {
            return Err(Error::LogFull { used, most });
        }
        Ok(())
    }

    /// The extent for `length` bytes; what is in quarantine is looked at where there is none.
    pub(crate) fn find(&mut self, length: u64) -> Result<Extent> {
        if let Some(extent) = self.state.catalog.space().find(length) {
            return Ok(extent);
        }
        self.reclaim()?;
        let found = self.state.catalog.space().find(length);
        found.ok_or_else(|| self.no_room(length))
    }

    pub(crate) fn no_room(&self, length: u64) -> Error {
        let catalog = &self.state.catalog;
        Error::NoRoom {
            asked: ByteSize::new(length),
            free: ByteSize::new(catalog.space().free()),
            largest: ByteSize::new(catalog.space().largest()),
            quarantined: ByteSize::new(catalog.quarantined()),
        }
    }

    /// Frees what is in quarantine without a lease; how many bytes.
    pub(crate) fn reclaim(&mut self) -> Result<u64> {
        let mut freed = 0;
        let all: Vec<_> = self.state.catalog.quarantine().collect();
        for (generation, extent) in all {
            if !self.shared.is_leased(generation, &self.state.catalog)? {
                self.free(generation, extent)?;
                freed += extent.length;
            }
        }
        Ok(freed)
    }
}

impl Shared {
    /// Does `work` as the only writer of this host, and as the writer of the pool.
    pub(crate) fn write<T>(
        self: &Arc<Self>,
        work: impl FnOnce(&mut Writer<'_>) -> Result<T>,
    ) -> Result<T> {
        let Some(epoch) = self.epoch else {
            return Err(Error::ReadOnly {
                what: "change a namespace",
            });
        };
        self.is_this_process()?;
        let mut state = locked(&self.state);
        let _lock = self.lock_append()?;
        self.log.refresh(&mut state)?;
        self.log.fence_after(&state, self.host.0, epoch)?;
        let done = work(&mut Writer {
            shared: self,
            state: &mut state,
            epoch,
        });
        if done.is_err() {
            // What was applied here may not be on the medium: it is read anew.
            *state = State::unread(&self.log.superblock);
            return done;
        }
        // Of a claim and what was appended one comes first. If this sees no claim, whoever claims
        // later sees what was appended.
        if self.log.superblock.hosts > 1 {
            self.log.fence(self.host.0, epoch)?;
        }
        done
    }

    pub(crate) fn lock_append(&self) -> Result<lock::Guard<'_>> {
        lock::acquire(
            self.backend.as_fd(),
            LOCK_APPEND,
            Kind::Exclusive,
            PATIENCE,
            "the log",
        )
    }
}
