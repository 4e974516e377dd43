//! RDMA connections in microseconds from a shared, checked pool.
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
pub use fabric::{DcAddress, Op, ShmFabric, Status};
pub use message::{Listener, Message};
pub use meta::MetaServer;
pub use node::{Config, Node, NodeId, Service, Stats};
pub use region::{Access, MemoryRegion, RKey, RegionSlice, RemoteSlice};
#[cfg(feature = "daemon")]
pub use server::{Daemon, DaemonOptions};
pub use vq::{Completion, VirtualQueue, WorkRequest};
#[doc(hidden)]
pub use wire::fuzz_entry;
