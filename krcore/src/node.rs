//! A node: its port on the fabric, its pool, and what it knows of the others.

use std::collections::HashMap;
use std::fmt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use carlsbad_types::ByteSize;
use serde::{Deserialize, Serialize};

use crate::attach::{Mode, Session};
use crate::clock;
use crate::dispatch::{MAX_DEPTH, Queue};
use crate::error::{Error, Malformed, Result};
use crate::fabric::{
    DcAddress, Fabric, Op, PairOptions, Port, QueuePair, RawRequest, Status, Wake,
};
use crate::message::{Acks, Header, Inbox, Listener, MAX_LARGE};
use crate::meta::{BUCKET, Found, MetaServer, MetaTable, OVERFLOW, REGISTER, find};
use crate::mr::{self, ACKS_KEY, RegionEntry, Regions};
use crate::notify::{Bells, Event, always_ready};
use crate::pool::Pool;
use crate::region::{Access, MemoryRegion, RKey, RegionSlice, RemoteSlice, Sealed};
use crate::vq::{PooledQueue, VirtualQueue};

/// How often a torn bucket or entry is read again.
const REREADS: usize = 64;
/// How long a request of the node's own may take.
const CONTROL_LIMIT: Duration = Duration::from_secs(1);
/// How often a metadata server that could not be told of this node is told again.
const TELL_AGAIN: Duration = Duration::from_secs(1);
/// Local memory for metadata that is read: the longest is an overflow bucket.
const SCRATCH: u64 = 4096;

/// The name of a node, unique on its fabric.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct NodeId(pub u64);

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "node {}", self.0)
    }
}

/// What a message is for: tells the listeners of a node apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Service(pub u16);

impl fmt::Display for Service {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "service {}", self.0)
    }
}

/// How a node is set up.
#[derive(Debug, Clone)]
pub struct Config {
    /// The metadata servers to ask, the nearest first. Without any, peers are asked themselves.
    pub meta: Vec<Arc<MetaServer>>,
    /// Metadata servers of other processes, asked after those. The node tells them that it is there,
    /// and tells those that cannot be reached later.
    pub tables: Vec<MetaTable>,
    /// Shared pairs that reach every node. Default: one for each CPU.
    pub dynamic_pairs: usize,
    /// The most dedicated pairs. Default: 32, as in the paper.
    pub dedicated_pairs: usize,
    /// Requests a pair holds. Default: 128.
    pub depth: usize,
    /// After how many requests of one virtual queue its peer gets a dedicated pair; 0 for never.
    /// Default: 4096.
    pub promote_after: u32,
    /// How long what a peer publishes of its regions is believed. Default: 1 s, as in the paper.
    pub lease: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            meta: Vec::new(),
            tables: Vec::new(),
            dynamic_pairs: std::thread::available_parallelism().map_or(1, usize::from),
            dedicated_pairs: 32,
            depth: 128,
            promote_after: 4096,
            lease: Duration::from_secs(1),
        }
    }
}

/// What a node has counted since it was made, and what it has now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Stats {
    /// One-sided READs of metadata tables.
    pub meta_reads: u64,
    /// Peers that were asked themselves.
    pub peers_asked: u64,
    /// Pairs that were rebuilt after they broke.
    pub rebuilt: u64,
    /// Queue pairs that were ever created on the fabric.
    pub queue_pairs: u64,
    /// Virtual queues there are.
    pub virtual_queues: u64,
    /// Regions that are registered.
    pub regions: u64,
    /// Peers whose address is cached.
    pub peers: u64,
    /// Messages that arrived for a listener that had gone.
    pub messages_dropped: u64,
    /// Processes that are attached.
    pub clients: u64,
    /// Requests of attached processes that a check refused.
    pub refused: u64,
    /// Requests of attached processes that were executed.
    pub executed: u64,
}

/// The addresses of peers that are known: 12 bytes each, and their names.
#[derive(Debug, Default)]
pub(crate) struct Peers(RwLock<HashMap<NodeId, DcAddress>>);

impl Peers {
    pub(crate) fn get(&self, peer: NodeId) -> Option<DcAddress> {
        let peers = self.0.read().unwrap_or_else(PoisonError::into_inner);
        peers.get(&peer).copied()
    }

    pub(crate) fn learn(&self, peer: NodeId, address: DcAddress) {
        if self.get(peer) != Some(address) {
            let mut peers = self.0.write().unwrap_or_else(PoisonError::into_inner);
            peers.insert(peer, address);
        }
    }

