//! A process that is attached to a node daemon. A connection is a lane of a channel that is mapped
//! already, so that connecting takes no system call; what is posted there the daemon executes after
//! its own checks (*isolated*), or this process does on the peer's mapped memory (*trusted*).

use std::collections::{HashMap, VecDeque};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock};
use std::time::Duration;

use carlsbad_types::ByteSize;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
use std::os::fd::AsRawFd;

use crate::channel::{Channel, DEPTH, LANES, MESSAGE_WORDS, MessageRing};
use crate::check;
use crate::clock::Deadline;
use crate::control::{self, Incoming, Reply, Request};
use crate::dispatch::COMPLETIONS;
use crate::error::{Error, Malformed, PostError, Result};
use crate::fabric::{self, DcAddress, Op, SEND_HEADER, Status};
use crate::message::Message;
use crate::mr::{self, RegionEntry};
use crate::node::{NodeId, Peers, Service, Stats, new_owner};
use crate::notify::{self, Event};
use crate::region::{Access, MemoryRegion, RKey, RegionSlice, Sealed};
use crate::ring::{Consumer, Corrupt, Producer};
use crate::vq::{Completion, WorkRequest};
use crate::wire::{self, Cookie, GENERATIONS, Submission};

/// How long the daemon may take for a request that has no limit of its own.
const CONTROL_LIMIT: Duration = Duration::from_secs(5);
/// How often to look for an answer before sleeping: some 20 us, in which most have come.
const LOOKS: u32 = 40;
/// A sleeper looks this often whether the daemon is still there.
const NAP: Duration = Duration::from_millis(20);
/// After so many operations of its own a trusted process looks whether the daemon is still there.
const LOOK_EVERY: u32 = 64;

/// Who executes what an attached process posts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Mode {
    /// The daemon, after it has checked it: for processes that nobody trusts.
    #[default]
    Isolated,
    /// The process itself, on the mapped memory of its peer: for those which are trusted with all of
    /// a region that they may reach any of.
    Trusted,
}

/// A packet socket to the daemon.
#[derive(Debug)]
struct Socket(UnixStream);

fn connect_to(path: &Path) -> Result<Socket> {
    let failed = |source: nix::Error| Error::NoDaemon {
        path: path.to_owned(),
        source: source.into(),
    };
    let address = UnixAddr::new(path).map_err(failed)?;
    let fd = socket(
        AddressFamily::Unix,
        SockType::SeqPacket,
        SockFlag::SOCK_CLOEXEC,
        None,
    )
    .map_err(|source| Error::Io {
        what: "create a Unix socket",
        source: source.into(),
    })?;
    connect(fd.as_raw_fd(), &address).map_err(failed)?;
    Ok(Socket(UnixStream::from(fd)))
}

