//! Nodes of one machine over shared memory: who executes a request copies between mapped regions.
//! The queue pairs have the real state machine.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock, Weak};
use std::time::Duration;

use super::{
    DcAddress, Fabric, Op, PairOptions, Port, QueueFull, QueuePair, RawCompletion, RawRequest,
    Received, Sink, State, Status, execute,
};
use crate::error::{Error, Malformed, Result};
use crate::node::{NodeId, Service};
use crate::region::{MemoryRegion, RKey};

struct ShmPort {
    node: NodeId,
    address: DcAddress,
    alive: AtomicBool,
    regions: RwLock<HashMap<u32, Arc<MemoryRegion>>>,
    /// Changes whenever a region is revoked, so that a queue pair may keep the one it used last.
    revoked: AtomicU64,
    sink: Arc<dyn Sink>,
    fabric: Arc<Shared>,
}

impl fmt::Debug for ShmPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ShmPort")
            .field("node", &self.node)
            .finish_non_exhaustive()
    }
}

impl Port for ShmPort {
    fn address(&self) -> DcAddress {
        self.address
    }

    fn expose(&self, region: &Arc<MemoryRegion>) -> Result<()> {
        let mut regions = self.regions.write().unwrap_or_else(PoisonError::into_inner);
        regions.insert(region.key().0, Arc::clone(region));
        Ok(())
    }

    fn revoke(&self, key: RKey) {
        let mut regions = self.regions.write().unwrap_or_else(PoisonError::into_inner);
        regions.remove(&key.0);
        self.revoked.fetch_add(1, Ordering::AcqRel);
    }

    fn leave(&self) {
        self.alive.store(false, Ordering::Release);
        let mut nodes = self
            .fabric
            .nodes
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        nodes.by_number.remove(&self.address.number);
        if nodes.by_id.get(&self.node) == Some(&self.address.number) {
            nodes.by_id.remove(&self.node);
        }
        drop(nodes);
        self.regions
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .clear();
    }
}

impl ShmPort {
    fn region(&self, key: RKey) -> Option<Arc<MemoryRegion>> {
        let regions = self.regions.read().unwrap_or_else(PoisonError::into_inner);
        regions.get(&key.0).cloned()
    }

    fn send(&self, work: &RawRequest, service: Service) -> Status {
        let Some(header) = work.header.clone() else {
            return Status::RemoteInvalid;
        };
        let mut body = vec![0; work.local.len as usize];
        if !work.local.region.read(work.local.offset, &mut body) {
            return Status::LocalProtection;
        }
        self.sink.deliver(Received {
            service,
            header,
            body,
        });
        Status::Success
    }
}

#[derive(Default)]
struct Nodes {
    by_number: HashMap<u32, Arc<ShmPort>>,
    by_id: HashMap<NodeId, u32>,
}

#[derive(Default)]
struct Shared {
    nodes: RwLock<Nodes>,
    next: AtomicU32,
    pairs: AtomicU64,
    lag: usize,
}

/// The shared-memory fabric: its nodes are those of one process, which may be the node daemon that
/// many processes attach to. Clones are the same fabric.
#[derive(Clone, Default)]
pub struct ShmFabric(Arc<Shared>);

impl fmt::Debug for ShmFabric {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ShmFabric")
            .field("queue_pairs", &self.queue_pairs())
            .finish_non_exhaustive()
    }
}

impl ShmFabric {
    /// A fabric without nodes. Requests are executed when they are posted.
    pub fn new() -> Self {
        Self::default()
    }

    /// One whose queue pairs execute a request only when `lag` more have been posted or the
    /// completion queue is polled, as an adapter lags behind its driver: for tests of what happens
    /// to outstanding requests.
    pub fn lagging(lag: usize) -> Self {
        Self(Arc::new(Shared {
            lag,
            ..Shared::default()
        }))
    }
}

impl Fabric for ShmFabric {
    fn join(&self, node: NodeId, sink: Arc<dyn Sink>) -> Result<Arc<dyn Port>> {
        let mut nodes = self.0.nodes.write().unwrap_or_else(PoisonError::into_inner);
        if nodes.by_id.contains_key(&node) {
            return Err(Error::NodeExists(node));
        }
        let number = self.0.next.fetch_add(1, Ordering::Relaxed) + 1;
        let address = DcAddress {
            number,
            key: fastrand::u32(..),
            lid: 0,
            gid: 0,
        };
        let port = Arc::new(ShmPort {
            node,
            address,
            alive: AtomicBool::new(true),
            regions: RwLock::default(),
            revoked: AtomicU64::new(0),
            sink,
            fabric: Arc::clone(&self.0),
        });
        nodes.by_id.insert(node, number);
        nodes.by_number.insert(number, Arc::clone(&port));
        Ok(port)
    }

    fn queue_pair(&self, options: PairOptions) -> Result<Box<dyn QueuePair>> {
        self.0.pairs.fetch_add(1, Ordering::Relaxed);
        Ok(Box::new(ShmQueuePair {
            fabric: Arc::clone(&self.0),
            state: State::Rts,
            depth: options.depth,
            used: 0,
            held: 0,
            queue: VecDeque::new(),
            completions: VecDeque::with_capacity(options.depth),
            target: None,
            region: None,
        }))
    }

