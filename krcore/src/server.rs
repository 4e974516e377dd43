//! The node daemon: it owns the node's queue pairs, and executes what attached processes post, after
//! it has checked it. Clients are taken to be hostile: whatever they share is copied out before it is
//! looked at, and bounded by what stands on this side.
//!
//! One thread speaks with the clients (attaching, registering, leaving); others execute, each for
//! its share of the clients. A client that is killed is noticed by its socket, and everything of it
//! is given back.

use std::collections::HashMap;
use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::fd::{AsRawFd, FromRawFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering, fence};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, accept4, bind, listen, socket,
};

use crate::channel::{Channel, DEPTH, LANES, MESSAGE_WORDS, MessageRing};
use crate::clock::Deadline;
use crate::control::{self, Failure, Incoming, Reply, Request};
use crate::error::{Error, Malformed, Result};
use crate::fabric::{SEND_HEADER, Status};
use crate::message::Mailbox;
use crate::mr::TABLE_KEY;
use crate::node::{Core, Node, NodeId, Service, Stats};
use crate::notify::{self, Event, Nudge};
use crate::region::{MemoryRegion, RKey, Sealed};
use crate::ring::{Consumer, Corrupt, Producer};
use crate::vq::{Completion, PooledQueue, WorkRequest};
use crate::wire::{self, Cookie, SUBMISSION, Submission};

/// Channels of one client: 1024 virtual queues.
const MAX_CHANNELS: usize = 16;
/// Regions of one client: a share of the node's table.
const MAX_CLIENT_REGIONS: usize = 256;
/// Listeners of one client.
const MAX_LISTENERS: usize = 64;
/// Submissions of one lane before the next lane has its turn.
const BATCH: usize = 16;
/// How long an executor looks for work before it sleeps.
const SPIN: Duration = Duration::from_micros(50);
/// A lane is looked at without its bell for so many rounds after its last request.
const LINGER: u32 = 256;
/// Channels that are made beforehand.
const STOCK: usize = 4;
/// Connections that wait to be accepted.
const BACKLOG: i32 = 1024;

/// How a daemon is set up.
#[derive(Debug, Clone)]
pub struct DaemonOptions {
    /// Whether clients may attach in [`Mode::Trusted`](crate::Mode::Trusted). Default: false.
    pub trusted: bool,
    /// The most clients. Default: 4096.
    pub clients: usize,
    /// Threads that execute. Default: half of the CPUs, at least one.
    pub executors: usize,
}

impl Default for DaemonOptions {
    fn default() -> Self {
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        Self {
            trusted: false,
            clients: 4096,
            executors: (cpus / 2).max(1),
        }
    }
}

#[derive(Debug, Default)]
struct Counters {
    clients: AtomicUsize,
    refused: AtomicU64,
    executed: AtomicU64,
    /// Requests that were taken from lanes and have not completed.
    outstanding: AtomicUsize,
}

/// A client, as the control thread and its executor see it.
#[derive(Debug)]
struct Client {
    id: u64,
    socket: OwnedFd,
    bell: Event,
    regions: RwLock<HashMap<RKey, Arc<MemoryRegion>>>,
    /// Changes with `regions`, so that a lane may keep the one it used last.
    changes: AtomicU64,
    /// Its memory does not say what can be true: it is thrown out.
    broken: AtomicBool,
}

impl Client {
    fn region(&self, key: RKey) -> Option<Arc<MemoryRegion>> {
        let regions = self.regions.read().unwrap_or_else(PoisonError::into_inner);
        regions.get(&key).cloned()
    }

    fn throw_out(&self) {
        self.broken.store(true, Ordering::Relaxed);
        let _gone =
            nix::sys::socket::shutdown(self.socket.as_raw_fd(), nix::sys::socket::Shutdown::Both);
    }
}

/// Which lanes of a channel are waited for by event loops.
#[derive(Debug)]
struct Armed {
    lanes: AtomicU64,
    nudges: [Mutex<Option<Nudge>>; LANES],
}

impl Armed {
    fn new() -> Self {
        Self {
            lanes: AtomicU64::new(0),
            nudges: [const { Mutex::new(None) }; LANES],
        }
    }

    /// False where there is no such lane.
    fn arm(&self, lane: usize, nudge: Nudge) -> bool {
        let Some(slot) = self.nudges.get(lane) else {
            return false;
        };
        *slot.lock().unwrap_or_else(PoisonError::into_inner) = Some(nudge);
        self.lanes.fetch_or(1 << lane, Ordering::SeqCst);
        true
    }

    fn nudge(&self, lane: usize) {
        if self.lanes.load(Ordering::SeqCst) & 1 << lane == 0 {
            return;
        }
        if let Some(slot) = self.nudges.get(lane)
            && let Some(nudge) = &*slot.lock().unwrap_or_else(PoisonError::into_inner)
        {
            nudge.set();
        }
    }
}