impl Socket {
    /// One packet there, one back.
    fn ask(
        &self,
        request: &Request,
        descriptors: &[BorrowedFd<'_>],
        limit: Duration,
    ) -> Result<(Reply, Vec<OwnedFd>)> {
        control::send(self.0.as_fd(), request, descriptors)?;
        let mut looks = LOOKS;
        let end = Deadline::after(limit);
        loop {
            match control::receive(self.0.as_fd()) {
                Incoming::Packet(Reply::Failed(why), _) => return Err(why.into()),
                Incoming::Packet(reply, descriptors) => return Ok((reply, descriptors)),
                Incoming::Broken(why) => return Err(Error::Protocol(why)),
                Incoming::Closed => return Err(Error::Disconnected),
                Incoming::Nothing if looks > 0 => {
                    looks -= 1;
                    std::thread::yield_now();
                    continue;
                }
                Incoming::Nothing => {}
            }
            let Some(left) = end.left() else {
                // What comes later would be taken for the answer to something else.
                let _gone = self.0.shutdown(std::net::Shutdown::Both);
                return Err(Error::TimedOut {
                    what: "an answer of the node daemon",
                    limit,
                });
            };
            self.wait(left);
        }
    }

    fn wait(&self, limit: Duration) {
        let mut one = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
        let limit = PollTimeout::try_from(limit).unwrap_or(PollTimeout::MAX);
        let _interrupted = poll(&mut one, limit);
    }

    fn is_alive(&self) -> bool {
        let mut one = [PollFd::new(self.0.as_fd(), PollFlags::empty())];
        match poll(&mut one, PollTimeout::ZERO) {
            Ok(0) => true,
            Ok(_) => one[0].revents().is_none_or(|events| events.is_empty()),
            Err(_) => true,
        }
    }
}

/// What is outstanding in a lane: to be completed, and its memory to be kept.
#[derive(Debug)]
struct Pending {
    id: u64,
    signalled: bool,
    generation: u32,
    _alive: RegionSlice,
}

/// A lane, with this side's state of it. It passes from one virtual queue to the next.
#[derive(Debug)]
struct Lane {
    channel: Channel,
    at: (u32, u32),
    generation: u32,
    producer: Producer,
    consumer: Consumer,
    pending: Vec<Option<Pending>>,
    /// Places of `pending` that are free.
    free: Vec<u8>,
    event: OnceLock<LaneEvent>,
}

/// What an event loop waits for: completions, or the end of the daemon.
#[derive(Debug)]
struct LaneEvent {
    nudged: UnixDatagram,
    own: UnixDatagram,
    either: Epoll,
}

impl LaneEvent {
    fn clear(&self) {
        while self.nudged.recv(&mut [0]).is_ok() {}
    }

    fn set(&self) {
        // Full is as good as set.
        let _full = self.own.send(b"!");
    }
}

impl Lane {
    fn new(channel: &Channel, number: u32, lane: usize) -> Box<Self> {
        Box::new(Self {
            channel: channel.clone(),
            at: (number, lane as u32),
            generation: 0,
            producer: Producer::default(),
            consumer: Consumer::default(),
            pending: Vec::new(),
            free: Vec::new(),
            event: OnceLock::new(),
        })
    }
}

impl Lane {
    /// A place for one more, where there is one.
    fn place(&mut self) -> Option<u8> {
        if let Some(free) = self.free.pop() {
            return Some(free);
        }
        let next = self.pending.len();
        if next == DEPTH {
            return None;
        }
        self.pending.push(None);
        Some(next as u8)
    }
}

/// The lanes that no virtual queue has: those that were used before, and the rest of a channel.
#[derive(Debug)]
struct Lanes {
    #[allow(
        clippy::vec_box,
        reason = "a lane goes from here to a queue and back as a pointer"
    )]
    used: Vec<Box<Lane>>,
    channel: Channel,
    number: u32,
    next: usize,
}

impl Lanes {
    fn take(&mut self) -> Option<Box<Lane>> {
        if let Some(lane) = self.used.pop() {
            return Some(lane);
        }
        if self.next == LANES {
            return None;
        }
        self.next += 1;
        Some(Lane::new(&self.channel, self.number, self.next - 1))
    }
}

/// A region of a peer that is mapped here, and the peer's table, which says whether it is still
/// registered.
#[derive(Debug, Clone)]
struct Mapped {
    region: Arc<MemoryRegion>,
    table: Arc<Sealed>,
}

impl Mapped {
    fn is_valid(&self) -> bool {
        let key = self.region.key();
        self.table
            .words(mr::offset(key) as usize, 1)
            .and_then(<[_]>::first)
            .is_some_and(|word| word.load(Ordering::Acquire) == u64::from(key.0))
    }
}

/// An attached process.
#[derive(Debug)]
pub(crate) struct Session {
    socket: Socket,
    /// Who asks the daemon something has the socket until the answer has come.
    asking: Mutex<()>,
    node: NodeId,
    address: DcAddress,
    mode: Mode,
    owner: u64,
    /// Wakes the daemon.
    bell: Event,
    lanes: Mutex<Lanes>,
    peers: Peers,
    regions: Mutex<Vec<Arc<MemoryRegion>>>,
    mapped: RwLock<HashMap<(NodeId, RKey), Mapped>>,
    scratch: OnceLock<Arc<MemoryRegion>>,
    /// What event loops get that cannot have their own.
    always_ready: Event,
    dead: AtomicBool,
}

