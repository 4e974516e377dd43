//! RDMA-style connections in microseconds from a shared, checked pool of queue pairs.
//!
//! Making an RDMA connection costs milliseconds: the driver's context, queues, a handshake. Here the
//! queue pairs are there already, and shared: connecting is a look-up, and what a user holds is a
//! [`VirtualQueue`]. Since one bad request would break a queue pair for all who share it, every
//! request is [checked](Malformed) before it reaches one.
//!
//! # How to start
//!
//! Two nodes of one process, on shared memory:
//!
//! ```
//! use std::time::Duration;
//!
//! use krcore::{Access, ByteSize, Config, Node, NodeId, Op, ShmFabric, Status, WorkRequest};
//!
//! # fn main() -> krcore::Result<()> {
//! let fabric = ShmFabric::new();
//! let server = Node::embedded(fabric.clone(), NodeId(1), Config::default())?;
//! let client = Node::embedded(fabric, NodeId(2), Config::default())?;
//! let table = server.register(ByteSize::kib(64), Access::ReadWrite)?;
//! let local = client.register(ByteSize::kib(4), Access::Local)?;
//! assert!(table.write(512, b"one-sided"));
//!
//! let second = Duration::from_secs(1);
//! let mut queue = client.connect(server.id(), second)?; // well below a microsecond
//! queue.post(&[WorkRequest::new(7, Op::Read, local.slice(0, 9), table.remote(512))])?;
//! let done = queue.wait(second)?;
//! assert_eq!((done.id, done.status), (7, Status::Success));
//! let mut bytes = [0; 9];
//! assert!(local.read(0, &mut bytes));
//! assert_eq!(&bytes, b"one-sided");
//! # Ok(())
//! # }
//! ```
//!
//! Processes that do not want to be a node of their own, because they live for milliseconds only or
//! nobody trusts them, [attach](Node::attach) to a node daemon (`krcored`, or `Daemon` in a program
//! of yours, with the feature `daemon`) and use the same API.
//!
//! # What to look at for what
//!
//! | you want to | look at |
//! |---|---|
//! | be a node, or attach to one | [`Node`] |
//! | READ, WRITE, compare and swap, add, SEND | [`VirtualQueue`], [`WorkRequest`] |
//! | have memory that peers may reach | [`Node::register`], [`MemoryRegion`] |
//! | receive messages | [`Node::listen`], [`Listener`], [`Message`] |
//! | wait in an event loop | [`VirtualQueue`] as [`AsFd`](std::os::fd::AsFd) |
//! | find nodes by one-sided READs | [`MetaServer`], [`Config::meta`] |
//! | know why a request was refused | [`Malformed`], [`Status`] |
//! | put all of this on something else | [`fabric`] |
//!
//! # How it fits together
//!
//! A [fabric](fabric::Fabric) has raw queue pairs with the state machine of RDMA: one bad request
//! puts a pair in ERR, for every sharer. The pool keeps a few pairs that reach every node, and
//! dedicated ones to peers that are talked to much; a virtual queue moves between them by a fence.
//! Completions are dispatched by their wr_id, which says whose they are, which life of that virtual
//! queue posted them, and how many requests they cover. Requests are checked against what the peer
//! publishes of its memory, which is believed for one lease. A daemon does the same for processes
//! that share rings with it, and trusts nothing that stands there.

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

mod attach;
mod channel;
mod check;
mod clock;
mod control;
mod dispatch;
mod error;
pub mod fabric;
mod message;
mod meta;
mod mr;
mod node;
mod notify;
mod pool;
mod region;
mod ring;
#[cfg(feature = "daemon")]
mod server;
mod sync;
mod transfer;
mod vq;
mod wire;

pub use attach::Mode;
pub use carlsbad_types::ByteSize;
pub use check::{MAX_INLINE, MAX_TRANSFER};
pub use error::{Error, Malformed, PostError, Result};
#[cfg(feature = "tcp")]
pub use fabric::tcp::{PresharedKey, TcpFabric, TcpOptions};
pub use fabric::{DcAddress, Op, ShmFabric, Status};
#[cfg(feature = "verbs")]
pub use fabric::{VerbsConfig, VerbsFabric};
pub use message::{Listener, Message};
pub use meta::{MetaServer, MetaTable};
pub use node::{Config, Node, NodeId, Service, Stats};
pub use region::{Access, MemoryRegion, RKey, RegionSlice, RemoteSlice};
#[cfg(feature = "daemon")]
pub use server::{Daemon, DaemonOptions};
pub use vq::{Completion, VirtualQueue, WorkRequest};
#[doc(hidden)]
pub use wire::fuzz_entry;

/// Decodes the frames of a record of the TCP fabric: for the fuzz target.
#[cfg(feature = "tcp")]
#[doc(hidden)]
pub fn fuzz_frames(bytes: &[u8]) {
    fabric::tcp::fuzz_frames(bytes);
}
