//! The store: what a process opens, and what it may ask.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use carlsbad_types::ByteSize;

use serde::{Deserialize, Serialize};

use crate::attach::SharedModel;
use crate::backing::{Backing, Memfd, TmpfsDir, read_dir};
use crate::error::{Error, Result};
use crate::hint::Hints;
use crate::huge_pages::{self, HugePages};
use crate::id::{Domain, ModelId, ObjectId};
use crate::label;
use crate::lease::{Lease, mark_in_use};
use crate::lifecycle::{Lifecycle, Moment};
use crate::lock::{Lock, try_lock};
use crate::manifest::Manifest;
use crate::regular;
use crate::root::Root;
use crate::stamp;

/// Where the bytes of stored files are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum BackingKind {
    /// Files in the store's directory, mode 0444, for all processes that see it. Their owner could
    /// still change them, and is trusted.
    #[default]
    Directory,
    /// Sealed memory files of the process that opened the store, which nobody can change any more.
    /// They end with it; others get them through the agent. Each takes a descriptor. Its root can
    /// be open in one process at a time, and begins empty.
    Memfd,
}

/// How a store is opened. Every field has a default but the root.
#[derive(Debug, Clone)]
pub struct StoreConfig {
    /// The store's directory, on a tmpfs where memory is to be shared: `/dev/shm/tetris`.
    pub root: PathBuf,
    /// Who may share with whom; fixed when the store is made. The default is one domain for all.
    pub domain: Domain,
    /// Where the bytes are kept; fixed when the store is made.
    pub backing: BackingKind,
    /// Whether the store gets a mount of its own with huge pages; not by default.
    pub huge_pages: HugePages,
    /// The most that may be stored, fills under way included; none by default. It is this
    /// process's own limit on what it adds.
    pub quota: Option<ByteSize>,
    /// How long a model is kept that nobody uses: 1 minute, as in the paper.
    pub keep_alive: Duration,
    /// How long to wait for another process: to finish a fill, before filling as well; to give back
    /// a lock, before giving up. 30 seconds by default.
    pub patience: Duration,
    /// Threads that read, hash and write in an ingest; one a core by default.
    pub threads: usize,
}

impl StoreConfig {
    /// The defaults, for the store in `root`.
    pub fn at(root: impl Into<PathBuf>) -> Self {
        Self {
            root: root.into(),
            domain: Domain::default(),
            backing: BackingKind::default(),
            huge_pages: HugePages::default(),
            quota: None,
            keep_alive: Duration::from_secs(60),
            patience: Duration::from_secs(30),
            threads: std::thread::available_parallelism().map_or(1, usize::from),
        }
    }
}

/// A store of shared tensors. Cloning it is cheap and gives a handle to the same store.
#[derive(Debug, Clone)]
pub struct Store {
    pub(crate) inner: Arc<Inner>,
}

#[derive(Debug)]
pub(crate) struct Inner {
    pub(crate) config: StoreConfig,
    pub(crate) root: Root,
    pub(crate) backing: Arc<dyn Backing>,
    pub(crate) hints: Hints,
    /// The right to be the one process that has this root open, where only one may.
    _sole_owner: Option<File>,
}

/// A model in the store, and the labels it goes by.
#[derive(Debug, Clone)]
pub struct StoredModel {
    /// What it is.
    pub id: ModelId,
    /// Its labels, sorted.
    pub labels: Vec<String>,
    /// What it consists of.
    pub manifest: Manifest,
}

/// What is in the store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stats {
    /// Models.
    pub models: usize,
    /// Stored files.
    pub objects: usize,
    /// Memory the stored files take.
    pub stored: ByteSize,
    /// Memory that the manifests take, with the small files of the models in them.
    pub manifests: ByteSize,
    /// Memory that the views below `<root>/views` take for themselves; what they link is stored.
    pub views: ByteSize,
    /// What fills under way have reserved, where there is a quota.
    pub reserved: ByteSize,
    /// Bytes of all models' tensors: what one private copy of each would take.
    pub private: ByteSize,
    /// The limit on what this process may add to.
    pub quota: Option<ByteSize>,
}