fn one(mut descriptors: Vec<OwnedFd>) -> Result<OwnedFd> {
    match (descriptors.pop(), descriptors.is_empty()) {
        (Some(fd), true) => Ok(fd),
        _ => Err(Error::Protocol("the wrong number of descriptors")),
    }
}

const UNEXPECTED: Error = Error::Protocol("an unexpected answer");

impl Session {
    pub(crate) fn open(path: &Path, mode: Mode, limit: Duration) -> Result<Arc<Self>> {
        let socket = connect_to(path)?;
        let hello = Request::Hello {
            version: control::VERSION,
            trusted: mode == Mode::Trusted,
        };
        let (reply, mut descriptors) = socket.ask(&hello, &[], limit)?;
        let Reply::Welcome { node, address } = reply else {
            return Err(UNEXPECTED);
        };
        let (Some(bell), Some(channel)) = (descriptors.pop(), descriptors.pop()) else {
            return Err(Error::Protocol("the wrong number of descriptors"));
        };
        let channel = Channel::over(Sealed::adopt(channel, true)?)?;
        let peers = Peers::default();
        peers.learn(node, address);
        Ok(Arc::new(Self {
            socket,
            asking: Mutex::default(),
            node,
            address,
            mode,
            owner: new_owner(),
            bell: Event::adopt(bell),
            lanes: Mutex::new(Lanes {
                used: Vec::new(),
                channel,
                number: 0,
                next: 0,
            }),
            peers,
            regions: Mutex::default(),
            mapped: RwLock::default(),
            scratch: OnceLock::new(),
            always_ready: notify::always_ready()?,
            dead: AtomicBool::new(false),
        }))
    }

    pub(crate) fn node(&self) -> NodeId {
        self.node
    }

    pub(crate) fn address(&self) -> DcAddress {
        self.address
    }

    pub(crate) fn metadata_bytes(&self) -> usize {
        self.peers.bytes()
    }

