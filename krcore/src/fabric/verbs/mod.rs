//! Nodes on RDMA adapters, through libibverbs: reliable connections (RC), at most one to each peer and
//! a bounded number in all, made when they are needed, the least recently used one going first.
//!
//! An adapter that knows dynamically connected pairs is not needed: a [pair](pair) that reaches every
//! node does here as such a one does, and serves one target at a time.

mod device;
mod engine;
mod handshake;
mod link;
mod pair;
mod port;

use std::collections::HashMap;
use std::fmt;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use self::device::Device;
pub(crate) use self::device::Registration;
use self::engine::{Engine, Look};
use self::handshake::{FRAME, Frame, Stream};
use self::port::{Open, Served, VerbsPort};
use super::{
    DcAddress, Fabric, PairOptions, Port, QueueFull, QueuePair, RawCompletion, RawRequest, Sink,
    State,
};
use crate::clock::Deadline;
use crate::error::{Error, Malformed, Result};
use crate::node::{NodeId, Service};
use crate::notify::Event;

/// The most connections that peers may have made to the nodes of one fabric.
const MOST_SERVED: usize = 1024;
/// How often the time is looked at while a peer owes an answer.
const SOON: u8 = 20;
/// How often it is looked at while there are connections.
const NOW_AND_THEN: u16 = 500;
/// What the thread waits for, beside streams and listeners.
const KICK: u64 = 0;
const CHANNEL: u64 = 1;

/// How a [`VerbsFabric`] is set up.
#[derive(Debug, Clone)]
pub struct VerbsConfig {
    /// The adapter's name (`rxe0`, `mlx5_0`). Default: the first whose port is up.
    pub device: Option<String>,
    /// The adapter's port. Default: 1.
    pub port: u8,
    /// The index of the port's GID. Default: the first of RoCE v2 with an IPv4 address, or the first
    /// there is.
    pub gid: Option<u8>,
    /// Where nodes of this fabric listen for handshakes, unless `peers` says where. It goes with their
    /// addresses, so that peers have to reach it. Default: 127.0.0.1.
    pub listen: Ipv4Addr,
    /// Where the handshakes of nodes are, this process's own among them: what
    /// [`Node::connect`](crate::Node::connect) finds a peer by that no metadata server knows.
    pub peers: HashMap<NodeId, SocketAddrV4>,
    /// The most connections that are kept to peers; the least recently used one goes. Default: 128.
    pub connections: usize,
    /// How long the adapter waits for a peer's before it sends again; rounded up to
    /// 4.096 us * 2^n. Default: 67 ms.
    pub timeout: Duration,
    /// How often it sends again, at most 7. Default: 7, so that a peer that is gone is known to be
    /// within half a second.
    pub retries: u8,
    /// How long a peer may take to answer in a handshake, or to say that a message was delivered.
    /// Default: 1 s.
    pub answer: Duration,
}

impl Default for VerbsConfig {
    fn default() -> Self {
        Self {
            device: None,
            port: 1,
            gid: None,
            listen: Ipv4Addr::LOCALHOST,
            peers: HashMap::new(),
            connections: 128,
            timeout: Duration::from_millis(67),
            retries: 7,
            answer: Duration::from_secs(1),
        }
    }
}

impl VerbsConfig {
    /// How long an adapter may take to give up: it may wait four times as long as it was told, each
    /// time (InfiniBand specification, volume 1, section 9.7.6.1.3), and be late.
    fn device_limit(&self) -> Duration {
        let times = 4 * (u32::from(self.retries.min(7)) + 1);
        self.timeout.saturating_mul(2 * times) + Duration::from_secs(1)
    }
}

/// What the thread and the handles share.
struct Shared {
    device: Arc<Device>,
    config: VerbsConfig,
    epoll: Arc<Epoll>,
    ids: Arc<AtomicU64>,
    kick: Arc<Event>,
    stopped: AtomicBool,
    engine: Mutex<Engine>,
    ports: Mutex<HashMap<u64, Arc<Open>>>,
    /// Connections that peers have made, ever.
    served: AtomicU64,
}