impl Store {
    /// Opens the store in `config.root`, or makes one there. A process that may only read, for
    /// instance through a read-only bind mount, can attach and look, but not ingest or reclaim.
    ///
    /// # Errors
    /// [`Error::NotAStore`] where the directory holds something else, or a store of another version,
    /// domain or backing; [`Error::Busy`] where another process has the memory files; [`Error::Io`].
    pub fn open(config: StoreConfig) -> Result<Self> {
        let name = match config.backing {
            BackingKind::Directory => "directory",
            BackingKind::Memfd => "memfd",
        };
        huge_pages::mount_if_configured(&config)?;
        let root = Root::open(&config.root, &config.domain, name)?;
        let (backing, sole_owner): (Arc<dyn Backing>, _) = match config.backing {
            BackingKind::Directory => (Arc::new(TmpfsDir::open(root.objects())?), None),
            BackingKind::Memfd => (Arc::new(Memfd::default()), Some(root.own_alone()?)),
        };
        let hints = Hints::new(root.hints());
        let inner = Inner {
            config,
            root,
            backing,
            hints,
            _sole_owner: sole_owner,
        };
        inner.after_a_reboot()?;
        Ok(Self {
            inner: Arc::new(inner),
        })
    }

    /// How it was opened.
    pub fn config(&self) -> &StoreConfig {
        &self.inner.config
    }

    /// The store's directory.
    pub fn root(&self) -> &Path {
        &self.inner.root.path
    }

    /// Takes a lease on `model` and gives access to its tensors.
    ///
    /// # Errors
    /// [`Error::UnknownModel`]; [`Error::Damaged`]; [`Error::Busy`] where it has been about to be reclaimed for longer
    /// than the configured patience; [`Error::Io`].
    pub fn attach(&self, model: &ModelId) -> Result<SharedModel> {
        let path = self.inner.root.model(model);
        let (lease, bytes) =
            Lease::take(&path, self.inner.config.patience)?.ok_or_else(|| Error::UnknownModel {
                name: model.to_string(),
            })?;
        let manifest = Manifest::decode(&bytes).map_err(|error| Error::Damaged {
            path,
            why: error.to_string(),
        })?;
        Ok(SharedModel::new(
            *model,
            manifest,
            self.inner.backing.clone(),
            Some(lease),
        ))
    }

    /// What `model` consists of. Takes no lease: it may be gone a moment later.
    ///
    /// # Errors
    /// [`Error::UnknownModel`]; [`Error::Damaged`]; [`Error::Io`].
    pub fn manifest(&self, model: &ModelId) -> Result<Manifest> {
        let path = self.inner.root.model(model);
        let mut file = regular::open(&path)?.ok_or_else(|| Error::UnknownModel {
            name: model.to_string(),
        })?;
        let bytes = regular::read(&mut file, &path)?;
        Manifest::decode(&bytes).map_err(|error| Error::Damaged {
            path,
            why: error.to_string(),
        })
    }

    /// Where `model` stands: leased, or idle and since when. To look is not to use it.
    ///
    /// # Errors
    /// [`Error::UnknownModel`]; [`Error::Damaged`]; [`Error::Io`].
    pub fn state(&self, model: &ModelId) -> Result<Lifecycle> {
        let path = self.inner.root.model(model);
        let manifest = regular::open(&path)?.ok_or_else(|| Error::UnknownModel {
            name: model.to_string(),
        })?;
        // For a moment only: who attaches meanwhile asks again after 50 us.
        let leased = !try_lock(&manifest, Lock::Exclusive, &path)?;
        let modified = manifest.metadata().and_then(|it| it.modified());
        let stamp = stamp::read(modified.map_err(Error::io("look at", path))?);
        Ok(Lifecycle::seen(leased, stamp, stamp::now()?))
    }

    /// The present moment, to compare with those of [`state`](Self::state).
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn now() -> Result<Moment> {
        stamp::now()
    }

    /// The ids of all models in the store, ascending.
    pub(crate) fn model_ids(&self) -> Result<Vec<ModelId>> {
        let mut ids: Vec<ModelId> = read_dir(&self.inner.root.models())?
            .into_iter()
            .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
            .collect();
        ids.sort_unstable();
        Ok(ids)
    }

    /// The models in the store, by ascending id.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Damaged`].
    pub fn models(&self) -> Result<Vec<StoredModel>> {
        let labels = label::all(&self.inner.root)?;
        let mut models = Vec::new();
        for id in self.model_ids()? {
            let manifest = match self.manifest(&id) {
                Ok(manifest) => manifest,
                // Reclaimed meanwhile.
                Err(Error::UnknownModel { .. }) => continue,
                Err(error) => return Err(error),
            };
            let of_this = labels.iter().filter(|(_, model)| *model == id);
            let labels = of_this.map(|(label, _)| label.clone()).collect();
            models.push(StoredModel {
                id,
                labels,
                manifest,
            });
        }
        Ok(models)
    }

