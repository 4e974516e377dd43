//! What a fabric has to be: nodes that have ports, and physical queue pairs with the state machine
//! of RDMA. Raw, unchecked and shared by hand; [`crate::VirtualQueue`] is what to use.
//!
//! # The contract
//!
//! A [`Fabric`] is a cheap handle; clones of it are the same fabric. Whoever implements one keeps
//! these promises, on which the pool, the checks and the transfer are built:
//!
//! 1. **Order.** The requests of one [`QueuePair`] are executed in the order in which they were
//!    posted, and complete in that order. [`Op::Fence`] completes when all before it have been
//!    executed at the peer.
//! 2. **Signals.** A signalled request completes once; an unsignalled one only where it fails. A
//!    completion frees the slots of its request and of the unsignalled ones before it.
//! 3. **Errors.** A request that fails completes with its own [`Status`] and puts the pair in
//!    [`State::Err`]. Every request behind it completes with [`Status::Flushed`], signalled or not,
//!    and **was not executed**: the pool posts those of other peers again on a new pair. A fabric
//!    that does not know whether a request was executed reports [`Status::RetryExceeded`] instead,
//!    for as many requests as it does not know that of. Behind the first failure every request
//!    completes by itself.
//! 4. **Bounds.** [`QueuePair::post`] takes all of a list or nothing of it, never more than
//!    [`QueuePair::depth`] requests are outstanding, and it does not block on the peer. A lost link
//!    or a dead peer ends every outstanding request with a status within the fabric's own time
//!    limit.
//! 5. **Nothing is lost when a pair is dropped**: what was outstanding on it has been executed or
//!    never will be.
//! 6. **Waking.** A pair whose requests complete after `post` has returned calls the [`Wake`] that it
//!    was made with whenever [`QueuePair::poll`] has something new. One whose requests are complete
//!    when `post` returns need not.
//! 7. **Keys.** A request reaches a region only from [`Port::expose`] to [`Port::revoke`], within its
//!    length, and as its [`Access`](crate::Access) allows; the target looks again, whatever the
//!    initiator has checked.
//! 8. **Receive buffers.** A SEND is posted only after [`Fabric::reserve`] has said yes, so that no
//!    pair breaks for want of a buffer; what arrives goes to the node's [`Sink`]. A fabric which
//!    cannot know says yes, and completes the SEND with [`Status::ReceiverNotReady`] **without**
//!    putting the pair in ERR.

mod shm;
mod target;
#[cfg(feature = "tcp")]
pub mod tcp;
#[cfg(feature = "verbs")]
mod verbs;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

pub use shm::ShmFabric;
pub(crate) use target::execute;
#[cfg(feature = "tcp")]
pub(crate) use target::{atomic, permit};
#[cfg(feature = "verbs")]
pub(crate) use verbs::Registration;
#[cfg(feature = "verbs")]
pub use verbs::{VerbsConfig, VerbsFabric};

use crate::error::{Malformed, Result};
use crate::node::{NodeId, Service};
use crate::region::{MemoryRegion, RKey, RegionSlice, RemoteSlice};

/// Where a DC queue pair finds a node: 12 bytes (section 4.2 of the paper).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct DcAddress {
    /// The number of the DC target.
    pub number: u32,
    /// The key without which the target takes no request.
    pub key: u32,
    /// The local id of the port.
    pub lid: u16,
    /// The index of the port's global id.
    pub gid: u16,
}

/// What to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op {
    /// Remote to local.
    Read,
    /// Local to remote.
    Write,
    /// Compare 8 remote bytes with `expected`, and make them `new` where they are equal; what was
    /// there goes to the local slice.
    CompareSwap {
        /// What should be there.
        expected: u64,
        /// What to put there.
        new: u64,
    },
    /// Add to 8 remote bytes; what was there goes to the local slice.
    FetchAdd {
        /// How much to add, wrapping.
        add: u64,
    },
    /// Local to a receive buffer of whoever listens for this service at the peer.
    Send(Service),
    /// Nothing, but in order: completes when all before it has.
    Fence,
}

