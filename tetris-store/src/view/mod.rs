//! Views: a model of the store as files that unmodified runtimes load.
//!
//! A view is a folder of hard links to stored files, and of a small file that names them. The
//! runtime maps the links, and so shares the memory of everybody else who uses the same tensors. It
//! holds no lease; what keeps a stored file is its link count. A view is deleted like any folder.

mod hf_sharded;
mod onnx_external;

use std::borrow::Cow;
use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Component, Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use carlsbad_types::ByteSize;
use nix::errno::Errno;

use serde::{Deserialize, Serialize};

use crate::attach::SharedModel;
use crate::backing::read_dir;
use crate::error::{Error, Result};
use crate::id::{ModelId, ObjectId};
use crate::lock::{Lock, try_lock};
use crate::quota::{Reservation, in_pages};
use crate::store::Store;

/// For whom a view is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum ViewKind {
    /// A Hugging Face folder: safetensors shards, `model.safetensors.index.json`, and the small
    /// files that came with the model. For torch, transformers and whatever reads safetensors; of
    /// any model whose element types safetensors knows. `torch` maps the shards and copies nothing.
    HfSharded,
    /// `model.onnx` with external data. For ONNX Runtime; of models that came as ONNX. Set the
    /// session option `session.disable_prepacking` to 1, or it copies the weights into a layout
    /// of its own.
    OnnxExternal,
}

impl ViewKind {
    /// `hf-sharded` or `onnx-external`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::HfSharded => "hf-sharded",
            Self::OnnxExternal => "onnx-external",
        }
    }
}

/// A view that was exported.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct View {
    /// Its folder.
    pub path: PathBuf,
    /// For whom it is.
    pub kind: ViewKind,
    /// Its files, relative to the folder, sorted.
    pub files: Vec<PathBuf>,
    /// Bytes of tensors that are shared with the store.
    pub linked: ByteSize,
    /// Bytes that belong to the view alone: its index or graph, the small files, tensors that the
    /// stored file has under another name, and those that the format wants inside.
    pub copied: ByteSize,
}

impl Store {
    /// Exports `model` as the folder `dir`, which must not exist yet (or be empty) and lie in the
    /// store's own mount, for instance below `<root>/views`. It appears there complete or not at
    /// all.
    ///
    /// What a view has for itself ([`View::copied`]) counts against the store's quota, in whole
    /// pages, for as long as it lies below `<root>/views`.
    ///
    /// # Errors
    /// [`Error::ViewUnsupported`] where the model does not go into this kind of view;
    /// [`Error::ViewElsewhere`] where `dir` is in another mount; [`Error::ViewDenied`] where the
    /// stored files are another user's; [`Error::ViewExists`]; [`Error::UnknownModel`];
    /// [`Error::ReadOnly`]; [`Error::Damaged`]; [`Error::QuotaExceeded`]; [`Error::NoSpace`];
    /// [`Error::Io`].
    pub fn export_view(&self, model: &ModelId, kind: ViewKind, dir: &Path) -> Result<View> {
        self.export_admitted(model, kind, dir, |_| Ok(()))
    }

    /// [`export_view`](Self::export_view), if `admit` agrees to what the view takes. Nothing is
    /// written before; what it returns is kept until the view is there.
    pub(crate) fn export_admitted<T>(
        &self,
        model: &ModelId,
        kind: ViewKind,
        dir: &Path,
        admit: impl FnOnce(&Demand) -> Result<T>,
    ) -> Result<View> {
        self.inner.root.check_writable()?;
        // The lease keeps every stored file until it is linked.
        let shared = self.attach(model)?;
        let mut builder = Builder {
            store: self,
            model: &shared,
            kind,
            files: Vec::new(),
        };
        match kind {
            ViewKind::HfSharded => hf_sharded::build(&mut builder)?,
            ViewKind::OnnxExternal => onnx_external::build(&mut builder)?,
        }
        let demand = builder.demand();
        let _admitted = admit(&demand)?;
        let reservation = Reservation::new(&self.inner);
        reservation.take(demand.own, demand.own)?;
        builder.finish(dir, &reservation, demand.own)
    }
}

/// What a view takes, known before it is made.
#[derive(Debug)]
pub(crate) struct Demand {
    /// Stored files that it keeps for as long as it exists.
    pub(crate) linked: Vec<ObjectId>,
    /// Bytes of its own, in whole pages.
    pub(crate) own: u64,
}