enum Command {
    Add(Arc<Client>),
    Channel(u64, Channel, Arc<Armed>),
    Remove(u64),
}

/// What wakes an executor, beside the bells.
struct Executor {
    commands: Sender<Command>,
    event: Arc<Event>,
    thread: Option<JoinHandle<()>>,
}

impl Executor {
    fn tell(&self, command: Command) {
        let _gone = self.commands.send(command);
        self.event.set();
    }
}

/// A node daemon, on threads of this process: one that speaks with the clients, and
/// [`executors`](DaemonOptions::executors). All are joined when it is dropped; clients see
/// [`Error::Disconnected`] then.
pub struct Daemon {
    path: PathBuf,
    core: Arc<Core>,
    counters: Arc<Counters>,
    stop: Arc<Shutdown>,
    control: Option<JoinHandle<()>>,
    // Dropped last: the threads use it.
    _node: Node,
}

#[derive(Debug)]
struct Shutdown {
    draining: AtomicBool,
    stopped: AtomicBool,
    event: Event,
}

impl fmt::Debug for Daemon {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Daemon")
            .field("path", &self.path)
            .finish_non_exhaustive()
    }
}

fn io(what: &'static str) -> impl Fn(nix::Error) -> Error {
    move |source| Error::Io {
        what,
        source: source.into(),
    }
}

/// Listens at `path`. A socket there that nobody listens at any more is replaced.
fn listener(path: &Path) -> Result<OwnedFd> {
    let what = "listen at the daemon's socket";
    let address = UnixAddr::new(path).map_err(io(what))?;
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let new = || socket(AddressFamily::Unix, SockType::SeqPacket, flags, None).map_err(io(what));
    let fd = new()?;
    match bind(fd.as_raw_fd(), &address) {
        Ok(()) => {}
        Err(Errno::EADDRINUSE) => {
            let probe = nix::sys::socket::connect(new()?.as_raw_fd(), &address);
            if probe != Err(Errno::ECONNREFUSED) {
                return Err(io(what)(Errno::EADDRINUSE));
            }
            std::fs::remove_file(path).map_err(|source| Error::Io {
                what: "remove a dead daemon's socket",
                source,
            })?;
            bind(fd.as_raw_fd(), &address).map_err(io(what))?;
        }
        Err(why) => return Err(io(what)(why)),
    }
    let backlog = Backlog::new(BACKLOG).map_err(io(what))?;
    listen(&fd, backlog).map_err(io(what))?;
    Ok(fd)
}

impl Daemon {
    /// Serves `node`, which has to be embedded, at the Unix socket `path`.
    ///
    /// # Errors
    /// Where somebody listens there already, or the system refuses.
    pub fn start(path: impl Into<PathBuf>, node: Node, options: DaemonOptions) -> Result<Self> {
        let path = path.into();
        let core = node
            .core()
            .cloned()
            .ok_or_else(|| Error::Refused("an attached node cannot be served again".to_owned()))?;
        let counters = Arc::new(Counters::default());
        let stop = Arc::new(Shutdown {
            draining: AtomicBool::new(false),
            stopped: AtomicBool::new(false),
            event: Event::new()?,
        });
        let listener = listener(&path)?;
        let mut executors = Vec::new();
        let spawn = |name: &str, work: Box<dyn FnOnce() + Send>| {
            let thread = std::thread::Builder::new().name(name.to_owned());
            thread.spawn(work).map_err(|source| Error::Io {
                what: "start a thread of the daemon",
                source,
            })
        };
        for _ in 0..options.executors.clamp(1, 256) {
            let (commands, todo) = channel();
            let event = Arc::new(Event::new()?);
            core.bells.add(&event);
            let run = Execution::new(&core, &counters, &stop, todo, Arc::clone(&event))?;
            let thread = spawn("krcored-execute", Box::new(move || run.run()));
            executors.push(Executor {
                commands,
                event,
                thread: Some(thread?),
            });
        }
        let mut control = Control {
            core: Arc::clone(&core),
            counters: Arc::clone(&counters),
            stop: Arc::clone(&stop),
            options,
            epoll: Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(io("make an epoll"))?,
            listener: Some(listener),
            clients: HashMap::new(),
            executors,
            next: 0,
            stock: Vec::new(),
            later: Vec::new(),
        };
        control.watch_all()?;
        let control = spawn("krcored-control", Box::new(move || control.run()))?;
        Ok(Self {
            path,
            core,
            counters,
            stop,
            control: Some(control),
            _node: node,
        })
    }