/// Bytes of the header that goes before what a SEND carries.
pub const SEND_HEADER: usize = 64;

/// A request as a queue pair takes it, unchecked.
#[derive(Debug, Clone)]
pub struct RawRequest {
    /// What its completion says.
    pub wr_id: u64,
    /// Whether it completes where it succeeds. A failure always completes.
    pub signalled: bool,
    /// What to do.
    pub op: Op,
    /// The local bytes. A SEND of a large message carries none (`len` 0).
    pub local: RegionSlice,
    /// Where at the peer.
    pub remote: RemoteSlice,
    /// Which node.
    pub to: DcAddress,
    /// What goes before the bytes of a SEND.
    pub header: Option<Box<[u8; SEND_HEADER]>>,
}

/// How a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Status {
    /// Done.
    #[error("done")]
    Success,
    /// The local slice is outside of its region.
    #[error("the local slice is outside of its region")]
    LocalProtection,
    /// The key, the range or the right at the peer is wrong.
    #[error("the key, the range or the right at the peer is wrong")]
    RemoteAccess,
    /// The operation is none the peer can do.
    #[error("the operation is none the peer can do")]
    RemoteInvalid,
    /// The peer does not answer. The request may have been executed.
    #[error("the peer does not answer")]
    RetryExceeded,
    /// The peer has no receive buffer.
    #[error("the peer has no receive buffer")]
    ReceiverNotReady,
    /// The queue pair was in ERR when the request's turn came: it was not executed.
    #[error("not executed: the queue pair was in ERR")]
    Flushed,
    /// A check refused it before it reached a queue pair: it was not executed.
    #[error("refused: {0}")]
    Refused(Malformed),
}

impl Status {
    const PLAIN: [Self; 7] = [
        Self::Success,
        Self::LocalProtection,
        Self::RemoteAccess,
        Self::RemoteInvalid,
        Self::RetryExceeded,
        Self::ReceiverNotReady,
        Self::Flushed,
    ];
    const REFUSED: u32 = 0x100;

    pub(crate) fn to_code(self) -> u32 {
        match self {
            Self::Refused(why) => Self::REFUSED | why as u32,
            plain => Self::PLAIN
                .iter()
                .position(|one| *one == plain)
                .unwrap_or(0) as u32,
        }
    }

    pub(crate) fn from_code(code: u32) -> Option<Self> {
        if code & Self::REFUSED != 0 {
            return Malformed::from_code(code as u8).map(Self::Refused);
        }
        Self::PLAIN.get(code as usize).copied()
    }
}

/// A completion as a queue pair gives it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RawCompletion {
    /// The request's.
    pub wr_id: u64,
    /// How it ended.
    pub status: Status,
}

/// The states of a queue pair that can be seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Ready to send.
    Rts,
    /// In error: every request is flushed, for every sharer, until the queue pair is rebuilt.
    Err,
}

/// The send queue was full: nothing was posted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the send queue is full")]
pub struct QueueFull;

/// A physical queue pair with its completion queue.
pub trait QueuePair: Send + fmt::Debug {
    /// Posts all of `work`, in order.
    ///
    /// # Errors
    /// Where there is no room for all of it; nothing was posted then.
    fn post(&mut self, work: &[RawRequest]) -> Result<(), QueueFull>;
    /// The next completion, where there is one.
    fn poll(&mut self) -> Option<RawCompletion>;
    /// Its state.
    fn state(&self) -> State;
    /// How many requests it holds.
    fn depth(&self) -> usize;
    /// Whether all that was posted has been executed, and all its completions can be polled, when
    /// [`post`](Self::post) returns. A pair that says so is spared some book-keeping.
    fn is_synchronous(&self) -> bool {
        false
    }
}