    pub(crate) fn forget(&self, peer: NodeId) {
        let mut peers = self.0.write().unwrap_or_else(PoisonError::into_inner);
        peers.remove(&peer);
    }

    pub(crate) fn len(&self) -> usize {
        self.0.read().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// Bytes that the table takes: hash maps keep an eighth free, and a byte of hash beside each.
    pub(crate) fn bytes(&self) -> usize {
        let slot = size_of::<(NodeId, DcAddress)>() + 1;
        let peers = self.0.read().unwrap_or_else(PoisonError::into_inner);
        (peers.capacity() * 8 / 7).next_power_of_two() * slot
    }
}

/// The node's own pair, on which it reads tables.
struct Control {
    pair: Box<dyn QueuePair>,
    scratch: Arc<MemoryRegion>,
}

/// What a virtual queue needs of its node.
pub(crate) struct Core {
    pub(crate) id: NodeId,
    pub(crate) fabric: Arc<dyn Fabric>,
    pub(crate) pool: Pool,
    pub(crate) bells: Arc<Bells>,
    pub(crate) promote_after: u32,
    pub(crate) port: Arc<dyn Port>,
    pub(crate) owner: u64,
    pub(crate) acks: Acks,
    pub(crate) inbox: Arc<Inbox>,
    pub(crate) always_ready: Event,
    pub(crate) lease: Duration,
    meta: Vec<Arc<MetaServer>>,
    tables: Vec<MetaTable>,
    /// Those of `tables` that do not know of this node yet.
    untold: Mutex<Vec<MetaTable>>,
    depth: usize,
    peers: Arc<Peers>,
    entries: RwLock<HashMap<(DcAddress, RKey), (Duration, RegionEntry)>>,
    regions: Mutex<Regions>,
    control: Mutex<Control>,
    scratch: Arc<MemoryRegion>,
    tasks: Mutex<Sender<Task>>,
    meta_reads: AtomicU64,
    peers_asked: AtomicU64,
}

impl fmt::Debug for Core {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Node")
            .field("id", &self.id)
            .finish_non_exhaustive()
    }
}

enum Task {
    Promote(NodeId, DcAddress),
    Stop,
}

/// A node, in this process or at a daemon that this process is attached to.
///
/// One in this process ([`embedded`](Self::embedded)) has one thread, which creates dedicated pairs
/// and ends leases, and is joined when the node is dropped. One that is attached has none.
#[derive(Debug)]
pub struct Node(Kind);

#[derive(Debug)]
enum Kind {
    Embedded(Embedded),
    Attached(Arc<Session>),
}

#[derive(Debug)]
struct Embedded {
    core: Arc<Core>,
    thread: Option<JoinHandle<()>>,
}

fn within(what: &'static str, given: usize, most: usize) -> Result<()> {
    if (1..=most).contains(&given) {
        return Ok(());
    }
    Err(Error::OutOfRange {
        what,
        given: given as u64,
        least: 1,
        most: most as u64,
    })
}

/// Tells the nodes of this process apart.
pub(crate) fn new_owner() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

impl Node {
    /// Joins the fabric, and tells the metadata servers.
    ///
    /// # Errors
    /// Where the id is taken, a number of `config` is out of range, or the system refuses.
    pub fn embedded(fabric: impl Fabric, id: NodeId, config: Config) -> Result<Self> {
        Self::on(Arc::new(fabric), id, config)
    }