    /// What was counted.
    pub fn stats(&self) -> Stats {
        stats(&self.core, &self.counters)
    }

    /// Takes no more clients, and waits until those there are have left and nothing is outstanding,
    /// or `limit` is over. True where they have.
    pub fn drain(&self, limit: Duration) -> bool {
        self.stop.draining.store(true, Ordering::SeqCst);
        self.stop.event.set();
        let end = Deadline::after(limit);
        while self.counters.clients.load(Ordering::SeqCst) > 0
            || self.counters.outstanding.load(Ordering::SeqCst) > 0
        {
            let Some(left) = end.left() else {
                return false;
            };
            std::thread::sleep(left.min(Duration::from_millis(2)));
        }
        true
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.stop.stopped.store(true, Ordering::SeqCst);
        self.stop.event.set();
        if let Some(thread) = self.control.take() {
            let _panicked = thread.join();
        }
        let _gone_already = std::fs::remove_file(&self.path);
    }
}

fn stats(core: &Core, counters: &Counters) -> Stats {
    let mut stats = core.stats();
    stats.clients = counters.clients.load(Ordering::Relaxed) as u64;
    stats.refused = counters.refused.load(Ordering::Relaxed);
    stats.executed = counters.executed.load(Ordering::Relaxed);
    stats
}

/// What the control thread alone knows of a client.
struct Session {
    client: Arc<Client>,
    greeted: bool,
    trusted: bool,
    channels: Vec<Arc<Armed>>,
    services: Vec<Service>,
}

struct Control {
    core: Arc<Core>,
    counters: Arc<Counters>,
    stop: Arc<Shutdown>,
    options: DaemonOptions,
    epoll: Epoll,
    listener: Option<OwnedFd>,
    clients: HashMap<u64, Session>,
    executors: Vec<Executor>,
    next: u64,
    stock: Vec<Channel>,
    /// What executors are told when the client has its answer, so that they do not wake before it.
    later: Vec<(u64, Command)>,
}

const LISTENER: u64 = u64::MAX;
const STOP: u64 = u64::MAX - 1;

impl Control {
    fn watch_all(&mut self) -> Result<()> {
        let watch = io("watch the daemon's socket");
        if let Some(listener) = &self.listener {
            let event = EpollEvent::new(EpollFlags::EPOLLIN, LISTENER);
            self.epoll.add(listener, event).map_err(&watch)?;
        }
        let event = EpollEvent::new(EpollFlags::EPOLLIN, STOP);
        self.epoll
            .add(self.stop.event.as_fd(), event)
            .map_err(watch)?;
        self.fill_stock();
        Ok(())
    }

    fn fill_stock(&mut self) {
        while self.stock.len() < STOCK
            && let Ok(channel) = Channel::create()
        {
            self.stock.push(channel);
        }
    }

    fn run(&mut self) {
        let mut events = [EpollEvent::empty(); 64];
        while !self.stop.stopped.load(Ordering::SeqCst) {
            let ready = match self.epoll.wait(&mut events, EpollTimeout::NONE) {
                Ok(ready) => ready,
                Err(Errno::EINTR) => continue,
                Err(why) => {
                    tracing::error!(%why, "the daemon cannot wait for its clients");
                    break;
                }
            };
            for event in &events[..ready] {
                match event.data() {
                    LISTENER => self.accept(),
                    STOP => {
                        self.stop.event.clear();
                        if self.stop.draining.load(Ordering::SeqCst) {
                            self.listener = None;
                        }
                    }
                    id => self.hear(id),
                }
            }
            self.fill_stock();
        }
        for id in self.clients.keys().copied().collect::<Vec<_>>() {
            self.remove(id);
        }
        for executor in &mut self.executors {
            executor.event.set();
            if let Some(thread) = executor.thread.take() {
                let _panicked = thread.join();
            }
        }
    }

    fn tell_executors(&mut self) {
        for (id, command) in self.later.drain(..) {
            let at = id as usize % self.executors.len();
            if let Some(executor) = self.executors.get(at) {
                executor.tell(command);
            }
        }
    }