    /// The model that goes by `name`: a label, an id, or the first digits of one.
    ///
    /// # Errors
    /// [`Error::UnknownModel`]; [`Error::AmbiguousModel`]; [`Error::Io`].
    pub fn resolve(&self, name: &str) -> Result<ModelId> {
        let ids = self.model_ids()?;
        if let Some(id) = label::get(&self.inner.root, name)?
            && ids.binary_search(&id).is_ok()
        {
            return Ok(id);
        }
        let prefix = name.to_ascii_lowercase();
        let mut fits = ids.iter().filter(|id| id.to_string().starts_with(&prefix));
        match (fits.next(), fits.count()) {
            (Some(id), 0) if !name.is_empty() => Ok(*id),
            (Some(_), more) if !name.is_empty() => Err(Error::AmbiguousModel {
                prefix: name.to_owned(),
                count: more + 1,
            }),
            _ => Err(Error::UnknownModel {
                name: name.to_owned(),
            }),
        }
    }

    /// Lets `model` go by `label` from now on, in place of the model that did so before.
    ///
    /// # Errors
    /// [`Error::BadLabel`]; [`Error::UnknownModel`]; [`Error::ReadOnly`]; [`Error::Io`].
    pub fn set_label(&self, label: &str, model: &ModelId) -> Result<()> {
        let _no_sweep = self
            .inner
            .root
            .lock(Lock::Shared, self.inner.config.patience)?;
        if !self.inner.root.model(model).exists() {
            return Err(Error::UnknownModel {
                name: model.to_string(),
            });
        }
        label::set(&self.inner.root, label, model)
    }

    /// Takes `label` away; whether there was one.
    ///
    /// # Errors
    /// [`Error::BadLabel`]; [`Error::ReadOnly`]; [`Error::Io`].
    pub fn remove_label(&self, label: &str) -> Result<bool> {
        self.inner.root.check_writable()?;
        label::remove(&self.inner.root, label)
    }

    /// The path of a stored file, where it has one: a complete safetensors file, mode 0444.
    pub fn object_path(&self, object: &ObjectId) -> Option<PathBuf> {
        self.inner.backing.path(object)
    }

    /// What is in the store.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Damaged`].
    pub fn stats(&self) -> Result<Stats> {
        let models = self.models()?;
        let objects = self.inner.backing.list()?;
        Ok(Stats {
            models: models.len(),
            objects: objects.len(),
            stored: objects.iter().map(|object| object.bytes).sum(),
            manifests: self.inner.of_manifests()?,
            views: self.inner.of_views()?,
            reserved: self.inner.reserved()?,
            private: models.iter().map(|model| model.manifest.byte_size()).sum(),
            quota: self.inner.config.quota,
        })
    }
}

impl Inner {
    /// Stamps count from boot, so those of an earlier boot say nothing: for everything that such a
    /// boot left, idle time begins anew. (On a tmpfs it left nothing.)
    fn after_a_reboot(&self) -> Result<()> {
        let seen = self.root.path.join("boot");
        let Ok(boot) = fs::read_to_string("/proc/sys/kernel/random/boot_id") else {
            tracing::debug!("cannot tell one boot from another: /proc is not there");
            return Ok(());
        };
        let is_known = || {
            let file = regular::open(&seen).ok().flatten();
            file.and_then(|mut file| regular::read(&mut file, &seen).ok())
                .is_some_and(|known| known == boot.as_bytes())
        };
        if is_known() || self.root.check_writable().is_err() {
            return Ok(());
        }
        let _no_commits = self.root.lock(Lock::Exclusive, self.config.patience)?;
        if is_known() {
            return Ok(());
        }
        for entry in read_dir(&self.root.models())? {
            let path = entry.path();
            match regular::open(&path) {
                Ok(Some(manifest)) => drop(mark_in_use(&manifest, &path)),
                Ok(None) => {}
                Err(error) => tracing::warn!(%error, "a damaged manifest"),
            }
        }
        for object in self.backing.list()? {
            self.backing.touch(&object.id, Moment::IN_USE)?;
        }
        let hidden = self.root.tmp().join("boot");
        regular::open_or_make(&hidden)
            .and_then(|mut file| {
                file.set_len(0)?;
                file.write_all(boot.as_bytes())
            })
            .map_err(Error::io("write", &hidden))?;
        fs::rename(&hidden, &seen).map_err(Error::io("write", &seen))
    }
}
