//! Ingest: bringing a model's tensors into the store, those that are not there yet.
//!
//! Every tensor is cut into pieces, and a few threads read, hash and write them. A tensor that is
//! certainly new is written while it is hashed; one that may be stored already is only hashed
//! ([`hint`](crate::hint)). What turns out to be missing after all waits until everything else is
//! done, and with it every claim given back, so that two processes that fill each other's tensors
//! never wait for each other.

mod commit;
mod fill;
mod work;

use std::collections::{HashMap, HashSet};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;

use carlsbad_types::ByteSize;

use serde::{Deserialize, Serialize};

use crate::content::{ContentHasher, PIECE};
use crate::error::{Error, Result};
use crate::id::{ModelId, ObjectId};
use crate::label;
use crate::lifecycle::Moment;
use crate::lock::Lock;
use crate::object::SINGLE_DATA_OFFSET;
use crate::quota::Reservation;
use crate::source::ModelSource;
use crate::store::Store;

use work::Work;

/// The most extents of a tensor, as in NumPy. A stored file's header has to hold them.
const MAX_RANK: usize = 64;

/// What else is wanted of an ingest.
#[derive(Default, Clone, Copy)]
pub struct IngestOptions<'a> {
    /// A label for the model to go by.
    pub label: Option<&'a str>,
    /// Called now and then, from any of the threads, with what has been read.
    pub progress: Option<&'a (dyn Fn(Progress) + Sync)>,
}

impl std::fmt::Debug for IngestOptions<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("IngestOptions")
            .field("label", &self.label)
            .field("progress", &self.progress.is_some())
            .finish()
    }
}

/// How far an ingest is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Bytes of tensors read.
    pub done: ByteSize,
    /// Bytes of all tensors.
    pub total: ByteSize,
}

/// What an ingest did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ingested {
    /// The model.
    pub model: ModelId,
    /// Its tensors.
    pub tensors: usize,
    /// Bytes of its tensors.
    pub bytes: ByteSize,
    /// Bytes of tensors that were written, since the store did not have them.
    pub written: ByteSize,
}

impl Ingested {
    /// Bytes of tensors that the store had already.
    pub const fn shared(&self) -> ByteSize {
        self.bytes.saturating_sub(self.written)
    }
}

impl Store {
    /// Brings a model into the store. Only tensors that are not there yet are written.
    ///
    /// # Errors
    /// What the source says; [`Error::QuotaExceeded`] and [`Error::NoSpace`], leaving nothing
    /// behind that the next sweep does not free; [`Error::ReadOnly`]; [`Error::Busy`];
    /// [`Error::Io`].
    pub fn ingest(&self, source: &dyn ModelSource) -> Result<Ingested> {
        self.ingest_with(source, &IngestOptions::default())
    }

    /// [`ingest`](Self::ingest), with a label or with reports on its progress.
    ///
    /// # Errors
    /// As [`ingest`](Self::ingest), and [`Error::BadLabel`].
    pub fn ingest_with(
        &self,
        source: &dyn ModelSource,
        options: &IngestOptions<'_>,
    ) -> Result<Ingested> {
        self.inner.root.check_writable()?;
        options.label.map_or(Ok(()), label::check)?;
        let ingest = Ingest::new(self, source, options);
        let done = ingest.all();
        if done.is_err()
            && let Err(error) = ingest.withdraw()
        {
            tracing::warn!(%error, "a failed ingest's tensors stay until the next sweeps");
        }
        done
    }
}

/// One ingest.
struct Ingest<'a> {
    store: &'a Store,
    source: &'a dyn ModelSource,
    options: &'a IngestOptions<'a>,
    total: ByteSize,
    read: AtomicU64,
    written: AtomicU64,
    room: Reservation<'a>,
    /// What this ingest has stored, to be withdrawn where it fails.
    published: Mutex<Vec<(ObjectId, Moment)>>,
}

