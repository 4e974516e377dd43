//! A queue pair. Its requests go to one target at a time, as those of a DC initiator do: the next
//! target's wait until all of the former's are done. So what stands behind a failure was never sent,
//! or is refused by the target that saw the failure; and what was sent and not answered when a link
//! is lost is all of one peer.

use std::collections::VecDeque;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::frame::{Bytes, CHUNK, Frame, Place, Tag};
use super::link::Link;
use super::peer::LinkError;
use super::port::Target;
use super::record::Sender;
use super::{Handle, Route, Shared};
use crate::fabric::{
    DcAddress, Op, PairOptions, QueueFull, QueuePair, RawCompletion, RawRequest, State, Status,
};

/// How often who drops a pair looks whether its last requests are done.
const NAP: Duration = Duration::from_micros(50);

#[derive(Debug)]
struct Posted {
    request: RawRequest,
    /// Bytes that have come for it.
    got: u64,
}

impl Posted {
    /// Bytes that have to come before it is done.
    fn wants(&self) -> u64 {
        match self.request.op {
            Op::Read => self.request.local.len,
            Op::CompareSwap { .. } | Op::FetchAdd { .. } => 8,
            _ => 0,
        }
    }
}

#[derive(Debug, Clone)]
enum Bound {
    Here(Arc<Target>),
    There(Arc<Link>),
}

#[derive(Debug)]
struct PairState {
    state: State,
    depth: usize,
    /// Posted, and not covered by a completion that was polled.
    used: usize,
    /// What the next completion covers beside its own request.
    held: usize,
    /// Posted and not done, oldest first.
    queue: VecDeque<Posted>,
    /// The number of the oldest.
    first: u64,
    /// How many of the oldest were sent.
    sent: usize,
    /// How many bytes were sent of the WRITE behind them.
    part: u64,
    target: Option<(DcAddress, Bound)>,
    completions: VecDeque<(RawCompletion, usize)>,
    /// The target has seen it fail, and refuses what it sends from then on.
    refused: bool,
}

/// What came of sending.
enum Sent {
    /// As much as there is for this target.
    All,
    /// As much as there is room for.
    Full,
    Lost(LinkError),
}

#[derive(Debug)]
pub(super) struct Pair {
    pub(super) number: u64,
    shared: Arc<Shared>,
    wake: crate::fabric::Wake,
    state: Mutex<PairState>,
}

impl PairState {
    fn complete(&mut self, request: &RawRequest, status: Status) {
        self.held += 1;
        if request.signalled || status != Status::Success {
            let completion = RawCompletion {
                wr_id: request.wr_id,
                status,
            };
            let covers = std::mem::take(&mut self.held);
            self.completions.push_back((completion, covers));
        }
    }

    /// The oldest request has ended.
    fn end(&mut self, status: Status) {
        if let Some(done) = self.queue.pop_front() {
            self.first += 1;
            self.sent = self.sent.saturating_sub(1);
            self.complete(&done.request, status);
        }
    }

    /// Fences that have become the oldest are done.
    fn end_fences(&mut self) {
        while self.sent > 0
            && self
                .queue
                .front()
                .is_some_and(|one| one.request.op == Op::Fence)
        {
            self.end(Status::Success);
        }
    }

    /// The oldest request has failed. Of those behind it `unknown` may have been executed.
    fn fail(&mut self, status: Status, unknown: usize) {
        self.state = State::Err;
        self.part = 0;
        self.end(status);
        let mut unknown = unknown;
        while let Some(next) = self.queue.front() {
            let status = if unknown > 0 && next.request.op != Op::Fence {
                Status::RetryExceeded
            } else {
                Status::Flushed
            };
            unknown = unknown.saturating_sub(1);
            self.end(status);
        }
        self.sent = 0;
    }
}

/// What can be seen to be wrong before it is sent.
fn look(request: &RawRequest) -> Result<(), Status> {
    let local = &request.local;
    if request.op != Op::Fence && !local.region.contains(local.offset, local.len) {
        return Err(Status::LocalProtection);
    }
    let right = match request.op {
        Op::CompareSwap { .. } | Op::FetchAdd { .. } => {
            local.len == 8 && local.region.atomic(local.offset).is_some()
        }
        Op::Send(_) => request.header.is_some() && local.len <= CHUNK as u64,
        _ => true,
    };
    right.then_some(()).ok_or(Status::RemoteInvalid)
}

