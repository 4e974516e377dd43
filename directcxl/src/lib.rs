//! CXL memory as named, mappable, crash-safe namespaces.
//!
//! A [`Pool`] divides the memory of a device, or of a file that stands in for one, into
//! [`Namespace`]s: pieces with names that any number of processes map, and several hosts if the
//! memory is connected to several. Nobody has to be asked for that: there is no daemon. All that a
//! pool knows lies in its memory, in a [format](layout) that a crash at any moment leaves whole.
//!
//! # How to start
//!
//! Choose a backend, make a pool of it, make a namespace:
//!
//! ```
//! use directcxl::{ByteSize, FormatOptions, MemfdHdm, NamespaceOptions, Pool};
//!
//! # fn main() -> directcxl::Result<()> {
//! let memory = MemfdHdm::new(ByteSize::mib(32))?; // or FileHdm, or DevDax
//! let pool = Pool::format(memory, FormatOptions::default())?;
//! let table = pool.create("table", ByteSize::mib(4), NamespaceOptions::default())?;
//! table.write(4096, &42u64.to_le_bytes())?;
//! table.publish(4096..4104)?; // in memory, for other hosts and after a power failure
//!
//! // What names it for others, for ever.
//! let handle = table.handle();
//! pool.remove("table")?; // the name is free; `table` can still be used
//! assert!(pool.resolve(handle).is_err()); // but nobody attaches any more
//! drop(table); // and now its memory can be used again
//! assert_eq!(pool.reclaim()?, ByteSize::mib(4));
//! # Ok(())
//! # }
//! ```
//!
//! # What to look at for what
//!
//! | you want to | look at |
//! |---|---|
//! | make, find, resize and remove namespaces | [`Pool`] |
//! | use the memory of one | [`Namespace`] |
//! | keep many small things in one, shared by processes | [`heap`] |
//! | share memory between hosts without coherent caches | [`Namespace::publish`], [`Namespace::acquire`], [`flush`] |
//! | decide which host writes | [`Role`], [`Epoch`] |
//! | survive memory that is unplugged or poisoned | [`Namespace::read`], [`Error::Removed`], [`Error::Poisoned`] |
//! | make a region of CXL devices | [`topology`] |
//! | put a pool on something else | [`Backend`], [`medium`] |
//! | read a pool in another language | [`layout`] |
//!
//! # How it fits together
//!
//! A [`Backend`] maps memory. The superblock says how it is divided; each host has an area of its own
//! in it, with a log. A [`Pool`] reads the log of the host that writes, and follows it; changes are
//! decided by a catalogue that does no input or output, and appended under a lock that dies with its
//! holder. Attaching takes a lease, looks again whether the namespace is still there, and maps it.
//! Every failure is an [`Error`] that says what was tried, on what, and what to do. What the crate
//! does not do stands in the README under *Limits*.

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

mod arch;
mod attach;
pub mod backend;
mod catalog;
mod check;
mod error;
mod fault;
pub mod flush;
pub mod heap;
mod host;
pub mod layout;
mod lease;
mod lock;
mod log;
pub mod medium;
mod namespace;
mod pool;
mod redo;
mod reserve;
mod salvage;
mod space;
mod superblock;
mod take_over;
pub mod topology;
mod writer;

pub use backend::{Backend, DevDax, FileHdm, MemfdHdm};
pub use check::{CheckReport, Problem};
pub use error::{Error, Result};
pub use heap::{Heap, HeapOptions};
pub use host::{Epoch, HostId, Role};
pub use namespace::{Contents, Handle, Namespace, NamespaceInfo, NamespaceOptions};
pub use pool::{Pool, PoolInfo};
pub use salvage::{Salvage, Salvaged};
pub use superblock::FormatOptions;

#[doc(no_inline)]
pub use carlsbad_types::ByteSize;