    fn ask(&self, request: &Request, with: &[BorrowedFd<'_>]) -> Result<(Reply, Vec<OwnedFd>)> {
        let asking = self.asking.lock().unwrap_or_else(PoisonError::into_inner);
        let answer = self.socket.ask(request, with, CONTROL_LIMIT);
        drop(asking);
        if matches!(answer, Err(Error::Disconnected)) {
            self.dead.store(true, Ordering::Relaxed);
        }
        answer
    }

    fn is_alive(&self) -> bool {
        if self.dead.load(Ordering::Relaxed) {
            return false;
        }
        let alive = self.socket.is_alive();
        if !alive {
            self.dead.store(true, Ordering::Relaxed);
        }
        alive
    }

    pub(crate) fn stats(&self) -> Result<Stats> {
        match self.ask(&Request::Stats, &[])?.0 {
            Reply::Stats(stats) => Ok(*stats),
            _ => Err(UNEXPECTED),
        }
    }

    pub(crate) fn register(&self, memory: Sealed, access: Access) -> Result<Arc<MemoryRegion>> {
        let request = Request::Register { access };
        let Reply::Registered(key) = self.ask(&request, &[memory.as_fd()])?.0 else {
            return Err(UNEXPECTED);
        };
        let region = MemoryRegion::over(memory, access, key, self.owner);
        let mut regions = self.regions.lock().unwrap_or_else(PoisonError::into_inner);
        regions.push(Arc::clone(&region));
        Ok(region)
    }

    pub(crate) fn deregister(&self, region: &Arc<MemoryRegion>) -> Result<()> {
        let mut regions = self.regions.lock().unwrap_or_else(PoisonError::into_inner);
        let at = regions.iter().position(|known| Arc::ptr_eq(known, region));
        regions.swap_remove(at.ok_or(Error::NotRegistered)?);
        drop(regions);
        self.ask(&Request::Deregister { key: region.key() }, &[])?;
        Ok(())
    }

    pub(crate) fn scratch(&self) -> Result<RegionSlice> {
        if let Some(scratch) = self.scratch.get() {
            return Ok(scratch.slice(0, 8));
        }
        let memory = Sealed::create(c"krcore-scratch", ByteSize::kib(4).get())?;
        let scratch = self.register(memory, Access::Local)?;
        Ok(self.scratch.get_or_init(|| scratch).slice(0, 8))
    }

    pub(crate) fn forget(&self, peer: NodeId) {
        self.peers.forget(peer);
    }

    pub(crate) fn connect(self: &Arc<Self>, peer: NodeId, limit: Duration) -> Result<LaneQueue> {
        if self.peers.get(peer).is_none() {
            let request = Request::Resolve {
                peer,
                millis: limit.as_millis().try_into().unwrap_or(u64::MAX),
            };
            let Reply::Address(address) = self.ask(&request, &[])?.0 else {
                return Err(UNEXPECTED);
            };
            self.peers.learn(peer, address);
        }
        self.connect_known(peer)
    }

    /// To a peer that the daemon knows.
    pub(crate) fn connect_known(self: &Arc<Self>, peer: NodeId) -> Result<LaneQueue> {
        if self.dead.load(Ordering::Relaxed) {
            return Err(Error::Disconnected);
        }
        let mut lanes = self.lanes.lock().unwrap_or_else(PoisonError::into_inner);
        let mut lane = match lanes.take() {
            Some(lane) => lane,
            None => {
                let (_, descriptors) = self.ask(&Request::Channel, &[])?;
                lanes.channel = Channel::over(Sealed::adopt(one(descriptors)?, true)?)?;
                lanes.number += 1;
                lanes.next = 0;
                lanes.take().ok_or(Error::TooManyQueues(LANES))?
            }
        };
        drop(lanes);
        lane.generation = (lane.generation + 1) % GENERATIONS;
        Ok(LaneQueue {
            session: Arc::clone(self),
            lane: Some(lane),
            peer,
            ready: VecDeque::new(),
            mapped: None,
            since: 0,
            is_elsewhere: false,
        })
    }

    pub(crate) fn listen(self: &Arc<Self>, service: Service) -> Result<RingListener> {
        let ring = self
            .ask(&Request::Listen { service }, &[])
            .and_then(|(_, descriptors)| one(descriptors))
            .and_then(|fd| MessageRing::over(Sealed::adopt(fd, true)?));
        match ring {
            Ok(ring) => Ok(RingListener {
                session: Arc::clone(self),
                service,
                ring,
                consumer: Mutex::default(),
            }),
            Err(why) => {
                // The daemon may listen already, and the ring was lost on the way.
                if !matches!(why, Error::ServiceTaken(_)) {
                    let _gone = self.ask(&Request::Unlisten { service }, &[]);
                }
                Err(why)
            }
        }
    }

    /// `None` where the peer is on another machine.
    fn map(&self, peer: NodeId, key: RKey) -> Result<Option<Mapped>, Malformed> {
        let which = (peer, key);
        let mapped = self.mapped.read().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = mapped.get(&which).filter(|known| known.is_valid()) {
            return Ok(Some(known.clone()));
        }
        drop(mapped);
        let fresh = self.map_anew(peer, key).map_err(|why| match why {
            Error::Disconnected => Malformed::Disconnected,
            Error::UnknownNode(_) => Malformed::PeerGone,
            _ => Malformed::StaleKey,
        })?;
        let Some(fresh) = fresh else {
            return Ok(None);
        };
        let mut mapped = self.mapped.write().unwrap_or_else(PoisonError::into_inner);
        mapped.retain(|_, known| known.is_valid());
        mapped.insert(which, fresh.clone());
        Ok(Some(fresh))
    }

    fn map_anew(&self, peer: NodeId, key: RKey) -> Result<Option<Mapped>> {
        let (reply, mut descriptors) = self.ask(&Request::Map { peer, key }, &[])?;
        let access = match reply {
            Reply::Mapped(access) => access,
            Reply::Elsewhere => return Ok(None),
            _ => return Err(UNEXPECTED),
        };
        let table = descriptors.pop().ok_or(UNEXPECTED)?;
        let region = Sealed::adopt(one(descriptors)?, access == Access::ReadWrite)?;
        let table = Sealed::adopt(table, false)?;
        Ok(Some(Mapped {
            region: MemoryRegion::over(region, access, key, 0),
            table: Arc::new(table),
        }))
    }
}

/// What a trusted process executes a request on.
enum Reached {
    /// A fence needs none.
    Nothing,
    Here(Mapped),
    /// It is not on this machine.
    Elsewhere,
}

/// A virtual queue of an attached process.
#[derive(Debug)]
pub(crate) struct LaneQueue {
    session: Arc<Session>,
    /// There until it is dropped.
    lane: Option<Box<Lane>>,
    peer: NodeId,
    ready: VecDeque<Completion>,
    /// Trusted: the region used last.
    mapped: Option<Mapped>,
    /// Trusted: operations since it was seen that the daemon is there.
    since: u32,
    /// Trusted: the peer is on another machine, so that the daemon executes.
    is_elsewhere: bool,
}

impl LaneQueue {
    pub(crate) fn peer(&self) -> NodeId {
        self.peer
    }