    fn accept(&mut self) {
        let Some(listener) = &self.listener else {
            return;
        };
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let socket = match accept4(listener.as_raw_fd(), flags) {
            // SAFETY: the kernel has just made this descriptor for this process, and nobody else
            // knows it.
            Ok(fd) => unsafe { OwnedFd::from_raw_fd(fd) },
            Err(Errno::EMFILE | Errno::ENFILE | Errno::ENOMEM | Errno::ENOBUFS) => {
                tracing::warn!("too many descriptors are open: clients wait");
                std::thread::sleep(Duration::from_millis(5));
                return;
            }
            Err(_) => return,
        };
        if self.clients.len() >= self.options.clients {
            let why = format!("it has {} clients, as many as it may", self.clients.len());
            let _gone = control::send(socket.as_fd(), &Reply::Failed(Failure::Other(why)), &[]);
            return;
        }
        let Ok(bell) = Event::new() else {
            return;
        };
        let id = self.next;
        self.next += 1;
        let client = Arc::new(Client {
            id,
            socket,
            bell,
            regions: RwLock::default(),
            changes: AtomicU64::new(0),
            broken: AtomicBool::new(false),
        });
        let flags = EpollFlags::EPOLLIN | EpollFlags::EPOLLRDHUP;
        if self
            .epoll
            .add(&client.socket, EpollEvent::new(flags, id))
            .is_err()
        {
            return;
        }
        self.later.push((id, Command::Add(Arc::clone(&client))));
        self.counters.clients.fetch_add(1, Ordering::SeqCst);
        self.clients.insert(
            id,
            Session {
                client,
                greeted: false,
                trusted: false,
                channels: Vec::new(),
                services: Vec::new(),
            },
        );
        self.hear(id);
    }

    /// Takes everything of a client back.
    fn remove(&mut self, id: u64) {
        let Some(session) = self.clients.remove(&id) else {
            return;
        };
        let _closed = self.epoll.delete(&session.client.socket);
        for service in session.services {
            self.core.inbox.close(service);
        }
        self.later.push((id, Command::Remove(id)));
        self.tell_executors();
        let regions = std::mem::take(
            &mut *session
                .client
                .regions
                .write()
                .unwrap_or_else(PoisonError::into_inner),
        );
        session.client.changes.fetch_add(1, Ordering::AcqRel);
        for region in regions.values() {
            if let Err(why) = self.core.deregister(region) {
                tracing::error!(%why, "a region of a client that has gone");
            }
        }
        self.counters.clients.fetch_sub(1, Ordering::SeqCst);
    }

    fn hear(&mut self, id: u64) {
        // Others have their turn after so many packets.
        for _ in 0..16 {
            let Some(session) = self.clients.get(&id) else {
                return;
            };
            let client = Arc::clone(&session.client);
            let (request, descriptors) = match control::receive::<Request>(client.socket.as_fd()) {
                Incoming::Packet(request, descriptors) => (request, descriptors),
                Incoming::Nothing => return,
                Incoming::Broken(why) => {
                    // A packet that makes no sense ends it; one that lost its descriptors does not.
                    let failed = Reply::Failed(Failure::Other(why.to_owned()));
                    if control::send(client.socket.as_fd(), &failed, &[]).is_err() {
                        self.remove(id);
                    }
                    return;
                }
                Incoming::Closed => return self.remove(id),
            };
            let mut out = Vec::new();
            let reply = match self.answer(id, request, descriptors, &mut out) {
                Ok(reply) => reply,
                Err(why) => Reply::Failed(why),
            };
            let borrowed: Vec<BorrowedFd<'_>> = out.iter().map(Descriptor::as_fd).collect();
            if control::send(client.socket.as_fd(), &reply, &borrowed).is_err() {
                return self.remove(id);
            }
            self.tell_executors();
        }
    }

