//! What a model consists of: its tensors by name, where their bytes are, and its small files.

use carlsbad_types::{ByteSize, Shape};
use serde::{Deserialize, Serialize};

use crate::element::ElementType;
use crate::error::{Error, Result};
use crate::id::{Domain, ModelId, ObjectId, TensorId};

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

    /// What the model is: its format, its tensors by name and its sidecars, wherever they are kept.
    pub fn id(&self, domain: &Domain) -> ModelId {
        let mut hasher = domain.hasher("model");
        let mut field = |bytes: &[u8]| {
            hasher.update(&(bytes.len() as u64).to_le_bytes());
            hasher.update(bytes);
        };
        field(self.format.name().as_bytes());
        field(&(self.tensors.len() as u64).to_le_bytes());
        for tensor in &self.tensors {
            field(tensor.name.as_bytes());
            field(tensor.id.as_bytes());
        }
        for sidecar in &self.sidecars {
            field(sidecar.name.as_bytes());
            field(&sidecar.bytes);
        }
        ModelId::finish(&hasher)
    }

    /// The stored files it needs, each once.
    pub fn objects(&self) -> Vec<ObjectId> {
        let mut objects: Vec<_> = self.tensors.iter().map(|tensor| tensor.object).collect();
        objects.sort_unstable();
        objects.dedup();
        objects
    }

    /// The form in which it is stored and sent: Protocol Buffers, which are read in a tenth of the
    /// time that JSON takes.
    pub fn encode(&self) -> Vec<u8> {
        use prost::Message;
        let objects = self.objects();
        let position = |id| objects.binary_search(id).unwrap_or_default() as u32;
        wire::Manifest {
            version: wire::VERSION,
            format: self.format.name().to_owned(),
            objects: objects.iter().map(|id| id.as_bytes().to_vec()).collect(),
            tensors: self
                .tensors
                .iter()
                .map(|tensor| wire::Tensor {
                    name: tensor.name.clone(),
                    element: tensor.element.name().to_owned(),
                    shape: tensor.shape.dims().iter().map(|&n| n as u64).collect(),
                    id: tensor.id.as_bytes().to_vec(),
                    object: position(&tensor.object),
                    offset: tensor.offset,
                    len: tensor.len,
                })
                .collect(),
            sidecars: self
                .sidecars
                .iter()
                .map(|sidecar| wire::Sidecar {
                    name: sidecar.name.clone(),
                    bytes: sidecar.bytes.clone(),
                })
                .collect(),
        }
        .encode_to_vec()
    }

    /// What [`encode`](Self::encode) wrote.
    ///
    /// # Errors
    /// [`Error::BadManifest`] where the bytes are no manifest, or one that contradicts itself.
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        use prost::Message;
        let bad = |why: String| Error::BadManifest { why };
        let manifest = wire::Manifest::decode(bytes).map_err(|error| bad(error.to_string()))?;
        manifest.check().map_err(bad)
    }
}

impl SourceFormat {
    /// The name that goes into identities and manifests.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Safetensors => "safetensors",
            Self::Onnx => "onnx",
            Self::Gguf => "gguf",
        }
    }

    fn from_name(name: &str) -> Option<Self> {
        [Self::Safetensors, Self::Onnx, Self::Gguf]
            .into_iter()
            .find(|format| format.name() == name)
    }
}

/// The stored form, version 1.
mod wire {
    use carlsbad_types::Shape;

    use super::{SourceFormat, TensorEntry};
    use crate::element::ElementType;
    use crate::id::{ObjectId, TensorId};

    pub(super) const VERSION: u32 = 1;

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Manifest {
        #[prost(uint32, tag = "1")]
        pub(super) version: u32,
        #[prost(string, tag = "2")]
        pub(super) format: String,
        /// 32 bytes each, ascending.
        #[prost(bytes = "vec", repeated, tag = "3")]
        pub(super) objects: Vec<Vec<u8>>,
        #[prost(message, repeated, tag = "4")]
        pub(super) tensors: Vec<Tensor>,
        #[prost(message, repeated, tag = "5")]
        pub(super) sidecars: Vec<Sidecar>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Tensor {
        #[prost(string, tag = "1")]
        pub(super) name: String,
        #[prost(string, tag = "2")]
        pub(super) element: String,
        #[prost(uint64, repeated, tag = "3")]
        pub(super) shape: Vec<u64>,
        #[prost(bytes = "vec", tag = "4")]
        pub(super) id: Vec<u8>,
        /// Position in `objects`.
        #[prost(uint32, tag = "5")]
        pub(super) object: u32,
        #[prost(uint64, tag = "6")]
        pub(super) offset: u64,
        #[prost(uint64, tag = "7")]
        pub(super) len: u64,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct Sidecar {
        #[prost(string, tag = "1")]
        pub(super) name: String,
        #[prost(bytes = "vec", tag = "2")]
        pub(super) bytes: Vec<u8>,
    }

    impl Manifest {
        /// The manifest, or what contradicts itself in it.
        pub(super) fn check(self) -> Result<super::Manifest, String> {
            if self.version != VERSION {
                return Err(format!("version {}, expected {VERSION}", self.version));
            }
            let format = SourceFormat::from_name(&self.format)
                .ok_or_else(|| format!("unknown format {:?}", self.format))?;
            let objects: Vec<_> = self
                .objects
                .iter()
                .map(|id| ObjectId::try_from(&id[..]).map_err(|_| "an object id is not 32 bytes"))
                .collect::<Result<_, _>>()?;
            let tensors: Vec<_> = self
                .tensors
                .into_iter()
                .map(|tensor| tensor.check(&objects))
                .collect::<Result<_, _>>()?;
            if !tensors.is_sorted_by(|a, b| a.name < b.name) {
                return Err("its tensors are not sorted by name".into());
            }
            let sidecars: Vec<_> = self
                .sidecars
                .into_iter()
                .map(|Sidecar { name, bytes }| super::Sidecar { name, bytes })
                .collect();
            if !sidecars.is_sorted_by(|a, b| a.name < b.name) {
                return Err("its sidecars are not sorted by name".into());
            }
            Ok(super::Manifest {
                format,
                tensors,
                sidecars,
            })
        }
    }

    impl Tensor {
        fn check(self, objects: &[ObjectId]) -> Result<TensorEntry, String> {
            let bad = |why: &str| format!("tensor {:?}: {why}", self.name);
            let element =
                ElementType::from_name(&self.element).ok_or_else(|| bad("unknown element type"))?;
            let extents: Vec<usize> = self
                .shape
                .iter()
                .map(|&extent| usize::try_from(extent))
                .collect::<Result<_, _>>()
                .map_err(|_| bad("an extent exceeds this machine's address space"))?;
            let shape = Shape::from(extents);
            let size = element
                .byte_size(&shape)
                .map_err(|error| error.to_string())?;
            if size.get() != self.len {
                return Err(bad("its size is not that of its type and shape"));
            }
            if self.offset.checked_add(self.len).is_none() {
                return Err(bad("it ends beyond 64 bits"));
            }
            let id = TensorId::try_from(&self.id[..]).map_err(|_| bad("its id is not 32 bytes"))?;
            let object = *objects
                .get(self.object as usize)
                .ok_or_else(|| bad("its object is not listed"))?;
            Ok(TensorEntry {
                name: self.name,
                element,
                shape,
                id,
                object,
                offset: self.offset,
                len: self.len,
            })
        }
    }
}