/// What a queue pair calls when it has something to poll.
#[derive(Clone)]
pub struct Wake(Arc<dyn Fn() + Send + Sync>);

impl Wake {
    /// Calls `what`, from whichever thread; it must not block, and not call the pair.
    pub fn new(what: impl Fn() + Send + Sync + 'static) -> Self {
        Self(Arc::new(what))
    }

    /// Wakes nobody.
    pub fn nobody() -> Self {
        Self::new(|| {})
    }

    /// There is something to poll.
    pub fn wake(&self) {
        (self.0)();
    }
}

impl fmt::Debug for Wake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Wake")
    }
}

/// What a queue pair is to be.
#[derive(Debug, Clone)]
pub struct PairOptions {
    /// How many requests it holds.
    pub depth: usize,
    /// The only peer it talks to (RC); or one that reaches every node (DC).
    pub peer: Option<DcAddress>,
    /// What it calls when there is something to poll.
    pub wake: Wake,
}

/// What a SEND brought.
#[derive(Debug, Clone)]
pub struct Received {
    /// For whom.
    pub service: Service,
    /// What went before the bytes.
    pub header: Box<[u8; SEND_HEADER]>,
    /// The bytes.
    pub body: Vec<u8>,
}

/// Where a node's messages go: the shared receive queue.
pub trait Sink: Send + Sync {
    /// Takes a receive buffer for a SEND that will come; false where there is none.
    fn reserve(&self, service: Service) -> bool;
    /// Gives a buffer back whose SEND will not come.
    fn release(&self, service: Service);
    /// Puts what has arrived into the buffer that was reserved for it.
    fn deliver(&self, received: Received);
}

/// A node as the fabric sees it: a DC target with its regions. It leaves the fabric when it is
/// dropped.
pub trait Port: Send + Sync + fmt::Debug {
    /// Where DC pairs find it.
    fn address(&self) -> DcAddress;
    /// Lets peers reach a region under its key.
    ///
    /// # Errors
    /// Where the device cannot register more.
    fn expose(&self, region: &Arc<MemoryRegion>) -> Result<()>;
    /// Ends that. Whatever is in flight either reaches the region or fails.
    fn revoke(&self, key: RKey);
    /// Takes the node off the fabric, as its death would.
    fn leave(&self);
}

/// Nodes that reach each other.
pub trait Fabric: Send + Sync + fmt::Debug + 'static {
    /// Makes this process reachable as `node`; its messages go to `sink`.
    ///
    /// # Errors
    /// Where a living node has that id.
    fn join(&self, node: NodeId, sink: Arc<dyn Sink>) -> Result<Arc<dyn Port>>;

    /// A new queue pair. May block for a handshake with `options.peer`; one without a peer never
    /// does.
    ///
    /// # Errors
    /// Where the device has no more.
    fn queue_pair(&self, options: PairOptions) -> Result<Box<dyn QueuePair>>;

    /// Asks a node itself for its address: what is left when no metadata server answers.
    ///
    /// # Errors
    /// [`Error::UnknownNode`](crate::Error::UnknownNode) where it does not answer in time.
    fn ask(&self, node: NodeId, limit: Duration) -> Result<DcAddress>;

    /// Takes a receive buffer of a peer for a SEND that will be posted; false where it has none.
    ///
    /// # Errors
    /// [`Malformed::PeerGone`] where the peer is known to be gone.
    fn reserve(&self, to: DcAddress, service: Service) -> Result<bool, Malformed>;

    /// Gives back a buffer whose SEND will not be posted.
    fn release(&self, to: DcAddress, service: Service);

    /// The peer's region, where this process can map it: what *trusted* mode executes on. Only a
    /// fabric within one machine has it.
    fn local_region(&self, _to: DcAddress, _key: RKey) -> Option<Arc<MemoryRegion>> {
        None
    }

    /// How many queue pairs were ever created.
    fn queue_pairs(&self) -> u64;
}
