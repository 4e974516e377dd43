//! Nodes on different machines, over TCP.
//!
//! # How it works
//!
//! Every process has one [`TcpFabric`], which listens at one port for all of its nodes and has one
//! thread. It dials a peer when one of its queue pairs first needs it, and keeps the link: requests go
//! out on the links that it dialled, replies come back on them; peers dial it in turn. The target's
//! thread looks at the key, the range and the right of each request, executes it, and answers. A
//! fabric finds a node at the address it was [given](TcpOptions::peers), or else where that node said
//! that it listens when it dialled here.
//!
//! A [DC pair](super) serves one target at a time, as on an adapter: requests to the next one wait
//! until those to the former are done. That keeps the promises of order and of what was not executed
//! ([contract](super#the-contract)) across peers; the price is that a peer which has just fallen
//! silent holds up those who share the pair for as long as [`TcpOptions::limit`].
//!
//! SEND asks for no buffer beforehand: where the receiver has none, it completes with
//! [`Status::ReceiverNotReady`](super::Status), and the pair goes on.
//!
//! # When a link is lost
//!
//! Links carry signs of life. One that is silent for [`TcpOptions::limit`], closed, cut, or carries
//! anything that is not of the protocol is given up: what had been sent on it and was not answered
//! completes with [`Status::RetryExceeded`](super::Status), since it may have been executed; what was
//! not sent is flushed. The peer is dialled again at once and then every 20 ms; requests wait for the
//! first attempt, and fail at once while the peer is known to be down. A peer that was held up (a
//! stopped process, say) may execute what it had received before it notices that the link is gone:
//! `RetryExceeded` means that a request was executed, will be, or never is.
//!
//! # Threat model
//!
//! All nodes of a fabric hold one [pre-shared key](PresharedKey). A link begins with a Noise
//! handshake (`Noise_NNpsk0_25519_ChaChaPoly_BLAKE2s`, by the crate `snow`), which mixes a fresh key
//! exchange with the shared key; all that follows is encrypted and authenticated.
//!
//! - **Somebody on the network without the key** can read the version, and when and how much is sent;
//!   not what. He cannot make a node execute anything, change, repeat, reorder or leave out a
//!   request: the link is given up instead. He can cut or delay links, which ends requests with
//!   `RetryExceeded`. Before the handshake is finished a connection costs a node some hundred bytes
//!   and one decryption; at most 64 such connections are kept, each for at most
//!   [`TcpOptions::limit`]: enough of them can keep peers from connecting, but not disturb links
//!   that are up.
//! - **Somebody who comes by the key later** cannot read what he recorded before: the key of each link
//!   comes from a key exchange of its own. He can act as any node from then on.
//! - **Whoever holds the key is trusted** as a member of the fabric: he can reach every region that a
//!   node publishes, as the region's access says, and can claim to be any node. The key tells members
//!   from strangers, not members from each other. A member's requests are still looked at: he reaches
//!   nothing that is not published, and no count or length of his makes a node allocate without bound.
//! - **Local processes** never see the key: only the daemon reads it.
//!
//! There is no revocation of one member: give the others a new key.

mod frame;
mod handshake;
mod key;
mod link;
mod pair;
mod peer;
mod port;
mod reactor;
mod record;
mod serve;

use std::collections::HashMap;
use std::fmt;
use std::net::{SocketAddr, TcpListener};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

pub use key::PresharedKey;
pub use peer::{LinkError, LinkState};

use self::frame::Frame;
use self::link::{Link, Question};
use self::pair::{Pair, TcpQueuePair};
use self::peer::{Peer, Way};
use self::port::{Target, TcpPort};
use self::reactor::Reactor;
use super::{DcAddress, Fabric, PairOptions, Port, QueuePair, Sink};
use crate::error::{Error, Malformed, Result};
use crate::node::{NodeId, Service};
use crate::notify::Event;
use crate::region::{MemoryRegion, RKey};

pub(crate) use frame::fuzz as fuzz_frames;

/// The bounds of [`TcpOptions::limit`].
const LIMITS: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(60));

