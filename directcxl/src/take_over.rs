//! Epochs: how a host becomes the writer of a pool, and another one stops being it.
//!
//! A host that takes an epoch over *claims* it in its record, *reads* the log to its end, and writes
//! what it read, under the new epoch, to an arena of its own. A writer *appends* an entry, then
//! *looks* at every record, and says that the entry holds only if none has a later epoch. Each of the
//! four is in memory, or comes from there, before the next begins. So no entry is lost that was said
//! to hold under an earlier epoch: its writer's look came before the claim (or it would have seen it),
//! its entry before its look, and the claim before the reading, which therefore finds the entry.
//!
//! That needs the claim from every host that takes over, also from the one whose arena is the pool's
//! state: another one, with an epoch in between, can become the writer while it reads. Its record
//! cannot say `claiming`, for it is what names that arena; it claims in a field of its own. Where the
//! pool has one host the lock of the kernel, which is held all the while, stands for all this.

use crate::error::{Error, Result};
use crate::host::{Epoch, HostId};
use crate::layout::{HostState, Record};
use crate::log::State;
use crate::pool::Shared;

impl Shared {
    /// Makes this host the writer with `epoch`, or joins it where it is that already.
    pub(crate) fn take_over(&self, epoch: Epoch) -> Result<Epoch> {
        let _lock = self.lock_append()?;
        let log = &self.log;
        let records = log.records()?;
        let own = records
            .get(usize::from(self.host.0))
            .copied()
            .unwrap_or(Record::idle(self.host.0));
        let current = log.current()?;
        let highest = records
            .iter()
            .filter(|record| record.state != HostState::Idle)
            .max_by_key(|record| (record.latest(), record.host == self.host.0))
            .copied()
            .unwrap_or(current);
        let mine = highest.host == self.host.0;
        let by = HostId(highest.host);
        let theirs = Epoch(highest.latest());
        let epoch = match epoch {
            epoch if epoch > Epoch::LAST => {
                let last = Epoch::LAST;
                return Err(Error::BadEpoch { epoch, last });
            }
            Epoch::CURRENT if mine => theirs,
            Epoch::CURRENT => return Err(Error::NotWriter { epoch: theirs, by }),
            ours if ours < theirs => return Err(Error::Fenced { ours, theirs, by }),
            ours if ours == theirs && !mine => return Err(Error::EpochTaken { epoch: ours, by }),
            ours => ours,
        };
        if current.host == self.host.0 && current.epoch == epoch.0 {
            return Ok(epoch);
        }
        if log.superblock.hosts > 1 {
            // The record of the pool's state goes on naming it; every other one may be written over.
            let (claim, withdrawn) = if current.host == self.host.0 {
                let claim = epoch.0;
                (Record { claim, ..current }, current)
            } else {
                let in_state = |epoch, state| Record {
                    epoch,
                    state,
                    claim: 0,
                    ..own
                };
                (
                    in_state(epoch.0, HostState::Claiming),
                    in_state(0, HostState::Idle),
                )
            };
            log.write_record(&Record {
                generation: own.generation.saturating_add(1),
                ..claim
            })?;
            if let Err(why) = log.fence(self.host.0, epoch) {
                log.write_record(&Record {
                    generation: own.generation.saturating_add(2),
                    ..withdrawn
                })?;
                return Err(why);
            }
        }
        let mut state = State::unread(&log.superblock);
        log.refresh(&mut state)?;
        log.begin_turn(&mut state, self.host.0, epoch)?;
        log.fence(self.host.0, epoch)?;
        tracing::info!(host = self.host.0, epoch = epoch.0, "writes from now on");
        Ok(epoch)
    }
}