    fn check(&self, request: &WorkRequest) -> Result<(), Malformed> {
        check::local(request)?;
        let owner = request.local.region.owner();
        if request.op != Op::Fence && owner != self.session.owner {
            return Err(Malformed::ForeignRegion);
        }
        Ok(())
    }

    pub(crate) fn post(&mut self, work: &[WorkRequest]) -> Result<usize, PostError> {
        let refused = |(index, why)| PostError { index, why };
        for (index, request) in work.iter().enumerate() {
            self.check(request).map_err(|why| refused((index, why)))?;
        }
        if self.session.dead.load(Ordering::Relaxed) {
            return Err(refused((0, Malformed::Disconnected)));
        }
        let own = self.session.mode == Mode::Trusted
            && work.iter().all(|request| {
                !matches!(request.op, Op::Send(_)) && request.remote.key.0 >= mr::RESERVED_KEYS
                    || request.op == Op::Fence
            });
        if own && !self.is_elsewhere && self.is_idle() {
            if let Some(taken) = self.execute(work).map_err(refused)? {
                return Ok(taken);
            }
            self.is_elsewhere = true;
        }
        self.submit(work).map_err(|why| refused((0, why)))
    }

    /// Nothing is outstanding at the daemon that would have to go first.
    fn is_idle(&mut self) -> bool {
        self.collect();
        self.lane
            .as_ref()
            .is_some_and(|lane| lane.free.len() == lane.pending.len())
    }

    /// Trusted mode: checks all, and executes it here; `None` where the peer is on another machine.
    fn execute(&mut self, work: &[WorkRequest]) -> Result<Option<usize>, (usize, Malformed)> {
        self.since += 1;
        if self.since >= LOOK_EVERY {
            self.since = 0;
            if !self.session.is_alive() {
                return Err((0, Malformed::Disconnected));
            }
        }
        let room = COMPLETIONS.saturating_sub(self.ready.len());
        let work = work.get(..room).unwrap_or(work);
        if let [request] = work {
            let mapped = match self.reach(request).map_err(|why| (0, why))? {
                Reached::Nothing => None,
                Reached::Here(mapped) => Some(mapped),
                Reached::Elsewhere => return Ok(None),
            };
            self.run(request, mapped.as_ref());
            self.mapped = mapped.or_else(|| self.mapped.take());
            return Ok(Some(1));
        }
        let mut reached = Vec::with_capacity(work.len());
        for (index, request) in work.iter().enumerate() {
            reached.push(match self.reach(request).map_err(|why| (index, why))? {
                Reached::Nothing => None,
                Reached::Here(mapped) => Some(mapped),
                Reached::Elsewhere => return Ok(None),
            });
        }
        for (request, mapped) in work.iter().zip(&reached) {
            self.run(request, mapped.as_ref());
        }
        self.mapped = reached.pop().flatten();
        Ok(Some(work.len()))
    }

