//! One copy of every tensor on the machine, whoever loads it.

mod element;
mod error;
mod id;
mod lifecycle;
mod manifest;
mod source;

pub use element::{BlockType, ElementType};
pub use error::{Error, Result};
pub use id::{Domain, ModelId, ObjectId, TensorId};
pub use lifecycle::{Event, IllegalTransition, Lifecycle, Moment};
pub use manifest::{Manifest, Sidecar, SourceFormat, TensorEntry};
pub use source::{
    GgufSource, ModelSource, OnnxSource, SafetensorsSource, SourceTensor, open_model,
    open_model_from,
};