    fn answer(
        &mut self,
        id: u64,
        request: Request,
        descriptors: Vec<OwnedFd>,
        out: &mut Vec<Descriptor>,
    ) -> Result<Reply, Failure> {
        let other = |why: &str| Failure::Other(why.to_owned());
        let gone = || Failure::Other("it has gone".to_owned());
        let first = matches!(request, Request::Hello { .. });
        let session = self.clients.get_mut(&id).ok_or_else(gone)?;
        if session.greeted == first {
            return Err(other("a packet out of order"));
        }
        let client = Arc::clone(&session.client);
        match request {
            Request::Hello { version, trusted } => {
                if version != control::VERSION {
                    let ours = control::VERSION;
                    return Err(Failure::Other(format!(
                        "the process speaks version {version} and the daemon {ours}"
                    )));
                }
                if trusted && !self.options.trusted {
                    return Err(other(
                        "it takes no trusted clients: start it with --trusted",
                    ));
                }
                session.greeted = true;
                session.trusted = trusted;
                let channel = self.channel(id)?;
                out.push(Descriptor::Channel(channel));
                out.push(Descriptor::Bell(client));
                Ok(Reply::Welcome {
                    node: self.core.id,
                    address: self.core.port.address(),
                })
            }
            Request::Channel => {
                let channel = self.channel(id)?;
                out.push(Descriptor::Channel(channel));
                Ok(Reply::Channel)
            }
            Request::Resolve { peer, millis } => {
                // Others wait meanwhile.
                let limit = Duration::from_millis(millis.min(1000));
                Ok(Reply::Address(self.core.address_of(peer, limit)?))
            }
            Request::Register { access } => {
                let fd = descriptors.into_iter().next().ok_or(Failure::NotSealed)?;
                let count = client.regions.read().map_or(0, |regions| regions.len());
                if count >= MAX_CLIENT_REGIONS {
                    return Err(Failure::TooManyRegions(MAX_CLIENT_REGIONS as u64));
                }
                let region = self.core.register(Sealed::adopt(fd, true)?, access)?;
                let key = region.key();
                let mut regions = client
                    .regions
                    .write()
                    .unwrap_or_else(PoisonError::into_inner);
                regions.insert(key, region);
                Ok(Reply::Registered(key))
            }
            Request::Deregister { key } => {
                let mut regions = client
                    .regions
                    .write()
                    .unwrap_or_else(PoisonError::into_inner);
                let region = regions.remove(&key).ok_or(Failure::NotRegistered)?;
                drop(regions);
                client.changes.fetch_add(1, Ordering::AcqRel);
                self.core.deregister(&region)?;
                Ok(Reply::Done)
            }
            Request::Map { peer, key } => {
                if !session.trusted {
                    return Err(other("only trusted clients map memory of others"));
                }
                let address = self.core.address_of(peer, Duration::from_secs(1))?;
                let find = |key| self.core.fabric.local_region(address, key);
                let Some(table) = find(TABLE_KEY) else {
                    return Ok(Reply::Elsewhere);
                };
                let (entry, _) = self
                    .core
                    .remote_entry(address, key, crate::clock::coarse())
                    .map_err(|_| Failure::StaleKey)?;
                let region = find(key).ok_or(Failure::StaleKey)?;
                out.push(Descriptor::Region(region));
                out.push(Descriptor::Region(table));
                Ok(Reply::Mapped(entry.access))
            }
            Request::Listen { service } => {
                if session.services.len() >= MAX_LISTENERS {
                    return Err(Failure::TooManyQueues(MAX_LISTENERS as u64));
                }
                let mailbox = Arc::new(RingBox::new()?);
                self.core.inbox.open(service, Arc::clone(&mailbox) as _)?;
                session.services.push(service);
                out.push(Descriptor::Messages(mailbox));
                Ok(Reply::Done)
            }
            Request::Unlisten { service } => {
                if let Some(at) = session.services.iter().position(|one| *one == service) {
                    session.services.swap_remove(at);
                    self.core.inbox.close(service);
                }
                Ok(Reply::Done)
            }
            Request::Arm { channel, lane } => {
                let fd = descriptors.into_iter().next();
                let fd = fd.ok_or_else(|| other("no descriptor came with it"))?;
                let armed = session.channels.get(channel as usize);
                if !armed.is_some_and(|armed| armed.arm(lane as usize, Nudge::adopt(fd))) {
                    return Err(other("there is no such lane"));
                }
                Ok(Reply::Done)
            }
            Request::Stats => Ok(Reply::Stats(Box::new(stats(&self.core, &self.counters)))),
        }
    }

    fn channel(&mut self, id: u64) -> Result<Channel, Failure> {
        let made = self.stock.pop();
        let session = self
            .clients
            .get_mut(&id)
            .ok_or_else(|| Failure::Other("it has gone".to_owned()))?;
        if session.channels.len() >= MAX_CHANNELS {
            return Err(Failure::TooManyQueues((MAX_CHANNELS * LANES) as u64));
        }
        let channel = match made {
            Some(channel) => channel,
            None => Channel::create()?,
        };
        let armed = Arc::new(Armed::new());
        session.channels.push(Arc::clone(&armed));
        let command = Command::Channel(id, channel.clone(), armed);
        self.later.push((id, command));
        Ok(channel)
    }
}

/// What goes with an answer.
enum Descriptor {
    Channel(Channel),
    Bell(Arc<Client>),
    Region(Arc<MemoryRegion>),
    Messages(Arc<RingBox>),
}

impl Descriptor {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Channel(channel) => channel.memory().as_fd(),
            Self::Bell(client) => client.bell.as_fd(),
            Self::Region(region) => region.as_fd(),
            Self::Messages(mailbox) => mailbox.ring.memory().as_fd(),
        }
    }
}

/// The mailbox of a listener of a client: a ring in memory that the client maps.
struct RingBox {
    ring: MessageRing,
    producer: Mutex<(Producer, u32)>,
}

impl RingBox {
    fn new() -> Result<Self> {
        Ok(Self {
            ring: MessageRing::create()?,
            producer: Mutex::default(),
        })
    }
}

