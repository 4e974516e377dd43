//! The virtual queue: what a user holds. A share of a physical queue pair, the peer's metadata, and
//! a software completion queue (section 4.3 of the paper).

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use crate::attach::LaneQueue;
use crate::check;
use crate::clock::{self, Deadline};
use crate::dispatch::{Item, Queue, Ticket};
use crate::error::{Error, Malformed, PostError, Result};
use crate::fabric::{DcAddress, Op, SEND_HEADER, Status};
use crate::message::{Descriptor, Header, LARGE_PER_QUEUE};
use crate::mr::{RESERVED_KEYS, RegionEntry};
use crate::node::{Core, NodeId, Service};
use crate::notify::Event;
use crate::region::{RKey, RegionSlice, RemoteSlice};

/// A request of a user.
#[derive(Debug, Clone)]
pub struct WorkRequest {
    /// What its completion says.
    pub id: u64,
    /// What to do.
    pub op: Op,
    /// The local bytes.
    pub local: RegionSlice,
    /// Where at the peer; of no meaning for a SEND.
    pub remote: RemoteSlice,
    /// Whether it completes where it succeeds. A failure always completes.
    pub signalled: bool,
}

impl WorkRequest {
    /// A signalled request.
    pub fn new(id: u64, op: Op, local: RegionSlice, remote: RemoteSlice) -> Self {
        Self {
            id,
            op,
            local,
            remote,
            signalled: true,
        }
    }

    /// A signalled SEND to whoever listens for `service` at the peer. What is longer than
    /// [`MAX_INLINE`](crate::MAX_INLINE) stays where it is until the receiver has fetched it, and
    /// completes then; its region has to allow [`Access::Read`](crate::Access::Read).
    pub fn send(id: u64, service: Service, local: RegionSlice) -> Self {
        let nowhere = RemoteSlice {
            key: RKey(0),
            offset: 0,
        };
        Self::new(id, Op::Send(service), local, nowhere)
    }

    /// The same request, completing only where it fails.
    #[must_use]
    pub fn unsignalled(mut self) -> Self {
        self.signalled = false;
        self
    }
}

/// How a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Completion {
    /// The request's.
    pub id: u64,
    /// How it ended.
    pub status: Status,
}

impl Default for Completion {
    fn default() -> Self {
        Self {
            id: 0,
            status: Status::Success,
        }
    }
}

/// A connection: a share of a pooled queue pair. Dropping it gives the share back; what is
/// outstanding is still executed, and its completions are dropped.
///
/// It is `Send` and not `Sync`: one thread at a time. Its descriptor ([`AsFd`]) is readable when
/// there may be completions: poll until there are none, then wait for it again.
#[derive(Debug)]
pub struct VirtualQueue {
    kind: Kind,
    _one_thread: std::marker::PhantomData<std::cell::Cell<()>>,
}

#[derive(Debug)]
enum Kind {
    Pooled(Box<PooledQueue>),
    Attached(LaneQueue),
}

impl VirtualQueue {
    pub(crate) fn pooled(queue: PooledQueue) -> Self {
        Self {
            kind: Kind::Pooled(Box::new(queue)),
            _one_thread: std::marker::PhantomData,
        }
    }

    pub(crate) fn attached(queue: LaneQueue) -> Self {
        Self {
            kind: Kind::Attached(queue),
            _one_thread: std::marker::PhantomData,
        }
    }

    /// The node at the other end.
    pub fn peer(&self) -> NodeId {
        match &self.kind {
            Kind::Pooled(queue) => queue.peer,
            Kind::Attached(queue) => queue.peer(),
        }
    }

    /// Checks all of `work`, and posts it in order. One wrong request, and nothing of the list is
    /// posted. Returns how many requests were taken: fewer than given where the completions that
    /// are not yet polled leave no more room; poll, and post the rest.
    ///
    /// On a node that is attached to a daemon in isolated mode, what only the peer knows is checked
    /// by the daemon: such a request completes with [`Status::Refused`], and those behind it are
    /// executed.
    ///
    /// # Errors
    /// The first request that is wrong, and why.
    pub fn post(&mut self, work: &[WorkRequest]) -> Result<usize, PostError> {
        match &mut self.kind {
            Kind::Pooled(queue) => queue.post(work),
            Kind::Attached(queue) => queue.post(work),
        }
    }