impl Pair {
    fn lock(&self) -> MutexGuard<'_, PairState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends what may be sent, and wakes who waits for what has completed.
    pub(super) fn pump(self: &Arc<Self>) {
        let state = self.lock();
        self.go_on(state);
    }

    fn go_on(self: &Arc<Self>, mut state: MutexGuard<'_, PairState>) {
        let lost = self.advance(&mut state);
        let any = !state.completions.is_empty();
        drop(state);
        if any {
            self.wake.wake();
        }
        if let Some((link, why)) = lost {
            link.lose(why);
            // It may have been lost before this pair was bound to it.
            self.lost(&link);
        }
    }

    /// Gives a link that turned out to be lost, to be given up when the pair is no longer locked.
    fn advance(self: &Arc<Self>, state: &mut PairState) -> Option<(Arc<Link>, LinkError)> {
        loop {
            state.end_fences();
            let next = &state.queue.get(state.sent)?.request;
            if next.op == Op::Fence {
                state.sent += 1;
                continue;
            }
            if let Err(why) = look(next) {
                // In its turn.
                if state.sent == 0 {
                    state.fail(why, 0);
                }
                return None;
            }
            let to = next.to;
            let idle = state.sent == 0 && state.part == 0;
            let bound = match &state.target {
                Some((one, Bound::Here(target))) if *one == to && target.is_alive() => true,
                Some((one, Bound::There(link))) if *one == to => !idle || !link.is_lost(),
                _ => false,
            };
            if !bound {
                if !idle {
                    return None;
                }
                self.unbind(state);
                let bound = match self.shared.route(to, self) {
                    Route::Here(target) => Bound::Here(target),
                    Route::There(link) => {
                        link.bind(self);
                        Bound::There(link)
                    }
                    Route::Wait => return None,
                    Route::Gone => {
                        state.fail(Status::RetryExceeded, 0);
                        return None;
                    }
                };
                state.target = Some((to, bound));
            }
            match state.target.as_ref().map(|(_, bound)| bound.clone())? {
                Bound::Here(target) => {
                    let request = &state.queue.front()?.request;
                    match target.execute(request) {
                        Status::Success => state.end(Status::Success),
                        why => {
                            state.fail(why, 0);
                            return None;
                        }
                    }
                }
                Bound::There(link) => match self.send(&link, to, state) {
                    Sent::All => {}
                    Sent::Full => return None,
                    Sent::Lost(why) => return Some((link, why)),
                },
            }
        }
    }

    fn unbind(&self, state: &mut PairState) {
        if let Some((_, Bound::There(link))) = state.target.take() {
            link.unbind(self.number);
        }
    }

    /// Sends what there is for the target of the next request, as much as there is room for.
    fn send(self: &Arc<Self>, link: &Arc<Link>, to: DcAddress, state: &mut PairState) -> Sent {
        let mut sender = link.sender();
        while let Some(next) = state.queue.get(state.sent) {
            if next.request.op == Op::Fence {
                state.sent += 1;
                continue;
            }
            if next.request.to != to || look(&next.request).is_err() {
                break;
            }
            if !sender.has_room() {
                if let Err(why) = link.flush(&mut sender) {
                    return Sent::Lost(why);
                }
                if !sender.has_room() {
                    // Said while the socket cannot be seen to take more.
                    link.starve(self);
                    return Sent::Full;
                }
            }
            let seq = state.first + state.sent as u64;
            let tag = Tag {
                pair: self.number,
                seq,
            };
            if put(&mut sender, tag, &next.request, &mut state.part) {
                state.sent += 1;
                state.part = 0;
            }
        }
        match link.flush(&mut sender) {
            Ok(()) => Sent::All,
            Err(why) => Sent::Lost(why),
        }
    }