impl Mailbox for RingBox {
    fn reserve(&self) -> bool {
        let mut producer = self.producer.lock().unwrap_or_else(PoisonError::into_inner);
        let Some((ring, _)) = self.ring.ring() else {
            return false;
        };
        let (producer, reserved) = &mut *producer;
        // A client whose index cannot be true receives nothing.
        let free = producer.look(&ring).is_ok_and(|room| room > *reserved);
        *reserved += u32::from(free);
        free
    }

    fn release(&self) {
        let mut producer = self.producer.lock().unwrap_or_else(PoisonError::into_inner);
        producer.1 = producer.1.saturating_sub(1);
    }

    fn deliver(&self, header: &[u8; SEND_HEADER], body: Vec<u8>) {
        let mut producer = self.producer.lock().unwrap_or_else(PoisonError::into_inner);
        let Some((ring, waiting)) = self.ring.ring() else {
            return;
        };
        producer.1 = producer.1.saturating_sub(1);
        let whole = header.as_chunks::<8>().0.iter().copied();
        let (words, rest) = body.as_chunks::<8>();
        let mut last = [0; 8];
        last[..rest.len()].copy_from_slice(rest);
        let words = std::iter::once((body.len() as u64).to_le_bytes())
            .chain(whole)
            .chain(words.iter().copied())
            .chain(std::iter::once(last))
            .take(MESSAGE_WORDS)
            .map(u64::from_le_bytes);
        if matches!(producer.0.write(&ring, words), Ok(true)) {
            producer.0.publish(&ring);
            fence(Ordering::SeqCst);
            if waiting.swap(0, Ordering::SeqCst) != 0 {
                notify::futex_wake(ring.tail);
            }
        }
    }
}

/// A lane, with this side's state of it.
#[derive(Default)]
struct Lane {
    consumer: Consumer,
    producer: Producer,
    /// For the virtual queue that posted last.
    queue: Option<PooledQueue>,
    generation: u32,
    peer: Option<NodeId>,
    /// What was taken and has not completed.
    outstanding: Vec<u32>,
    /// The client's region used last, and what its `changes` were then.
    region: Option<(u64, Arc<MemoryRegion>)>,
    /// Rounds without work.
    idle: u32,
}

struct Lanes {
    channel: Channel,
    armed: Arc<Armed>,
    lanes: [Option<Box<Lane>>; LANES],
    /// Those that are looked at.
    active: u64,
}

struct Served {
    client: Arc<Client>,
    channels: Vec<Lanes>,
}

/// An executor.
struct Execution {
    core: Arc<Core>,
    counters: Arc<Counters>,
    stop: Arc<Shutdown>,
    commands: Receiver<Command>,
    event: Arc<Event>,
    epoll: Epoll,
    clients: Vec<Served>,
}

/// What one turn of a lane came to.
#[derive(Default)]
struct Turn {
    taken: usize,
    completed: usize,
    refused: u64,
}

