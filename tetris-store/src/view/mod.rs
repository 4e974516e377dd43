//! Views: a model of the store as files that unmodified runtimes load.
//!
//! A view is a folder of hard links to stored files, and of a small file that names them. The
//! runtime maps the links, and so shares the memory of everybody else who uses the same tensors. It
//! holds no lease; what keeps a stored file is its link count. A view is deleted like any folder.

mod hf_sharded;
mod onnx_external;

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Component, Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use carlsbad_types::ByteSize;
use nix::errno::Errno;

use serde::{Deserialize, Serialize};

use crate::attach::SharedModel;
use crate::error::{Error, Result};
use crate::id::{ModelId, ObjectId};
use crate::lock::{Lock, try_lock};
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
    /// # Errors
    /// [`Error::ViewUnsupported`] where the model does not go into this kind of view;
    /// [`Error::ViewElsewhere`] where `dir` is in another mount; [`Error::ViewDenied`] where the
    /// stored files are another user's; [`Error::ViewExists`]; [`Error::UnknownModel`];
    /// [`Error::ReadOnly`]; [`Error::Damaged`]; [`Error::NoSpace`]; [`Error::Io`].
    pub fn export_view(&self, model: &ModelId, kind: ViewKind, dir: &Path) -> Result<View> {
        self.inner.root.check_writable()?;
        // The lease keeps every stored file until it is linked.
        let shared = self.attach(model)?;
        let mut builder = Builder::new(self, &shared, kind)?;
        match kind {
            ViewKind::HfSharded => hf_sharded::build(&mut builder)?,
            ViewKind::OnnxExternal => onnx_external::build(&mut builder)?,
        }
        builder.finish(dir)
    }
}

/// A view under construction, in a hidden folder of the store's `tmp` that is locked as long as
/// somebody works on it.
struct Builder<'a> {
    store: &'a Store,
    model: &'a SharedModel,
    kind: ViewKind,
    hidden: Hidden,
    files: Vec<PathBuf>,
    linked: u64,
    copied: u64,
}

impl<'a> Builder<'a> {
    fn new(store: &'a Store, model: &'a SharedModel, kind: ViewKind) -> Result<Self> {
        Ok(Self {
            store,
            model,
            kind,
            hidden: Hidden::create(&store.inner.root.tmp())?,
            files: Vec::new(),
            linked: 0,
            copied: 0,
        })
    }

    fn unsupported(&self, why: impl Into<String>) -> Error {
        Error::ViewUnsupported {
            model: *self.model.id(),
            kind: self.kind.name(),
            why: why.into(),
        }
    }

    /// The path of a new file of the view.
    fn add(&mut self, name: &str) -> Result<PathBuf> {
        let mut parts = Path::new(name).components();
        let plain = matches!(
            (parts.next(), parts.next()),
            (Some(Component::Normal(part)), None) if part == name
        );
        if !plain || name.contains('\0') || name.len() > 255 {
            return Err(self.unsupported(format!("`{name}` cannot be the name of a file")));
        }
        self.files.push(name.into());
        Ok(self.hidden.path.join(name))
    }

    /// Shows a stored file, `bytes` of tensors, as `name`.
    fn link(&mut self, object: &ObjectId, name: &str, bytes: u64) -> Result<()> {
        let stored = self
            .store
            .object_path(object)
            .ok_or_else(|| self.unsupported("this store keeps its files without names"))?;
        let path = self.add(name)?;
        fs::hard_link(&stored, &path).map_err(|error| match error.raw_os_error() {
            Some(code) if code == Errno::EPERM as i32 => Error::ViewDenied {
                path: stored.clone(),
            },
            Some(code) if code == Errno::EXDEV as i32 => Error::ViewElsewhere {
                dir: path,
                root: self.store.root().to_owned(),
            },
            _ => Error::io("link", stored)(error),
        })?;
        self.linked += bytes;
        Ok(())
    }

    /// A file of the view's own, read-only like the others.
    fn write(&mut self, name: &str, parts: &[&[u8]]) -> Result<()> {
        let path = self.add(name)?;
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)
            .map_err(Error::io("create", &path))?;
        for part in parts {
            file.write_all(part).map_err(Error::io("write", &path))?;
            self.copied += part.len() as u64;
        }
        file.set_permissions(fs::Permissions::from_mode(0o444))
            .map_err(Error::io("make readable", &path))
    }

    fn finish(mut self, dir: &Path) -> Result<View> {
        if let Some(parent) = dir.parent().filter(|parent| *parent != Path::new("")) {
            DirBuilder::new()
                .recursive(true)
                .mode(0o755)
                .create(parent)
                .map_err(Error::io("create", parent))?;
        }
        // Takes the place of nothing or of an empty folder, in one step.
        if let Err(error) = fs::rename(&self.hidden.path, dir) {
            let dir = dir.to_owned();
            return Err(match error.kind() {
                ErrorKind::CrossesDevices => Error::ViewElsewhere {
                    dir,
                    root: self.store.root().to_owned(),
                },
                ErrorKind::DirectoryNotEmpty
                | ErrorKind::AlreadyExists
                | ErrorKind::NotADirectory => Error::ViewExists { dir },
                _ => Error::io("put the view in", dir)(error),
            });
        }
        self.hidden.kept = true;
        self.files.sort();
        Ok(View {
            path: dir.to_owned(),
            kind: self.kind,
            files: std::mem::take(&mut self.files),
            linked: ByteSize::new(self.linked),
            copied: ByteSize::new(self.copied),
        })
    }
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
                Ok(()) => {}
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
