//! Model files as a list of tensors that can be read piece by piece.

use carlsbad_types::Shape;

use crate::element::ElementType;
use crate::error::Result;
use crate::manifest::{Sidecar, SourceFormat};

/// A tensor that a model file declares. A source has checked it: `len` is the size that element
/// type and shape ask for, and the file holds that many bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SourceTensor {
    /// Its name, unique in the model.
    pub name: String,
    /// Its element type.
    pub element: ElementType,
    /// Its extents.
    pub shape: Shape,
    /// Its size in bytes.
    pub len: u64,
}

/// A model as it comes: tensors to be read, and small files to be kept.
///
/// Bytes are read by position into the caller's memory and never mapped: somebody may write to the
/// file, or cut it short, while it is read.
pub trait ModelSource: Send + Sync {
    /// The format it comes in.
    fn format(&self) -> SourceFormat;

    /// Its tensors, in the order in which reading them is cheapest.
    fn tensors(&self) -> &[SourceTensor];

    /// Fills `into` with the bytes of tensor `index` from byte `offset` of the tensor on.
    ///
    /// # Errors
    /// [`Error::Io`](crate::Error::Io), also where the file has become shorter meanwhile.
    fn read_at(&self, index: usize, offset: u64, into: &mut [u8]) -> Result<()>;

    /// Its small files.
    ///
    /// # Errors
    /// [`Error::Io`](crate::Error::Io) where one cannot be read.
    fn sidecars(&self) -> Result<Vec<Sidecar>>;
}