impl Execution {
    fn new(
        core: &Arc<Core>,
        counters: &Arc<Counters>,
        stop: &Arc<Shutdown>,
        commands: Receiver<Command>,
        event: Arc<Event>,
    ) -> Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(io("make an epoll"))?;
        let readable = EpollEvent::new(EpollFlags::EPOLLIN, 0);
        epoll
            .add(event.as_fd(), readable)
            .map_err(io("watch an executor's event"))?;
        Ok(Self {
            core: Arc::clone(core),
            counters: Arc::clone(counters),
            stop: Arc::clone(stop),
            commands,
            event,
            epoll,
            clients: Vec::new(),
        })
    }

    fn run(mut self) {
        let mut quiet_since: Option<Instant> = None;
        let mut rounds = 0_u32;
        loop {
            self.obey();
            if self.stop.stopped.load(Ordering::Relaxed) {
                return;
            }
            if self.round() {
                quiet_since = None;
                rounds = 0;
                continue;
            }
            rounds += 1;
            std::hint::spin_loop();
            if !rounds.is_multiple_of(notify::YIELD_EVERY) {
                continue;
            }
            std::thread::yield_now();
            if quiet_since.get_or_insert_with(Instant::now).elapsed() > SPIN {
                self.sleep();
                quiet_since = None;
            }
        }
    }

    fn obey(&mut self) {
        while let Ok(command) = self.commands.try_recv() {
            match command {
                Command::Add(client) => {
                    // By edges, so that the bell is never read: the client shares it, and could make
                    // reading it block.
                    let flags = EpollFlags::EPOLLIN | EpollFlags::EPOLLET;
                    let _watched = self
                        .epoll
                        .add(client.bell.as_fd(), EpollEvent::new(flags, 1));
                    self.clients.push(Served {
                        client,
                        channels: Vec::new(),
                    });
                }
                Command::Channel(id, channel, armed) => {
                    if let Some(served) = self.clients.iter_mut().find(|c| c.client.id == id) {
                        served.channels.push(Lanes {
                            channel,
                            armed,
                            lanes: [const { None }; LANES],
                            active: 0,
                        });
                    }
                }
                Command::Remove(id) => {
                    let Some(at) = self.clients.iter().position(|c| c.client.id == id) else {
                        continue;
                    };
                    let served = self.clients.swap_remove(at);
                    let _closed = self.epoll.delete(served.client.bell.as_fd());
                    let lost: usize = served
                        .channels
                        .iter()
                        .flat_map(|channel| channel.lanes.iter().flatten())
                        .map(|lane| lane.outstanding.len())
                        .sum();
                    self.counters.outstanding.fetch_sub(lost, Ordering::SeqCst);
                }
            }
        }
    }

    /// Every lane in which something may be has its turn. False where nothing was.
    fn round(&mut self) -> bool {
        let mut worked = false;
        for served in &mut self.clients {
            let client = &served.client;
            if client.broken.load(Ordering::Relaxed) {
                continue;
            }
            for lanes in &mut served.channels {
                worked |= lanes.turn(&self.core, &self.counters, client);
            }
        }
        worked
    }

    /// Sleeps until a client rings, the fabric has something, or something else happens.
    fn sleep(&mut self) {
        /// A bell that was missed costs no more than this.
        const NAP: u16 = 5;
        self.fall_asleep(1);
        fence(Ordering::SeqCst);
        let rung = self
            .channels()
            .filter_map(|lanes| lanes.channel.doorbell())
            .any(|doorbell| doorbell.load(Ordering::SeqCst) != 0);
        if !rung {
            let waits = self.waits();
            if waits {
                self.core.bells.asleep();
            }
            // What came before the bells could ring.
            if !waits || !self.round() {
                let limit = if waits { NAP } else { 1000 };
                let mut events = [EpollEvent::empty(); 16];
                let _interrupted = self.epoll.wait(&mut events, limit);
            }
            if waits {
                self.core.bells.awake();
            }
            self.event.clear();
        }
        self.fall_asleep(0);
    }

    fn channels(&self) -> impl Iterator<Item = &Lanes> {
        self.clients.iter().flat_map(|served| &served.channels)
    }

    /// Whether something is out on the fabric.
    fn waits(&self) -> bool {
        self.channels()
            .flat_map(|lanes| lanes.lanes.iter().flatten())
            .any(|lane| !lane.outstanding.is_empty())
    }

    fn fall_asleep(&self, asleep: u32) {
        let all = self.channels().filter_map(|lanes| lanes.channel.sleeping());
        all.for_each(|one| one.store(asleep, Ordering::SeqCst));
    }
}

impl Lanes {
    fn turn(&mut self, core: &Arc<Core>, counters: &Counters, client: &Client) -> bool {
        let Some(doorbell) = self.channel.doorbell() else {
            return false;
        };
        if doorbell.load(Ordering::Relaxed) != 0 {
            self.active |= doorbell.swap(0, Ordering::SeqCst);
        }
        let mut worked = false;
        let mut left = self.active;
        while left != 0 {
            let index = left.trailing_zeros() as usize;
            left &= left - 1;
            let lane = self.lanes[index].get_or_insert_default();
            let Some(shared) = self.channel.lane(index) else {
                continue;
            };
            let Ok(turn) = lane.turn(core, client, &shared) else {
                tracing::warn!(client = client.id, "a client's ring cannot be true");
                client.throw_out();
                return worked;
            };
            if turn.taken == 0 && turn.completed == 0 {
                lane.idle += 1;
                if lane.idle > LINGER && lane.outstanding.is_empty() {
                    self.active &= !(1 << index);
                }
                continue;
            }
            lane.idle = 0;
            worked = true;
            if turn.completed > 0 {
                fence(Ordering::SeqCst);
                if shared.waiting.load(Ordering::Relaxed) != 0 {
                    shared.waiting.store(0, Ordering::SeqCst);
                    notify::futex_wake(shared.completions.tail);
                }
                self.armed.nudge(index);
            }
            match turn.taken.cmp(&turn.completed) {
                std::cmp::Ordering::Greater => {
                    let more = turn.taken - turn.completed;
                    counters.outstanding.fetch_add(more, Ordering::SeqCst);
                }
                std::cmp::Ordering::Less => {
                    let fewer = turn.completed - turn.taken;
                    counters.outstanding.fetch_sub(fewer, Ordering::SeqCst);
                }
                std::cmp::Ordering::Equal => {}
            }
            if turn.refused > 0 {
                counters.refused.fetch_add(turn.refused, Ordering::Relaxed);
            }
            let executed = turn.completed as u64 - turn.refused;
            counters.executed.fetch_add(executed, Ordering::Relaxed);
        }
        worked
    }
}

