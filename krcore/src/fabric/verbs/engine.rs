//! What all pairs of a fabric share: the connections to peers, at most one to each and a bounded
//! number in all, of which the least recently used one goes; and what moves requests onto them.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use nix::sys::epoll::{Epoll, EpollEvent, EpollFlags};

use super::VerbsConfig;
use super::device::{Device, Registration, Work};
use super::handshake::Frame;
use super::link::{Fates, LONGEST_MESSAGE, Link, Phase};
use super::pair::{Pair, Turn};
use crate::fabric::{
    DcAddress, Op, PairOptions, QueueFull, RawCompletion, RawRequest, State, Status, Wake,
};
use crate::notify::Event;

/// What a request can be.
enum Step {
    Ready(Work),
    Waits,
    Fails(Status),
}

/// The initiator's side of a fabric.
pub(super) struct Engine {
    device: Arc<Device>,
    config: VerbsConfig,
    epoll: Arc<Epoll>,
    ids: Arc<AtomicU64>,
    kick: Arc<Event>,
    links: HashMap<DcAddress, Link>,
    names: HashMap<u64, DcAddress>,
    pairs: Vec<Option<Pair>>,
    free: Vec<usize>,
    /// Pairs that may go on.
    due: VecDeque<usize>,
    /// Pairs that wait for room on a connection, or for a connection.
    starved: Vec<usize>,
    /// Whom to wake when the lock is free.
    woken: Vec<Wake>,
    posts: u64,
    /// Connections that were ever made.
    pub(super) made: u64,
    /// A peer's answer has become due by some time.
    owed: bool,
    /// The thread sleeps until something happens, and does not look at the time.
    resting: bool,
}

impl Engine {
    pub(super) fn new(
        device: &Arc<Device>,
        config: VerbsConfig,
        epoll: Arc<Epoll>,
        ids: Arc<AtomicU64>,
        kick: Arc<Event>,
    ) -> Self {
        Self {
            device: Arc::clone(device),
            config,
            epoll,
            ids,
            kick,
            links: HashMap::new(),
            names: HashMap::new(),
            pairs: Vec::new(),
            free: Vec::new(),
            due: VecDeque::new(),
            starved: Vec::new(),
            woken: Vec::new(),
            posts: 0,
            made: 0,
            owed: false,
            resting: false,
        }
    }

    pub(super) fn connections(&self) -> usize {
        self.links.len()
    }

    pub(super) fn add(&mut self, options: &PairOptions) -> usize {
        let pair = Some(Pair::new(options.depth, options.wake.clone()));
        match self.free.pop() {
            Some(at) => {
                self.pairs[at] = pair;
                at
            }
            None => {
                self.pairs.push(pair);
                self.pairs.len() - 1
            }
        }
    }

    fn pair(&mut self, at: usize) -> Option<&mut Pair> {
        self.pairs.get_mut(at)?.as_mut()
    }

    pub(super) fn post(&mut self, at: usize, work: &[RawRequest]) -> Result<(), QueueFull> {
        let Some(pair) = self.pair(at) else {
            return Err(QueueFull);
        };
        pair.post(work)?;
        self.due.push_back(at);
        self.run(None);
        Ok(())
    }

    pub(super) fn poll(&mut self, at: usize) -> Option<RawCompletion> {
        let pair = self.pair(at)?;
        if !pair.has_completions()
            && let Some(target) = pair.target()
        {
            self.look(target);
            self.run(Some(at));
        }
        self.pair(at)?.poll()
    }

    pub(super) fn state(&mut self, at: usize) -> State {
        self.pair(at).map_or(State::Err, |pair| pair.state())
    }

    /// Ends a pair: nothing more of it is sent. True when nothing of it is under way, and it is gone.
    pub(super) fn remove(&mut self, at: usize) -> bool {
        let Some(pair) = self.pair(at) else {
            return true;
        };
        pair.abandon();
        if let Some(target) = pair.target() {
            self.look(target);
            self.run(Some(at));
        }
        let done = self.pair(at).is_none_or(|pair| pair.sent() == 0);
        if done {
            self.pairs[at] = None;
            self.free.push(at);
        }
        done
    }

