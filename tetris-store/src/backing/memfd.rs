//! Stored files in sealed memory files of one process, which nobody can change any more: not even
//! this process, or whoever it hands them to.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use carlsbad_types::ByteSize;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};

use super::{Backing, Objects, StoredObject};
use crate::error::{Error, Result};
use crate::id::ObjectId;
use crate::lifecycle::Moment;

/// Memory files by id. Each takes a descriptor of this process.
#[derive(Debug, Default)]
pub(crate) struct Memfd {
    objects: Mutex<BTreeMap<ObjectId, (File, Moment)>>,
}

impl Memfd {
    fn objects(&self) -> MutexGuard<'_, BTreeMap<ObjectId, (File, Moment)>> {
        // Nothing that may panic is done under this lock.
        self.objects.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

const NAME: &str = "tetris-store";

impl Objects for Memfd {
    fn open(&self, id: &ObjectId) -> Result<Option<File>> {
        let objects = self.objects();
        let file = objects.get(id).map(|(file, _)| file.try_clone());
        file.transpose().map_err(Error::io("open", id.to_string()))
    }

    fn path(&self, _: &ObjectId) -> Option<PathBuf> {
        None
    }
}

impl Backing for Memfd {
    fn begin(&self) -> Result<File> {
        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
        memfd_create(NAME, flags)
            .map(File::from)
            .map_err(Error::io("create", Path::new("a memfd")))
    }

    fn publish(&self, file: File, id: &ObjectId, at: Moment) -> Result<bool> {
        let seals = SealFlag::F_SEAL_SHRINK
            | SealFlag::F_SEAL_GROW
            | SealFlag::F_SEAL_WRITE
            | SealFlag::F_SEAL_SEAL;
        fcntl(&file, FcntlArg::F_ADD_SEALS(seals)).map_err(Error::io("seal", id.to_string()))?;
        let mut objects = self.objects();
        if objects.contains_key(id) {
            return Ok(false);
        }
        objects.insert(*id, (file, at));
        Ok(true)
    }

    fn contains(&self, id: &ObjectId) -> Result<bool> {
        Ok(self.objects().contains_key(id))
    }

    fn touch(&self, id: &ObjectId, at: Moment) -> Result<bool> {
        Ok(match self.objects().get_mut(id) {
            Some((_, stamp)) => {
                *stamp = at;
                true
            }
            None => false,
        })
    }

    fn evict(&self, id: &ObjectId) -> Result<()> {
        self.objects().remove(id);
        Ok(())
    }

    fn list(&self) -> Result<Vec<StoredObject>> {
        let objects = self.objects();
        let describe = |(id, (file, stamp)): (&ObjectId, &(File, Moment))| {
            let metadata = file
                .metadata()
                .map_err(Error::io("look at", id.to_string()))?;
            Ok(StoredObject {
                id: *id,
                bytes: ByteSize::new(metadata.blocks() * 512),
                views: 0,
                stamp: *stamp,
            })
        };
        objects.iter().map(describe).collect()
    }
}
