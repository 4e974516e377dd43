//! The quota: how much may be stored, fills under way included.
//!
//! No counter is kept, since whoever dies would leave it wrong. What is used is what the files take,
//! manifests and what views have for themselves included, plus the *reservations* of those who
//! fill: files in `tmp` which take no memory, a byte long for each page that is reserved (a byte for
//! a byte would meet the limit on file sizes, which kills). A reservation is locked while its owner
//! lives, and does not count otherwise.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use carlsbad_types::ByteSize;

use crate::backing::{name, read_dir, unnamed};
use crate::error::{Error, Result};
use crate::lock::{Lock, try_lock};
use crate::object::DATA_ALIGNMENT;
use crate::publish::Claim;
use crate::reclaim::abandoned;
use crate::store::Inner;
use crate::view;

/// How much is reserved at once, so that the store is not measured for every tensor.
const STEP: u64 = 16 << 20;

/// What one ingest may still add. Without a quota, anything.
#[derive(Debug)]
pub(crate) struct Reservation<'a> {
    inner: &'a Inner,
    held: Mutex<Held>,
}

#[derive(Debug, Default)]
struct Held {
    file: Option<(File, PathBuf)>,
    /// Reserved and not yet stored; whole pages.
    reserved: u64,
    /// How much of it is spoken for by fills under way.
    spoken_for: u64,
}

impl<'a> Reservation<'a> {
    pub(crate) fn new(inner: &'a Inner) -> Self {
        Self {
            inner,
            held: Mutex::default(),
        }
    }

    /// Room for a file of `size` bytes, after which `planned` more are expected.
    pub(crate) fn take(&self, size: u64, planned: u64) -> Result<()> {
        let Some(quota) = self.inner.config.quota else {
            return Ok(());
        };
        let need = in_pages(size);
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let missing = (held.spoken_for + need).saturating_sub(held.reserved);
        if missing > 0 {
            let tmp = self.inner.root.tmp();
            let patience = self.inner.config.patience;
            let _alone = Claim::wait(&tmp, "quota", patience)?.ok_or_else(|| Error::Busy {
                what: "being measured for its quota",
                path: self.inner.root.path.clone(),
                waited: patience,
            })?;
            let used = self.inner.used()?.get();
            let free = quota.get().saturating_sub(used);
            if missing > free {
                let need = ByteSize::new(missing);
                return Err(Error::QuotaExceeded {
                    need,
                    used: ByteSize::new(used),
                    quota,
                });
            }
            let grow = STEP.min(planned).max(missing).min(free);
            held.grow(grow / DATA_ALIGNMENT * DATA_ALIGNMENT, &tmp)?;
        }
        held.spoken_for += need;
        Ok(())
    }

    /// Stores a file of `size` bytes by `publish`, and gives its room back: it counts by itself
    /// then. Nobody measures in between, when it counts twice.
    pub(crate) fn settle(&self, size: u64, publish: impl FnOnce() -> Result<bool>) -> Result<bool> {
        if self.inner.config.quota.is_none() {
            return publish();
        }
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        // Where it is not to be had in time, somebody may be refused too early.
        let _alone = Claim::wait(&self.inner.root.tmp(), "quota", self.inner.config.patience)?;
        let published = publish()?;
        let size = in_pages(size);
        held.spoken_for = held.spoken_for.saturating_sub(size);
        held.reserved = held.reserved.saturating_sub(size);
        held.resize()?;
        Ok(published)
    }
}

impl Held {
    fn grow(&mut self, by: u64, tmp: &std::path::Path) -> Result<()> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        self.reserved += by;
        if self.file.is_some() {
            return self.resize();
        }
        let failed = |error| Error::io("reserve in", tmp)(error);
        // Locked and sized before it has a name: nobody sees it without.
        let file = unnamed(tmp).map_err(failed)?;
        try_lock(&file, Lock::Exclusive, tmp)?;
        file.set_len(self.pages()).map_err(failed)?;
        loop {
            let unique = NEXT.fetch_add(1, Ordering::Relaxed);
            let path = tmp.join(format!("{PREFIX}{}-{unique}", std::process::id()));
            // The name may be taken, for process ids are used again.
            if name(&file, &path).map_err(failed)? {
                self.file = Some((file, path));
                return Ok(());
            }
        }
    }

    const fn pages(&self) -> u64 {
        self.reserved / DATA_ALIGNMENT
    }

    fn resize(&mut self) -> Result<()> {
        match &self.file {
            Some((file, path)) => file
                .set_len(self.pages())
                .map_err(Error::io("reserve in", path)),
            None => Ok(()),
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if let Some((_file, path)) = &self.file {
            // Where it stays it does not count once it is unlocked, and the next sweep removes it.
            let _ = fs::remove_file(path);
        }
    }
}

const PREFIX: &str = "reserve-";

/// What a file of `size` bytes takes.
pub(crate) const fn in_pages(size: u64) -> u64 {
    size.next_multiple_of(DATA_ALIGNMENT)
}

impl Inner {
    /// What is stored, manifests included, what views have for themselves, and what living processes have reserved.
    pub(crate) fn used(&self) -> Result<ByteSize> {
        let stored = self.backing.list()?.into_iter().map(|object| object.bytes);
        Ok(stored.sum::<ByteSize>() + self.of_manifests()? + self.of_views()? + self.reserved()?)
    }

    /// What the manifests take, with the small files in them.
    pub(crate) fn of_manifests(&self) -> Result<ByteSize> {
        let manifests = read_dir(&self.root.models())?;
        // Reclaimed meanwhile: then it does not count.
        let sizes = manifests.iter().filter_map(|entry| entry.metadata().ok());
        Ok(sizes.map(|it| ByteSize::new(it.blocks() * 512)).sum())
    }

    /// What the views below the root have for themselves.
    pub(crate) fn of_views(&self) -> Result<ByteSize> {
        view::own_bytes(&self.root.views())
    }

    /// What living processes have reserved.
    pub(crate) fn reserved(&self) -> Result<ByteSize> {
        let mut reserved = ByteSize::ZERO;
        for entry in read_dir(&self.root.tmp())? {
            if !entry
                .file_name()
                .as_encoded_bytes()
                .starts_with(PREFIX.as_bytes())
            {
                continue;
            }
            // Gone meanwhile: then it does not count.
            let Ok(metadata) = entry.metadata() else {
                continue;
            };
            // Left for a sweep to remove: this process may only be looking.
            if abandoned(&entry.path())?.is_none() {
                reserved += ByteSize::new(metadata.len().saturating_mul(DATA_ALIGNMENT));
            }
        }
        Ok(reserved)
    }
}