    /// Takes completions, as many as there are and fit; returns how many.
    pub fn poll(&mut self, out: &mut [Completion]) -> usize {
        match &mut self.kind {
            Kind::Pooled(queue) => queue.poll(out),
            Kind::Attached(queue) => queue.poll(out),
        }
    }

    /// Waits for the next completion: spins a few microseconds, then sleeps.
    ///
    /// # Errors
    /// [`Error::TimedOut`], and [`Error::Disconnected`] where the daemon is gone.
    pub fn wait(&mut self, limit: Duration) -> Result<Completion> {
        let end = Deadline::after(limit);
        let found = match &mut self.kind {
            Kind::Pooled(queue) => queue.wait(end),
            Kind::Attached(queue) => queue.wait(end)?,
        };
        found.ok_or(Error::TimedOut {
            what: "a completion",
            limit,
        })
    }

    /// Whether it is on a dedicated queue pair (RC) rather than a dynamically connected one (DC).
    /// Always false on an attached node: there the daemon decides and does not say.
    pub fn is_dedicated(&self) -> bool {
        match &self.kind {
            Kind::Pooled(queue) => queue.queue.is_dedicated(),
            Kind::Attached(_) => false,
        }
    }

    /// Moves to a dedicated pair to the peer, creating it in the pool where there is none. The pool
    /// does that by itself for peers that are talked to much. On an attached node it is the daemon's
    /// business, and nothing happens.
    ///
    /// # Errors
    /// Where the pool keeps no dedicated pairs, or none can be created.
    pub fn transfer_to_dedicated(&mut self) -> Result<()> {
        match &mut self.kind {
            Kind::Pooled(queue) => queue.transfer_to_dedicated(),
            Kind::Attached(_) => Ok(()),
        }
    }

    /// Moves to a shared pair. See [`transfer_to_dedicated`](Self::transfer_to_dedicated).
    ///
    /// # Errors
    /// Where the pair has no more room for virtual queues.
    pub fn transfer_to_dynamic(&mut self) -> Result<()> {
        match &mut self.kind {
            Kind::Pooled(queue) => queue.transfer_to_dynamic(),
            Kind::Attached(_) => Ok(()),
        }
    }
}

impl AsFd for VirtualQueue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.kind {
            Kind::Pooled(queue) => queue.event().as_fd(),
            Kind::Attached(queue) => queue.event_fd(),
        }
    }
}

/// A virtual queue on the pool of a node of this process.
#[derive(Debug)]
pub(crate) struct PooledQueue {
    pub(crate) core: Arc<Core>,
    pub(crate) peer: NodeId,
    pub(crate) address: DcAddress,
    pub(crate) queue: Arc<Queue>,
    pub(crate) ticket: Ticket,
    pub(crate) posted: u32,
    pub(crate) event: OnceLock<Arc<Event>>,
    /// The remote region used last, and until when its entry is believed.
    entry: Option<(RKey, RegionEntry, Duration)>,
    /// What has completed and was not polled.
    pub(crate) ready: VecDeque<Completion>,
    /// Large messages that wait to be fetched: what to complete, and where that will be said.
    large: Vec<Large>,
}

#[derive(Debug, Clone, Copy)]
struct Large {
    id: u64,
    signalled: bool,
    ack: u32,
}

/// A request of a list with messages, with what was taken for it.
struct Send {
    work: WorkRequest,
    header: Option<Box<[u8; SEND_HEADER]>>,
    large: Option<Large>,
}

