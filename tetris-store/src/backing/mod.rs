//! Where the bytes of stored files are kept.

mod memfd;
mod tmpfs_dir;

use std::fmt;
use std::fs::File;
use std::path::PathBuf;

use carlsbad_types::ByteSize;

use crate::error::Result;
use crate::id::ObjectId;
use crate::lifecycle::Moment;

pub(crate) use memfd::Memfd;
pub(crate) use tmpfs_dir::{TmpfsDir, name, read_dir, unnamed};

/// Stored files to be read: all that a process needs that uses them.
pub(crate) trait Objects: Send + Sync + fmt::Debug {
    /// The stored file, to be read; `None` where it does not exist.
    fn open(&self, id: &ObjectId) -> Result<Option<File>>;

    /// Its path, where it has one.
    fn path(&self, id: &ObjectId) -> Option<PathBuf>;
}

/// A place for stored files. It does what it is told and decides nothing.
pub(crate) trait Backing: Objects {
    /// A hidden, empty file to be filled: nobody else sees it, and it ceases to exist with its last
    /// descriptor unless it is published.
    fn begin(&self) -> Result<File>;

    /// Makes `file` visible as `id`, read-only from now on. False where that exists already.
    fn publish(&self, file: File, id: &ObjectId, at: Moment) -> Result<bool>;

    /// Whether it exists.
    fn contains(&self, id: &ObjectId) -> Result<bool>;

    /// Notes that it was in use at `at`. False where it does not exist.
    fn touch(&self, id: &ObjectId, at: Moment) -> Result<bool>;

    /// Takes it away; whoever has it open or mapped keeps it until then.
    fn evict(&self, id: &ObjectId) -> Result<()>;

    /// Every stored file.
    fn list(&self) -> Result<Vec<StoredObject>>;
}

/// A stored file.
#[derive(Debug, Clone, Copy)]
pub(crate) struct StoredObject {
    /// Its name.
    pub(crate) id: ObjectId,
    /// Memory it takes.
    pub(crate) bytes: ByteSize,
    /// Links to it other than the store's own: the views that show it.
    pub(crate) views: u64,
    /// When it was last seen in use.
    pub(crate) stamp: Moment,
}
