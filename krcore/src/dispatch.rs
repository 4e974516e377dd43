//! A physical queue pair with those who share it, and the dispatch of its completions (section 4.3
//! of the paper): a wr_id says whose a completion is, which life of that virtual queue, and how many
//! requests it covers.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::fabric::{
    DcAddress, Fabric, PairOptions, QueuePair, RawCompletion, RawRequest, SEND_HEADER, State,
    Status,
};
use crate::node::NodeId;
use crate::notify::{Bells, Signal};
use crate::vq::{Completion, WorkRequest};

/// The most completions that wait in a virtual queue to be polled.
pub(crate) const COMPLETIONS: usize = 1024;
/// How long a broken pair has to complete what was outstanding on it.
const FLUSH_LIMIT: Duration = Duration::from_millis(50);

/// What a wr_id of a pooled pair says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct WrId {
    /// Whose completion it is; nobody's, for the last request of a chunk that was forced to signal.
    pub(crate) ticket: Option<Ticket>,
    /// How many requests the completion covers.
    pub(crate) covers: u32,
}

/// A share of a pair: a slot, and how often the slot was given out before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Ticket {
    pub(crate) slot: u32,
    pub(crate) generation: u32,
}

const SLOT_BITS: u32 = 20;
const GENERATION_BITS: u32 = 28;
const NOBODY: u32 = (1 << SLOT_BITS) - 1;
/// The greatest depth of a pair: what a wr_id can cover.
pub(crate) const MAX_DEPTH: usize = (1 << (64 - SLOT_BITS - GENERATION_BITS)) - 1;

impl WrId {
    pub(crate) fn encode(self) -> u64 {
        let (slot, generation) = self.ticket.map_or((NOBODY, 0), |t| (t.slot, t.generation));
        u64::from(slot)
            | u64::from(generation) << SLOT_BITS
            | u64::from(self.covers) << (SLOT_BITS + GENERATION_BITS)
    }

    pub(crate) fn decode(wr_id: u64) -> Self {
        let slot = (wr_id as u32) & NOBODY;
        let generation = (wr_id >> SLOT_BITS) as u32 & ((1 << GENERATION_BITS) - 1);
        let covers = (wr_id >> (SLOT_BITS + GENERATION_BITS)) as u32;
        Self {
            ticket: (slot != NOBODY).then_some(Ticket { slot, generation }),
            covers,
        }
    }
}

/// What to post for a virtual queue: the user's request, and what goes before a SEND.
#[derive(Debug)]
pub(crate) struct Item<'a> {
    pub(crate) work: &'a WorkRequest,
    pub(crate) header: Option<Box<[u8; SEND_HEADER]>>,
    /// The fence of a transfer, which completes for nobody but that.
    pub(crate) transfers: bool,
}

impl<'a> Item<'a> {
    pub(crate) fn plain(work: &'a WorkRequest) -> Self {
        Self {
            work,
            header: None,
            transfers: false,
        }
    }
}

#[derive(Debug)]
struct Sharer {
    generation: u32,
    taken: bool,
    /// Signalled requests that are posted and not ready.
    pending: usize,
    ready: VecDeque<Completion>,
    /// The fence that was posted for it has completed.
    fenced: bool,
}

/// What is posted and not yet covered by a completion, oldest first.
#[derive(Debug)]
struct Outstanding {
    whose: Whose,
    /// Keeps its regions alive, and is posted again where a broken pair did not execute it.
    raw: RawRequest,
}

/// Whom a request is of, and what he wants to hear.
#[derive(Debug, Clone, Copy)]
struct Whose {
    ticket: Ticket,
    id: u64,
    /// He wants to hear of its success.
    signalled: bool,
    transfers: bool,
}

#[derive(Debug)]
struct Shared {
    pair: Box<dyn QueuePair>,
    used: usize,
    outstanding: VecDeque<Outstanding>,
    sharers: Vec<Sharer>,
    free: Vec<u32>,
    /// The chunk that is being posted.
    chunk: Vec<RawRequest>,
    whose: Vec<Whose>,
    /// Whose request failed last, and how: what the pair broke by.
    cause: Option<(Ticket, DcAddress, Status)>,
    /// Who was given something since the lock was taken.
    given: Vec<u32>,
}

/// A physical queue pair with those who share it.
#[derive(Debug)]
pub(crate) struct Queue {
    shared: Mutex<Shared>,
    fabric: Arc<dyn Fabric>,
    options: PairOptions,
    peer: Option<NodeId>,
    pub(crate) signal: Arc<Signal>,
    bells: Arc<Bells>,
    /// Whether its pairs have done all when posting returns.
    pub(crate) is_synchronous: bool,
    rebuilt: AtomicU64,
    sharers: AtomicUsize,
    /// Left the LRU: its sharers go back to DC.
    pub(crate) evicted: AtomicBool,
}

