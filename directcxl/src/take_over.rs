//! Epochs: how a host becomes the writer of a pool, and another one stops being it.

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
            .max_by_key(|record| (record.epoch, record.host == self.host.0))
            .copied()
            .unwrap_or(current);
        let mine = highest.host == self.host.0;
        let by = HostId(highest.host);
        let theirs = Epoch(highest.epoch);
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
        // The record of the pool's state is not written over; every other one may be.
        if current.host != self.host.0 {
            log.write_record(&Record {
                generation: own.generation.saturating_add(1),
                epoch: epoch.0,
                state: HostState::Claiming,
                ..own
            })?;
            if let Err(why) = log.fence(self.host.0, epoch) {
                log.write_record(&Record {
                    generation: own.generation.saturating_add(2),
                    epoch: 0,
                    state: HostState::Idle,
                    ..own
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