/// A poisoned lock means that another thread panicked, which ends the ingest anyway.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<'a> Ingest<'a> {
    fn new(store: &'a Store, source: &'a dyn ModelSource, options: &'a IngestOptions<'a>) -> Self {
        let sizes = source.tensors().iter().map(|tensor| tensor.len);
        Self {
            store,
            source,
            options,
            total: sizes.map(ByteSize::new).sum(),
            read: AtomicU64::new(0),
            written: AtomicU64::new(0),
            room: Reservation::new(&store.inner),
            published: Mutex::default(),
        }
    }

    fn all(&self) -> Result<Ingested> {
        self.check()?;
        let works = self.plan();
        self.run(&works.iter().collect::<Vec<_>>())?;
        self.fill_what_is_missing(&works)?;
        self.commit(&works)
    }

    /// Takes back what this ingest has stored, except what somebody else has found useful since.
    fn withdraw(&self) -> Result<()> {
        let inner = &self.store.inner;
        let published: HashMap<_, _> = lock(&self.published).drain(..).collect();
        if published.is_empty() {
            return Ok(());
        }
        let _no_commits = inner.root.lock(Lock::Exclusive, inner.config.patience)?;
        let mut needed = HashSet::new();
        for model in self.store.model_ids()? {
            match self.store.manifest(&model) {
                Ok(manifest) => needed.extend(manifest.objects()),
                Err(Error::UnknownModel { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        for object in inner.backing.list()? {
            let untouched = published.get(&object.id) == Some(&object.stamp);
            if untouched && object.views == 0 && !needed.contains(&object.id) {
                inner.backing.evict(&object.id)?;
            }
        }
        Ok(())
    }

    /// Whoever writes a source may err, and what he says of a tensor is never asked again.
    fn check(&self) -> Result<()> {
        for tensor in self.source.tensors() {
            let bad = |why| Error::BadShape {
                element: tensor.element.name(),
                shape: tensor.shape.clone(),
                why,
            };
            if tensor.shape.rank() > MAX_RANK {
                return Err(bad("more than 64 extents"));
            }
            if tensor.element.byte_size(&tensor.shape)?.get() != tensor.len {
                return Err(bad("its source gives another size"));
            }
        }
        Ok(())
    }

    /// Does `works`, on as many threads as are configured and worth starting.
    ///
    /// Each thread takes a work of its own as long as there is one, and then helps with others: the
    /// kernel lets only one thread at a time write to a file.
    fn run(&self, works: &[&Work]) -> Result<()> {
        let next = AtomicUsize::new(0);
        let failure = Mutex::new(None);
        let stop = AtomicBool::new(false);
        let drain = |work: &Work, buffer: &mut [u8]| {
            while !stop.load(Ordering::Relaxed) {
                let piece = work.next.fetch_add(1, Ordering::Relaxed);
                if piece >= work.pieces {
                    break;
                }
                if let Err(error) = self.step(work, piece, buffer) {
                    stop.store(true, Ordering::Relaxed);
                    lock(&failure).get_or_insert(error);
                }
            }
        };
        let worker = || {
            let mut buffer = vec![0; PIECE];
            while let Some(work) = works.get(next.fetch_add(1, Ordering::Relaxed)) {
                drain(work, &mut buffer);
            }
            for work in works {
                drain(work, &mut buffer);
            }
        };
        let pieces: usize = works.iter().map(|work| work.pieces).sum();
        thread::scope(|scope| {
            for _ in 1..self.store.inner.config.threads.min(pieces) {
                // Where no further thread can be had, this one does it all.
                let spawned = thread::Builder::new()
                    .name("tetris-ingest".into())
                    .spawn_scoped(scope, worker);
                if let Err(error) = spawned {
                    tracing::warn!(%error, "ingest runs on fewer threads than configured");
                    break;
                }
            }
            worker();
        });
        let failure = failure.into_inner().unwrap_or_else(PoisonError::into_inner);
        failure.map_or(Ok(()), Err)
    }

    fn step(&self, work: &Work, piece: usize, buffer: &mut [u8]) -> Result<()> {
        if work.packed {
            self.pack(work)?;
            return self.report(work.len);
        }
        let tensor = work.tensors[0];
        let write = self.decide(work)?;
        let offset = (piece * PIECE) as u64;
        let bytes = &mut buffer[..PIECE.min((work.len - offset) as usize)];
        self.source.read_at(tensor, offset, bytes)?;
        let digest = ContentHasher::hash_piece(piece, work.pieces, bytes);
        if let Some(file) = write {
            let at = SINGLE_DATA_OFFSET + offset;
            file.write_all_at(bytes, at).map_err(Error::io(
                "fill a tensor in",
                self.store.inner.root.objects(),
            ))?;
        }
        lock(&work.state).content.set(piece, digest);
        // AcqRel: the last one sees what the others have set and written.
        if work.left.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.finish(work)?;
        }
        self.report(bytes.len() as u64)
    }

    fn report(&self, bytes: u64) -> Result<()> {
        let done = self.read.fetch_add(bytes, Ordering::Relaxed) + bytes;
        if let Some(progress) = self.options.progress {
            // A tensor that had to be read twice does not make it more than everything.
            let done = ByteSize::new(done).min(self.total);
            progress(Progress {
                done,
                total: self.total,
            });
        }
        Ok(())
    }
}
