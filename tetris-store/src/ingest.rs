//! Ingest: bringing a model's tensors into the store, those that are not there yet.
//!
//! Every tensor is cut into pieces, and a few threads read, hash and write them. A tensor that is
//! certainly new is written while it is hashed; one that may be stored already is only hashed
//! ([`hint`](crate::hint)). What turns out to be missing after all waits until everything else is
//! done, and with it every claim given back, so that two processes that fill each other's tensors
//! never wait for each other.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Instant;

use carlsbad_types::ByteSize;
use nix::sys::resource::{Resource, getrlimit};

use serde::{Deserialize, Serialize};

use crate::backing::{name, unnamed};
use crate::content::{ContentHasher, PIECE, pieces};
use crate::error::{Error, Result};
use crate::hint::Fingerprint;
use crate::id::{ModelId, ObjectId, TensorId};
use crate::label;
use crate::lease::{begin_idle_time, mark_in_use};
use crate::lifecycle::Moment;
use crate::lock::Lock;
use crate::manifest::{Manifest, TensorEntry};
use crate::object::{
    Member, PACK_LIMIT, PACKED_BELOW, SINGLE_DATA_OFFSET, header, pack_order, single_header,
};
use crate::publish::Claim;
use crate::quota::Reservation;
use crate::regular;
use crate::root::readable;
use crate::source::ModelSource;
use crate::stamp;
use crate::store::Store;

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

/// One stored file to be: a large tensor, or a pack of small ones.
struct Work {
    /// Positions in the source, in the order of the file.
    tensors: Vec<usize>,
    packed: bool,
    /// Bytes of data.
    len: u64,
    pieces: usize,
    /// The next piece to be read.
    next: AtomicUsize,
    /// Pieces that are not done.
    left: AtomicUsize,
    state: Mutex<State>,
}

struct State {
    fill: Fill,
    fingerprint: Option<Fingerprint>,
    content: ContentHasher,
    placed: Option<Placed>,
}

/// What happens to the bytes that are read, besides being hashed.
enum Fill {
    /// To be decided when the first piece is read.
    Undecided,
    /// Nothing.
    HashOnly,
    /// They are written. The claim keeps others from filling the same; there is none after waiting
    /// for it in vain.
    Write(Arc<File>, Option<Claim>),
}

/// Where a work's tensors are, or should be.
#[derive(Debug, Clone)]
struct Placed {
    object: ObjectId,
    /// Where its data begins.
    data: u64,
    ids: Vec<TensorId>,
    /// The store does not have it; somebody else may be filling it.
    missing: bool,
}

impl Work {
    fn new(tensors: Vec<usize>, packed: bool, len: u64) -> Self {
        let pieces = if packed { 1 } else { pieces(len) };
        Self {
            tensors,
            packed,
            len,
            pieces,
            next: AtomicUsize::new(0),
            left: AtomicUsize::new(pieces),
            state: Mutex::new(State {
                fill: Fill::Undecided,
                fingerprint: None,
                content: ContentHasher::new(len),
                placed: None,
            }),
        }
    }

    /// To be done again, and written this time.
    fn again(&self, fill: Fill) {
        self.next.store(0, Ordering::Relaxed);
        self.left.store(self.pieces, Ordering::Relaxed);
        let mut state = lock(&self.state);
        state.fill = fill;
        state.content = ContentHasher::new(self.len);
        state.placed = None;
    }
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