/// How a TCP fabric is set up.
#[derive(Debug, Clone)]
pub struct TcpOptions {
    /// The key that all nodes hold.
    pub key: PresharedKey,
    /// Where peers dial this process; a port of 0 for any. Without it no peer can begin to talk to
    /// the nodes here.
    pub listen: Option<SocketAddr>,
    /// Where nodes are found. Own nodes may be among them and are passed over, so that one list does
    /// for all.
    pub peers: HashMap<NodeId, SocketAddr>,
    /// How long a peer may take to connect, or be silent, before its link is given up. Default:
    /// 500 ms; from 20 ms to 60 s. A link has to carry 64 KiB in that time.
    pub limit: Duration,
}

impl TcpOptions {
    /// No peers yet, and nowhere to listen.
    pub fn new(key: PresharedKey) -> Self {
        Self {
            key,
            listen: None,
            peers: HashMap::new(),
            limit: Duration::from_millis(500),
        }
    }
}

/// Where a request goes.
enum Route {
    Here(Arc<Target>),
    There(Arc<Link>),
    /// The pair is told when it is known.
    Wait,
    Gone,
}

/// Where nodes are dialled: as it was set, and as they have said.
#[derive(Debug, Default)]
struct Book {
    set: HashMap<NodeId, SocketAddr>,
    learned: HashMap<NodeId, SocketAddr>,
}

/// What the fabric's thread shares with those who post.
pub(crate) struct Shared {
    key: PresharedKey,
    limit: Duration,
    port: u16,
    begun: Instant,
    event: Event,
    stop: AtomicBool,
    nodes: RwLock<HashMap<NodeId, Arc<Target>>>,
    book: RwLock<Book>,
    peers: Mutex<HashMap<SocketAddr, Arc<Peer>>>,
    /// Peers to dial, and nodes that have joined or left: for the thread.
    dials: Mutex<Vec<Arc<Peer>>>,
    news: Mutex<Vec<(bool, DcAddress)>>,
    next_pair: AtomicU64,
    pairs: AtomicU64,
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared").finish_non_exhaustive()
    }
}

