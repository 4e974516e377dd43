//! What a process and its daemon say to each other beside the data path: packets on a Unix socket,
//! with descriptors (SCM_RIGHTS).

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::fabric::DcAddress;
use crate::node::{NodeId, Service, Stats};
use crate::region::{Access, RKey};

/// Of the packets and of the shared memory.
pub(crate) const VERSION: u32 = 2;
/// The longest packet.
const PACKET: usize = 4096;
/// The most descriptors of one packet.
const DESCRIPTORS: usize = 2;

/// What a process asks of its daemon.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) enum Request {
    Hello { version: u32, trusted: bool },
    Channel,
    Resolve { peer: NodeId, millis: u64 },
    Register { access: Access },
    Deregister { key: RKey },
    Map { peer: NodeId, key: RKey },
    Listen { service: Service },
    Unlisten { service: Service },
    Arm { channel: u32, lane: u32 },
    Stats,
}

/// What a daemon answers.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) enum Reply {
    Welcome {
        node: NodeId,
        address: DcAddress,
    },
    Channel,
    Address(DcAddress),
    Registered(RKey),
    Mapped(Access),
    /// Not on this machine: it cannot be mapped.
    Elsewhere,
    Done,
    Stats(Box<Stats>),
    Failed(Failure),
}

/// Why a daemon does not do what it was asked.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) enum Failure {
    UnknownNode(NodeId),
    TooManyRegions(u64),
    TooManyQueues(u64),
    NotRegistered,
    NotSealed,
    ServiceTaken(Service),
    StaleKey,
    Other(String),
}

impl From<Failure> for Error {
    fn from(why: Failure) -> Self {
        match why {
            Failure::UnknownNode(node) => Self::UnknownNode(node),
            Failure::TooManyRegions(most) => Self::TooManyRegions(most as usize),
            Failure::TooManyQueues(most) => Self::TooManyQueues(most as usize),
            Failure::NotRegistered | Failure::StaleKey => Self::NotRegistered,
            Failure::NotSealed => Self::NotSealed,
            Failure::ServiceTaken(service) => Self::ServiceTaken(service),
            Failure::Other(why) => Self::Refused(why),
        }
    }
}

impl From<Error> for Failure {
    fn from(why: Error) -> Self {
        match why {
            Error::UnknownNode(node) => Self::UnknownNode(node),
            Error::TooManyRegions(most) => Self::TooManyRegions(most as u64),
            Error::TooManyQueues(most) => Self::TooManyQueues(most as u64),
            Error::NotRegistered => Self::NotRegistered,
            Error::NotSealed => Self::NotSealed,
            Error::ServiceTaken(service) => Self::ServiceTaken(service),
            other => Self::Other(other.to_string()),
        }
    }
}

/// Sends a packet.
pub(crate) fn send(
    socket: BorrowedFd<'_>,
    packet: &impl Serialize,
    descriptors: &[BorrowedFd<'_>],
) -> Result<()> {
    let bytes =
        postcard::to_allocvec(packet).map_err(|_| Error::Protocol("a packet cannot be encoded"))?;
    let raw: Vec<_> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let control: &[ControlMessage<'_>] = if raw.is_empty() { &[] } else { &rights };
    let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
    loop {
        let sent = sendmsg::<()>(
            socket.as_raw_fd(),
            &[IoSlice::new(&bytes)],
            control,
            flags,
            None,
        );
        match sent {
            Ok(_) => return Ok(()),
            Err(Errno::EINTR) => {}
            Err(Errno::EPIPE | Errno::ECONNRESET | Errno::ENOTCONN) => {
                return Err(Error::Disconnected);
            }
            Err(why) => {
                return Err(Error::Io {
                    what: "send a packet to the other side of the daemon's socket",
                    source: why.into(),
                });
            }
        }
    }
}

/// What was received.
pub(crate) enum Incoming<T> {
    /// A packet, with its descriptors.
    Packet(T, Vec<OwnedFd>),
    /// Nothing yet.
    Nothing,
    /// Some bytes that are no packet, or a packet whose descriptors did not fit into this process.
    Broken(&'static str),
    /// The other side is gone.
    Closed,
}

/// Receives a packet, where there is one.
pub(crate) fn receive<T: DeserializeOwned>(socket: BorrowedFd<'_>) -> Incoming<T> {
    let mut bytes = [0; PACKET];
    let mut control = nix::cmsg_space!([std::os::fd::RawFd; DESCRIPTORS]);
    let mut parts = [IoSliceMut::new(&mut bytes)];
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_CMSG_CLOEXEC;
    let (length, descriptors, flags) = loop {
        match recvmsg::<()>(socket.as_raw_fd(), &mut parts, Some(&mut control), flags) {
            Ok(message) => {
                let mut descriptors = Vec::new();
                for part in message.cmsgs().into_iter().flatten() {
                    if let ControlMessageOwned::ScmRights(raw) = part {
                        // SAFETY: the kernel has just made these descriptors for this process, and
                        // nobody else knows them.
                        let owned = |fd| unsafe { OwnedFd::from_raw_fd(fd) };
                        descriptors.extend(raw.into_iter().map(owned));
                    }
                }
                break (message.bytes, descriptors, message.flags);
            }
            Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) => return Incoming::Nothing,
            Err(_) => return Incoming::Closed,
        }
    };
    if length == 0 {
        return Incoming::Closed;
    }
    if flags.contains(MsgFlags::MSG_CTRUNC) {
        return Incoming::Broken("descriptors were lost: this process has too many open");
    }
    if flags.contains(MsgFlags::MSG_TRUNC) {
        return Incoming::Broken("a packet is too long");
    }
    match postcard::from_bytes(&bytes[..length]) {
        Ok(packet) => Incoming::Packet(packet, descriptors),
        Err(_) => Incoming::Broken("a packet makes no sense"),
    }
}