impl PooledQueue {
    pub(crate) fn new(core: &Arc<Core>, peer: NodeId, address: DcAddress) -> Result<Self> {
        let queue = Arc::clone(core.pool.dynamic());
        let ticket = queue.join()?;
        Ok(Self {
            core: Arc::clone(core),
            peer,
            address,
            queue,
            ticket,
            posted: 0,
            event: OnceLock::new(),
            entry: None,
            ready: VecDeque::new(),
            large: Vec::new(),
        })
    }

    pub(crate) fn post(&mut self, work: &[WorkRequest]) -> Result<usize, PostError> {
        let mut sends = false;
        for (index, request) in work.iter().enumerate() {
            self.check(request)
                .map_err(|why| PostError { index, why })?;
            sends |= matches!(request.op, Op::Send(_));
        }
        self.follow_pool(work.len());
        if sends {
            return self.post_sends(work);
        }
        let items = work.iter().map(Item::plain);
        let ready = &mut self.ready;
        Ok(self.queue.post(self.ticket, self.address, items, ready))
    }

    /// Takes a receive buffer of the peer for each message before any is posted.
    fn post_sends(&mut self, work: &[WorkRequest]) -> Result<usize, PostError> {
        let mut sends = Vec::with_capacity(work.len());
        for (index, request) in work.iter().enumerate() {
            let large = sends
                .iter()
                .filter(|send: &&Send| send.large.is_some())
                .count();
            match self.send(request, large) {
                Ok(send) => sends.push(send),
                Err(why) => {
                    self.take_back(&sends);
                    return Err(PostError { index, why });
                }
            }
        }
        let items = sends.iter_mut().map(|send| Item {
            work: &send.work,
            header: send.header.take(),
            transfers: false,
        });
        let ready = &mut self.ready;
        let taken = self.queue.post(self.ticket, self.address, items, ready);
        let unposted = sends.split_off(taken);
        self.take_back(&unposted);
        self.large
            .extend(sends.iter().filter_map(|send| send.large));
        Ok(taken)
    }

    /// Gives back what was taken for messages that are not posted.
    fn take_back(&self, sends: &[Send]) {
        for send in sends {
            if let Op::Send(service) = send.work.op {
                self.core.fabric.release(self.address, service);
            }
            if let Some(large) = send.large {
                self.core.acks.give_back(large.ack);
            }
        }
    }

    /// `larges` are before it in the same list.
    fn send(&self, request: &WorkRequest, larges: usize) -> Result<Send, Malformed> {
        let mut work = request.clone();
        let Op::Send(service) = request.op else {
            return Ok(Send {
                work,
                header: None,
                large: None,
            });
        };
        let mut header = Header {
            from: self.core.id,
            address: self.core.port.address(),
            len: request.local.len,
            large: None,
        };
        let is_large = request.local.len > check::MAX_INLINE;
        if is_large && self.large.len() + larges >= LARGE_PER_QUEUE {
            return Err(Malformed::TooManyLarge);
        }
        if !self.core.fabric.reserve(self.address, service)? {
            return Err(Malformed::ReceiverNotReady);
        }
        let mut large = None;
        if is_large {
            let Some((ack, nonce)) = self.core.acks.take() else {
                self.core.fabric.release(self.address, service);
                return Err(Malformed::TooManyLarge);
            };
            header.large = Some(Descriptor {
                remote: request.local.region.remote(request.local.offset),
                ack,
                nonce,
            });
            large = Some(Large {
                id: work.id,
                signalled: work.signalled,
                ack,
            });
            work.local.len = 0;
            work.signalled = false;
        }
        Ok(Send {
            work,
            header: Some(Box::new(header.encode())),
            large,
        })
    }