/// Bytes that the views below `dir` have for themselves, in whole pages: files that nobody else has
/// a link to. None where there is no such folder.
pub(crate) fn own_bytes(dir: &Path) -> Result<ByteSize> {
    // `<root>/views/NAME` is one user's, `<root>/views/USER/NAME` an agent's.
    const DEEPEST: usize = 3;
    fn walk(dir: &Path, deeper: usize) -> Result<ByteSize> {
        let mut bytes = ByteSize::ZERO;
        for entry in read_dir(dir)? {
            // Removed meanwhile.
            let Ok(metadata) = entry.metadata() else {
                continue;
            };
            if metadata.is_dir() && deeper > 0 {
                bytes += walk(&entry.path(), deeper - 1)?;
            } else if metadata.is_file() && metadata.nlink() == 1 {
                bytes += ByteSize::new(metadata.blocks() * 512);
            }
        }
        Ok(bytes)
    }
    if dir.is_dir() {
        walk(dir, DEEPEST)
    } else {
        Ok(ByteSize::ZERO)
    }
}

/// A view to be. It is decided first and made at once, in a hidden folder of the store's `tmp` that
/// is locked as long as somebody works on it.
struct Builder<'a> {
    store: &'a Store,
    model: &'a SharedModel,
    kind: ViewKind,
    files: Vec<(String, Content<'a>)>,
}

/// What a file of a view consists of.
enum Content<'a> {
    /// A stored file, and how many bytes of it are tensors of this model.
    Linked(ObjectId, u64),
    /// These bytes, one after another.
    Own(Vec<Cow<'a, [u8]>>),
}

impl<'a> Builder<'a> {
    fn unsupported(&self, why: impl Into<String>) -> Error {
        Error::ViewUnsupported {
            model: *self.model.id(),
            kind: self.kind.name(),
            why: why.into(),
        }
    }

    /// A new file of the view.
    fn add(&mut self, name: &str, content: Content<'a>) -> Result<()> {
        let mut parts = Path::new(name).components();
        let plain = matches!(
            (parts.next(), parts.next()),
            (Some(Component::Normal(part)), None) if part == name
        );
        if !plain || name.contains('\0') || name.len() > 255 {
            return Err(self.unsupported(format!("`{name}` cannot be the name of a file")));
        }
        self.files.push((name.to_owned(), content));
        Ok(())
    }

    /// Shows a stored file, `bytes` of tensors, as `name`.
    fn link(&mut self, object: ObjectId, name: &str, bytes: u64) -> Result<()> {
        self.add(name, Content::Linked(object, bytes))
    }

    /// A file of the view's own, read-only like the others.
    fn write(&mut self, name: &str, parts: Vec<Cow<'a, [u8]>>) -> Result<()> {
        self.add(name, Content::Own(parts))
    }

    fn demand(&self) -> Demand {
        let mut demand = Demand {
            linked: Vec::new(),
            own: 0,
        };
        for (_, content) in &self.files {
            match content {
                Content::Linked(object, _) => demand.linked.push(*object),
                Content::Own(parts) => demand.own += in_pages(total(parts)),
            }
        }
        demand
    }

    /// Makes the view, whose `own` bytes are reserved.
    fn finish(mut self, dir: &Path, reservation: &Reservation<'_>, own: u64) -> Result<View> {
        let mut hidden = Hidden::create(&self.store.inner.root.tmp())?;
        let (mut linked, mut copied) = (0, 0);
        for (name, content) in &self.files {
            let path = hidden.path.join(name);
            match content {
                Content::Linked(object, bytes) => {
                    self.make_link(object, &path)?;
                    linked += bytes;
                }
                Content::Own(parts) => {
                    write(parts, &path)?;
                    copied += total(parts);
                }
            }
        }
        if let Some(parent) = dir.parent().filter(|parent| *parent != Path::new("")) {
            DirBuilder::new()
                .recursive(true)
                .mode(0o755)
                .create(parent)
                .map_err(Error::io("create", parent))?;
        }
        reservation.settle(own, || self.put(&hidden.path, dir).map(|()| true))?;
        hidden.kept = true;
        let names = self.files.drain(..).map(|(name, _)| name.into());
        let mut files: Vec<PathBuf> = names.collect();
        files.sort();
        Ok(View {
            path: dir.to_owned(),
            kind: self.kind,
            files,
            linked: ByteSize::new(linked),
            copied: ByteSize::new(copied),
        })
    }

    fn make_link(&self, object: &ObjectId, path: &Path) -> Result<()> {
        let stored = self
            .store
            .object_path(object)
            .ok_or_else(|| self.unsupported("this store keeps its files without names"))?;
        fs::hard_link(&stored, path).map_err(|error| match error.raw_os_error() {
            Some(code) if code == Errno::EPERM as i32 => Error::ViewDenied {
                path: stored.clone(),
            },
            Some(code) if code == Errno::EXDEV as i32 => Error::ViewElsewhere {
                dir: path.to_owned(),
                root: self.store.root().to_owned(),
            },
            _ => Error::io("link", stored)(error),
        })
    }

