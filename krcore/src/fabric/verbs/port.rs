//! A node's end: its regions, registered with the device, and the connections that peers have made to
//! it. What they SEND lands in buffers of their connection, goes to the node's sink from there, and the
//! stream says whether somebody took it.

use std::collections::HashMap;
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use carlsbad_types::ByteSize;

use super::device::{Connection, Device, Endpoint, Outcome, Registration};
use super::handshake::{Frame, Place, Stream};
use super::{Handle, VerbsConfig};
use crate::check::MAX_INLINE;
use crate::error::Result;
use crate::fabric::{DcAddress, Port, Received, SEND_HEADER, Sink};
use crate::node::{NodeId, Service};
use crate::region::{Access, MemoryRegion, RKey};

/// Messages that one connection may have under way: it has so many buffers, so that an adapter never
/// finds none.
pub(super) const WINDOW: usize = 16;
/// What goes before the bytes of a message on this fabric: its number, its service, its header.
pub(super) const PREFIX: usize = 16 + SEND_HEADER;
/// A receive buffer.
pub(super) const MESSAGE: usize = PREFIX + MAX_INLINE as usize;

/// Where the handshake of the node of that address is: an address is an IPv4 address, a port, and
/// which life of the node it is.
pub(super) fn socket_address(address: DcAddress) -> SocketAddrV4 {
    SocketAddrV4::new(Ipv4Addr::from(address.number), address.lid)
}

pub(super) fn address_of(socket: SocketAddrV4) -> DcAddress {
    DcAddress {
        number: u32::from(*socket.ip()),
        key: fastrand::u32(1..),
        lid: socket.port(),
        gid: 0,
    }
}

/// What the port and the fabric's thread share.
pub(super) struct Open {
    pub(super) node: NodeId,
    pub(super) address: DcAddress,
    pub(super) listener: TcpListener,
    pub(super) sink: Arc<dyn Sink>,
    device: Arc<Device>,
    regions: Mutex<HashMap<RKey, Registration>>,
    left: AtomicBool,
    closed: Mutex<bool>,
    is_closed: Condvar,
}

impl Open {
    pub(super) fn new(
        node: NodeId,
        address: DcAddress,
        listener: TcpListener,
        sink: Arc<dyn Sink>,
        device: &Arc<Device>,
    ) -> Self {
        Self {
            node,
            address,
            listener,
            sink,
            device: Arc::clone(device),
            regions: Mutex::default(),
            left: AtomicBool::new(false),
            closed: Mutex::new(false),
            is_closed: Condvar::new(),
        }
    }

    fn regions(&self) -> MutexGuard<'_, HashMap<RKey, Registration>> {
        self.regions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn find(&self, region: RKey) -> Option<Place> {
        let regions = self.regions();
        let registration = regions.get(&region)?;
        Some(Place {
            key: registration.remote_key(),
            address: registration.address(),
        })
    }

    pub(super) fn has_left(&self) -> bool {
        self.left.load(Ordering::Acquire)
    }

    /// The thread has ended all connections to it.
    pub(super) fn close(&self) {
        *self.closed.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.is_closed.notify_all();
    }

    fn await_close(&self) {
        /// The thread is never longer about one round than this.
        const LIMIT: Duration = Duration::from_secs(1);
        let closed = self.closed.lock().unwrap_or_else(PoisonError::into_inner);
        let _late = self
            .is_closed
            .wait_timeout_while(closed, LIMIT, |closed| !*closed);
    }
}

/// A node on the fabric.
pub(super) struct VerbsPort {
    pub(super) open: Arc<Open>,
    pub(super) handle: Arc<Handle>,
}

impl std::fmt::Debug for VerbsPort {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VerbsPort")
            .field("node", &self.open.node)
            .finish_non_exhaustive()
    }
}

impl Port for VerbsPort {
    fn address(&self) -> DcAddress {
        self.open.address
    }

    fn expose(&self, region: &Arc<MemoryRegion>) -> Result<()> {
        let registration = Registration::new(&self.open.device, region, region.access())?;
        self.open.regions().insert(region.key(), registration);
        Ok(())
    }

    fn revoke(&self, key: RKey) {
        self.open.regions().remove(&key);
    }

    fn leave(&self) {
        if self.open.left.swap(true, Ordering::AcqRel) {
            return;
        }
        self.open.regions().clear();
        if self.handle.kick_other() {
            self.open.await_close();
        }
    }
}

impl Drop for VerbsPort {
    fn drop(&mut self) {
        self.leave();
    }
}