impl Shared {
    fn ports(&self) -> MutexGuard<'_, HashMap<u64, Arc<Open>>> {
        self.ports.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does something with the engine, and wakes whom that concerns when the lock is free.
    fn with<T>(&self, what: impl FnOnce(&mut Engine) -> T) -> T {
        let mut engine = self.engine.lock().unwrap_or_else(PoisonError::into_inner);
        let given = what(&mut engine);
        let woken = engine.take_woken();
        drop(engine);
        woken.iter().for_each(crate::fabric::Wake::wake);
        given
    }
}

/// The last of these ends the thread.
struct Handle {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
    id: std::thread::ThreadId,
}

impl Handle {
    /// Makes the thread look around; false where it is the caller.
    fn kick_other(&self) -> bool {
        self.shared.kick.set();
        std::thread::current().id() != self.id
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.shared.stopped.store(true, Ordering::Release);
        let other = self.kick_other();
        let thread = self
            .thread
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(thread) = thread
            && other
        {
            let _panicked = thread.join();
        }
    }
}

/// The fabric of an RDMA adapter: nodes of different processes and machines, found by a list of where
/// their handshakes are. Clones are the same fabric.
///
/// It has one thread, which makes connections, receives messages and wakes those who sleep; it is
/// joined when the last clone, node and pair of the fabric is gone.
#[derive(Clone)]
pub struct VerbsFabric(Arc<Handle>);

impl fmt::Debug for VerbsFabric {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VerbsFabric")
            .field("device", &self.0.shared.device)
            .finish_non_exhaustive()
    }
}

fn io(what: &'static str) -> impl Fn(Errno) -> Error {
    move |source| Error::Io {
        what,
        source: source.into(),
    }
}

impl VerbsFabric {
    /// Opens the adapter.
    ///
    /// # Errors
    /// [`Error::NoDevice`] where there is none that can be used.
    pub fn open(config: VerbsConfig) -> Result<Self> {
        let device = Device::open(&config)?;
        let flags = EpollCreateFlags::EPOLL_CLOEXEC;
        let epoll = Arc::new(Epoll::new(flags).map_err(io("make an epoll"))?);
        let kick = Arc::new(Event::new()?);
        let watch = |id| EpollEvent::new(EpollFlags::EPOLLIN, id);
        let failed = io("wait for an RDMA device");
        epoll.add(&*kick, watch(KICK)).map_err(&failed)?;
        epoll.add(&*device, watch(CHANNEL)).map_err(&failed)?;
        let ids = Arc::new(AtomicU64::new(CHANNEL + 1));
        let engine = Engine::new(
            &device,
            config.clone(),
            Arc::clone(&epoll),
            Arc::clone(&ids),
            Arc::clone(&kick),
        );
        let shared = Arc::new(Shared {
            device,
            config,
            epoll,
            ids,
            kick,
            stopped: AtomicBool::new(false),
            engine: Mutex::new(engine),
            ports: Mutex::default(),
            served: AtomicU64::new(0),
        });
        let round = Round {
            shared: Arc::clone(&shared),
            served: HashMap::new(),
        };
        let thread = std::thread::Builder::new()
            .name("krcore-verbs".to_owned())
            .spawn(move || round.run())
            .map_err(|source| Error::Io {
                what: "start the thread of an RDMA fabric",
                source,
            })?;
        let id = thread.thread().id();
        Ok(Self(Arc::new(Handle {
            shared,
            thread: Mutex::new(Some(thread)),
            id,
        })))
    }

    /// Connections to peers that there are.
    pub fn connections(&self) -> usize {
        self.0.shared.with(|engine| engine.connections())
    }
}