    /// Breaks the connection on which requests of a pair are under way, so that they end.
    pub(super) fn cut(&mut self, at: usize) {
        if let Some(target) = self.pair(at).and_then(|pair| pair.target()) {
            self.lose(target);
            self.run(Some(at));
        }
    }

    /// Begins to connect, where that has not been done.
    pub(super) fn prepare(&mut self, to: DcAddress) {
        if self.link(to) == Ok(true) {
            self.run(None);
        }
    }

    pub(super) fn take_woken(&mut self) -> Vec<Wake> {
        std::mem::take(&mut self.woken)
    }

    /// Moves every pair on that may, and notes whom to wake. `polling` hears by itself.
    fn run(&mut self, polling: Option<usize>) {
        while let Some(at) = self.due.pop_front() {
            let Some(mut pair) = self.pairs.get_mut(at).and_then(Option::take) else {
                continue;
            };
            let lost = self.advance(at, &mut pair);
            if std::mem::take(&mut pair.fresh) && polling != Some(at) {
                self.woken.push(pair.wake.clone());
            }
            self.pairs[at] = Some(pair);
            if let Some(lost) = lost {
                self.lose(lost);
            }
        }
        if std::mem::take(&mut self.owed) && std::mem::take(&mut self.resting) {
            self.kick.set();
        }
    }

    /// Sends what of a pair's requests has its turn, with one ring of the bell. Gives the peer whose
    /// connection did not take it.
    fn advance(&mut self, at: usize, pair: &mut Pair) -> Option<DcAddress> {
        let mut batch = Vec::new();
        let mut to = None;
        while let Some(turn) = pair.next() {
            let target = turn.request.to;
            match self.step(at, &turn) {
                Step::Ready(work) => {
                    to = Some(target);
                    batch.push(work);
                    pair.mark_sent();
                }
                Step::Waits => break,
                // Where something is under way it has to wait, and is seen again when that is done.
                Step::Fails(status) => {
                    if !pair.fail_next(status) {
                        break;
                    }
                }
            }
        }
        let to = to?;
        self.posts += 1;
        let link = self.links.get_mut(&to)?;
        link.used = self.posts;
        (!link.post(&mut batch)).then_some(to)
    }

    fn step(&mut self, at: usize, turn: &Turn<'_>) -> Step {
        let request = turn.request;
        let local = &request.local;
        if !local.region.contains(local.offset, local.len) {
            return Step::Fails(Status::LocalProtection);
        }
        match request.op {
            // What no adapter could be told.
            Op::Send(_) if request.header.is_none() || local.len > LONGEST_MESSAGE => {
                return Step::Fails(Status::RemoteInvalid);
            }
            _ if local.len > u64::from(self.device.longest) => {
                return Step::Fails(Status::RemoteInvalid);
            }
            // An adapter says of it what it likes, and some send it again until they give up.
            Op::CompareSwap { .. } | Op::FetchAdd { .. }
                if local.region.atomic(local.offset).is_none()
                    || !request.remote.offset.is_multiple_of(8) =>
            {
                return Step::Fails(Status::RemoteInvalid);
            }
            _ => {}
        }
        match self.link(request.to) {
            Ok(true) => {}
            Ok(false) => {
                self.starved.push(at);
                return Step::Waits;
            }
            Err(status) => return Step::Fails(status),
        }
        let Some(link) = self.links.get_mut(&request.to) else {
            return Step::Waits;
        };
        let is_message = matches!(request.op, Op::Send(_));
        if !matches!(link.phase, Phase::Ready(_)) {
            link.waiting.push(at);
            return Step::Waits;
        }
        if link.room() == 0 || is_message && !link.has_window() {
            self.starved.push(at);
            return Step::Waits;
        }
        let mut place = None;
        if !is_message {
            match link.place(request.remote.key) {
                Some(Some(known)) => place = Some(known),
                Some(None) => {
                    link.forget_missing(request.remote.key);
                    return Step::Fails(Status::RemoteAccess);
                }
                None => {
                    self.owed = true;
                    link.waiting.push(at);
                    return Step::Waits;
                }
            }
        }
        let mut own = None;
        if local.len > 0 {
            match Registration::of(&self.device, &local.region) {
                Ok(registration) => own = Some(registration),
                Err(why) => {
                    tracing::warn!(%why, "a local region cannot be reached by the device");
                    return Step::Fails(Status::LocalProtection);
                }
            }
        }
        self.owed |= is_message;
        let whose = (at, turn.number);
        Step::Ready(link.prepare(whose, request, own, place, turn.fenced))
    }