    fn run(&mut self, request: &WorkRequest, mapped: Option<&Mapped>) {
        let status = mapped.map_or(Status::Success, |mapped| {
            fabric::execute(
                &mapped.region,
                request.op,
                &request.local,
                request.remote.offset,
            )
        });
        self.done(request, status);
    }

    fn done(&mut self, request: &WorkRequest, status: Status) {
        if request.signalled || status != Status::Success {
            self.ready.push_back(Completion {
                id: request.id,
                status,
            });
        }
    }

    fn reach(&mut self, request: &WorkRequest) -> Result<Reached, Malformed> {
        if request.op == Op::Fence {
            return Ok(Reached::Nothing);
        }
        let key = request.remote.key;
        let kept = self
            .mapped
            .take()
            .filter(|mapped| mapped.region.key() == key && mapped.is_valid());
        let mapped = match kept {
            Some(mapped) => mapped,
            None => match self.session.map(self.peer, key)? {
                Some(mapped) => mapped,
                None => return Ok(Reached::Elsewhere),
            },
        };
        let entry = RegionEntry {
            len: mapped.region.len() as u64,
            access: mapped.region.access(),
        };
        check::remote(request, entry)?;
        Ok(Reached::Here(mapped))
    }

    /// Isolated mode: gives it to the daemon.
    fn submit(&mut self, work: &[WorkRequest]) -> Result<usize, Malformed> {
        if work.is_empty() {
            return Ok(0);
        }
        let Some(lane) = &mut self.lane else {
            return Err(Malformed::Disconnected);
        };
        if lane.free.len() + DEPTH - lane.pending.len() < work.len() {
            self.collect();
        }
        let Some(lane) = &mut self.lane else {
            return Err(Malformed::Disconnected);
        };
        let lane = &mut **lane;
        let memory = lane.channel.clone();
        let Some(shared) = memory.lane(lane.at.1 as usize) else {
            return Err(Malformed::Disconnected);
        };
        let mut taken = 0;
        let room = COMPLETIONS.saturating_sub(self.ready.len());
        for request in work.iter().take(room) {
            let Some(index) = lane.place() else {
                break;
            };
            let submission = Submission {
                op: request.op,
                cookie: Cookie {
                    index,
                    generation: lane.generation,
                },
                peer: self.peer,
                local: request.local.region.key(),
                offset: request.local.offset,
                len: request.local.len,
                remote: request.remote,
            };
            match lane
                .producer
                .write(&shared.submissions, submission.encode())
            {
                Ok(true) => {}
                Ok(false) => {
                    lane.free.push(index);
                    break;
                }
                Err(Corrupt) => {
                    self.session.dead.store(true, Ordering::Relaxed);
                    return Err(Malformed::Disconnected);
                }
            }
            if let Some(slot) = lane.pending.get_mut(usize::from(index)) {
                *slot = Some(Pending {
                    id: request.id,
                    signalled: request.signalled,
                    generation: lane.generation,
                    _alive: request.local.clone(),
                });
            }
            taken += 1;
        }
        if taken > 0 {
            lane.producer.publish(&shared.submissions);
            if let Some(doorbell) = memory.doorbell() {
                doorbell.fetch_or(1 << lane.at.1, Ordering::SeqCst);
            }
            let asleep = memory.sleeping();
            if asleep.is_some_and(|asleep| asleep.load(Ordering::SeqCst) != 0) {
                self.session.bell.set();
            }
        }
        Ok(taken)
    }

