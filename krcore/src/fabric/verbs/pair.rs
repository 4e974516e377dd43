//! A pair that reaches every node, where the adapter has none: it does as a dynamically connected one
//! does, and serves one target at a time, in the order in which was posted. Its requests go out on
//! the reliable connection to each target, which all pairs of this fabric share.
//!
//! Pure: what is sent where, and when, is decided here; [`engine`](super::engine) does it.

use std::collections::VecDeque;

use crate::fabric::{DcAddress, Op, QueueFull, RawCompletion, RawRequest, State, Status, Wake};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Progress {
    Waits,
    Sent,
    Done(Status),
}

#[derive(Debug)]
struct Slot {
    request: RawRequest,
    progress: Progress,
}

/// Whether a request that ended so puts its pair in ERR.
fn breaks(status: Status) -> bool {
    !matches!(status, Status::Success | Status::ReceiverNotReady)
}

/// The order of one pair's requests.
#[derive(Debug)]
pub(super) struct Pair {
    pub(super) wake: Wake,
    depth: usize,
    state: State,
    slots: VecDeque<Slot>,
    /// The number of the first slot.
    first: u64,
    /// The number of the first request that waits.
    next: u64,
    /// Whom it serves, and how many requests are under way there.
    target: Option<DcAddress>,
    sent: usize,
    /// A READ or an atomic is under way.
    reads: bool,
    /// One of those under way has failed: nothing more is sent.
    failed: bool,
    used: usize,
    held: usize,
    completions: VecDeque<(RawCompletion, usize)>,
    /// Something has completed that its owner has not been told of.
    pub(super) fresh: bool,
}

/// A request whose turn it is.
#[derive(Debug)]
pub(super) struct Turn<'a> {
    pub(super) number: u64,
    pub(super) request: &'a RawRequest,
    /// It may be executed only when the READs and atomics before it have completed: an adapter does
    /// not keep that order by itself (InfiniBand specification, volume 1, section 9.5).
    pub(super) fenced: bool,
}

impl Pair {
    pub(super) fn new(depth: usize, wake: Wake) -> Self {
        Self {
            wake,
            depth,
            state: State::Rts,
            slots: VecDeque::new(),
            first: 0,
            next: 0,
            target: None,
            sent: 0,
            reads: false,
            failed: false,
            used: 0,
            held: 0,
            completions: VecDeque::new(),
            fresh: false,
        }
    }

    pub(super) fn post(&mut self, work: &[RawRequest]) -> Result<(), QueueFull> {
        if self.used + work.len() > self.depth {
            return Err(QueueFull);
        }
        self.used += work.len();
        self.slots.extend(work.iter().map(|request| Slot {
            request: request.clone(),
            progress: Progress::Waits,
        }));
        Ok(())
    }

    pub(super) fn poll(&mut self) -> Option<RawCompletion> {
        let (completion, covers) = self.completions.pop_front()?;
        self.used -= covers;
        Some(completion)
    }

    pub(super) fn has_completions(&self) -> bool {
        !self.completions.is_empty()
    }

    pub(super) fn state(&self) -> State {
        self.state
    }

    /// Whose requests are under way, where any are.
    pub(super) fn target(&self) -> Option<DcAddress> {
        self.target.filter(|_| self.sent > 0)
    }

    /// How many are under way.
    pub(super) fn sent(&self) -> usize {
        self.sent
    }