    /// A reply that came by `link`.
    pub(super) fn hear(&self, link: &Arc<Link>, frame: &Frame<'_>) -> Result<(), LinkError> {
        let mut state = self.lock();
        let state = &mut *state;
        match &state.target {
            Some((_, Bound::There(one))) if Arc::ptr_eq(one, link) => {}
            _ => return Ok(()),
        }
        let (Frame::Data { tag, .. } | Frame::Done(tag) | Frame::Failed { tag, .. }) = *frame
        else {
            return Err(LinkError::Garbled);
        };
        if state.state == State::Err {
            return Ok(());
        }
        // It answers only what it was asked, or what it is being asked.
        let begun = state.sent + usize::from(state.part > 0);
        let nth = tag
            .seq
            .checked_sub(state.first)
            .and_then(|nth| usize::try_from(nth).ok())
            .filter(|nth| *nth < begun)
            .ok_or(LinkError::Garbled)?;
        match *frame {
            Frame::Data { from, bytes, .. } => {
                let posted = state.queue.get_mut(nth).ok_or(LinkError::Garbled)?;
                let end = from
                    .checked_add(bytes.0.len() as u64)
                    .ok_or(LinkError::Garbled)?;
                if from != posted.got || end > posted.wants() {
                    return Err(LinkError::Garbled);
                }
                posted.got = end;
                let local = &posted.request.local;
                if posted.request.op != Op::Read
                    && let (Some(word), Ok(was)) =
                        (local.region.atomic(local.offset), bytes.0.try_into())
                {
                    word.store(u64::from_le_bytes(was), Ordering::Release);
                } else if !local.region.write(local.offset + from, bytes.0) {
                    return Err(LinkError::Garbled);
                }
                Ok(())
            }
            Frame::Done(_) => {
                if nth >= state.sent {
                    return Err(LinkError::Garbled);
                }
                end_all(state, nth + 1)
            }
            Frame::Failed { status, .. } => {
                let status = Status::from_code(u32::from(status)).ok_or(LinkError::Garbled)?;
                end_all(state, nth)?;
                match status {
                    Status::ReceiverNotReady => state.end(status),
                    Status::RemoteAccess
                    | Status::RemoteInvalid
                    | Status::LocalProtection
                    | Status::RetryExceeded => {
                        state.refused = true;
                        state.fail(status, 0);
                    }
                    _ => return Err(LinkError::Garbled),
                }
                Ok(())
            }
            _ => Err(LinkError::Garbled),
        }
    }

    /// The link is lost: what was sent may have been executed, and the rest was not.
    pub(super) fn lost(self: &Arc<Self>, link: &Arc<Link>) {
        let mut state = self.lock();
        let out = match &state.target {
            Some((_, Bound::There(one))) if Arc::ptr_eq(one, link) => {
                state.sent + usize::from(state.part > 0)
            }
            _ => return,
        };
        state.target = None;
        if out > 0 {
            // Fences before it hold for what was done before.
            state.end_fences();
            let out = state.sent + usize::from(state.part > 0);
            if out > 0 {
                state.fail(Status::RetryExceeded, out - 1);
            }
        }
        self.go_on(state);
    }
}

/// The `count` oldest are done.
fn end_all(state: &mut PairState, count: usize) -> Result<(), LinkError> {
    for _ in 0..count {
        if state.queue.front().is_none_or(|one| one.got < one.wants()) {
            return Err(LinkError::Garbled);
        }
        state.end(Status::Success);
    }
    Ok(())
}

/// Adds a request to what is to be sent; of a WRITE the next part. True where it is complete.
fn put(sender: &mut Sender, tag: Tag, request: &RawRequest, part: &mut u64) -> bool {
    let at = Place {
        to: request.to,
        key: request.remote.key.0,
        offset: request.remote.offset,
    };
    let local = &request.local;
    let mut buffer = std::mem::take(&mut sender.buffer);
    match request.op {
        Op::Read => sender.put(&Frame::Read {
            tag,
            at,
            len: local.len,
        }),
        // Nothing moves, whatever the right: the key and the range are looked at.
        Op::Write if local.len == 0 => sender.put(&Frame::Read { tag, at, len: 0 }),
        Op::Write => {
            let take = (local.len - *part).min(CHUNK as u64);
            let bytes = &mut buffer[..take as usize];
            // Its range was looked at before.
            let _inside = local.region.read(local.offset + *part, bytes);
            sender.put(&Frame::Write {
                tag,
                at,
                len: local.len,
                from: *part,
                bytes: Bytes(bytes),
            });
            *part += take;
        }
        Op::CompareSwap { expected, new } => sender.put(&Frame::CompareSwap {
            tag,
            at,
            expected,
            new,
        }),
        Op::FetchAdd { add } => sender.put(&Frame::FetchAdd { tag, at, add }),
        Op::Send(service) => {
            let body = &mut buffer[..(local.len as usize).min(CHUNK)];
            let _inside = local.region.read(local.offset, body);
            if let Some(header) = &request.header {
                sender.put(&Frame::Send {
                    tag,
                    to: request.to,
                    service: service.0,
                    header: Bytes(&**header),
                    body: Bytes(body),
                });
            }
        }
        Op::Fence => {}
    }
    sender.buffer = buffer;
    request.op != Op::Write || *part == local.len
}