impl Fabric for VerbsFabric {
    fn join(&self, node: NodeId, sink: Arc<dyn Sink>) -> Result<Arc<dyn Port>> {
        let shared = &self.0.shared;
        let mut ports = shared.ports();
        if ports
            .values()
            .any(|open| open.node == node && !open.has_left())
        {
            return Err(Error::NodeExists(node));
        }
        let listed = shared.config.peers.get(&node).copied();
        let wanted = listed.unwrap_or(SocketAddrV4::new(shared.config.listen, 0));
        let failed = |source: std::io::Error| {
            if listed.is_some() && source.kind() == std::io::ErrorKind::AddrInUse {
                return Error::NodeExists(node);
            }
            Error::Io {
                what: "listen for RDMA handshakes",
                source,
            }
        };
        let listener = TcpListener::bind(wanted).map_err(failed)?;
        listener.set_nonblocking(true).map_err(failed)?;
        let SocketAddr::V4(at) = listener.local_addr().map_err(failed)? else {
            return Err(failed(std::io::ErrorKind::Unsupported.into()));
        };
        let address = port::address_of(at);
        let id = shared.ids.fetch_add(1, Ordering::Relaxed);
        let open = Open::new(node, address, listener, sink, &shared.device);
        let open = Arc::new(open);
        let event = EpollEvent::new(EpollFlags::EPOLLIN, id);
        shared
            .epoll
            .add(&open.listener, event)
            .map_err(io("wait for RDMA handshakes"))?;
        ports.insert(id, Arc::clone(&open));
        drop(ports);
        Ok(Arc::new(VerbsPort {
            open,
            handle: Arc::clone(&self.0),
        }))
    }

    fn queue_pair(&self, options: PairOptions) -> Result<Box<dyn QueuePair>> {
        let at = self.0.shared.with(|engine| {
            if let Some(peer) = options.peer {
                engine.prepare(peer);
            }
            engine.add(&options)
        });
        Ok(Box::new(VerbsPair {
            at,
            depth: options.depth,
            handle: Arc::clone(&self.0),
        }))
    }

    fn ask(&self, node: NodeId, limit: Duration) -> Result<DcAddress> {
        let shared = &self.0.shared;
        let own = shared
            .ports()
            .values()
            .find(|open| open.node == node && !open.has_left())
            .map(|open| open.address);
        if let Some(own) = own {
            return Ok(own);
        }
        let at = shared.config.peers.get(&node);
        at.and_then(|at| ask(*at, node, Deadline::after(limit)))
            .ok_or(Error::UnknownNode(node))
    }

    /// What room a peer has is known to it only.
    fn reserve(&self, _to: DcAddress, _service: Service) -> Result<bool, Malformed> {
        Ok(true)
    }

    fn release(&self, _to: DcAddress, _service: Service) {}

    /// Reliable connections, those that peers have made included.
    fn queue_pairs(&self) -> u64 {
        let shared = &self.0.shared;
        shared.with(|engine| engine.made) + shared.served.load(Ordering::Relaxed)
    }
}

/// Asks whoever listens there who it is.
fn ask(at: SocketAddrV4, node: NodeId, limit: Deadline) -> Option<DcAddress> {
    let mut stream = TcpStream::connect_timeout(&SocketAddr::V4(at), limit.left()?).ok()?;
    stream.write_all(&Frame::Ask.encode()).ok()?;
    let mut answer = [0; FRAME];
    let mut got = 0;
    while got < FRAME {
        stream.set_read_timeout(Some(limit.left()?)).ok()?;
        got += match stream.read(&mut answer[got..]) {
            Ok(some) if some > 0 => some,
            _ => return None,
        };
    }
    match Frame::decode(&answer)? {
        Frame::Here { node: it, address } if it == node => Some(address),
        _ => None,
    }
}

/// A pair, as the pool has it. The rest of it is the engine's.
struct VerbsPair {
    at: usize,
    depth: usize,
    handle: Arc<Handle>,
}

impl fmt::Debug for VerbsPair {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VerbsPair").finish_non_exhaustive()
    }
}

impl QueuePair for VerbsPair {
    fn post(&mut self, work: &[RawRequest]) -> Result<(), QueueFull> {
        let at = self.at;
        self.handle.shared.with(|engine| engine.post(at, work))
    }

    fn poll(&mut self) -> Option<RawCompletion> {
        self.handle.shared.with(|engine| engine.poll(self.at))
    }

    fn state(&self) -> State {
        self.handle.shared.with(|engine| engine.state(self.at))
    }

    fn depth(&self) -> usize {
        self.depth
    }
}