impl Queue {
    pub(crate) fn new(
        fabric: &Arc<dyn Fabric>,
        depth: usize,
        peer: Option<(NodeId, DcAddress)>,
        bells: &Arc<Bells>,
    ) -> Result<Self> {
        let signal = Arc::new(Signal::default());
        let woken = (Arc::clone(&signal), Arc::clone(bells));
        let options = PairOptions {
            depth,
            peer: peer.map(|(_, address)| address),
            wake: crate::fabric::Wake::new(move || {
                woken.0.wake();
                woken.1.ring();
            }),
        };
        let pair = fabric.queue_pair(options.clone())?;
        let is_synchronous = pair.is_synchronous();
        let shared = Shared {
            pair,
            used: 0,
            outstanding: VecDeque::with_capacity(depth),
            sharers: Vec::new(),
            free: Vec::new(),
            chunk: Vec::with_capacity(depth),
            whose: Vec::with_capacity(depth),
            cause: None,
            given: Vec::new(),
        };
        Ok(Self {
            shared: Mutex::new(shared),
            fabric: Arc::clone(fabric),
            options,
            peer: peer.map(|(node, _)| node),
            signal,
            bells: Arc::clone(bells),
            is_synchronous,
            rebuilt: AtomicU64::new(0),
            sharers: AtomicUsize::new(0),
            evicted: AtomicBool::new(false),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn is_dedicated(&self) -> bool {
        self.peer.is_some()
    }

    pub(crate) fn rebuilt(&self) -> u64 {
        self.rebuilt.load(Ordering::Relaxed)
    }

    pub(crate) fn sharers(&self) -> usize {
        self.sharers.load(Ordering::Relaxed)
    }

    pub(crate) fn join(&self) -> Result<Ticket> {
        let mut shared = self.lock();
        let slot = match shared.free.pop() {
            Some(slot) => slot,
            None => {
                let slot = u32::try_from(shared.sharers.len())
                    .ok()
                    .filter(|slot| *slot < NOBODY)
                    .ok_or(Error::TooManyQueues(NOBODY as usize))?;
                shared.sharers.push(Sharer {
                    generation: 0,
                    taken: false,
                    pending: 0,
                    ready: VecDeque::new(),
                    fenced: false,
                });
                slot
            }
        };
        self.sharers.fetch_add(1, Ordering::Relaxed);
        let sharer = &mut shared.sharers[slot as usize];
        sharer.taken = true;
        Ok(Ticket {
            slot,
            generation: sharer.generation,
        })
    }

    pub(crate) fn leave(&self, ticket: Ticket) {
        let mut shared = self.lock();
        let sharer = &mut shared.sharers[ticket.slot as usize];
        sharer.generation = (sharer.generation + 1) & ((1 << GENERATION_BITS) - 1);
        sharer.taken = false;
        sharer.pending = 0;
        sharer.fenced = false;
        sharer.ready.clear();
        shared.free.push(ticket.slot);
        drop(shared);
        self.sharers.fetch_sub(1, Ordering::Relaxed);
        self.signal.unregister(ticket.slot);
    }

    /// Posts what of `work` there is room for among the completions that the sharer has not polled,
    /// in chunks of at most the depth; polls while the pair has no room. Says how many. What is ready
    /// by then goes to `ready`, so that who polls next need not lock.
    pub(crate) fn post<'a>(
        &self,
        ticket: Ticket,
        to: DcAddress,
        work: impl ExactSizeIterator<Item = Item<'a>>,
        ready: &mut VecDeque<Completion>,
    ) -> usize {
        let mut shared = self.lock();
        let sharer = &shared.sharers[ticket.slot as usize];
        let waiting = sharer.pending + sharer.ready.len() + ready.len();
        let taken = work.len().min(COMPLETIONS.saturating_sub(waiting));
        let mut work = work.take(taken);
        while work.len() > 0 {
            let chunk = work.len().min(self.options.depth);
            while shared.used + chunk > self.options.depth {
                if !shared.pop() {
                    std::thread::yield_now();
                }
                self.mend(&mut shared);
            }
            shared.post_chunk(ticket, to, work.by_ref().take(chunk));
            self.mend(&mut shared);
        }
        if self.signal.is_watched() || !self.is_synchronous {
            // Its own event as well: what it posted may have completed already.
            self.tell(&mut shared, NOBODY);
        } else {
            shared.given.clear();
        }
        ready.append(&mut shared.sharers[ticket.slot as usize].ready);
        taken
    }

    /// Moves what is ready to `ready`.
    pub(crate) fn collect(&self, ticket: Ticket, ready: &mut VecDeque<Completion>) {
        let mut shared = self.lock();
        while shared.pop() {}
        self.mend(&mut shared);
        ready.append(&mut shared.sharers[ticket.slot as usize].ready);
        self.tell(&mut shared, ticket.slot);
    }

    /// Wakes those, but `me`, who were given something.
    fn tell(&self, shared: &mut Shared, me: u32) {
        if self.signal.is_watched() {
            let given = shared.given.iter().copied().filter(|slot| *slot != me);
            self.signal.wake_some(given);
        }
        if !self.is_synchronous && shared.given.iter().any(|slot| *slot != me) {
            self.bells.ring();
        }
        shared.given.clear();
    }

    /// Posts a fence for a sharer, and waits until it and all before it have completed. Gives what
    /// is ready and was not polled.
    pub(crate) fn fence(
        &self,
        ticket: Ticket,
        to: DcAddress,
        fence: WorkRequest,
    ) -> VecDeque<Completion> {
        let fence = Item {
            work: &fence,
            header: None,
            transfers: true,
        };
        {
            // It needs no room among the completions, so that it can always be posted.
            let mut shared = self.lock();
            while shared.used + 1 > self.options.depth {
                if !shared.pop() {
                    std::thread::yield_now();
                }
                self.mend(&mut shared);
            }
            shared.post_chunk(ticket, to, std::iter::once(fence));
            self.mend(&mut shared);
        }
        loop {
            let mut shared = self.lock();
            while shared.pop() {}
            self.mend(&mut shared);
            let sharer = &mut shared.sharers[ticket.slot as usize];
            if sharer.fenced {
                sharer.fenced = false;
                let ready = std::mem::take(&mut sharer.ready);
                self.tell(&mut shared, ticket.slot);
                return ready;
            }
            self.tell(&mut shared, ticket.slot);
            drop(shared);
            std::thread::yield_now();
        }
    }

    /// Where the pair has broken: hands out what it has completed, puts a new pair in its place, and
    /// posts again what it did not execute, except what follows the failure it broke by.
    fn mend(&self, shared: &mut Shared) {
        while shared.pair.state() == State::Err {
            let begun = Instant::now();
            let mut again = VecDeque::new();
            // The failure that broke it completes what stands before it; after that every request
            // completes by itself.
            let mut broke = shared.cause.is_some_and(|(_, _, why)| breaks(why));
            while !shared.outstanding.is_empty() {
                let Some(completion) = shared.pair.poll() else {
                    if begun.elapsed() > FLUSH_LIMIT {
                        break;
                    }
                    std::thread::yield_now();
                    continue;
                };
                if completion.status == Status::Flushed {
                    again.extend(shared.outstanding.pop_front());
                } else if broke {
                    if let Some(lost) = shared.outstanding.pop_front() {
                        shared.finish(lost.whose, completion.status);
                    }
                } else {
                    broke = breaks(completion.status);
                    shared.settle(completion);
                }
            }
            // What it never completed it may have executed.
            while let Some(lost) = shared.outstanding.pop_front() {
                shared.finish(lost.whose, Status::RetryExceeded);
            }
            let cause = shared.cause.take();
            let Ok(pair) = self.fabric.queue_pair(self.options.clone()) else {
                // The next request tries again; none of these waits for it.
                for lost in again {
                    shared.finish(lost.whose, Status::Flushed);
                }
                shared.used = 0;
                return;
            };
            shared.pair = pair;
            shared.used = 0;
            self.rebuilt.fetch_add(1, Ordering::Relaxed);
            for item in again {
                let follows = cause.is_none_or(|(ticket, to, status)| {
                    item.whose.ticket == ticket
                        || status == Status::RetryExceeded && item.raw.to == to
                });
                if follows {
                    shared.finish(item.whose, Status::Flushed);
                } else {
                    shared.post_again(item);
                }
            }
        }
    }
}

/// Whether a request that ends so puts its pair in ERR.
fn breaks(status: Status) -> bool {
    !matches!(
        status,
        Status::Success | Status::ReceiverNotReady | Status::Flushed
    )
}

impl Shared {
    fn post_chunk<'a>(
        &mut self,
        ticket: Ticket,
        to: DcAddress,
        items: impl ExactSizeIterator<Item = Item<'a>>,
    ) {
        let mut covers = 0;
        let mut signals = 0;
        let last = items.len();
        for (at, item) in items.enumerate() {
            let Item {
                work,
                header,
                transfers,
            } = item;
            covers += 1;
            signals += usize::from(work.signalled);
            // A SEND always signals: it may fail without breaking the pair.
            let signalled = work.signalled || at + 1 == last || header.is_some();
            let wr_id = WrId {
                ticket: work.signalled.then_some(ticket),
                covers,
            };
            if signalled {
                covers = 0;
            }
            self.whose.push(Whose {
                ticket,
                id: work.id,
                signalled: work.signalled,
                transfers,
            });
            self.chunk.push(RawRequest {
                wr_id: wr_id.encode(),
                signalled,
                op: work.op,
                local: work.local.clone(),
                remote: work.remote,
                to,
                header,
            });
        }
        self.sharers[ticket.slot as usize].pending += signals;
        let posted = self.pair.post(&self.chunk).is_ok();
        if posted
            && self.outstanding.is_empty()
            && self.pair.is_synchronous()
            && self.pair.state() == State::Rts
        {
            // All of it is done: nothing has to be kept.
            let whose = std::mem::take(&mut self.whose);
            let mut at = 0;
            while let Some(completion) = self.pair.poll() {
                at += WrId::decode(completion.wr_id).covers as usize;
                if let Some(whose) = at.checked_sub(1).and_then(|at| whose.get(at)) {
                    self.finish(*whose, completion.status);
                }
            }
            debug_assert_eq!(at, last, "a synchronous pair completes all");
            self.whose = whose;
            self.whose.clear();
            self.chunk.clear();
            return;
        }
        if posted {
            self.used += last;
            let both = self.whose.drain(..).zip(self.chunk.drain(..));
            self.outstanding
                .extend(both.map(|(whose, raw)| Outstanding { whose, raw }));
            return;
        }
        // Room was made before. A pair that says otherwise has lost count, and nothing was posted.
        self.chunk.clear();
        for lost in std::mem::take(&mut self.whose) {
            self.finish(lost, Status::Flushed);
        }
    }

    /// Posts what a broken pair did not execute, each signalled, so that it is covered by itself.
    fn post_again(&mut self, mut item: Outstanding) {
        item.raw.signalled = true;
        item.raw.wr_id = WrId {
            ticket: item.whose.signalled.then_some(item.whose.ticket),
            covers: 1,
        }
        .encode();
        if self.pair.post(std::slice::from_ref(&item.raw)).is_ok() {
            self.used += 1;
            self.outstanding.push_back(item);
        } else {
            self.finish(item.whose, Status::Flushed);
        }
    }

    /// Takes one completion of the pair and gives it to whom it is due. What a broken pair flushed
    /// is left to [`Queue::mend`].
    fn pop(&mut self) -> bool {
        if self.pair.state() == State::Err {
            return false;
        }
        let Some(completion) = self.pair.poll() else {
            return false;
        };
        self.settle(completion);
        true
    }

    fn settle(&mut self, completion: RawCompletion) {
        let said = WrId::decode(completion.wr_id);
        let covers = (said.covers as usize).min(self.outstanding.len());
        for nth in 1..=covers {
            let Some(done) = self.outstanding.pop_front() else {
                break;
            };
            self.used = self.used.saturating_sub(1);
            if nth < covers {
                continue;
            }
            debug_assert!(
                said.ticket.is_none_or(|ticket| ticket == done.whose.ticket),
                "completions in order"
            );
            if completion.status != Status::Success {
                self.cause = Some((done.whose.ticket, done.raw.to, completion.status));
            }
            self.finish(done.whose, completion.status);
        }
    }

    fn finish(&mut self, done: Whose, status: Status) {
        let sharer = &mut self.sharers[done.ticket.slot as usize];
        if !sharer.taken || sharer.generation != done.ticket.generation {
            return;
        }
        sharer.pending = sharer.pending.saturating_sub(usize::from(done.signalled));
        if done.transfers {
            sharer.fenced = true;
        } else if done.signalled || status != Status::Success {
            sharer.ready.push_back(Completion {
                id: done.id,
                status,
            });
            self.given.push(done.ticket.slot);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wr_id_is_what_it_was_made_of() {
        for (slot, generation, covers) in [
            (0, 0, 1),
            (5, 77, 128),
            (NOBODY - 1, (1 << GENERATION_BITS) - 1, MAX_DEPTH as u32),
        ] {
            let id = WrId {
                ticket: Some(Ticket { slot, generation }),
                covers,
            };
            assert_eq!(WrId::decode(id.encode()), id);
        }
        let nobody = WrId {
            ticket: None,
            covers: 3,
        };
        assert_eq!(WrId::decode(nobody.encode()), nobody);
    }
}
