//! Two-sided communication: a node's shared receive queue, whose buffers are divided among its
//! listeners, and large messages that the receiver READs straight to where its user wants them. The
//! header says who sent a message and where that node is found, so that a reply needs no look-up
//! (section 4.4 of the paper).

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use crate::clock::Deadline;
use crate::error::{Error, Malformed, PostError, Result};
use crate::fabric::{DcAddress, Op, Received, SEND_HEADER, Sink, Status};
use crate::mr::ACKS_KEY;
use crate::node::{Core, Node, NodeId, Peers, Service};
use crate::notify::Signal;
use crate::region::{MemoryRegion, RKey, RegionSlice, RemoteSlice};
use crate::vq::{VirtualQueue, WorkRequest};

/// Receive buffers of one listener: its share of the shared receive queue.
pub(crate) const BUFFERS: usize = 64;
/// Large messages of a node that may wait to be fetched.
pub(crate) const MAX_LARGE: usize = 4096;
/// Large messages of one virtual queue that may wait to be fetched.
pub(crate) const LARGE_PER_QUEUE: usize = 16;
const VERSION: u32 = 0x4B52_0001;

/// What goes before the bytes of a SEND.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) from: NodeId,
    pub(crate) address: DcAddress,
    /// Bytes of the message.
    pub(crate) len: u64,
    pub(crate) large: Option<Descriptor>,
}

/// Where a large message lies, and how to say that it has been fetched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Descriptor {
    pub(crate) remote: RemoteSlice,
    /// Index of the word that is to become 0.
    pub(crate) ack: u32,
    /// What the word is until then: nobody else can know it.
    pub(crate) nonce: u64,
}

impl Header {
    pub(crate) fn encode(&self) -> [u8; SEND_HEADER] {
        let mut bytes = [0; SEND_HEADER];
        let mut put = |at: usize, part: &[u8]| bytes[at..at + part.len()].copy_from_slice(part);
        put(0, &VERSION.to_le_bytes());
        put(4, &u32::from(self.large.is_some()).to_le_bytes());
        put(8, &self.from.0.to_le_bytes());
        put(16, &self.address.number.to_le_bytes());
        put(20, &self.address.key.to_le_bytes());
        put(24, &self.address.lid.to_le_bytes());
        put(26, &self.address.gid.to_le_bytes());
        put(28, &self.large.map_or(0, |l| l.ack).to_le_bytes());
        put(32, &self.len.to_le_bytes());
        put(40, &self.large.map_or(0, |l| l.nonce).to_le_bytes());
        put(48, &self.large.map_or(0, |l| l.remote.offset).to_le_bytes());
        put(56, &self.large.map_or(0, |l| l.remote.key.0).to_le_bytes());
        bytes
    }

    pub(crate) fn decode(bytes: &[u8; SEND_HEADER]) -> Option<Self> {
        let small = |at: usize| {
            let mut word = [0; 4];
            word.copy_from_slice(&bytes[at..at + 4]);
            u32::from_le_bytes(word)
        };
        let word = |at: usize| u64::from(small(at)) | u64::from(small(at + 4)) << 32;
        if small(0) != VERSION || small(4) > 1 {
            return None;
        }
        Some(Self {
            from: NodeId(word(8)),
            address: DcAddress {
                number: small(16),
                key: small(20),
                lid: small(24) as u16,
                gid: (small(24) >> 16) as u16,
            },
            len: word(32),
            large: (small(4) == 1).then(|| Descriptor {
                remote: RemoteSlice {
                    key: RKey(small(56)),
                    offset: word(48),
                },
                ack: small(28),
                nonce: word(40),
            }),
        })
    }
}

/// Where the messages of one listener go.
pub(crate) trait Mailbox: Send + Sync {
    fn reserve(&self) -> bool;
    fn release(&self);
    fn deliver(&self, header: &[u8; SEND_HEADER], body: Vec<u8>);
}

/// The shared receive queue of a node.
pub(crate) struct Inbox {
    boxes: RwLock<HashMap<Service, Arc<dyn Mailbox>>>,
    peers: Arc<Peers>,
    pub(crate) dropped: AtomicU64,
}

impl fmt::Debug for Inbox {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Inbox").finish_non_exhaustive()
    }
}

impl Inbox {
    pub(crate) fn new(peers: Arc<Peers>) -> Self {
        Self {
            boxes: RwLock::default(),
            peers,
            dropped: AtomicU64::new(0),
        }
    }