    /// The same, on a fabric whose kind is known at run time only.
    ///
    /// # Errors
    /// As [`embedded`](Self::embedded).
    pub fn on(fabric: Arc<dyn Fabric>, id: NodeId, config: Config) -> Result<Self> {
        within("the number of shared pairs", config.dynamic_pairs, 1024)?;
        within("the depth of a pair", config.depth, MAX_DEPTH)?;
        let owner = new_owner();
        let own =
            |bytes, access, key| MemoryRegion::create(ByteSize::new(bytes), access, key, owner);
        let regions = Regions::new(owner)?;
        let scratch = own(SCRATCH, Access::Local, RKey(0))?;
        let acks = own(MAX_LARGE as u64 * 8, Access::ReadWrite, ACKS_KEY)?;
        let (tasks, todo) = mpsc::channel();
        let peers = Arc::new(Peers::default());
        let inbox = Arc::new(Inbox::new(Arc::clone(&peers)));
        let port = fabric.join(id, Arc::clone(&inbox) as _)?;
        port.expose(&regions.table)?;
        port.expose(&acks)?;
        let bells = Arc::new(Bells::default());
        let core = Core {
            id,
            pool: Pool::new(
                &fabric,
                config.dynamic_pairs,
                config.dedicated_pairs,
                config.depth,
                &bells,
            )?,
            bells,
            promote_after: config.promote_after,
            port,
            owner,
            acks: Acks::new(acks),
            inbox,
            always_ready: always_ready()?,
            lease: config.lease,
            meta: config.meta,
            untold: Mutex::new(config.tables.clone()),
            tables: config.tables,
            depth: config.depth,
            peers,
            entries: RwLock::default(),
            regions: Mutex::new(regions),
            control: Mutex::new(Control {
                pair: fabric.queue_pair(control_pair())?,
                scratch: Arc::clone(&scratch),
            }),
            scratch,
            tasks: Mutex::new(tasks),
            meta_reads: AtomicU64::new(0),
            peers_asked: AtomicU64::new(0),
            fabric,
        };
        let mut node = Embedded {
            core: Arc::new(core),
            thread: None,
        };
        // The processes of this node reach each other without a look-up.
        node.core.peers.learn(id, node.core.port.address());
        for server in &node.core.meta {
            server.insert(id, node.core.port.address())?;
        }
        node.core.tell_tables();
        let core = Arc::clone(&node.core);
        let thread = std::thread::Builder::new()
            .name("krcore".to_owned())
            .spawn(move || serve(&core, &todo));
        node.thread = Some(thread.map_err(|source| Error::Io {
            what: "start the node's thread",
            source,
        })?);
        Ok(Self(Kind::Embedded(node)))
    }

    /// Attaches to the node daemon at `socket`, in isolated mode: the daemon executes what this
    /// process posts, after it has checked it.
    ///
    /// # Errors
    /// [`Error::NoDaemon`], [`Error::TimedOut`], [`Error::Refused`].
    pub fn attach(socket: impl AsRef<Path>, limit: Duration) -> Result<Self> {
        Self::attach_as(socket, Mode::Isolated, limit)
    }

    /// Attaches in a mode of choice. *Trusted* has to be allowed by the daemon.
    ///
    /// # Errors
    /// As [`attach`](Self::attach).
    pub fn attach_as(socket: impl AsRef<Path>, mode: Mode, limit: Duration) -> Result<Self> {
        let session = Session::open(socket.as_ref(), mode, limit)?;
        Ok(Self(Kind::Attached(session)))
    }

    /// Its name.
    pub fn id(&self) -> NodeId {
        match &self.0 {
            Kind::Embedded(node) => node.core.id,
            Kind::Attached(session) => session.node(),
        }
    }

    /// Where DC pairs find it.
    pub fn address(&self) -> DcAddress {
        match &self.0 {
            Kind::Embedded(node) => node.core.port.address(),
            Kind::Attached(session) => session.address(),
        }
    }

    /// Registers new memory, zeroed, and publishes it to peers as `access` says.
    ///
    /// # Errors
    /// Where there is no memory, or no more regions may be registered.
    pub fn register(&self, len: ByteSize, access: Access) -> Result<Arc<MemoryRegion>> {
        let memory = Sealed::create(c"krcore", len.get())?;
        match &self.0 {
            Kind::Embedded(node) => node.core.register(memory, access),
            Kind::Attached(session) => session.register(memory, access),
        }
    }

    /// Takes a region from what is published now, and from the fabric when the last lease on it has
    /// ended: until then a peer that has just looked may still reach it.
    ///
    /// # Errors
    /// [`Error::NotRegistered`].
    pub fn deregister(&self, region: &Arc<MemoryRegion>) -> Result<()> {
        match &self.0 {
            Kind::Embedded(node) => node.core.deregister(region),
            Kind::Attached(session) => session.deregister(region),
        }
    }

    /// A connection: a look-up, and a share of a pair that is there already. `limit` is for the
    /// look-up, where the peer is not known yet.
    ///
    /// # Errors
    /// [`Error::UnknownNode`], and [`Error::TooManyQueues`].
    pub fn connect(&self, peer: NodeId, limit: Duration) -> Result<VirtualQueue> {
        match &self.0 {
            Kind::Embedded(node) => {
                let address = node.core.address_of(peer, limit)?;
                PooledQueue::new(&node.core, peer, address).map(VirtualQueue::pooled)
            }
            Kind::Attached(session) => session.connect(peer, limit).map(VirtualQueue::attached),
        }
    }