    /// Takes the place of nothing or of an empty folder, in one step.
    fn put(&self, hidden: &Path, dir: &Path) -> Result<()> {
        fs::rename(hidden, dir).map_err(|error| {
            let dir = dir.to_owned();
            match error.kind() {
                ErrorKind::CrossesDevices => Error::ViewElsewhere {
                    dir,
                    root: self.store.root().to_owned(),
                },
                ErrorKind::DirectoryNotEmpty
                | ErrorKind::AlreadyExists
                | ErrorKind::NotADirectory => Error::ViewExists { dir },
                _ => Error::io("put the view in", dir)(error),
            }
        })
    }
}

fn total(parts: &[Cow<'_, [u8]>]) -> u64 {
    parts.iter().map(|part| part.len() as u64).sum()
}

fn write(parts: &[Cow<'_, [u8]>], path: &Path) -> Result<()> {
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .map_err(Error::io("create", path))?;
    for part in parts {
        file.write_all(part).map_err(Error::io("write", path))?;
    }
    file.set_permissions(Permissions::from_mode(0o444))
        .map_err(Error::io("make readable", path))
}

const HIDDEN_PREFIX: &str = "view-";

/// A folder that goes away with its maker: by drop, or, if he dies, by the next sweep.
struct Hidden {
    path: PathBuf,
    kept: bool,
    _lock: File,
}

impl Hidden {
    fn create(tmp: &Path) -> Result<Self> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        loop {
            let unique = NEXT.fetch_add(1, Ordering::Relaxed);
            let path = tmp.join(format!("{HIDDEN_PREFIX}{}-{unique}", std::process::id()));
            match DirBuilder::new().mode(0o755).create(&path) {
                // Whatever the umask; unless a sweep came between.
                Ok(()) => match fs::set_permissions(&path, Permissions::from_mode(0o755)) {
                    Err(error) if error.kind() == ErrorKind::NotFound => continue,
                    set => set.map_err(Error::io("make readable", &path))?,
                },
                // Left behind by a process that had this number before us.
                Err(error) if error.kind() == ErrorKind::AlreadyExists => continue,
                Err(error) => return Err(Error::io("create", path)(error)),
            }
            // A sweep may come between: then the folder is gone, or its lock is taken.
            let lock = match File::open(&path) {
                Ok(lock) => lock,
                Err(error) if error.kind() == ErrorKind::NotFound => continue,
                Err(error) => return Err(Error::io("open", path)(error)),
            };
            if try_lock(&lock, Lock::Exclusive, &path)? && path.exists() {
                return Ok(Self {
                    path,
                    kept: false,
                    _lock: lock,
                });
            }
        }
    }
}

impl Drop for Hidden {
    fn drop(&mut self) {
        if self.kept {
            return;
        }
        if let Err(error) = fs::remove_dir_all(&self.path) {
            let path = self.path.display();
            tracing::warn!(%path, %error, "an unfinished view stays until the next sweep");
        }
    }
}

/// Removes unfinished views whose makers died, from the store's `tmp`. Returns how many.
pub(crate) fn sweep_unfinished(tmp: &Path) -> Result<usize> {
    let mut removed = 0;
    for entry in fs::read_dir(tmp).map_err(Error::io("list", tmp))? {
        let entry = entry.map_err(Error::io("list", tmp))?;
        let path = entry.path();
        let ours = entry
            .file_name()
            .to_str()
            .is_some_and(|name| name.starts_with(HIDDEN_PREFIX));
        if !ours {
            continue;
        }
        let lock = match File::open(&path) {
            Ok(lock) => lock,
            Err(error) if error.kind() == ErrorKind::NotFound => continue,
            Err(error) => return Err(Error::io("open", path)(error)),
        };
        if try_lock(&lock, Lock::Exclusive, &path)? {
            match fs::remove_dir_all(&path) {
                Ok(()) => removed += 1,
                // Finished and renamed, or removed by its maker, between our look and our lock.
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(error) => return Err(Error::io("remove", path)(error)),
            }
        }
    }
    Ok(removed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sweep_takes_what_dead_makers_left_and_nothing_else() {
        let tmp = tempfile::tempdir().unwrap();
        let alive = Hidden::create(tmp.path()).unwrap();
        let dead = tmp.path().join("view-1-0");
        fs::create_dir(&dead).unwrap();
        fs::write(dead.join("model.onnx"), "half").unwrap();
        fs::write(tmp.path().join("claim-0"), "").unwrap();
        assert_eq!(sweep_unfinished(tmp.path()).unwrap(), 1);
        assert!(alive.path.exists() && !dead.exists() && tmp.path().join("claim-0").exists());
        drop(alive);
        assert_eq!(fs::read_dir(tmp.path()).unwrap().count(), 1);
    }
}