    fn of(&self, service: Service) -> Option<Arc<dyn Mailbox>> {
        let boxes = self.boxes.read().unwrap_or_else(PoisonError::into_inner);
        boxes.get(&service).cloned()
    }

    pub(crate) fn open(&self, service: Service, mailbox: Arc<dyn Mailbox>) -> Result<()> {
        let mut boxes = self.boxes.write().unwrap_or_else(PoisonError::into_inner);
        if boxes.contains_key(&service) {
            return Err(Error::ServiceTaken(service));
        }
        boxes.insert(service, mailbox);
        Ok(())
    }

    pub(crate) fn close(&self, service: Service) {
        let mut boxes = self.boxes.write().unwrap_or_else(PoisonError::into_inner);
        boxes.remove(&service);
    }
}

impl Sink for Inbox {
    fn reserve(&self, service: Service) -> bool {
        self.of(service).is_some_and(|mailbox| mailbox.reserve())
    }

    fn release(&self, service: Service) {
        if let Some(mailbox) = self.of(service) {
            mailbox.release();
        }
    }

    fn deliver(&self, received: Received) {
        let header = Header::decode(&received.header);
        match (header, self.of(received.service)) {
            (Some(header), Some(mailbox)) => {
                self.peers.learn(header.from, header.address);
                mailbox.deliver(&received.header, received.body);
            }
            // The listener has gone in the meantime.
            _ => {
                self.dropped.fetch_add(1, Ordering::Relaxed);
            }
        }
    }
}

/// The mailbox of a listener in the node's own process.
#[derive(Debug)]
pub(crate) struct LocalBox {
    room: AtomicUsize,
    messages: Mutex<VecDeque<Message>>,
    signal: Signal,
}

impl LocalBox {
    pub(crate) fn new() -> Self {
        Self {
            room: AtomicUsize::new(BUFFERS),
            messages: Mutex::default(),
            signal: Signal::default(),
        }
    }

    fn pop(&self) -> Option<Message> {
        let mut messages = self.messages.lock().unwrap_or_else(PoisonError::into_inner);
        let message = messages.pop_front()?;
        drop(messages);
        self.release();
        Some(message)
    }
}

impl Mailbox for LocalBox {
    fn reserve(&self) -> bool {
        let take = |room: usize| room.checked_sub(1);
        self.room
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, take)
            .is_ok()
    }

    fn release(&self) {
        self.room.fetch_add(1, Ordering::AcqRel);
    }

    fn deliver(&self, header: &[u8; SEND_HEADER], body: Vec<u8>) {
        let Some(message) = Message::from_parts(header, body) else {
            return self.release();
        };
        let mut messages = self.messages.lock().unwrap_or_else(PoisonError::into_inner);
        messages.push_back(message);
        drop(messages);
        self.signal.wake();
    }
}

/// A message that has arrived. A small one is here; a large one is still at its sender, and is
/// [fetched](Self::fetch) to where it is wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    header: Header,
    body: Vec<u8>,
}

impl Message {
    pub(crate) fn from_parts(header: &[u8; SEND_HEADER], body: Vec<u8>) -> Option<Self> {
        let header = Header::decode(header)?;
        let here = header.large.is_none();
        (!here || header.len == body.len() as u64).then_some(Self { header, body })
    }

    /// The node that sent it.
    pub fn from(&self) -> NodeId {
        self.header.from
    }

    pub(crate) fn address(&self) -> DcAddress {
        self.header.address
    }

    /// Its length in bytes.
    pub fn len(&self) -> u64 {
        self.header.len
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.header.len == 0
    }

    /// Its bytes, where it is small enough to have come with them.
    pub fn bytes(&self) -> Option<&[u8]> {
        self.header.large.is_none().then_some(&self.body)
    }