    /// Takes what the daemon has completed.
    fn collect(&mut self) {
        let Some(lane) = &mut self.lane else {
            return;
        };
        let lane = &mut **lane;
        let Some(shared) = lane.channel.lane(lane.at.1 as usize) else {
            return;
        };
        let mut word = [0];
        let mut any = false;
        loop {
            match lane.consumer.read(&shared.completions, &mut word) {
                Ok(true) => any = true,
                Ok(false) => break,
                Err(Corrupt) => {
                    self.session.dead.store(true, Ordering::Relaxed);
                    break;
                }
            }
            let Some((cookie, status)) = wire::decode_completion(word[0]) else {
                continue;
            };
            let slot = lane.pending.get_mut(usize::from(cookie.index));
            let Some(done) =
                slot.and_then(|slot| slot.take_if(|p| p.generation == cookie.generation))
            else {
                continue;
            };
            lane.free.push(cookie.index);
            if matches!(
                status,
                Status::RetryExceeded | Status::Refused(Malformed::PeerGone)
            ) {
                self.session.peers.forget(self.peer);
            }
            // What an earlier virtual queue posted in this lane completes for nobody.
            if done.generation == lane.generation && (done.signalled || status != Status::Success) {
                self.ready.push_back(Completion {
                    id: done.id,
                    status,
                });
            }
        }
        if any {
            lane.consumer.release(&shared.completions);
        }
    }

    fn take(&mut self, out: &mut [Completion]) -> usize {
        if self.ready.len() < out.len() {
            self.collect();
        }
        let taken = self.ready.len().min(out.len());
        for (to, completion) in out.iter_mut().zip(self.ready.drain(..taken)) {
            *to = completion;
        }
        taken
    }

    pub(crate) fn poll(&mut self, out: &mut [Completion]) -> usize {
        let taken = self.take(out);
        let event = self.lane.as_ref().and_then(|lane| lane.event.get());
        let Some(event) = event.filter(|_| taken == 0 && !out.is_empty()) else {
            return taken;
        };
        // Whatever comes from here on sets it again.
        event.clear();
        let taken = self.take(out);
        if taken > 0
            && let Some(event) = self.lane.as_ref().and_then(|lane| lane.event.get())
        {
            // There may be more than fitted.
            event.set();
        }
        taken
    }

    pub(crate) fn wait(&mut self, end: Deadline) -> Result<Option<Completion>> {
        let mut one = [Completion::default()];
        if let Some(found) = notify::spin(|| (self.take(&mut one) == 1).then_some(one[0])) {
            return Ok(Some(found));
        }
        loop {
            let Some(lane) = &self.lane else {
                return Err(Error::Disconnected);
            };
            let channel = lane.channel.clone();
            let Some(shared) = channel.lane(lane.at.1 as usize) else {
                return Err(Error::Disconnected);
            };
            let tail = shared.completions.tail.load(Ordering::Acquire);
            shared.waiting.store(1, Ordering::SeqCst);
            fence(Ordering::SeqCst);
            if self.take(&mut one) == 1 {
                return Ok(Some(one[0]));
            }
            if !self.session.is_alive() {
                return Err(Error::Disconnected);
            }
            let Some(left) = end.left() else {
                return Ok(None);
            };
            notify::futex_wait(shared.completions.tail, tail, left.min(NAP));
        }
    }

    /// For event loops. Where it cannot be made it is one that is always readable.
    pub(crate) fn event_fd(&self) -> BorrowedFd<'_> {
        let Some(lane) = &self.lane else {
            return self.session.always_ready.as_fd();
        };
        if lane.event.get().is_none()
            && let Ok(made) = self.arm(lane)
        {
            let _first = lane.event.set(made);
        }
        match lane.event.get() {
            Some(event) => event.either.0.as_fd(),
            None => self.session.always_ready.as_fd(),
        }
    }

