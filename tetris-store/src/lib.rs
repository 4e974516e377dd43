//! One copy of every tensor on the machine, whoever loads it.

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
mod root;
pub mod runtime;
pub mod schedule;
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