impl Lane {
    fn turn(
        &mut self,
        core: &Arc<Core>,
        client: &Client,
        shared: &crate::channel::Lane<'_>,
    ) -> Result<Turn, Corrupt> {
        let mut turn = Turn::default();
        let mut words = [0; SUBMISSION];
        while turn.taken < BATCH {
            // Whatever is taken will complete: there has to be room for that.
            let room = self.producer.room(&shared.completions)? as usize;
            let needed = self.outstanding.len() + 1;
            if room < needed && (self.producer.look(&shared.completions)? as usize) < needed {
                break;
            }
            if !self.consumer.read(&shared.submissions, &mut words)? {
                break;
            }
            turn.taken += 1;
            let (cookie, submission) = Submission::decode(words);
            let posted = match submission {
                Some(submission) => {
                    self.switch(core, &submission, shared, &mut turn)?;
                    self.post(client, &submission)
                }
                None => Err(Malformed::UnknownOperation),
            };
            match posted {
                Ok(()) => self.outstanding.push(cookie.encode()),
                Err(why) => {
                    turn.refused += 1;
                    self.complete(cookie.encode(), Status::Refused(why), shared, &mut turn)?;
                }
            }
        }
        if turn.taken > 0 {
            self.consumer.release(&shared.submissions);
        }
        if !self.outstanding.is_empty() {
            self.collect(shared, &mut turn)?;
        }
        if turn.completed > 0 {
            self.producer.publish(&shared.completions);
        }
        Ok(turn)
    }

    fn complete(
        &mut self,
        cookie: u32,
        status: Status,
        shared: &crate::channel::Lane<'_>,
        turn: &mut Turn,
    ) -> Result<(), Corrupt> {
        let word = wire::encode_completion(Cookie::decode(cookie), status);
        self.producer.write(&shared.completions, [word])?;
        turn.completed += 1;
        Ok(())
    }

    fn collect(
        &mut self,
        shared: &crate::channel::Lane<'_>,
        turn: &mut Turn,
    ) -> Result<(), Corrupt> {
        let mut done = [Completion::default(); BATCH];
        while let Some(queue) = &mut self.queue {
            let taken = queue.poll(&mut done);
            for completion in &done[..taken] {
                let cookie = completion.id as u32;
                // In order, but for large messages.
                if let Some(at) = self.outstanding.iter().position(|one| *one == cookie) {
                    self.outstanding.remove(at);
                    self.complete(cookie, completion.status, shared, turn)?;
                }
            }
            if taken < done.len() {
                break;
            }
        }
        Ok(())
    }

    /// Where another virtual queue posts in this lane than before, ends the old one.
    fn switch(
        &mut self,
        core: &Arc<Core>,
        next: &Submission,
        shared: &crate::channel::Lane<'_>,
        turn: &mut Turn,
    ) -> Result<(), Corrupt> {
        let same = self.generation == next.cookie.generation && self.peer == Some(next.peer);
        if same && self.queue.is_some() {
            return Ok(());
        }
        self.collect(shared, turn)?;
        self.queue = None;
        // Nobody waits for these, but the client's table of what is outstanding.
        for cookie in std::mem::take(&mut self.outstanding) {
            self.complete(cookie, Status::Flushed, shared, turn)?;
        }
        self.generation = next.cookie.generation;
        self.peer = Some(next.peer);
        let address = core.cached_address(next.peer);
        self.queue = address.and_then(|address| PooledQueue::new(core, next.peer, address).ok());
        Ok(())
    }

    fn post(&mut self, client: &Client, submission: &Submission) -> Result<(), Malformed> {
        let queue = self.queue.as_mut().ok_or(Malformed::PeerGone)?;
        let changes = client.changes.load(Ordering::Acquire);
        let region = match &self.region {
            Some((when, region)) if *when == changes && region.key() == submission.local => {
                Arc::clone(region)
            }
            _ => {
                let found = client
                    .region(submission.local)
                    .ok_or(Malformed::ForeignRegion)?;
                self.region = Some((changes, Arc::clone(&found)));
                found
            }
        };
        let work = WorkRequest::new(
            u64::from(submission.cookie.encode()),
            submission.op,
            region.slice(submission.offset, submission.len),
            submission.remote,
        );
        match queue.post(std::slice::from_ref(&work)) {
            Ok(1..) => Ok(()),
            Ok(0) => Err(Malformed::ReceiverNotReady),
            Err(refused) => Err(refused.why),
        }
    }
}

const _: () = assert!(DEPTH <= crate::dispatch::COMPLETIONS);
const _: () = assert!(DEPTH <= u8::MAX as usize + 1);

#[cfg(test)]
mod tests;