    pub(crate) fn connect_at(&self, peer: NodeId, address: DcAddress) -> Result<VirtualQueue> {
        match &self.0 {
            Kind::Embedded(node) => {
                PooledQueue::new(&node.core, peer, address).map(VirtualQueue::pooled)
            }
            Kind::Attached(session) => session.connect_known(peer).map(VirtualQueue::attached),
        }
    }

    /// Receives the messages for `service` of this node.
    ///
    /// # Errors
    /// [`Error::ServiceTaken`].
    pub fn listen(&self, service: Service) -> Result<Listener> {
        match &self.0 {
            Kind::Embedded(node) => Listener::local(&node.core, service),
            Kind::Attached(session) => session.listen(service).map(Listener::attached),
        }
    }

    /// Forgets what is cached of a peer, so that the next connect looks it up again.
    pub fn forget(&self, peer: NodeId) {
        match &self.0 {
            Kind::Embedded(node) => node.core.forget(peer),
            Kind::Attached(session) => session.forget(peer),
        }
    }

    /// Memory that the addresses of peers take in this process.
    pub fn metadata_size(&self) -> ByteSize {
        ByteSize::new(match &self.0 {
            Kind::Embedded(node) => node.core.peers.bytes() as u64,
            Kind::Attached(session) => session.metadata_bytes() as u64,
        })
    }

    /// What was counted.
    ///
    /// # Errors
    /// Where the daemon is gone.
    pub fn stats(&self) -> Result<Stats> {
        match &self.0 {
            Kind::Embedded(node) => Ok(node.core.stats()),
            Kind::Attached(session) => session.stats(),
        }
    }

    /// Eight bytes for the results of atomics that nobody wants.
    pub(crate) fn scratch(&self) -> Result<RegionSlice> {
        match &self.0 {
            Kind::Embedded(node) => Ok(node.core.scratch.slice(SCRATCH - 8, 8)),
            Kind::Attached(session) => session.scratch(),
        }
    }

    #[cfg(feature = "daemon")]
    pub(crate) fn core(&self) -> Option<&Arc<Core>> {
        match &self.0 {
            Kind::Embedded(node) => Some(&node.core),
            Kind::Attached(_) => None,
        }
    }
}

impl Drop for Embedded {
    fn drop(&mut self) {
        for server in &self.core.meta {
            server.remove(self.core.id);
        }
        let untold = std::mem::take(&mut *self.core.lock_untold());
        for table in self.core.tables.iter().filter(|one| !untold.contains(one)) {
            // One that is gone has forgotten it already.
            let _gone = self.core.tell_table(table, false);
        }
        self.core.lock_regions().clear();
        self.core.port.leave();
        self.core.give(Task::Stop);
        if let Some(thread) = self.thread.take() {
            let _panicked = thread.join();
        }
    }
}

fn control_pair() -> PairOptions {
    PairOptions {
        depth: 16,
        peer: None,
        wake: Wake::nobody(),
    }
}

fn serve(core: &Core, todo: &mpsc::Receiver<Task>) {
    let tick = (core.lease / 8).max(Duration::from_millis(5));
    let mut told = Instant::now();
    loop {
        match todo.recv_timeout(tick) {
            Ok(Task::Promote(peer, address)) => {
                if let Err(why) = core.promote(peer, address) {
                    tracing::warn!(%peer, %why, "no dedicated pair: it stays on a shared one");
                }
            }
            Ok(Task::Stop) | Err(RecvTimeoutError::Disconnected) => return,
            Err(RecvTimeoutError::Timeout) => {}
        }
        core.end_leases();
        if told.elapsed() > TELL_AGAIN {
            told = Instant::now();
            core.tell_tables();
        }
    }
}

impl Core {
    pub(crate) fn nothing(&self) -> RegionSlice {
        self.scratch.slice(0, 0)
    }

    fn give(&self, task: Task) {
        let tasks = self.tasks.lock().unwrap_or_else(PoisonError::into_inner);
        let _gone = tasks.send(task);
    }

