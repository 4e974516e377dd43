//! How much of a model is here already.

use std::collections::HashSet;

use carlsbad_types::ByteSize;

use serde::{Deserialize, Serialize};

use crate::error::Result;
use crate::id::ObjectId;
use crate::manifest::Manifest;
use crate::store::Store;

/// What two sets of stored files have in common. Each file counts once, however many models and
/// tensors it serves: the union of hashes, not the pairwise maximum of the paper, which
/// misses what one model shares with several others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Overlap {
    /// Bytes of the model's tensors that are here.
    pub shared: ByteSize,
    /// Bytes of the model's tensors that would have to be added.
    pub missing: ByteSize,
}

impl Overlap {
    /// The share that is here, from 0 to 1.
    pub fn ratio(self) -> f64 {
        self.shared.ratio_of(self.shared + self.missing)
    }
}

impl Manifest {
    /// Its stored files with the bytes of tensors in each.
    pub fn object_sizes(&self) -> Vec<(ObjectId, ByteSize)> {
        // Tied weights are several entries for the same bytes.
        let mut extents: Vec<_> = self
            .tensors
            .iter()
            .map(|tensor| (tensor.object, tensor.offset, tensor.len))
            .collect();
        extents.sort_unstable();
        extents.dedup();
        let mut sizes: Vec<(ObjectId, ByteSize)> = Vec::new();
        for (object, _, len) in extents {
            let len = ByteSize::new(len);
            match sizes.last_mut() {
                Some((last, bytes)) if *last == object => *bytes += len,
                _ => sizes.push((object, len)),
            }
        }
        sizes
    }

    /// How much of this model is there where all of `others` are.
    pub fn overlap<'a>(&self, others: impl IntoIterator<Item = &'a Self>) -> Overlap {
        let here: HashSet<_> = others.into_iter().flat_map(Self::objects).collect();
        let mut overlap = Overlap::default();
        for (object, bytes) in self.object_sizes() {
            overlap.count(bytes, here.contains(&object));
        }
        overlap
    }
}

impl Overlap {
    fn count(&mut self, bytes: ByteSize, here: bool) {
        if here {
            self.shared += bytes;
        } else {
            self.missing += bytes;
        }
    }
}

impl Store {
    /// How much of the model described by `manifest` the store has.
    ///
    /// # Errors
    /// [`Error::Io`](crate::Error::Io).
    pub fn overlap(&self, manifest: &Manifest) -> Result<Overlap> {
        let mut overlap = Overlap::default();
        for (object, bytes) in manifest.object_sizes() {
            overlap.count(bytes, self.inner.backing.contains(&object)?);
        }
        Ok(overlap)
    }
}