impl Shared {
    /// Milliseconds since the fabric was made.
    fn now(&self) -> u64 {
        u64::try_from(self.begun.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    fn limit_millis(&self) -> u64 {
        u64::try_from(self.limit.as_millis()).unwrap_or(u64::MAX)
    }

    /// How often a sign of life is asked for, where the other side gives up after `theirs`.
    fn every(&self, theirs: u64) -> u64 {
        (self.limit_millis().min(theirs) / 4).max(1)
    }

    fn dial(&self, peer: Arc<Peer>) {
        let mut dials = self.dials.lock().unwrap_or_else(PoisonError::into_inner);
        dials.push(peer);
        drop(dials);
        self.event.set();
    }

    fn take_dials(&self) -> Vec<Arc<Peer>> {
        std::mem::take(&mut self.dials.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn take_news(&self) -> Vec<(bool, DcAddress)> {
        std::mem::take(&mut self.news.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn tell(&self, joined: bool, address: DcAddress) {
        let mut news = self.news.lock().unwrap_or_else(PoisonError::into_inner);
        news.push((joined, address));
        drop(news);
        self.event.set();
    }

    fn peers(&self) -> Vec<Arc<Peer>> {
        let peers = self.peers.lock().unwrap_or_else(PoisonError::into_inner);
        peers.values().cloned().collect()
    }

    fn has_peers(&self) -> bool {
        let peers = self.peers.lock().unwrap_or_else(PoisonError::into_inner);
        !peers.is_empty()
    }

    /// What each side says first on a link.
    fn hello(&self) -> Frame<'static> {
        Frame::Hello {
            limit: u32::try_from(self.limit_millis()).unwrap_or(u32::MAX),
            port: self.port,
        }
    }

    /// What the side that dials says first: its nodes as well, so that they can be dialled.
    fn introduction(&self) -> Vec<Frame<'static>> {
        let nodes = self.nodes.read().unwrap_or_else(PoisonError::into_inner);
        std::iter::once(self.hello())
            .chain(nodes.values().map(|target| Frame::Node(target.address)))
            .collect()
    }

    fn learn(&self, node: NodeId, at: SocketAddr) {
        let mut book = self.book.write().unwrap_or_else(PoisonError::into_inner);
        // It may have said so many that do not exist.
        if book.learned.len() < 1 << 16 || book.learned.contains_key(&node) {
            book.learned.insert(node, at);
        }
    }

    fn peer(&self, node: NodeId) -> Option<Arc<Peer>> {
        let book = self.book.read().unwrap_or_else(PoisonError::into_inner);
        let at = *book.set.get(&node).or_else(|| book.learned.get(&node))?;
        drop(book);
        let mut peers = self.peers.lock().unwrap_or_else(PoisonError::into_inner);
        Some(Arc::clone(peers.entry(at).or_insert_with(|| Peer::new(at))))
    }

    fn here(&self, node: NodeId) -> Option<Arc<Target>> {
        let nodes = self.nodes.read().unwrap_or_else(PoisonError::into_inner);
        nodes.get(&node).cloned()
    }

    /// The node of this process with that address, in that life.
    fn target(&self, to: DcAddress) -> Option<Arc<Target>> {
        self.here(port::node(to)).filter(|one| one.address == to)
    }

    fn route(&self, to: DcAddress, pair: &Arc<Pair>) -> Route {
        let node = port::node(to);
        if let Some(target) = self.here(node) {
            return if target.address == to {
                Route::Here(target)
            } else {
                Route::Gone
            };
        }
        if self.stop.load(Ordering::Acquire) {
            return Route::Gone;
        }
        match self.peer(node).map(|peer| peer.way(pair, self)) {
            Some(Way::Link(link)) => Route::There(link),
            Some(Way::Wait) => Route::Wait,
            Some(Way::Gone) | None => Route::Gone,
        }
    }

    fn leave(&self, target: &Target) {
        let mut nodes = self.nodes.write().unwrap_or_else(PoisonError::into_inner);
        let node = port::node(target.address);
        if nodes
            .get(&node)
            .is_some_and(|one| one.address == target.address)
        {
            nodes.remove(&node);
        }
        drop(nodes);
        self.tell(false, target.address);
    }
}

/// The fabric's thread, which is joined when the last of its handles, ports and pairs is dropped.
struct Handle {
    shared: Arc<Shared>,
    at: Option<SocketAddr>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl fmt::Debug for Handle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Handle").field("at", &self.at).finish()
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        self.shared.event.set();
        let thread = self
            .thread
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(thread) = thread.take() {
            let _panicked = thread.join();
        }
        self.shared
            .peers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clear();
    }
}

/// The TCP fabric: its nodes are those of this process, and those of its peers. It has one thread.
/// Clones are the same fabric.
#[derive(Clone)]
pub struct TcpFabric(Arc<Handle>);

impl fmt::Debug for TcpFabric {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TcpFabric")
            .field("at", &self.0.at)
            .finish_non_exhaustive()
    }
}

impl TcpFabric {
    /// Begins to listen, where it is to. Nobody is dialled before he is needed.
    ///
    /// # Errors
    /// [`Error::OutOfRange`] for the limit; [`Error::Io`], as where somebody listens there already.
    pub fn new(options: TcpOptions) -> Result<Self> {
        if options.limit < LIMITS.0 || options.limit > LIMITS.1 {
            let millis = |limit: Duration| limit.as_millis() as u64;
            return Err(Error::OutOfRange {
                what: "the limit of a TCP fabric, in milliseconds,",
                given: millis(options.limit),
                least: millis(LIMITS.0),
                most: millis(LIMITS.1),
            });
        }
        let io = |source| Error::Io {
            what: "listen for peers",
            source,
        };
        let listener = options
            .listen
            .map(TcpListener::bind)
            .transpose()
            .map_err(io)?;
        let mut at = None;
        if let Some(listener) = &listener {
            listener.set_nonblocking(true).map_err(io)?;
            at = Some(listener.local_addr().map_err(io)?);
        }
        let shared = Arc::new(Shared {
            key: options.key,
            limit: options.limit,
            port: at.map_or(0, |at| at.port()),
            begun: Instant::now(),
            event: Event::new()?,
            stop: AtomicBool::new(false),
            nodes: RwLock::default(),
            book: RwLock::new(Book {
                set: options.peers,
                learned: HashMap::new(),
            }),
            peers: Mutex::default(),
            dials: Mutex::default(),
            news: Mutex::default(),
            next_pair: AtomicU64::new(1),
            pairs: AtomicU64::new(0),
        });
        let reactor = Reactor::new(&shared, listener)?;
        let thread = std::thread::Builder::new()
            .name("krcore-tcp".to_owned())
            .spawn(move || reactor.run())
            .map_err(|source| Error::Io {
                what: "start the thread of a TCP fabric",
                source,
            })?;
        Ok(Self(Arc::new(Handle {
            shared,
            at,
            thread: Mutex::new(Some(thread)),
        })))
    }

    /// Where it listens.
    pub fn local_addr(&self) -> Option<SocketAddr> {
        self.0.at
    }

    /// Says where a node is found, from its next link on.
    pub fn set_peer(&self, node: NodeId, at: SocketAddr) {
        let mut book = self
            .0
            .shared
            .book
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        book.set.insert(node, at);
    }

    /// How it stands with a node; `None` where nobody has said where it is.
    pub fn link(&self, node: NodeId) -> Option<LinkState> {
        self.0.shared.peer(node).map(|peer| peer.state())
    }
}

impl Fabric for TcpFabric {
    fn join(&self, node: NodeId, sink: Arc<dyn Sink>) -> Result<Arc<dyn Port>> {
        let shared = &self.0.shared;
        let mut nodes = shared.nodes.write().unwrap_or_else(PoisonError::into_inner);
        if nodes.contains_key(&node) {
            return Err(Error::NodeExists(node));
        }
        let target = Target::new(node, sink);
        nodes.insert(node, Arc::clone(&target));
        drop(nodes);
        shared.tell(true, target.address);
        Ok(Arc::new(TcpPort {
            target,
            fabric: Arc::clone(&self.0),
        }))
    }

    fn queue_pair(&self, options: PairOptions) -> Result<Box<dyn QueuePair>> {
        self.0.shared.pairs.fetch_add(1, Ordering::Relaxed);
        Ok(Box::new(TcpQueuePair::new(&self.0, options)))
    }

    fn ask(&self, node: NodeId, limit: Duration) -> Result<DcAddress> {
        let shared = &self.0.shared;
        if let Some(target) = shared.here(node) {
            return Ok(target.address);
        }
        let mut question = Question::default();
        shared
            .peer(node)
            .and_then(|peer| peer.wait(shared, limit, |link| link.ask(node, &mut question)))
            .flatten()
            .ok_or(Error::UnknownNode(node))
    }

    fn reserve(&self, to: DcAddress, service: Service) -> Result<bool, Malformed> {
        let shared = &self.0.shared;
        if let Some(target) = shared.here(port::node(to)) {
            if target.address != to || !target.is_alive() {
                return Err(Malformed::PeerGone);
            }
            return Ok(target.sink.reserve(service));
        }
        match shared.peer(port::node(to)).map(|peer| peer.state()) {
            None | Some(LinkState::Down(_)) => Err(Malformed::PeerGone),
            Some(_) => Ok(true),
        }
    }

    fn release(&self, to: DcAddress, service: Service) {
        if let Some(target) = self.0.shared.target(to) {
            target.sink.release(service);
        }
    }

    fn local_region(&self, to: DcAddress, key: RKey) -> Option<Arc<MemoryRegion>> {
        self.0.shared.target(to)?.region(key)
    }

    fn queue_pairs(&self) -> u64 {
        self.0.shared.pairs.load(Ordering::Relaxed)
    }
}