impl Drop for VerbsPair {
    fn drop(&mut self) {
        let shared = &self.handle.shared;
        // Longer than the adapter takes to give up, so that it is not cut short while there is hope.
        let limit = shared.config.answer.saturating_mul(2);
        let end = Deadline::after(limit);
        while !shared.with(|engine| engine.remove(self.at)) {
            if end.left().is_none() {
                shared.with(|engine| engine.cut(self.at));
            }
            std::thread::yield_now();
        }
    }
}

/// The fabric's thread.
struct Round {
    shared: Arc<Shared>,
    served: HashMap<u64, Served>,
}

impl Round {
    fn run(mut self) {
        let mut events = [EpollEvent::empty(); 64];
        while !self.shared.stopped.load(Ordering::Acquire) {
            let limit = match self.shared.with(Engine::on_time) {
                Look::Soon => EpollTimeout::from(SOON),
                Look::NowAndThen => EpollTimeout::from(NOW_AND_THEN),
                Look::WhenToldTo => EpollTimeout::NONE,
            };
            let ready = match self.shared.epoll.wait(&mut events, limit) {
                Ok(ready) => ready,
                Err(Errno::EINTR) => continue,
                Err(why) => {
                    tracing::error!(%why, "an RDMA fabric cannot wait for its peers");
                    return;
                }
            };
            for event in &events[..ready] {
                match event.data() {
                    KICK => self.shared.kick.clear(),
                    CHANNEL => self.on_completions(),
                    id => self.on_stream(id),
                }
            }
            self.close_ports();
        }
        for open in self.shared.ports().values() {
            open.close();
        }
    }

    fn on_completions(&mut self) {
        while let Some(id) = self.shared.device.next_event() {
            match self.served.get_mut(&id) {
                Some(served) => {
                    if !served.deliver() {
                        self.served.remove(&id);
                    }
                }
                None => self.shared.with(|engine| engine.on_completions(id)),
            }
        }
    }

    fn on_stream(&mut self, id: u64) {
        let open = self.shared.ports().get(&id).cloned();
        if let Some(open) = open {
            return self.accept(&open);
        }
        let Some(served) = self.served.get_mut(&id) else {
            return self.shared.with(|engine| engine.on_stream(id));
        };
        let mut made = 0;
        if !served.hear(id, &self.shared.config, &mut made) {
            self.served.remove(&id);
        }
        self.shared.served.fetch_add(made, Ordering::Relaxed);
    }

    fn accept(&mut self, open: &Arc<Open>) {
        loop {
            let stream = match open.listener.accept() {
                Ok((stream, _)) => stream,
                Err(why) if why.kind() == std::io::ErrorKind::WouldBlock => return,
                Err(why) => {
                    tracing::warn!(%why, "a peer cannot be accepted: it waits");
                    // It would be seen again at once.
                    std::thread::sleep(Duration::from_millis(5));
                    return;
                }
            };
            if self.served.len() >= MOST_SERVED {
                // Whoever has not said what it wants makes room.
                self.served.retain(|_, served| served.is_connected());
            }
            if self.served.len() >= MOST_SERVED {
                tracing::warn!("{MOST_SERVED} peers are connected: one more is not");
                continue;
            }
            let Ok(stream) = Stream::over(stream) else {
                continue;
            };
            let id = self.shared.ids.fetch_add(1, Ordering::Relaxed);
            let flags = EpollFlags::EPOLLIN | EpollFlags::EPOLLRDHUP;
            if self
                .shared
                .epoll
                .add(&stream, EpollEvent::new(flags, id))
                .is_ok()
            {
                self.served
                    .insert(id, Served::new(Arc::clone(open), stream));
            }
        }
    }

    /// Ends the connections to nodes that have left.
    fn close_ports(&mut self) {
        let left: Vec<Arc<Open>> = {
            let mut ports = self.shared.ports();
            let gone: Vec<u64> = ports
                .iter()
                .filter(|(_, open)| open.has_left())
                .map(|(id, _)| *id)
                .collect();
            gone.iter().filter_map(|id| ports.remove(id)).collect()
        };
        for open in left {
            self.served
                .retain(|_, served| !Arc::ptr_eq(&served.open, &open));
            let _closed = self.shared.epoll.delete(&open.listener);
            open.close();
        }
    }
}