    /// The next request to send: none while another target's are under way, or a fence waits.
    pub(super) fn next(&mut self) -> Option<Turn<'_>> {
        self.retire();
        if self.failed || self.state == State::Err {
            return None;
        }
        let at = usize::try_from(self.next - self.first).ok()?;
        let request = &self.slots.get(at)?.request;
        let its_turn = request.op != Op::Fence
            && (self.sent == 0 || self.target.is_none_or(|target| target == request.to));
        its_turn.then_some(Turn {
            number: self.next,
            request,
            fenced: self.reads && request.op != Op::Read,
        })
    }

    /// The next request has been sent.
    pub(super) fn mark_sent(&mut self) {
        let at = (self.next - self.first) as usize;
        if let Some(slot) = self.slots.get_mut(at) {
            slot.progress = Progress::Sent;
            self.target = Some(slot.request.to);
            self.reads |= matches!(
                slot.request.op,
                Op::Read | Op::CompareSwap { .. } | Op::FetchAdd { .. }
            );
            self.sent += 1;
            self.next += 1;
        }
    }

    /// The next request ends without being sent. It is the oldest, or has to wait: false then.
    pub(super) fn fail_next(&mut self, status: Status) -> bool {
        self.retire();
        if self.next != self.first {
            return false;
        }
        if let Some(slot) = self.slots.front_mut() {
            slot.progress = Progress::Done(status);
            self.next += 1;
        }
        self.retire();
        true
    }

    /// A request that was sent has ended.
    pub(super) fn complete(&mut self, number: u64, status: Status) {
        let Some(at) = number.checked_sub(self.first) else {
            return;
        };
        if let Some(slot) = self.slots.get_mut(at as usize)
            && slot.progress == Progress::Sent
        {
            slot.progress = Progress::Done(status);
            self.failed |= breaks(status);
            self.less_sent();
            self.retire();
        }
    }

    /// A request that was sent, and all behind it, were not executed: they wait again.
    pub(super) fn take_back(&mut self, number: u64) {
        let Some(at) = number.checked_sub(self.first) else {
            return;
        };
        let mut back = false;
        for slot in self.slots.iter_mut().skip(at as usize) {
            if slot.progress == Progress::Sent {
                slot.progress = Progress::Waits;
                self.sent = self.sent.saturating_sub(1);
                back = true;
            }
        }
        if back {
            self.next = self.next.min(number);
            self.reads &= self.sent > 0;
        }
    }

    /// Nothing more is sent; what is under way ends.
    pub(super) fn abandon(&mut self) {
        self.state = State::Err;
        self.retire();
    }

    fn less_sent(&mut self) {
        self.sent = self.sent.saturating_sub(1);
        self.reads &= self.sent > 0;
    }

    /// Completes what is done, in order.
    fn retire(&mut self) {
        while let Some(front) = self.slots.front() {
            let status = match front.progress {
                Progress::Done(status) => status,
                Progress::Waits if self.state == State::Err => Status::Flushed,
                Progress::Waits if front.request.op == Op::Fence => Status::Success,
                Progress::Waits | Progress::Sent => return,
            };
            let Some(slot) = self.slots.pop_front() else {
                return;
            };
            self.first += 1;
            self.next = self.next.max(self.first);
            self.held += 1;
            if breaks(status) {
                self.state = State::Err;
            }
            if slot.request.signalled || status != Status::Success {
                let completion = RawCompletion {
                    wr_id: slot.request.wr_id,
                    status,
                };
                self.completions
                    .push_back((completion, std::mem::take(&mut self.held)));
                self.fresh = true;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ByteSize;
    use crate::region::{Access, MemoryRegion, RKey, RemoteSlice};

    fn to(number: u32) -> DcAddress {
        DcAddress {
            number,
            key: 0,
            lid: 0,
            gid: 0,
        }
    }

    fn request(wr_id: u64, op: Op, peer: u32) -> RawRequest {
        let region = MemoryRegion::create(ByteSize::new(64), Access::Local, RKey(0), 1).unwrap();
        RawRequest {
            wr_id,
            signalled: true,
            op,
            local: region.slice(0, 8),
            remote: RemoteSlice {
                key: RKey(16),
                offset: 0,
            },
            to: to(peer),
            header: None,
        }
    }

    fn pair() -> Pair {
        Pair::new(16, Wake::nobody())
    }

    fn all(pair: &mut Pair) -> Vec<(u64, Status)> {
        std::iter::from_fn(|| pair.poll())
            .map(|done| (done.wr_id, done.status))
            .collect()
    }

    fn send_all(pair: &mut Pair) -> Vec<u64> {
        let mut sent = Vec::new();
        while let Some(turn) = pair.next() {
            sent.push(turn.number);
            pair.mark_sent();
        }
        sent
    }

    #[test]
    fn one_target_is_served_at_a_time_in_order() {
        let mut pair = pair();
        let work = [(0, 1), (1, 1), (2, 2), (3, 1)].map(|(id, peer)| request(id, Op::Write, peer));
        pair.post(&work).unwrap();
        assert_eq!(send_all(&mut pair), [0, 1]);
        pair.complete(1, Status::Success);
        assert!(send_all(&mut pair).is_empty() && all(&mut pair).is_empty());
        pair.complete(0, Status::Success);
        assert_eq!(all(&mut pair), [(0, Status::Success), (1, Status::Success)]);
        assert_eq!(send_all(&mut pair), [2]);
        pair.complete(2, Status::Success);
        assert_eq!(send_all(&mut pair), [3]);
    }

    #[test]
    fn a_fence_completes_when_all_before_it_has_and_nothing_overtakes_it() {
        let mut pair = pair();
        let work = [
            request(0, Op::Write, 1),
            request(1, Op::Fence, 1),
            request(2, Op::Read, 1),
            request(3, Op::Read, 1),
            request(4, Op::Write, 1),
        ];
        pair.post(&work).unwrap();
        assert_eq!(send_all(&mut pair), [0]);
        pair.complete(0, Status::Success);
        assert_eq!(all(&mut pair), [(0, Status::Success), (1, Status::Success)]);
        let mut fenced = Vec::new();
        while let Some(turn) = pair.next() {
            fenced.push((turn.number, turn.fenced));
            pair.mark_sent();
        }
        // A WRITE behind a READ is fenced on the adapter, a READ behind a READ is not.
        assert_eq!(fenced, [(2, false), (3, false), (4, true)]);
    }

    #[test]
    fn what_is_behind_a_failure_is_flushed_whoever_it_is_for() {
        let mut pair = pair();
        let work = [(0, 1), (1, 1), (2, 2)].map(|(id, peer)| request(id, Op::Write, peer));
        pair.post(&work).unwrap();
        assert_eq!(send_all(&mut pair), [0, 1]);
        pair.complete(0, Status::RemoteAccess);
        assert_eq!(pair.state(), State::Err);
        assert!(send_all(&mut pair).is_empty());
        pair.complete(1, Status::Flushed);
        let flushed = [1, 2].map(|id| (id, Status::Flushed));
        let done = all(&mut pair);
        assert_eq!(done[0], (0, Status::RemoteAccess));
        assert_eq!(done[1..], flushed);
        pair.post(&[request(3, Op::Write, 1)]).unwrap();
        assert!(pair.next().is_none());
        assert_eq!(all(&mut pair), [(3, Status::Flushed)]);
    }

    #[test]
    fn what_was_taken_back_is_sent_again_and_completes_once() {
        let mut pair = pair();
        let work = [0, 1, 2].map(|id| request(id, Op::Write, 1));
        pair.post(&work).unwrap();
        assert_eq!(send_all(&mut pair), [0, 1, 2]);
        pair.complete(0, Status::Success);
        pair.take_back(1);
        assert_eq!(pair.sent(), 0);
        assert_eq!(send_all(&mut pair), [1, 2]);
        pair.complete(1, Status::Success);
        pair.complete(2, Status::Success);
        pair.complete(2, Status::Success);
        assert_eq!(all(&mut pair).len(), 3);
        assert_eq!(pair.used, 0);
    }

    #[test]
    fn a_refused_message_breaks_nothing_and_a_completion_covers_what_was_not_signalled() {
        let mut pair = pair();
        let mut quiet = request(0, Op::Write, 1);
        quiet.signalled = false;
        let work = [quiet, request(1, Op::Send(crate::Service(1)), 1)];
        pair.post(&work).unwrap();
        assert_eq!(send_all(&mut pair), [0, 1]);
        pair.complete(0, Status::Success);
        assert_eq!((all(&mut pair).len(), pair.used), (0, 2));
        pair.complete(1, Status::ReceiverNotReady);
        assert_eq!(pair.state(), State::Rts);
        assert_eq!(all(&mut pair), [(1, Status::ReceiverNotReady)]);
        assert_eq!(pair.used, 0);
        assert_eq!(
            pair.post(&vec![request(2, Op::Write, 1); 17]),
            Err(QueueFull)
        );
    }

    #[test]
    fn a_request_that_cannot_be_sent_fails_in_its_turn() {
        let mut pair = pair();
        pair.post(&[request(0, Op::Write, 1), request(1, Op::Write, 1)])
            .unwrap();
        assert!(pair.next().is_some());
        pair.mark_sent();
        assert!(pair.next().is_some());
        assert!(!pair.fail_next(Status::LocalProtection));
        pair.complete(0, Status::Success);
        assert!(pair.fail_next(Status::LocalProtection));
        assert_eq!(
            all(&mut pair),
            [(0, Status::Success), (1, Status::LocalProtection)]
        );
        assert_eq!(pair.state(), State::Err);
    }
}
