//! What a model consists of: its tensors by name, where their bytes are, and its small files.

use carlsbad_types::{ByteSize, Shape};
use serde::{Deserialize, Serialize};

use crate::element::ElementType;
use crate::id::{ObjectId, TensorId};

/// The format a model came in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum SourceFormat {
    /// One safetensors file, or several with a Hugging Face index.
    Safetensors,
    /// An ONNX graph with its initializers inside or in external files.
    Onnx,
    /// A GGUF file.
    Gguf,
}

/// One tensor of a model: what it is, and where its bytes are.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TensorEntry {
    /// Its name in the model.
    pub name: String,
    /// Its element type.
    pub element: ElementType,
    /// Its extents.
    pub shape: Shape,
    /// What it is.
    pub id: TensorId,
    /// The stored file that holds its bytes.
    pub object: ObjectId,
    /// Where in that file they begin, in bytes.
    pub offset: u64,
    /// How many bytes there are.
    pub len: u64,
}

/// A small file that belongs to a model and is kept whole: the graph of an ONNX model without its
/// weights, the metadata of a GGUF file, a tokenizer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sidecar {
    /// Its file name, without any folder.
    pub name: String,
    /// What is in it.
    pub bytes: Vec<u8>,
}

/// A model in the store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// The format it came in.
    pub format: SourceFormat,
    /// Its tensors, sorted by name.
    pub tensors: Vec<TensorEntry>,
    /// Its small files, sorted by name.
    pub sidecars: Vec<Sidecar>,
}

impl Manifest {
    /// Bytes of all its tensors, as a private copy would take.
    pub fn byte_size(&self) -> ByteSize {
        self.tensors
            .iter()
            .map(|tensor| ByteSize::new(tensor.len))
            .sum()
    }

    /// The tensor called `name`.
    pub fn tensor(&self, name: &str) -> Option<&TensorEntry> {
        self.tensors
            .binary_search_by(|tensor| tensor.name.as_str().cmp(name))
            .ok()
            .map(|i| &self.tensors[i])
    }
}