    fn ask(&self, node: NodeId, _limit: Duration) -> Result<DcAddress> {
        let nodes = self.0.nodes.read().unwrap_or_else(PoisonError::into_inner);
        let number = nodes.by_id.get(&node).ok_or(Error::UnknownNode(node))?;
        let port = nodes
            .by_number
            .get(number)
            .ok_or(Error::UnknownNode(node))?;
        Ok(port.address)
    }

    fn reserve(&self, to: DcAddress, service: Service) -> Result<bool, Malformed> {
        let port = self.0.port(to).ok_or(Malformed::PeerGone)?;
        Ok(port.sink.reserve(service))
    }

    fn release(&self, to: DcAddress, service: Service) {
        if let Some(port) = self.0.port(to) {
            port.sink.release(service);
        }
    }

    fn local_region(&self, to: DcAddress, key: RKey) -> Option<Arc<MemoryRegion>> {
        self.0.port(to)?.region(key)
    }

    fn queue_pairs(&self) -> u64 {
        self.0.pairs.load(Ordering::Relaxed)
    }
}

impl Shared {
    fn port(&self, address: DcAddress) -> Option<Arc<ShmPort>> {
        let nodes = self.nodes.read().unwrap_or_else(PoisonError::into_inner);
        nodes
            .by_number
            .get(&address.number)
            .filter(|port| port.address.key == address.key)
            .cloned()
    }
}

/// A request's slot is free again when a completion that covers it has been polled, as on a real
/// queue pair; so `used` falls by what a completion covers, and `held` counts what the next one
/// will.
struct ShmQueuePair {
    fabric: Arc<Shared>,
    state: State,
    depth: usize,
    used: usize,
    held: usize,
    /// Posted, and not yet executed.
    queue: VecDeque<RawRequest>,
    completions: VecDeque<(RawCompletion, usize)>,
    /// A DC initiator is attached to one target at a time.
    target: Option<Arc<ShmPort>>,
    /// The region used last, and what `revoked` was then. It does not keep a region's memory.
    region: Option<(u64, RKey, Weak<MemoryRegion>)>,
}

impl fmt::Debug for ShmQueuePair {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ShmQueuePair")
            .field("state", &self.state)
            .finish_non_exhaustive()
    }
}

impl QueuePair for ShmQueuePair {
    fn post(&mut self, work: &[RawRequest]) -> Result<(), QueueFull> {
        if self.used + work.len() > self.depth {
            return Err(QueueFull);
        }
        self.used += work.len();
        if self.fabric.lag == 0 {
            work.iter().for_each(|request| self.turn(request));
        } else {
            self.queue.extend(work.iter().cloned());
            self.progress(self.fabric.lag);
        }
        Ok(())
    }

    fn poll(&mut self) -> Option<RawCompletion> {
        if !self.queue.is_empty() {
            self.progress(0);
        }
        let (completion, covers) = self.completions.pop_front()?;
        self.used -= covers;
        Some(completion)
    }

    fn state(&self) -> State {
        self.state
    }

    fn depth(&self) -> usize {
        self.depth
    }

    fn is_synchronous(&self) -> bool {
        self.fabric.lag == 0
    }
}

impl ShmQueuePair {
    fn progress(&mut self, leave: usize) {
        while self.queue.len() > leave
            && let Some(request) = self.queue.pop_front()
        {
            self.turn(&request);
        }
    }

    fn turn(&mut self, request: &RawRequest) {
        self.held += 1;
        let status = if self.state == State::Err {
            Status::Flushed
        } else {
            self.execute(request)
        };
        if status != Status::Success {
            self.state = State::Err;
        }
        if request.signalled || status != Status::Success {
            let completion = RawCompletion {
                wr_id: request.wr_id,
                status,
            };
            self.completions
                .push_back((completion, std::mem::take(&mut self.held)));
        }
    }

    fn execute(&mut self, request: &RawRequest) -> Status {
        if request.op == Op::Fence {
            return Status::Success;
        }
        if self
            .target
            .as_ref()
            .is_none_or(|port| port.address != request.to)
        {
            self.target = self.fabric.port(request.to);
            self.region = None;
        }
        let Some(port) = &self.target else {
            return Status::RetryExceeded;
        };
        if !port.alive.load(Ordering::Acquire) {
            return Status::RetryExceeded;
        }
        if let Op::Send(service) = request.op {
            return port.send(request, service);
        }
        let revoked = port.revoked.load(Ordering::Acquire);
        let kept = match &self.region {
            Some((when, key, region)) if *when == revoked && *key == request.remote.key => {
                region.upgrade()
            }
            _ => None,
        };
        let region = kept.or_else(|| {
            let found = port.region(request.remote.key)?;
            self.region = Some((revoked, found.key(), Arc::downgrade(&found)));
            Some(found)
        });
        match region {
            Some(region) => execute(&region, request.op, &request.local, request.remote.offset),
            None => Status::RemoteAccess,
        }
    }
}