    /// READs a large message straight into `into`, and tells the sender, whose request completes by
    /// that. A small one is copied.
    ///
    /// # Errors
    /// Where `into` is too short, the sender is gone, or `limit` is over.
    pub fn fetch(&self, node: &Node, into: &RegionSlice, limit: Duration) -> Result<()> {
        if into.len < self.header.len {
            return Err(Error::OutOfRange {
                what: "the room for a message",
                given: into.len,
                least: self.header.len,
                most: u64::MAX,
            });
        }
        let Some(large) = self.header.large else {
            if into.region.write(into.offset, &self.body) {
                return Ok(());
            }
            let why = Malformed::LocalRange;
            return Err(PostError { index: 0, why }.into());
        };
        let limit = Deadline::after(limit);
        let mut queue = node.connect_back(self)?;
        let local = into.region.slice(into.offset, self.header.len);
        let read = WorkRequest::new(0, Op::Read, local, large.remote);
        let acknowledge = Op::CompareSwap {
            expected: large.nonce,
            new: 0,
        };
        let ack = RemoteSlice {
            key: ACKS_KEY,
            offset: u64::from(large.ack) * 8,
        };
        let ack = WorkRequest::new(1, acknowledge, node.scratch()?, ack);
        for request in [read, ack] {
            queue.post(std::slice::from_ref(&request))?;
            let done = queue.wait(limit.left().unwrap_or_default())?;
            if done.status != Status::Success {
                return Err(Error::Failed {
                    what: "fetching a message",
                    peer: self.header.from,
                    status: done.status,
                });
            }
        }
        Ok(())
    }
}

/// The words by which receivers say that they have fetched large messages.
#[derive(Debug)]
pub(crate) struct Acks {
    pub(crate) region: Arc<MemoryRegion>,
    free: Mutex<Vec<u32>>,
}

impl Acks {
    pub(crate) fn new(region: Arc<MemoryRegion>) -> Self {
        Self {
            region,
            free: Mutex::new((0..MAX_LARGE as u32).rev().collect()),
        }
    }

    pub(crate) fn take(&self) -> Option<(u32, u64)> {
        let ack = self
            .free
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .pop()?;
        let nonce = fastrand::u64(1..);
        if let Some(word) = self.region.atomic(u64::from(ack) * 8) {
            word.store(nonce, Ordering::Release);
        }
        Some((ack, nonce))
    }

    pub(crate) fn is_done(&self, ack: u32) -> bool {
        let word = self.region.atomic(u64::from(ack) * 8);
        word.is_some_and(|word| word.load(Ordering::Acquire) == 0)
    }

    /// The word may be used for another message at once: an acknowledgement that comes late does not
    /// find its number there.
    pub(crate) fn give_back(&self, ack: u32) {
        self.free
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(ack);
    }
}

/// Receives the messages to one service of a node.
#[derive(Debug)]
pub struct Listener(Kind);

#[derive(Debug)]
enum Kind {
    Local {
        core: Arc<Core>,
        mailbox: Arc<LocalBox>,
        service: Service,
    },
    Attached(crate::attach::RingListener),
}

impl Listener {
    pub(crate) fn local(core: &Arc<Core>, service: Service) -> Result<Self> {
        let mailbox = Arc::new(LocalBox::new());
        core.inbox.open(service, Arc::clone(&mailbox) as _)?;
        Ok(Self(Kind::Local {
            core: Arc::clone(core),
            mailbox,
            service,
        }))
    }

    pub(crate) fn attached(listener: crate::attach::RingListener) -> Self {
        Self(Kind::Attached(listener))
    }

    /// The next message.
    ///
    /// # Errors
    /// [`Error::TimedOut`] where none comes; [`Error::Disconnected`] where the daemon is gone.
    pub fn receive(&self, limit: Duration) -> Result<Message> {
        let end = Deadline::after(limit);
        let late = Error::TimedOut {
            what: "a message",
            limit,
        };
        match &self.0 {
            Kind::Local { mailbox, .. } => mailbox.signal.wait(end, || mailbox.pop()).ok_or(late),
            Kind::Attached(ring) => ring.receive(end)?.ok_or(late),
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Kind::Local { core, service, .. } = &self.0 {
            core.inbox.close(*service);
        }
    }
}

impl Node {
    /// A connection to whoever sent `message`, without a look-up: its header says where that is.
    ///
    /// # Errors
    /// As [`connect`](Self::connect).
    pub fn connect_back(&self, message: &Message) -> Result<VirtualQueue> {
        self.connect_at(message.from(), message.address())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_says_what_it_was_made_of() {
        let mut header = Header {
            from: NodeId(0x0102_0304_0506_0708),
            address: DcAddress {
                number: 11,
                key: 12,
                lid: 13,
                gid: 14,
            },
            len: 1 << 33,
            large: None,
        };
        assert_eq!(Header::decode(&header.encode()), Some(header));
        header.large = Some(Descriptor {
            remote: RemoteSlice {
                key: RKey(99),
                offset: 1 << 40,
            },
            ack: 3,
            nonce: u64::MAX - 1,
        });
        assert_eq!(Header::decode(&header.encode()), Some(header));
        let mut other = header.encode();
        other[0] ^= 1;
        assert_eq!(Header::decode(&other), None);
    }
}