/// The pair as its user holds it.
#[derive(Debug)]
pub(super) struct TcpQueuePair {
    pair: Arc<Pair>,
    /// The fabric's thread lives as long as this.
    fabric: Arc<Handle>,
    depth: usize,
}

impl TcpQueuePair {
    pub(super) fn new(fabric: &Arc<Handle>, options: PairOptions) -> Self {
        let shared = &fabric.shared;
        let state = PairState {
            state: State::Rts,
            depth: options.depth,
            used: 0,
            held: 0,
            queue: VecDeque::with_capacity(options.depth),
            first: 0,
            sent: 0,
            part: 0,
            target: None,
            completions: VecDeque::with_capacity(options.depth),
            refused: false,
        };
        Self {
            pair: Arc::new(Pair {
                number: shared.next_pair.fetch_add(1, Ordering::Relaxed),
                shared: Arc::clone(shared),
                wake: options.wake,
                state: Mutex::new(state),
            }),
            fabric: Arc::clone(fabric),
            depth: options.depth,
        }
    }

    /// The link on which something is out.
    fn waits_for(state: &PairState) -> Option<Arc<Link>> {
        match &state.target {
            Some((_, Bound::There(link))) if !state.queue.is_empty() => Some(Arc::clone(link)),
            _ => None,
        }
    }
}

impl QueuePair for TcpQueuePair {
    fn post(&mut self, work: &[RawRequest]) -> Result<(), QueueFull> {
        let mut state = self.pair.lock();
        if state.used + work.len() > state.depth {
            return Err(QueueFull);
        }
        state.used += work.len();
        if state.state == State::Err {
            for request in work {
                state.complete(request, Status::Flushed);
            }
            return Ok(());
        }
        state.queue.extend(work.iter().map(|request| Posted {
            request: request.clone(),
            got: 0,
        }));
        self.pair.go_on(state);
        Ok(())
    }

    fn poll(&mut self) -> Option<RawCompletion> {
        let mut state = self.pair.lock();
        if state.completions.is_empty()
            && let Some(link) = Self::waits_for(&state)
        {
            drop(state);
            link.progress();
            state = self.pair.lock();
        }
        let (completion, covers) = state.completions.pop_front()?;
        state.used -= covers;
        Some(completion)
    }

    fn state(&self) -> State {
        self.pair.lock().state
    }

    fn depth(&self) -> usize {
        self.depth
    }
}

impl Drop for TcpQueuePair {
    /// What was not sent never will be; what was is waited for, as long as its link lives.
    fn drop(&mut self) {
        let mut state = self.pair.lock();
        let out = state.sent + usize::from(state.part > 0);
        state.queue.truncate(out);
        let end = Instant::now() + self.fabric.shared.limit;
        while let Some(link) = Self::waits_for(&state) {
            drop(state);
            if !link.progress() {
                std::thread::sleep(NAP);
            }
            state = self.pair.lock();
            if link.is_lost() || Instant::now() > end {
                break;
            }
        }
        state.queue.clear();
        state.sent = 0;
        if let Some((_, Bound::There(link))) = state.target.take() {
            link.unbind(self.pair.number);
            let refused = state.refused;
            drop(state);
            if refused
                && let Err(why) = link.say(&[Frame::Close {
                    pair: self.pair.number,
                }])
            {
                link.lose(why);
            }
        }
    }
}