    /// Whether a request can be posted without waiting for a look-up, which is begun where not.
    #[cfg(feature = "daemon")]
    pub(crate) fn look_ahead(&mut self, request: &WorkRequest) -> Option<Result<(), Malformed>> {
        /// Less than half of what a deregistration waits longer than the lease.
        const LATE: Duration = Duration::from_millis(5);
        let key = request.remote.key;
        let needs_none = matches!(request.op, Op::Fence | Op::Send(_))
            || key.0 < RESERVED_KEYS
            || self.queue.is_synchronous
            || check::local(request).is_err();
        let now = clock::coarse();
        if needs_none
            || matches!(self.entry, Some((known, _, until)) if known == key && now < until)
        {
            return Some(Ok(()));
        }
        let found = self.core.entry_soon(self.address, key, now, LATE)?;
        if found == Err(Malformed::PeerGone) {
            self.core.forget(self.peer);
        }
        Some(found.map(|(entry, until)| {
            self.entry = Some((key, entry, until.max(now + LATE)));
        }))
    }

    fn check(&mut self, request: &WorkRequest) -> Result<(), Malformed> {
        check::local(request)?;
        match request.op {
            Op::Fence => return Ok(()),
            _ if request.local.region.owner() != self.core.owner => {
                return Err(Malformed::ForeignRegion);
            }
            Op::Send(_) => return Ok(()),
            _ => {}
        }
        let key = request.remote.key;
        if key.0 < RESERVED_KEYS {
            return check::remote(request, self.core.acks_entry());
        }
        let now = clock::coarse();
        let entry = match self.entry {
            Some((known, entry, until)) if known == key && now < until => entry,
            _ => {
                let found = self.core.remote_entry(self.address, key, now);
                if found == Err(Malformed::PeerGone) {
                    self.core.forget(self.peer);
                }
                let (entry, until) = found?;
                self.entry = Some((key, entry, until));
                entry
            }
        };
        check::remote(request, entry)
    }

    pub(crate) fn poll(&mut self, out: &mut [Completion]) -> usize {
        let mut taken = self.take(out);
        if taken == 0
            && !out.is_empty()
            && let Some(event) = self.event.get().cloned()
        {
            // Whatever comes from here on sets it again.
            event.clear();
            taken = self.take(out);
            if taken > 0 || !self.large.is_empty() {
                event.set();
            }
        }
        taken
    }

    fn take(&mut self, out: &mut [Completion]) -> usize {
        // On a synchronous pair nothing comes but while posting.
        if self.ready.len() < out.len() && !self.queue.is_synchronous {
            self.queue.collect(self.ticket, &mut self.ready);
        }
        let mut taken = self.ready.len().min(out.len());
        for (to, completion) in out.iter_mut().zip(self.ready.drain(..taken)) {
            *to = completion;
        }
        for done in &out[..taken] {
            if done.status == Status::RetryExceeded {
                self.core.forget(self.peer);
            }
            if done.status != Status::Success
                && let Some(at) = self.large.iter().position(|large| large.id == done.id)
            {
                self.core.acks.give_back(self.large.swap_remove(at).ack);
            }
        }
        let mut at = 0;
        while at < self.large.len() && taken < out.len() {
            let large = self.large[at];
            if !self.core.acks.is_done(large.ack) {
                at += 1;
                continue;
            }
            self.large.remove(at);
            self.core.acks.give_back(large.ack);
            if large.signalled {
                out[taken] = Completion {
                    id: large.id,
                    status: Status::Success,
                };
                taken += 1;
            }
        }
        taken
    }

    fn wait(&mut self, end: Deadline) -> Option<Completion> {
        let queue = Arc::clone(&self.queue);
        let mut one = [Completion::default()];
        queue
            .signal
            .wait(end, || (self.take(&mut one) == 1).then(|| one[0]))
    }

    fn event(&self) -> &Event {
        if let Some(event) = self.event.get() {
            return event;
        }
        match Event::new() {
            Ok(event) => {
                let event = self.event.get_or_init(|| Arc::new(event));
                self.queue
                    .signal
                    .register(self.ticket.slot, Arc::clone(event));
                event
            }
            Err(_) => &self.core.always_ready,
        }
    }
}

impl Drop for PooledQueue {
    fn drop(&mut self) {
        self.queue.leave(self.ticket);
        for large in self.large.drain(..) {
            self.core.acks.give_back(large.ack);
        }
    }
}