    /// Whether there is a connection to that node, connected or not: false where there are as many as
    /// there may be, and all are in use.
    fn link(&mut self, to: DcAddress) -> Result<bool, Status> {
        if self.links.contains_key(&to) {
            return Ok(true);
        }
        if self.links.len() >= self.config.connections.max(1) {
            let idle = self.links.iter().filter(|(_, link)| link.is_idle());
            let Some((oldest, _)) = idle.min_by_key(|(_, link)| link.used) else {
                return Ok(false);
            };
            let oldest = *oldest;
            self.discard(oldest);
        }
        let id = self.ids.fetch_add(1, Ordering::Relaxed);
        let failed = |why: crate::Error| {
            tracing::warn!(%why, "no connection to a peer");
            Status::RetryExceeded
        };
        let mut link = Link::new(&self.device, id, to).map_err(failed)?;
        link.used = self.posts;
        let flags = EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT | EpollFlags::EPOLLRDHUP;
        self.epoll
            .add(&link.stream, EpollEvent::new(flags, id))
            .map_err(|why| {
                tracing::warn!(%why, "a peer cannot be waited for");
                Status::RetryExceeded
            })?;
        self.names.insert(id, to);
        self.links.insert(to, link);
        self.made += 1;
        self.owed = true;
        Ok(true)
    }

    /// Takes a connection away on which nothing is under way.
    fn discard(&mut self, to: DcAddress) {
        if let Some(link) = self.links.remove(&to) {
            let _closed = self.epoll.delete(&link.stream);
            self.names.remove(&link.id);
            self.due.extend(link.waiting);
            self.due.append(&mut self.starved.drain(..).collect());
        }
    }

    /// Takes what the device has completed of a connection.
    fn look(&mut self, to: DcAddress) {
        let mut fates = Fates::default();
        if let Some(link) = self.links.get_mut(&to) {
            link.poll(&mut fates);
        }
        self.apply(to, fates);
    }

    fn apply(&mut self, to: DcAddress, fates: Fates) {
        if !fates.done.is_empty() {
            self.due.append(&mut self.starved.drain(..).collect());
        }
        for ((at, number), status) in fates.done {
            if let Some(pair) = self.pair(at) {
                pair.complete(number, status);
                self.due.push_back(at);
            }
        }
        for (at, number) in fates.back {
            if let Some(pair) = self.pair(at) {
                pair.take_back(number);
                self.due.push_back(at);
            }
        }
        if self.links.get(&to).is_some_and(Link::is_drained) {
            self.discard(to);
        } else if fates.broken {
            self.owed = true;
        }
    }

    /// A connection has ended, and nobody knows what was executed of what is under way.
    fn lose(&mut self, to: DcAddress) {
        // What has completed has.
        self.look(to);
        let Some(link) = self.links.get_mut(&to) else {
            return;
        };
        let never_was = matches!(link.phase, Phase::Connecting(_));
        let waiting = std::mem::take(&mut link.waiting);
        let mut fates = Fates::default();
        link.break_off(None, &mut fates);
        if never_was {
            for &at in &waiting {
                if let Some(pair) = self.pair(at)
                    && pair.next().is_some_and(|turn| turn.request.to == to)
                {
                    pair.fail_next(Status::RetryExceeded);
                }
            }
        }
        self.due.extend(waiting);
        self.apply(to, fates);
    }