    fn lock_regions(&self) -> std::sync::MutexGuard<'_, Regions> {
        self.regions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn register(&self, memory: Sealed, access: Access) -> Result<Arc<MemoryRegion>> {
        let mut regions = self.lock_regions();
        let region = regions.add(memory, access)?;
        if access != Access::Local {
            if let Err(why) = self.port.expose(&region) {
                regions.remove(&region, Duration::ZERO)?;
                return Err(why);
            }
            regions.publish(&region);
        }
        Ok(region)
    }

    pub(crate) fn deregister(&self, region: &Arc<MemoryRegion>) -> Result<()> {
        // What peers could never see they have no lease on. The clock of leases is coarse: a lease
        // is counted two of its ticks longer than it is.
        let until = if region.access() == Access::Local {
            Duration::ZERO
        } else {
            clock::coarse() + self.lease + Duration::from_millis(20)
        };
        self.lock_regions().remove(region, until)?;
        if until.is_zero() {
            self.end_leases();
        }
        Ok(())
    }

    fn end_leases(&self) {
        let gone = self.lock_regions().expired(clock::coarse());
        gone.into_iter().for_each(|key| self.port.revoke(key));
    }

    pub(crate) fn promote(&self, peer: NodeId, address: DcAddress) -> Result<()> {
        if self.pool.dedicated(peer).is_none() {
            let queue = Queue::new(&self.fabric, self.depth, Some((peer, address)), &self.bells)?;
            self.pool.promote(peer, queue);
        }
        Ok(())
    }

    pub(crate) fn promote_later(&self, peer: NodeId, address: DcAddress) {
        self.give(Task::Promote(peer, address));
    }

    pub(crate) fn forget(&self, peer: NodeId) {
        self.peers.forget(peer);
        self.pool.demote(peer);
    }

    #[cfg(feature = "daemon")]
    pub(crate) fn cached_address(&self, peer: NodeId) -> Option<DcAddress> {
        self.peers.get(peer)
    }

    pub(crate) fn address_of(&self, peer: NodeId, limit: Duration) -> Result<DcAddress> {
        if let Some(address) = self.peers.get(peer) {
            return Ok(address);
        }
        let address = self.look_up(peer, limit)?;
        self.peers.learn(peer, address);
        Ok(address)
    }

    /// At the first replica that answers; and at the peer itself where none knows it.
    fn look_up(&self, peer: NodeId, limit: Duration) -> Result<DcAddress> {
        let tables = self.meta.iter().map(|server| server.table());
        for table in tables.chain(self.tables.iter().copied()) {
            let read = |offset, len| {
                let mut bytes = [0; OVERFLOW];
                let bytes = &mut bytes[..len];
                let at = RemoteSlice {
                    key: table.key,
                    offset,
                };
                for _ in 0..REREADS {
                    self.meta_reads.fetch_add(1, Ordering::Relaxed);
                    self.read(table.address, at, bytes).ok()?;
                    match find(bytes, peer) {
                        Found::Torn => std::thread::yield_now(),
                        found => return Some(found),
                    }
                }
                None
            };
            let found = match read(table.bucket(peer), BUCKET) {
                Some(Found::Further(index)) => table
                    .overflow(index)
                    .and_then(|offset| read(offset, OVERFLOW)),
                found => found,
            };
            match found {
                Some(Found::Here(address)) => return Ok(address),
                Some(Found::Nowhere | Found::Further(_)) => break,
                // The replica is gone, or damaged: the next one.
                Some(Found::Torn) | None => {}
            }
        }
        self.peers_asked.fetch_add(1, Ordering::Relaxed);
        self.fabric.ask(peer, limit)
    }

    pub(crate) fn acks_entry(&self) -> RegionEntry {
        RegionEntry {
            len: MAX_LARGE as u64 * 8,
            access: Access::ReadWrite,
        }
    }

