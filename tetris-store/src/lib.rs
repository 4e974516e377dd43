//! One copy of every tensor on the machine, whoever loads it.
//!
//! A [`Store`] is a directory, usually on a tmpfs, in which each tensor is one read-only file named
//! by its content. Processes map those files, so that ten of them that serve the same model, or ten
//! fine-tunes of one base, hold what they have in common once. No daemon is needed: a lease is a
//! kernel lock that ends with its process, however that ends.
//!
//! # How to start
//!
//! Open a store, bring a model in, attach to it:
//!
//! ```
//! use carlsbad_types::ByteSize;
//! use tetris_store::{Store, StoreConfig, open_model};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let dir = tempfile::tempdir()?;
//! # let write = |name: &str, head: f32| -> Result<_, Box<dyn std::error::Error>> {
//! #     use safetensors::{Dtype, tensor::TensorView};
//! #     let path = dir.path().join(name);
//! #     let (base, head) = (vec![1; 1 << 20], head.to_le_bytes());
//! #     let tensors = [
//! #         ("base.weight", TensorView::new(Dtype::F32, vec![1 << 18], &base)?),
//! #         ("head.weight", TensorView::new(Dtype::F32, vec![1], &head)?),
//! #     ];
//! #     safetensors::serialize_to_file(tensors, None, &path)?;
//! #     Ok(path)
//! # };
//! # let (base, tuned) = (write("base.safetensors", 1.0)?, write("tuned.safetensors", 2.0)?);
//! # let root = dir.path().join("store");
//! let store = Store::open(StoreConfig::at(root))?; // "/dev/shm/tetris", say
//! store.ingest(&*open_model(&base)?)?;
//! let tuned = store.ingest(&*open_model(&tuned)?)?; // 1 MiB of it is there already
//! assert_eq!(tuned.shared(), ByteSize::mib(1));
//!
//! let model = store.attach(&tuned.model)?; // a lease: nothing of it is freed
//! let head = model.tensor("head.weight")?;
//! assert_eq!(head.bytes, 2f32.to_le_bytes()); // in everybody's pages, read-only
//! drop(model); // idle from now on: `store.reclaim()` frees it a minute later
//! # Ok(())
//! # }
//! ```
//!
//! A library that only attaches leaves reclaiming to somebody: a process that calls
//! [`Store::reclaim`] now and then, or the agent (feature `daemon`).
//!
//! # What to look at for what
//!
//! | you want to | look at |
//! |---|---|
//! | read safetensors, ONNX or GGUF, or bring tensors of your own | [`open_model`], [`ModelSource`] |
//! | see tensors in this process | [`Store::attach`], [`SharedModel`], [`TensorRef`] |
//! | run candle models on shared pages | `candle` (feature `candle`) |
//! | serve torch or ONNX Runtime, unmodified | [`Store::export_view`], [`ViewKind`] |
//! | limit, free, check | [`StoreConfig::quota`], [`Store::reclaim`], [`Store::verify`] |
//! | know what models have in common | [`Store::overlap`], [`Manifest::overlap`] |
//! | keep tenants from learning of each other | [`Domain`] |
//! | let one process fill, reclaim and export for others | `agent` (feature `daemon`) |
//! | place functions where their tensors are | [`schedule`] |
//! | batch requests under an SLO | [`runtime`] |
//! | decide how long instances stay | [`keep_alive`] |
//!
//! # How it fits together
//!
//! A [`ModelSource`] says what tensors there are and reads them. Ingest hashes them into
//! [`TensorId`]s while it writes what the store lacks, and commits a [`Manifest`] that names the
//! stored files; its hash is the [`ModelId`]. Attaching takes a shared lock on the manifest and maps
//! the files; a sweep frees what has been without such a lock, and without a view, for the
//! keep-alive time. [`lifecycle`] is that life of a tensor as a state machine without input or
//! output, and every decision is taken there; [`schedule`], [`runtime::Profile`] and [`keep_alive`]
//! are such policies as well.
//!
//! Every failure is an [`Error`] that says what was tried, on what, and what to do. What the crate
//! does not do stands in the README under *Limits*.

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

mod adapters;
#[cfg(feature = "daemon")]
pub mod agent;
mod attach;
mod backing;
mod content;
mod element;
mod error;
mod hint;
mod huge_pages;
mod id;
mod ingest;
pub mod keep_alive;
mod label;
mod lease;
pub mod lifecycle;
mod lock;
mod manifest;
mod object;
mod overlap;
mod publish;
mod quota;
mod reclaim;
mod regular;
mod root;
pub mod runtime;
pub mod schedule;
mod seconds;
mod source;
mod stamp;
mod store;
mod verify;
mod view;

#[cfg(feature = "candle")]
pub use adapters::candle;
pub use attach::{SharedModel, TensorRef};
pub use element::{BlockType, ElementType};
pub use error::{Error, Result};
pub use huge_pages::{HugePages, HugePagesInForce};
pub use id::{Domain, ModelId, ObjectId, TensorId};
pub use ingest::{IngestOptions, Ingested, Progress};
pub use manifest::{Manifest, Sidecar, SourceFormat, TensorEntry};
pub use overlap::Overlap;
pub use reclaim::ReclaimReport;
pub use source::{
    GgufSource, ModelSource, OnnxSource, SafetensorsSource, SourceTensor, open_model,
    open_model_from,
};
pub use store::{BackingKind, Stats, Store, StoreConfig, StoredModel};
pub use verify::{Damage, VerifyReport};
pub use view::{View, ViewKind};