/// A connection that a peer has made.
pub(super) struct Served {
    pub(super) open: Arc<Open>,
    pub(super) stream: Stream,
    receiving: Option<Receiving>,
}

struct Receiving {
    connection: Connection,
    buffers: Arc<MemoryRegion>,
    registration: Registration,
}

impl Receiving {
    fn new(device: &Arc<Device>, id: u64, peer: &Endpoint, config: &VerbsConfig) -> Result<Self> {
        let size = ByteSize::new((WINDOW * MESSAGE) as u64);
        let buffers = MemoryRegion::create(size, Access::Local, RKey(0), 0)?;
        let registration = Registration::new(device, &buffers, Access::Local)?;
        let mut connection = Connection::new(device, id, 1, WINDOW as u32)?;
        connection.connect(peer, config)?;
        connection.arm();
        let mut receiving = Self {
            connection,
            buffers,
            registration,
        };
        for at in 0..WINDOW as u64 {
            receiving.offer(at)?;
        }
        Ok(receiving)
    }

    fn offer(&mut self, at: u64) -> Result<()> {
        let part = self.registration.part(at * MESSAGE as u64, MESSAGE as u32);
        self.connection.receive(at, part)
    }

    /// What lies in a buffer; `None` where it is no message of this fabric's.
    fn read(&self, at: u64, len: usize) -> Option<(u64, Received)> {
        let mut prefix = [0; PREFIX];
        let mut body = vec![0; len.checked_sub(PREFIX)?.min(MESSAGE - PREFIX)];
        let begin = at * MESSAGE as u64;
        let whole = self.buffers.read(begin, &mut prefix)
            && self.buffers.read(begin + PREFIX as u64, &mut body);
        let number = u64::from_le_bytes(*prefix.first_chunk()?);
        let service = Service(u16::from_le_bytes([prefix[8], prefix[9]]));
        let header = Box::new(*prefix.last_chunk::<SEND_HEADER>()?);
        whole.then_some((
            number,
            Received {
                service,
                header,
                body,
            },
        ))
    }
}

impl Served {
    pub(super) fn new(open: Arc<Open>, stream: Stream) -> Self {
        Self {
            open,
            stream,
            receiving: None,
        }
    }

    /// Whether it has become a connection.
    pub(super) fn is_connected(&self) -> bool {
        self.receiving.is_some()
    }

    /// Answers what the peer has said; false where the connection has ended.
    #[must_use]
    pub(super) fn hear(&mut self, id: u64, config: &VerbsConfig, made: &mut u64) -> bool {
        let mut said = Vec::new();
        let mut open = self.stream.receive(|frame| said.push(frame));
        for frame in said {
            let answer = match frame {
                Frame::Ask => Frame::Here {
                    node: self.open.node,
                    address: self.open.address,
                },
                Frame::Hello { key, endpoint }
                    if key == self.open.address.key && self.receiving.is_none() =>
                {
                    match Receiving::new(&self.open.device, id, &endpoint, config) {
                        Ok(receiving) => {
                            *made += 1;
                            let endpoint = receiving.connection.endpoint();
                            self.receiving = Some(receiving);
                            Frame::Ready { endpoint }
                        }
                        Err(why) => {
                            tracing::warn!(%why, "a peer cannot be connected");
                            Frame::Refused
                        }
                    }
                }
                Frame::Hello { .. } => Frame::Refused,
                Frame::Find { region } => Frame::Found {
                    region,
                    place: self.open.find(region),
                },
                _ => return false,
            };
            open &= self.stream.send(&answer);
        }
        open
    }

    /// Hands on what has landed; false where the peer does not hear what became of it.
    #[must_use]
    pub(super) fn deliver(&mut self) -> bool {
        let Some(receiving) = &mut self.receiving else {
            return true;
        };
        // Before it is looked at, so that nothing is missed.
        receiving.connection.arm();
        loop {
            let mut any = false;
            for done in receiving.connection.poll() {
                any = true;
                // One that failed is the end of the pair: the peer will end the connection.
                if done.outcome != Outcome::Success {
                    continue;
                }
                let message = receiving.read(done.id, done.len);
                // Before the peer hears of it, so that its next message finds a buffer.
                if let Err(why) = receiving.offer(done.id) {
                    tracing::debug!(%why, "no more messages of this connection");
                }
                let Some((message, received)) = message else {
                    return false;
                };
                let sink = &self.open.sink;
                let taken = !self.open.has_left() && sink.reserve(received.service);
                if taken {
                    sink.deliver(received);
                }
                if !self.stream.send(&Frame::Delivered { message, taken }) {
                    return false;
                }
            }
            if !any {
                return true;
            }
        }
    }
}