    fn arm(&self, lane: &Lane) -> Result<LaneEvent> {
        let failed = |source: nix::Error| Error::Io {
            what: "make an epoll descriptor",
            source: source.into(),
        };
        let pair = || {
            let (nudged, own) = UnixDatagram::pair()?;
            nudged.set_nonblocking(true)?;
            own.set_nonblocking(true)?;
            Ok((nudged, own))
        };
        let (nudged, own) = pair().map_err(|source| Error::Io {
            what: "make a pair of sockets",
            source,
        })?;
        let either = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(failed)?;
        let readable = EpollEvent::new(EpollFlags::EPOLLIN, 0);
        either.add(&nudged, readable).map_err(failed)?;
        let gone = EpollEvent::new(EpollFlags::EPOLLRDHUP, 1);
        either.add(&self.session.socket.0, gone).map_err(failed)?;
        let (channel, lane) = lane.at;
        self.session
            .ask(&Request::Arm { channel, lane }, &[own.as_fd()])?;
        let event = LaneEvent {
            nudged,
            own,
            either,
        };
        // What has completed before the daemon knew it.
        event.set();
        Ok(event)
    }
}

impl Drop for LaneQueue {
    fn drop(&mut self) {
        if let Some(lane) = self.lane.take() {
            let lanes = self.session.lanes.lock();
            lanes
                .unwrap_or_else(PoisonError::into_inner)
                .used
                .push(lane);
        }
    }
}

/// A listener of an attached process.
#[derive(Debug)]
pub(crate) struct RingListener {
    session: Arc<Session>,
    service: Service,
    ring: MessageRing,
    consumer: Mutex<Consumer>,
}

impl RingListener {
    fn pop(&self) -> Result<Option<Message>> {
        let Some((ring, _)) = self.ring.ring() else {
            return Err(Error::Disconnected);
        };
        let mut consumer = self.consumer.lock().unwrap_or_else(PoisonError::into_inner);
        let mut words = [0; MESSAGE_WORDS];
        match consumer.read(&ring, &mut words) {
            Ok(true) => consumer.release(&ring),
            Ok(false) => return Ok(None),
            Err(Corrupt) => return Err(Error::Protocol("a ring of messages is corrupt")),
        }
        let length = usize::try_from(words[0]).unwrap_or(usize::MAX);
        let bytes: Vec<u8> = words[1..].iter().flat_map(|w| w.to_le_bytes()).collect();
        let (header, body) = bytes.split_at(SEND_HEADER);
        let header = header.first_chunk::<SEND_HEADER>();
        let message = header
            .zip(body.get(..length))
            .and_then(|(header, body)| Message::from_parts(header, body.to_vec()));
        match message {
            Some(message) => {
                self.session.peers.learn(message.from(), message.address());
                Ok(Some(message))
            }
            None => Err(Error::Protocol("a message makes no sense")),
        }
    }

    pub(crate) fn receive(&self, end: Deadline) -> Result<Option<Message>> {
        if let Some(found) = notify::spin(|| self.pop().transpose()) {
            return found.map(Some);
        }
        let Some((ring, waiting)) = self.ring.ring() else {
            return Err(Error::Disconnected);
        };
        loop {
            let tail = ring.tail.load(Ordering::Acquire);
            waiting.store(1, Ordering::SeqCst);
            fence(Ordering::SeqCst);
            if let Some(found) = self.pop()? {
                return Ok(Some(found));
            }
            if !self.session.is_alive() {
                return Err(Error::Disconnected);
            }
            let Some(left) = end.left() else {
                return Ok(None);
            };
            notify::futex_wait(ring.tail, tail, left.min(NAP));
        }
    }
}

impl Drop for RingListener {
    fn drop(&mut self) {
        let service = self.service;
        // Where the daemon is gone, so is the listener.
        let _gone = self.session.ask(&Request::Unlisten { service }, &[]);
    }
}