    /// The completion queue of a connection has something.
    pub(super) fn on_completions(&mut self, id: u64) {
        let Some(&to) = self.names.get(&id) else {
            return;
        };
        let mut fates = Fates::default();
        if let Some(link) = self.links.get_mut(&to) {
            link.on_event(&mut fates);
        }
        self.apply(to, fates);
        self.run(None);
    }

    /// The stream of a connection has something, or has ended.
    pub(super) fn on_stream(&mut self, id: u64) {
        let Some(&to) = self.names.get(&id) else {
            return;
        };
        if !self.hear(to) {
            self.lose(to);
        }
        self.run(None);
    }

    /// False where the connection has ended.
    fn hear(&mut self, to: DcAddress) -> bool {
        let Some(link) = self.links.get_mut(&to) else {
            return true;
        };
        if !link.greeted {
            let Phase::Connecting(connection) = &link.phase else {
                return false;
            };
            match link.stream.is_connected() {
                Ok(true) => {}
                Ok(false) => return true,
                Err(_) => return false,
            }
            let hello = Frame::Hello {
                key: to.key,
                endpoint: connection.endpoint(),
            };
            link.greeted = true;
            let flags = EpollFlags::EPOLLIN | EpollFlags::EPOLLRDHUP;
            let watched = self
                .epoll
                .modify(&link.stream, &mut EpollEvent::new(flags, link.id));
            return watched.is_ok() && link.stream.send(&hello);
        }
        let mut said = Vec::new();
        let mut open = link.stream.receive(|frame| said.push(frame));
        let mut fates = Fates::default();
        for frame in said {
            let phase = std::mem::replace(&mut link.phase, Phase::Draining);
            link.phase = match (frame, phase) {
                (Frame::Ready { endpoint }, Phase::Connecting(mut connection)) => {
                    match connection.connect(&endpoint, &self.config) {
                        Ok(()) => {
                            self.due.extend(link.waiting.drain(..));
                            Phase::Ready(connection)
                        }
                        Err(why) => {
                            tracing::warn!(%why, "a peer cannot be connected");
                            open = false;
                            Phase::Connecting(connection)
                        }
                    }
                }
                (Frame::Found { region, place }, phase) => {
                    link.learn(region, place);
                    self.due.extend(link.waiting.drain(..));
                    phase
                }
                (Frame::Delivered { message, taken }, phase) => {
                    link.delivered(message, taken, &mut fates);
                    phase
                }
                (_, phase) => {
                    open = false;
                    phase
                }
            };
        }
        self.apply(to, fates);
        open
    }

    /// Ends the connections whose peers have not answered in time, and those on which the device has
    /// neither completed anything nor given up for longer than it may. Says when to look again.
    pub(super) fn on_time(&mut self) -> Look {
        let now = Instant::now();
        let device = self.config.device_limit();
        let late: Vec<_> = self
            .links
            .iter()
            .filter(|(_, link)| {
                link.is_owed() && now.duration_since(link.since) > self.config.answer
                    || link.is_busy() && now.duration_since(link.moved) > device
            })
            .map(|(to, _)| *to)
            .collect();
        for to in late {
            self.lose(to);
        }
        self.run(None);
        let owed = self.links.values().any(Link::is_owed);
        self.resting = !owed;
        if owed {
            Look::Soon
        } else if self.links.is_empty() {
            Look::WhenToldTo
        } else {
            Look::NowAndThen
        }
    }
}

/// When the time is to be looked at again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Look {
    Soon,
    NowAndThen,
    WhenToldTo,
}
