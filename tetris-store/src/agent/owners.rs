//! Whose models and labels those are: how much a user has brought, and who may rename what.
//!
//! Kept as files below `<root>/agent`, so that a new agent goes on where the last one ended.
//! A user is charged for the full size of every model he brought, and of every stored file that a
//! view of his keeps, whoever brought it; what several of them have is charged once. Small files
//! that came with a model, and what a view has for itself, are charged as well. What others have
//! brought or keep is charged to them, too; so a quota is no one's secret but one's own.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

use carlsbad_types::ByteSize;

use super::wire::Refusal;
use crate::backing::read_dir;
use crate::error::{Error, Result};
use crate::id::{ModelId, ObjectId};
use crate::label;
use crate::lock::{Lock, try_lock};
use crate::regular::{make_dir, open_or_make};
use crate::store::Store;
use crate::view::Demand;

#[derive(Debug)]
pub(super) struct Owners {
    dir: PathBuf,
    /// Bytes that ingests under way may yet bring, by user.
    coming: Mutex<HashMap<u32, u64>>,
    /// Held while labels and their owners change together.
    labels: Mutex<()>,
    /// One agent a store.
    _lock: File,
}

/// Room for an ingest; given back by drop, once what it brought counts by itself.
#[derive(Debug)]
pub(super) struct Coming<'a> {
    owners: &'a Owners,
    user: u32,
    bytes: u64,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Plain values that are whole at all times.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Owners {
    /// Takes the store over, or fails with [`Error::AgentRunning`].
    pub(super) fn open(store: &Store) -> Result<Self> {
        store.inner.root.check_writable()?;
        let dir = store.root().join("agent");
        for dir in [dir.clone(), dir.join("users"), dir.join("labels")] {
            make_dir(&dir, 0o700).map_err(Error::io("create", dir))?;
        }
        let path = dir.join("lock");
        let file = open_or_make(&path).map_err(Error::io("open", &path))?;
        if !try_lock(&file, Lock::Exclusive, &path)? {
            return Err(Error::AgentRunning { path });
        }
        Ok(Self {
            dir,
            coming: Mutex::default(),
            labels: Mutex::default(),
            _lock: file,
        })
    }

    fn models_of(&self, user: u32) -> PathBuf {
        self.dir.join("users").join(user.to_string())
    }

    fn owner_of_label(&self, label: &str) -> PathBuf {
        self.dir.join("labels").join(label)
    }

    /// What counts against `user`'s quota.
    pub(super) fn used(&self, store: &Store, user: u32) -> Result<ByteSize> {
        self.charged(store, user).map(|charged| charged.total())
    }

    fn charged(&self, store: &Store, user: u32) -> Result<Charged> {
        let mut charged = Charged::default();
        for model in self.brought_by(user)? {
            match store.manifest(&model) {
                Ok(manifest) => {
                    charged.brought.extend(manifest.object_sizes());
                    let small = manifest.sidecars.iter().map(|it| it.bytes.len() as u64);
                    charged.own += small.sum::<u64>();
                }
                Err(Error::UnknownModel { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        self.charge_views(store, user, &mut charged)?;
        Ok(charged)
    }

    /// Where `user`'s views are.
    pub(super) fn views_of(&self, store: &Store, user: u32) -> PathBuf {
        store.inner.root.views().join(user.to_string())
    }

    fn charge_views(&self, store: &Store, user: u32, charged: &mut Charged) -> Result<()> {
        for view in read_dir(&self.views_of(store, user))? {
            // Removed meanwhile.
            let Ok(files) = fs::read_dir(view.path()) else {
                continue;
            };
            for file in files.filter_map(|file| file.ok()?.metadata().ok()) {
                if file.nlink() > 1 {
                    // A stored file, or one that another view of his keeps as well.
                    charged.kept.insert(inode(&file), file.len());
                } else if file.is_file() {
                    charged.own += file.blocks() * 512;
                }
            }
        }
        if charged.kept.is_empty() {
            return Ok(());
        }
        for object in charged.brought.keys() {
            if let Some((file, _)) = stored_file(store, object) {
                charged.kept.remove(&file);
            }
        }
        Ok(())
    }

    /// Room for a view of `user`'s that takes `demand`.
    pub(super) fn expect_view(
        &self,
        store: &Store,
        user: u32,
        demand: &Demand,
        quota: Option<ByteSize>,
    ) -> Result<Coming<'_>> {
        let mut coming = lock(&self.coming);
        let mut more = demand.own;
        if quota.is_some() {
            let charged = self.charged(store, user)?;
            for object in &demand.linked {
                if charged.brought.contains_key(object) {
                    continue;
                }
                match stored_file(store, object) {
                    Some((file, len)) if !charged.kept.contains_key(&file) => more += len,
                    _ => {}
                }
            }
        }
        self.admit(&mut coming, store, user, ByteSize::new(more), quota)
    }

    fn brought_by(&self, user: u32) -> Result<Vec<ModelId>> {
        let dir = self.models_of(user);
        if !dir.exists() {
            return Ok(Vec::new());
        }
        Ok(read_dir(&dir)?
            .iter()
            .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
            .collect())
    }

    /// Room for `bytes` more from `user`.
    pub(super) fn expect(
        &self,
        store: &Store,
        user: u32,
        bytes: ByteSize,
        quota: Option<ByteSize>,
    ) -> Result<Coming<'_>> {
        self.admit(&mut lock(&self.coming), store, user, bytes, quota)
    }

    fn admit(
        &self,
        coming: &mut HashMap<u32, u64>,
        store: &Store,
        user: u32,
        bytes: ByteSize,
        quota: Option<ByteSize>,
    ) -> Result<Coming<'_>> {
        let of_user = coming.entry(user).or_default();
        if let Some(quota) = quota {
            let used = self.used(store, user)? + ByteSize::new(*of_user);
            if used + bytes > quota {
                return Err(Error::QuotaExceeded {
                    need: bytes,
                    used,
                    quota,
                });
            }
        }
        *of_user += bytes.get();
        Ok(Coming {
            owners: self,
            user,
            bytes: bytes.get(),
        })
    }

    /// Notes that `user` has brought `model`.
    pub(super) fn brought(&self, user: u32, model: &ModelId) -> Result<()> {
        let dir = self.models_of(user);
        make_dir(&dir, 0o700).map_err(Error::io("create", &dir))?;
        let path = dir.join(model.to_string());
        File::create(&path)
            .map(drop)
            .map_err(Error::io("create", path))
    }

    /// Fails unless `user` may let a model go by `label`: it is his, or nobody's.
    pub(super) fn check_label(&self, store: &Store, label: &str, user: u32) -> Result<()> {
        label::check(label)?;
        if label::get(&store.inner.root, label)?.is_none() {
            return Ok(());
        }
        match fs::read_to_string(self.owner_of_label(label)) {
            Ok(owner) if owner.trim() == user.to_string() => Ok(()),
            Ok(_) => Err(not_yours(label)),
            Err(error) if error.kind() == ErrorKind::NotFound => Err(not_yours(label)),
            Err(error) => Err(Error::io("read", self.owner_of_label(label))(error)),
        }
    }

    /// Lets `model` go by `label`, which is `user`'s from now on.
    pub(super) fn set_label(
        &self,
        store: &Store,
        label: &str,
        model: &ModelId,
        user: u32,
        admin: bool,
    ) -> Result<()> {
        let _alone = lock(&self.labels);
        label::check(label)?;
        if !admin {
            self.check_label(store, label, user)?;
        }
        let path = self.owner_of_label(label);
        open_or_make(&path)
            .and_then(|mut file| {
                file.set_len(0)?;
                file.write_all(user.to_string().as_bytes())
            })
            .map_err(Error::io("write", path))?;
        store.set_label(label, model)
    }

    pub(super) fn remove_label(
        &self,
        store: &Store,
        label: &str,
        user: u32,
        admin: bool,
    ) -> Result<bool> {
        let _alone = lock(&self.labels);
        label::check(label)?;
        if !admin {
            self.check_label(store, label, user)?;
        }
        store.remove_label(label)
    }

    /// Forgets models and labels that are gone.
    pub(super) fn sweep(&self, store: &Store) -> Result<()> {
        let _alone = lock(&self.labels);
        // Looked for one by one, after the note was seen: a model is there before its note.
        let here = |model: &ModelId| store.inner.root.model(model).exists();
        for user in read_dir(&self.dir.join("users"))? {
            for entry in read_dir(&user.path())? {
                let model = entry.file_name().to_str().and_then(|id| id.parse().ok());
                if model.is_none_or(|model: ModelId| !here(&model)) {
                    forget(entry.path())?;
                }
            }
        }
        for entry in read_dir(&self.dir.join("labels"))? {
            let name = entry.file_name();
            let label = name.to_str().unwrap_or_default();
            if label::get(&store.inner.root, label)?.is_none() {
                forget(entry.path())?;
            }
        }
        Ok(())
    }
}

/// What a user is charged for.
#[derive(Debug, Default)]
struct Charged {
    /// Stored files of the models that he brought and that are still there.
    brought: HashMap<ObjectId, ByteSize>,
    /// Other stored files that his views keep, with their sizes.
    kept: HashMap<Inode, u64>,
    /// Bytes that are nobody else's.
    own: u64,
}

impl Charged {
    fn total(&self) -> ByteSize {
        let brought: ByteSize = self.brought.values().copied().sum();
        brought + ByteSize::new(self.own + self.kept.values().sum::<u64>())
    }
}

/// Device and number.
type Inode = (u64, u64);

fn inode(metadata: &fs::Metadata) -> Inode {
    (metadata.dev(), metadata.ino())
}

/// Which file `object` is, and its size; `None` where it has gone or has no path.
fn stored_file(store: &Store, object: &ObjectId) -> Option<(Inode, u64)> {
    let metadata = fs::metadata(store.object_path(object)?).ok()?;
    Some((inode(&metadata), metadata.len()))
}

fn forget(path: PathBuf) -> Result<()> {
    match fs::remove_file(&path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(Error::io("remove", path)(error)),
        _ => Ok(()),
    }
}

fn not_yours(label: &str) -> Error {
    Refusal::NotAllowed.because(format!(
        "the label `{label}` is another user's: choose another one"
    ))
}

impl Drop for Coming<'_> {
    fn drop(&mut self) {
        let mut coming = lock(&self.owners.coming);
        if let Some(bytes) = coming.get_mut(&self.user) {
            *bytes = bytes.saturating_sub(self.bytes);
        }
    }
}
