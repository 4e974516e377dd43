use std::io;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::fabric::Status;
use crate::node::{NodeId, Service};

/// `std::result::Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong, on what, and what to do about it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused.
    #[error("cannot {what}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// A size or a number is outside of what is supported.
    #[error("{what} is {given}: it has to be between {least} and {most}")]
    OutOfRange {
        /// Which value.
        what: &'static str,
        /// What was given.
        given: u64,
        /// The least value.
        least: u64,
        /// The greatest value.
        most: u64,
    },
    /// Another living node of the fabric has this id.
    #[error("{0} is on the fabric already: give this one another id, or drop the other first")]
    NodeExists(NodeId),
    /// No metadata server and no peer knows this node.
    #[error("{0} is unknown: no metadata server has it and it does not answer itself")]
    UnknownNode(NodeId),
    /// Every slot of the table of regions is taken.
    #[error("this node has {0} registered regions, as many as it may: deregister one")]
    TooManyRegions(usize),
    /// Every virtual queue that this process or queue pair may have is taken.
    #[error("there are {0} virtual queues, as many as there may be: drop one")]
    TooManyQueues(usize),
    /// A bucket of the metadata table is full.
    #[error("no room for {0} in the metadata table: create it for more nodes")]
    MetaFull(NodeId),
    /// The region is not, or no longer, registered with this node.
    #[error("the region is not registered with this node")]
    NotRegistered,
    /// A descriptor that should be a sealed memfd is none.
    #[error("the descriptor is no memfd whose length is sealed (F_SEAL_SHRINK and F_SEAL_GROW)")]
    NotSealed,
    /// Somebody listens there already.
    #[error("{0} of this node has a listener already: drop it, or choose another service")]
    ServiceTaken(Service),
    /// A work request was refused before it reached a queue pair.
    #[error(transparent)]
    Post(#[from] PostError),
    /// A request failed on the fabric.
    #[error("{what} at {peer} failed: {status}")]
    Failed {
        /// What was tried.
        what: &'static str,
        /// At which node.
        peer: NodeId,
        /// How it ended.
        status: Status,
    },
    /// Nothing came in time.
    #[error("{what} took longer than {limit:?}")]
    TimedOut {
        /// What was waited for.
        what: &'static str,
        /// The deadline.
        limit: Duration,
    },
    /// There is no RDMA device that can be used.
    #[error("no RDMA device: {0}; `ibv_devinfo` shows those there are")]
    NoDevice(String),
    /// No daemon answers at this socket.
    #[error("no daemon at {}: start `krcored --socket` there ({source})", path.display())]
    NoDaemon {
        /// The socket.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The file with the key of a TCP fabric cannot be used.
    #[error("the key in {} cannot be used: {why}", path.display())]
    BadKey {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: &'static str,
    },
    /// The daemon is gone. What was outstanding may have been done, or not.
    #[error("the node daemon is gone: attach again when it has been restarted")]
    Disconnected,
    /// The daemon did not do what was asked of it.
    #[error("the node daemon refused: {0}")]
    Refused(String),
    /// What the other side sent is none of this protocol's messages.
    #[error("the node daemon and this process do not understand each other: {0}")]
    Protocol(&'static str),
}

/// Why a list of work requests was refused. Nothing of the list was posted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("work request {index} was refused: {why}")]
pub struct PostError {
    /// The first request that is wrong.
    pub index: usize,
    /// What is wrong with it.
    pub why: Malformed,
}

/// What is wrong with a work request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error, Serialize, Deserialize)]
#[non_exhaustive]
#[repr(u8)]
pub enum Malformed {
    /// The request moves no bytes.
    #[error("it moves no bytes")]
    ZeroLength = 1,
    /// The request moves more than one request may.
    #[error("it is longer than one request may be")]
    TooLong,
    /// The local slice does not lie in its region.
    #[error("its local slice does not lie in its region")]
    LocalRange,
    /// The local region is none of this node's, or no longer.
    #[error("its local region is not registered with this node")]
    ForeignRegion,
    /// `addr + len` overflows, or lies outside of the remote region.
    #[error("its remote range does not lie in the remote region")]
    RemoteRange,
    /// The peer publishes no region under that key: it never did, or no longer does.
    #[error("the peer publishes no region under that key")]
    StaleKey,
    /// The region does not allow this operation.
    #[error("the region does not allow this operation")]
    Denied,
    /// An atomic needs 8 bytes at a multiple of 8, on both sides.
    #[error("an atomic needs 8 bytes at a multiple of 8, on both sides")]
    Unaligned,
    /// There is no such operation.
    #[error("there is no such operation")]
    UnknownOperation,
    /// The peer did not answer when its regions were looked up.
    #[error("the peer is gone")]
    PeerGone,
    /// The peer has no receive buffer free: send again after it has received.
    #[error("nobody listens there, or has no receive buffer free")]
    ReceiverNotReady,
    /// Too many large messages of this node wait to be fetched.
    #[error("too many large messages wait to be fetched")]
    TooManyLarge,
    /// The node daemon is gone.
    #[error("the node daemon is gone")]
    Disconnected,
}

impl Malformed {
    const ALL: [Self; 13] = [
        Self::ZeroLength,
        Self::TooLong,
        Self::LocalRange,
        Self::ForeignRegion,
        Self::RemoteRange,
        Self::StaleKey,
        Self::Denied,
        Self::Unaligned,
        Self::UnknownOperation,
        Self::PeerGone,
        Self::ReceiverNotReady,
        Self::TooManyLarge,
        Self::Disconnected,
    ];

    /// The reverse of `as u8`.
    pub(crate) fn from_code(code: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|one| *one as u8 == code)
    }
}
