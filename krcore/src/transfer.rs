//! Moving a virtual queue between a shared (DC) and a dedicated pair (RC): a fence on the old one,
//! its completion, and only then the switch; so nothing is reordered, lost or doubled (section 4.5).
//! A SEND has been delivered to the peer's receive queue when it completes, so the fence holds for
//! messages as well.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::dispatch::Queue;
use crate::error::{Error, Result};
use crate::fabric::Op;
use crate::region::{RKey, RemoteSlice};
use crate::vq::{PooledQueue, WorkRequest};

impl PooledQueue {
    pub(crate) fn transfer_to_dedicated(&mut self) -> Result<()> {
        if !self.core.pool.keeps_dedicated() {
            return Err(Error::OutOfRange {
                what: "the number of dedicated pairs of this node",
                given: 0,
                least: 1,
                most: u64::MAX,
            });
        }
        if self.core.pool.dedicated(self.peer).is_none() {
            self.core.promote(self.peer, self.address)?;
        }
        match self.core.pool.dedicated(self.peer) {
            Some(queue) => self.transfer(&queue),
            // Evicted again at once: it is as if it had been moved back.
            None => Ok(()),
        }
    }

    pub(crate) fn transfer_to_dynamic(&mut self) -> Result<()> {
        let queue = Arc::clone(self.core.pool.dynamic());
        self.transfer(&queue)
    }

    fn transfer(&mut self, to: &Arc<Queue>) -> Result<()> {
        if Arc::ptr_eq(to, &self.queue) {
            return Ok(());
        }
        let ticket = to.join()?;
        let nowhere = RemoteSlice {
            key: RKey(0),
            offset: 0,
        };
        let fence = WorkRequest::new(0, Op::Fence, self.core.nothing(), nowhere);
        let ready = self.queue.fence(self.ticket, self.address, fence);
        self.queue.leave(self.ticket);
        self.ready.extend(ready);
        if let Some(event) = self.event.get() {
            to.signal.register(ticket.slot, Arc::clone(event));
        }
        self.queue = Arc::clone(to);
        self.ticket = ticket;
        Ok(())
    }

    /// Goes where the pool wants this queue: to a dedicated pair when its peer has become hot and
    /// the pair is there, back when the pair has left the LRU.
    pub(crate) fn follow_pool(&mut self, posting: usize) {
        if self.queue.evicted.load(Ordering::Relaxed) && self.transfer_to_dynamic().is_ok() {
            self.posted = 0;
        }
        let every = self.core.promote_after;
        if every == 0 || self.queue.is_dedicated() {
            return;
        }
        let before = self.posted;
        self.posted = before.saturating_add(u32::try_from(posting).unwrap_or(u32::MAX));
        if before / every == self.posted / every {
            return;
        }
        match self.core.pool.dedicated(self.peer) {
            // Where there is no slot on it, the shared pair does.
            Some(queue) => {
                let _stays = self.transfer(&queue);
            }
            None => self.core.promote_later(self.peer, self.address),
        }
    }
}
