//! A model in use: its tensors, mapped from the store.

use std::fs::File;
#[cfg(feature = "candle")]
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use carlsbad_types::ByteSize;
use memmap2::Mmap;

use crate::backing::Objects;
use crate::error::{Error, Result};
use crate::id::{ModelId, ObjectId};
use crate::lease::Lease;
use crate::manifest::{Manifest, TensorEntry};

/// A model whose tensors this process shares with all others that use them.
///
/// It holds a lease: as long as it lives nothing of the model is reclaimed. Its stored files are
/// mapped read-only when they are first asked for, each once.
#[derive(Debug)]
pub struct SharedModel {
    id: ModelId,
    manifest: Manifest,
    objects: Vec<MappedObject>,
    /// For every tensor the position of its stored file in `objects`.
    object_of: Vec<u32>,
    files: Arc<dyn Objects>,
    #[cfg_attr(
        not(feature = "candle"),
        allow(dead_code, reason = "held for what its end means")
    )]
    lease: Option<Lease>,
}

#[derive(Debug)]
struct MappedObject {
    id: ObjectId,
    bytes: OnceLock<Mmap>,
}

/// A tensor of a [`SharedModel`].
#[derive(Debug, Clone, Copy)]
pub struct TensorRef<'a> {
    /// What it is.
    pub entry: &'a TensorEntry,
    /// Its bytes, in the mapping that all processes share. Aligned to the element type.
    pub bytes: &'a [u8],
}

impl SharedModel {
    pub(crate) fn new(
        id: ModelId,
        manifest: Manifest,
        files: Arc<dyn Objects>,
        lease: Option<Lease>,
    ) -> Self {
        let ids = manifest.objects();
        let object_of = manifest
            .tensors
            .iter()
            .map(|tensor| ids.partition_point(|id| *id < tensor.object) as u32)
            .collect();
        let mapped = |id| MappedObject {
            id,
            bytes: OnceLock::new(),
        };
        Self {
            id,
            manifest,
            objects: ids.into_iter().map(mapped).collect(),
            object_of,
            files,
            lease,
        }
    }

    /// What the model is.
    pub const fn id(&self) -> &ModelId {
        &self.id
    }

    /// What it consists of.
    pub const fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Its tensor called `name`.
    ///
    /// # Errors
    /// [`Error::UnknownTensor`]; [`Error::Damaged`] and [`Error::Io`] where its stored file cannot
    /// be mapped.
    pub fn tensor(&self, name: &str) -> Result<TensorRef<'_>> {
        let tensors = &self.manifest.tensors;
        let index = tensors
            .binary_search_by(|tensor| tensor.name.as_str().cmp(name))
            .map_err(|_| Error::UnknownTensor {
                model: self.id,
                name: name.to_owned(),
            })?;
        self.at(index)
    }

    /// Its tensors, sorted by name.
    ///
    /// # Errors
    /// Each as for [`tensor`](Self::tensor).
    pub fn tensors(&self) -> impl ExactSizeIterator<Item = Result<TensorRef<'_>>> {
        (0..self.manifest.tensors.len()).map(|index| self.at(index))
    }

    /// Its tensor at position `index` of the manifest.
    fn at(&self, index: usize) -> Result<TensorRef<'_>> {
        let entry = &self.manifest.tensors[index];
        let bytes = self.map(self.object_of[index] as usize)?;
        let begin = entry.offset as usize;
        let bytes = begin
            .checked_add(entry.len as usize)
            .and_then(|end| bytes.get(begin..end))
            .ok_or_else(|| self.damaged(&entry.object, "it ends before a tensor does"))?;
        Ok(TensorRef { entry, bytes })
    }

    fn map(&self, index: usize) -> Result<&Mmap> {
        let object = &self.objects[index];
        if let Some(bytes) = object.bytes.get() {
            return Ok(bytes);
        }
        let file = self.open_object(&object.id)?;
        // SAFETY: a stored file is complete before it is visible. A memory file is sealed then;
        // another has mode 0444 and is never opened for writing again, so that only the store's
        // owner could change it or cut it short, and he is trusted (README, Limits). Reclaiming it
        // would leave the mapping intact.
        let bytes = unsafe { Mmap::map(&file) }
            .map_err(|error| Error::io("map", self.object_name(&object.id))(error))?;
        // Another thread may have been faster; then ours is unmapped.
        Ok(object.bytes.get_or_init(|| bytes))
    }

    /// The stored file `id`, which is one of this model's, open for reading.
    pub(crate) fn open_object(&self, id: &ObjectId) -> Result<File> {
        self.files
            .open(id)?
            .ok_or_else(|| self.damaged(id, "it is missing"))
    }

    /// Whether the lease is this process's own, rather than that of a connection to an agent.
    pub const fn has_own_lease(&self) -> bool {
        self.lease.is_some()
    }

    /// Leaves the lease to the program that this process executes next (`execve`), and its
    /// children: it ends with the last of them. False where the lease belongs to a connection to an
    /// agent, and ends here.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn keep_lease_on_exec(self) -> Result<bool> {
        match self.lease {
            Some(lease) => lease.keep_on_exec().map(|()| true),
            None => Ok(false),
        }
    }

    /// Another descriptor of its lease, where it has one.
    #[cfg(feature = "candle")]
    pub(crate) fn share_lease(&self) -> Result<Option<OwnedFd>> {
        self.lease.as_ref().map_or(Ok(None), Lease::share)
    }

    /// The address space its stored files take once they are all mapped.
    pub fn byte_size(&self) -> ByteSize {
        self.manifest.byte_size()
    }

    fn object_name(&self, id: &ObjectId) -> PathBuf {
        let unnamed = || PathBuf::from(format!("object {id:.12}"));
        self.files.path(id).unwrap_or_else(unnamed)
    }

    fn damaged(&self, id: &ObjectId, why: &str) -> Error {
        Error::Damaged {
            path: self.object_name(id),
            why: why.to_owned(),
        }
    }
}