    /// The stored files to be, packs first, large tensors in the source's order.
    fn plan(&self) -> Vec<Work> {
        let tensors = self.source.tensors();
        let (mut small, large): (Vec<usize>, Vec<usize>) =
            (0..tensors.len()).partition(|&i| tensors[i].len < PACKED_BELOW);
        small.sort_by(|&a, &b| {
            let key = |i: usize| (tensors[i].element, tensors[i].name.as_str());
            pack_order(key(a), key(b))
        });
        let mut works = Vec::with_capacity(large.len() + 1);
        let mut pack = Vec::new();
        let mut len = 0;
        for i in small {
            if len + tensors[i].len > PACK_LIMIT {
                works.push(Work::new(std::mem::take(&mut pack), true, len));
                len = 0;
            }
            len += tensors[i].len;
            pack.push(i);
        }
        if !pack.is_empty() {
            works.push(Work::new(pack, true, len));
        }
        works.extend(
            large
                .into_iter()
                .map(|i| Work::new(vec![i], false, tensors[i].len)),
        );
        works
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

    /// Decides whether a large tensor is written, if that has not been decided; the file to be
    /// written if so.
    fn decide(&self, work: &Work) -> Result<Option<Arc<File>>> {
        let mut state = lock(&work.state);
        if matches!(state.fill, Fill::Undecided) {
            let index = work.tensors[0];
            let tensor = &self.source.tensors()[index];
            let fingerprint = Fingerprint::of(self.source, index, tensor)?;
            state.fingerprint = Some(fingerprint);
            state.fill = self.claim_if_new(work, fingerprint)?;
        }
        Ok(match &state.fill {
            Fill::Write(file, _) => Some(file.clone()),
            _ => None,
        })
    }

    fn claim_if_new(&self, work: &Work, fingerprint: Fingerprint) -> Result<Fill> {
        if self.may_be_stored(fingerprint)? {
            return Ok(Fill::HashOnly);
        }
        let Some(claim) = Claim::try_take(&self.store.inner.root.tmp(), fingerprint)? else {
            return Ok(Fill::HashOnly);
        };
        // Somebody may have finished it just before we got the claim.
        if self.may_be_stored(fingerprint)? {
            return Ok(Fill::HashOnly);
        }
        self.begin_single(work, Some(claim))
    }

    fn may_be_stored(&self, fingerprint: Fingerprint) -> Result<bool> {
        let inner = &self.store.inner;
        match inner.hints.get(fingerprint)? {
            Some(object) => inner.backing.contains(&object),
            None => Ok(false),
        }
    }

    fn begin_single(&self, work: &Work, claim: Option<Claim>) -> Result<Fill> {
        self.make_room(SINGLE_DATA_OFFSET + work.len)?;
        let file = self.store.inner.backing.begin()?;
        // Known from the start, so that a tmpfs can give huge pages to what will fill them.
        file.set_len(SINGLE_DATA_OFFSET + work.len)
            .map_err(Error::io(
                "fill a tensor in",
                self.store.inner.root.objects(),
            ))?;
        file.write_all_at(&single_header(&self.member(work.tensors[0])), 0)
            .map_err(Error::io(
                "fill a tensor in",
                self.store.inner.root.objects(),
            ))?;
        Ok(Fill::Write(Arc::new(file), claim))
    }

    /// Room for a file of `size` bytes; more will be wanted for what is still to be read.
    fn make_room(&self, size: u64) -> Result<()> {
        // Writing beyond this limit would not fail but kill the process, by SIGXFSZ.
        let objects = self.store.inner.root.objects();
        let (limit, _) = getrlimit(Resource::RLIMIT_FSIZE)
            .map_err(Error::io("read the limit on file sizes for", &objects))?;
        if size > limit {
            return Err(Error::NoSpace {
                what: "store a tensor in",
                path: objects,
                why: format!("{size} bytes exceed RLIMIT_FSIZE, {limit} bytes"),
            });
        }
        let read = ByteSize::new(self.read.load(Ordering::Relaxed));
        self.room.take(size, self.total.saturating_sub(read).get())
    }

    fn member(&self, index: usize) -> Member {
        let tensor = &self.source.tensors()[index];
        Member {
            name: tensor.name.clone(),
            element: tensor.element,
            shape: tensor.shape.clone(),
            len: tensor.len,
        }
    }

    /// All pieces of a large tensor are read: what is it, and does the store have it now?
    fn finish(&self, work: &Work) -> Result<()> {
        let inner = &self.store.inner;
        let tensor = &self.source.tensors()[work.tensors[0]];
        let mut state = lock(&work.state);
        let Some(content) = state.content.finish() else {
            // Another thread failed on a piece, and says so.
            return Ok(());
        };
        let id = TensorId::from_content(
            &inner.config.domain,
            tensor.element,
            &tensor.shape,
            &content,
        );
        let object = ObjectId::single(&id);
        let stored = match std::mem::replace(&mut state.fill, Fill::HashOnly) {
            Fill::Write(file, claim) => {
                self.publish(file, &object, work.len, SINGLE_DATA_OFFSET + work.len)?;
                if let Some(fingerprint) = state.fingerprint {
                    inner.hints.set(fingerprint, &object, &inner.root.tmp())?;
                }
                // Now that whoever waits for it finds the hint.
                drop(claim);
                true
            }
            Fill::Undecided | Fill::HashOnly => self.touch(&object)?,
        };
        state.placed = Some(Placed {
            object,
            data: SINGLE_DATA_OFFSET,
            ids: vec![id],
            missing: !stored,
        });
        Ok(())
    }

    fn publish(&self, file: Arc<File>, object: &ObjectId, len: u64, size: u64) -> Result<()> {
        // The other threads have dropped theirs, or are about to: they are done writing.
        let file = match Arc::try_unwrap(file) {
            Ok(file) => file,
            Err(file) => file
                .try_clone()
                .map_err(Error::io("publish", object.to_string()))?,
        };
        let now = stamp::now()?;
        let publish = || self.store.inner.backing.publish(file, object, now);
        if self.room.settle(size, publish)? {
            self.written.fetch_add(len, Ordering::Relaxed);
            lock(&self.published).push((*object, now));
        }
        Ok(())
    }

    /// Whether the store has `object`; if so it counts as used now.
    fn touch(&self, object: &ObjectId) -> Result<bool> {
        self.store.inner.backing.touch(object, stamp::now()?)
    }

    /// Reads a pack's tensors into memory, and stores them if the store does not have them.
    fn pack(&self, work: &Work) -> Result<()> {
        let inner = &self.store.inner;
        let members: Vec<_> = work.tensors.iter().map(|&i| self.member(i)).collect();
        let mut bytes = header(&members);
        let data = bytes.len();
        bytes.resize(data + work.len as usize, 0);
        let mut ids = Vec::with_capacity(members.len());
        let mut begin = data;
        for (&index, member) in work.tensors.iter().zip(&members) {
            let tensor = &mut bytes[begin..begin + member.len as usize];
            self.source.read_at(index, 0, tensor)?;
            ids.push(TensorId::of(
                &inner.config.domain,
                member.element,
                &member.shape,
                tensor,
            ));
            begin += member.len as usize;
        }
        let names = members.iter().map(|member| member.name.as_str());
        let object = ObjectId::pack(names.zip(&ids));

        let stored = self.touch(&object)? || self.write_pack(work, &object, &bytes)?;
        let data = data as u64;
        lock(&work.state).placed = Some(Placed {
            object,
            data,
            ids,
            missing: !stored,
        });
        Ok(())
    }

    /// Whether it was written; not where somebody else is at it.
    fn write_pack(&self, work: &Work, object: &ObjectId, bytes: &[u8]) -> Result<bool> {
        let inner = &self.store.inner;
        let size = bytes.len() as u64;
        let given = std::mem::replace(&mut lock(&work.state).fill, Fill::HashOnly);
        let (file, claim) = match given {
            Fill::Write(file, claim) => (file, claim),
            Fill::Undecided | Fill::HashOnly => {
                let Some(claim) = Claim::try_take(&inner.root.tmp(), object)? else {
                    return Ok(false);
                };
                if self.touch(object)? {
                    return Ok(true);
                }
                (Arc::new(inner.backing.begin()?), Some(claim))
            }
        };
        self.make_room(size)?;
        file.write_all_at(bytes, 0)
            .map_err(Error::io("fill a pack in", inner.root.objects()))?;
        self.publish(file, object, work.len, size)?;
        drop(claim);
        Ok(true)
    }

    /// Waits for what others may be filling, and fills what they did not.
    fn fill_what_is_missing(&self, works: &[Work]) -> Result<()> {
        for work in works {
            let (placed, fingerprint) = {
                let state = lock(&work.state);
                (state.placed.clone(), state.fingerprint)
            };
            let Some(placed) = placed.filter(|placed| placed.missing) else {
                continue;
            };
            let tmp = self.store.inner.root.tmp();
            let patience = self.store.inner.config.patience;
            let claim = match fingerprint {
                Some(fingerprint) => Claim::wait(&tmp, fingerprint, patience)?,
                None => Claim::wait(&tmp, placed.object, patience)?,
            };
            if claim.is_none() {
                tracing::warn!(object = %placed.object, ?patience, "no longer waiting for its filler");
            }
            if self.touch(&placed.object)? {
                if let Some(placed) = &mut lock(&work.state).placed {
                    placed.missing = false;
                }
                continue;
            }
            let fill = if work.packed {
                Fill::Write(Arc::new(self.store.inner.backing.begin()?), claim)
            } else {
                self.begin_single(work, claim)?
            };
            work.again(fill);
            self.run(&[work])?;
        }
        Ok(())
    }

    /// Makes the model visible, once everything it needs is there.
    fn commit(&self, works: &[Work]) -> Result<Ingested> {
        let inner = &self.store.inner;
        let start = Instant::now();
        loop {
            // Anew each time: where a tensor had to be read again, its source may have changed.
            let manifest = self.manifest(works)?;
            let model = manifest.id(&inner.config.domain);
            let sweepless = inner.root.lock(Lock::Shared, inner.config.patience)?;
            let mut vanished = false;
            for work in works {
                if let Some(placed) = &mut lock(&work.state).placed {
                    // Nobody has leased the model yet, so a sweep may have taken it.
                    placed.missing = !inner.backing.contains(&placed.object)?;
                    vanished |= placed.missing;
                }
            }
            if !vanished {
                self.write_manifest(&model, &manifest)?;
                if let Some(label) = self.options.label {
                    label::set(&inner.root, label, &model)?;
                }
                drop(sweepless);
                return Ok(Ingested {
                    model,
                    tensors: manifest.tensors.len(),
                    bytes: manifest.byte_size(),
                    written: ByteSize::new(self.written.load(Ordering::Relaxed)),
                });
            }
            drop(sweepless);
            let waited = start.elapsed();
            if waited > inner.config.patience {
                let what = "being swept faster than it is filled (is keep_alive too short?)";
                return Err(Error::Busy {
                    what,
                    path: inner.root.path.clone(),
                    waited,
                });
            }
            self.fill_what_is_missing(works)?;
        }
    }

    fn write_manifest(&self, model: &ModelId, manifest: &Manifest) -> Result<()> {
        let path = self.store.inner.root.model(model);
        let failed = |error| Error::io("publish", &path)(error);
        // Ingested before: it counts as used now.
        let Some(before) = regular::open(&path)? else {
            let bytes = manifest.encode();
            let size = bytes.len() as u64;
            self.room.take(size, 0)?;
            let mut file = unnamed(&self.store.inner.root.models()).map_err(failed)?;
            file.write_all(&bytes).map_err(failed)?;
            readable(&file).map_err(failed)?;
            mark_in_use(&file, &path);
            // False: another ingest of the same was faster by a moment.
            self.room
                .settle(size, || name(&file, &path).map_err(failed))?;
            begin_idle_time(&path);
            return Ok(());
        };
        mark_in_use(&before, &path);
        begin_idle_time(&path);
        Ok(())
    }

    fn manifest(&self, works: &[Work]) -> Result<Manifest> {
        let declared = self.source.tensors();
        let mut tensors = Vec::with_capacity(declared.len());
        for work in works {
            let state = lock(&work.state);
            let Some(placed) = &state.placed else {
                continue;
            };
            let mut offset = placed.data;
            for (&index, &id) in work.tensors.iter().zip(&placed.ids) {
                let tensor = &declared[index];
                tensors.push(TensorEntry {
                    name: tensor.name.clone(),
                    element: tensor.element,
                    shape: tensor.shape.clone(),
                    id,
                    object: placed.object,
                    offset,
                    len: tensor.len,
                });
                offset += tensor.len;
            }
        }
        tensors.sort_unstable_by(|a, b| a.name.cmp(&b.name));
        let mut sidecars = self.source.sidecars()?;
        sidecars.sort_unstable_by(|a, b| a.name.cmp(&b.name));
        let twice = |what: &str, name: &str| Error::BadManifest {
            why: format!("two {what} are called {name:?}"),
        };
        if let Some(pair) = tensors.windows(2).find(|pair| pair[0].name == pair[1].name) {
            return Err(twice("tensors", &pair[0].name));
        }
        if let Some(pair) = sidecars
            .windows(2)
            .find(|pair| pair[0].name == pair[1].name)
        {
            return Err(twice("sidecars", &pair[0].name));
        }
        Ok(Manifest {
            format: self.source.format(),
            tensors,
            sidecars,
        })
    }
}