    /// What a peer publishes of a region, and until when that may be believed.
    pub(crate) fn remote_entry(
        &self,
        peer: DcAddress,
        key: RKey,
        now: Duration,
    ) -> Result<(RegionEntry, Duration), Malformed> {
        // All of the address: a node that comes back may have its number again, and other regions.
        let which = (peer, key);
        let known = self
            .entries
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .get(&which)
            .copied();
        if let Some((until, entry)) = known
            && now < until
        {
            return Ok((entry, until));
        }
        let mut bytes = [0; mr::ENTRY as usize];
        let at = RemoteSlice {
            key: mr::TABLE_KEY,
            offset: mr::offset(key),
        };
        let mut found = None;
        for _ in 0..REREADS {
            self.read(peer, at, &mut bytes)
                .map_err(|_| Malformed::PeerGone)?;
            found = mr::decode(key, &bytes);
            if found.is_some() || bytes == [0; mr::ENTRY as usize] {
                break;
            }
        }
        let entry = found.ok_or(Malformed::StaleKey)?;
        // The lease began before it was read.
        let until = now + self.lease;
        let mut entries = self.entries.write().unwrap_or_else(PoisonError::into_inner);
        // Flushed when leases have ended, so that it does not grow with what is gone.
        if entries.len() == entries.capacity() {
            entries.retain(|_, (until, _)| now < *until);
        }
        entries.insert(which, (until, entry));
        Ok((entry, until))
    }

    fn lock_untold(&self) -> std::sync::MutexGuard<'_, Vec<MetaTable>> {
        self.untold.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells the metadata servers of other processes that do not know it yet of this node.
    fn tell_tables(&self) {
        let untold = std::mem::take(&mut *self.lock_untold());
        for table in untold {
            if let Err(why) = self.tell_table(&table, true) {
                tracing::warn!(server = %table.node, %why, "a metadata server cannot be told");
                self.lock_untold().push(table);
            }
        }
    }

    fn tell_table(&self, table: &MetaTable, joined: bool) -> Result<(), Status> {
        let header = Header {
            from: self.id,
            address: self.port.address(),
            len: 1,
            large: None,
        };
        let reserved = self.fabric.reserve(table.address, REGISTER);
        match reserved {
            Ok(true) => {}
            Ok(false) => return Err(Status::ReceiverNotReady),
            Err(why) => return Err(Status::Refused(why)),
        }
        let nowhere = RemoteSlice {
            key: RKey(0),
            offset: 0,
        };
        let mut control = self.control.lock().unwrap_or_else(PoisonError::into_inner);
        let _inside = control.scratch.write(0, &[u8::from(joined)]);
        let request = RawRequest {
            wr_id: 0,
            signalled: true,
            op: Op::Send(REGISTER),
            local: control.scratch.slice(0, 1),
            remote: nowhere,
            to: table.address,
            header: Some(Box::new(header.encode())),
        };
        self.execute(&mut control, &request)
    }

    /// One READ on the node's own pair.
    fn read(&self, to: DcAddress, remote: RemoteSlice, out: &mut [u8]) -> Result<(), Status> {
        let mut control = self.control.lock().unwrap_or_else(PoisonError::into_inner);
        let local = control.scratch.slice(0, out.len() as u64);
        let request = RawRequest {
            wr_id: 0,
            signalled: true,
            op: Op::Read,
            local,
            remote,
            to,
            header: None,
        };
        self.execute(&mut control, &request)?;
        if control.scratch.read(0, out) {
            Ok(())
        } else {
            Err(Status::LocalProtection)
        }
    }

    /// One request on the node's own pair, which is rebuilt if that breaks it.
    fn execute(&self, control: &mut Control, request: &RawRequest) -> Result<(), Status> {
        let posted = control.pair.post(std::slice::from_ref(request));
        let status = match posted {
            Ok(()) => crate::notify::poll_until(CONTROL_LIMIT, || control.pair.poll())
                .map_or(Status::RetryExceeded, |completion| completion.status),
            Err(_) => Status::RetryExceeded,
        };
        if status == Status::Success {
            return Ok(());
        }
        if let Ok(pair) = self.fabric.queue_pair(control_pair()) {
            control.pair = pair;
        }
        Err(status)
    }

    pub(crate) fn stats(&self) -> Stats {
        let queues = self.pool.queues();
        Stats {
            meta_reads: self.meta_reads.load(Ordering::Relaxed),
            peers_asked: self.peers_asked.load(Ordering::Relaxed),
            rebuilt: queues.iter().map(|queue| queue.rebuilt()).sum(),
            queue_pairs: self.fabric.queue_pairs(),
            virtual_queues: queues.iter().map(|queue| queue.sharers() as u64).sum(),
            regions: self.lock_regions().len() as u64,
            peers: self.peers.len() as u64,
            messages_dropped: self.inbox.dropped.load(Ordering::Relaxed),
            ..Stats::default()
        }
    }
}
