//! The store's directory: what is where, and which version wrote it.
//!
//! ```text
//! FORMAT    version, domain and backing: who differs is refused
//! boot      the boot that the stamps count from
//! lock      flock: shared for a commit, exclusive for a sweep, both short
//! objects/  stored files by object id
//! models/   manifests by model id; a shared flock on one is a lease
//! names/    label -> model id, as symbolic links
//! hints/    fingerprint -> object id, as symbolic links
//! owner     flock: the process that has the memory files, where there are such
//! tmp/      claims on fills, reservations
//! ```

use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::unistd::{AccessFlags, access};

use crate::backing::{name, read_dir, unnamed};
use crate::error::{Error, Result};
use crate::id::{Domain, ModelId};
use crate::lock::{Lock, try_lock, wait_lock};
use crate::regular::{self, make_dir, open_or_make};

/// The directory and what this process may do there.
#[derive(Debug)]
pub(crate) struct Root {
    pub(crate) path: PathBuf,
    writable: bool,
}

impl Root {
    /// Opens the store in `path`, and makes one there if there is none and this process may.
    pub(crate) fn open(path: &Path, domain: &Domain, backing: &str) -> Result<Self> {
        let format = format!(
            "tetris-store 1\nbacking {backing}\ndomain {}\n",
            domain.name().escape_default()
        );
        let format_path = path.join("FORMAT");
        if !format_path.exists() {
            Self::create(path, &format)?;
        }
        let not_a_store = |why| Error::NotAStore {
            path: path.to_owned(),
            why,
        };
        let mut file = regular::open(&format_path)?
            .ok_or_else(|| not_a_store("its FORMAT has just been removed".to_owned()))?;
        let found = regular::read(&mut file, &format_path)?;
        if found != format.as_bytes() {
            let found = String::from_utf8_lossy(&found[..found.len().min(200)]);
            return Err(not_a_store(format!(
                "it says {found:?}, wanted is {format:?}"
            )));
        }
        // What is followed from here on could lead to somebody else's files.
        for dir in DIRECTORIES {
            let at = path.join(dir);
            let metadata = fs::symlink_metadata(&at).map_err(Error::io("look at", &at))?;
            if !metadata.is_dir() {
                return Err(not_a_store(format!("its `{dir}` is not a directory")));
            }
        }
        let writable = access(&path.join("tmp"), AccessFlags::W_OK | AccessFlags::X_OK).is_ok();
        Ok(Self {
            path: path.to_owned(),
            writable,
        })
    }

    fn create(path: &Path, format: &str) -> Result<()> {
        let public = |dir: &Path| make_dir(dir, 0o755).map_err(Error::io("create", dir));
        if let Some(parent) = path.parent().filter(|parent| *parent != Path::new("")) {
            fs::create_dir_all(parent).map_err(Error::io("create", parent))?;
        }
        public(path)?;
        let foreign = fs::read_dir(path)
            .map_err(Error::io("list", path))?
            .filter_map(std::result::Result::ok)
            .any(|entry| !DIRECTORIES.iter().any(|dir| entry.file_name() == *dir));
        if foreign && !path.join("FORMAT").exists() {
            let why = "it holds something else; give an empty or a new directory".to_owned();
            return Err(Error::NotAStore {
                path: path.to_owned(),
                why,
            });
        }
        for dir in DIRECTORIES {
            public(&path.join(dir))?;
        }
        // Last, and whole: where there is a FORMAT there is all the rest.
        let format_path = path.join("FORMAT");
        let failed = |error| Error::io("create", &format_path)(error);
        let mut file = unnamed(path).map_err(failed)?;
        file.write_all(format.as_bytes()).map_err(failed)?;
        readable(&file).map_err(failed)?;
        // False: somebody else was faster, and his is compared with ours next.
        name(&file, &format_path).map(|_| ()).map_err(failed)
    }

    /// Fails where this process may only read.
    pub(crate) fn check_writable(&self) -> Result<()> {
        if self.writable {
            Ok(())
        } else {
            Err(Error::ReadOnly {
                path: self.path.clone(),
            })
        }
    }

    /// Takes the store's lock; closing the file gives it back.
    pub(crate) fn lock(&self, lock: Lock, patience: Duration) -> Result<File> {
        self.check_writable()?;
        let path = self.path.join("lock");
        let file = open_lock(&path)?;
        if wait_lock(&file, lock, &path, patience)? {
            return Ok(file);
        }
        let what = match lock {
            Lock::Shared => "being swept",
            Lock::Exclusive => "in use by commits or another sweep",
        };
        Err(Error::Busy {
            what,
            path,
            waited: patience,
        })
    }

    /// Makes this process the only one, and empties the store of what an earlier one described:
    /// its memory has ended with it.
    pub(crate) fn own_alone(&self) -> Result<File> {
        self.check_writable()?;
        let path = self.path.join("owner");
        let file = open_lock(&path)?;
        if !try_lock(&file, Lock::Exclusive, &path)? {
            let what = "in use by the process that has its memory files";
            let waited = Duration::ZERO;
            return Err(Error::Busy { what, path, waited });
        }
        for dir in [self.models(), self.names(), self.hints(), self.tmp()] {
            for entry in read_dir(&dir)? {
                let left = entry.path();
                // A folder: of a view that its maker did not come to give up.
                let removed = match entry.file_type() {
                    Ok(kind) if kind.is_dir() => fs::remove_dir_all(&left),
                    _ => fs::remove_file(&left),
                };
                removed.map_err(Error::io("remove", left))?;
            }
        }
        Ok(file)
    }

    pub(crate) fn objects(&self) -> PathBuf {
        self.path.join("objects")
    }

    pub(crate) fn models(&self) -> PathBuf {
        self.path.join("models")
    }

    pub(crate) fn model(&self, id: &ModelId) -> PathBuf {
        self.path.join(format!("models/{id}"))
    }

    pub(crate) fn names(&self) -> PathBuf {
        self.path.join("names")
    }

    pub(crate) fn hints(&self) -> PathBuf {
        self.path.join("hints")
    }

    /// Where views are, unless their makers choose another place.
    pub(crate) fn views(&self) -> PathBuf {
        self.path.join("views")
    }

    pub(crate) fn tmp(&self) -> PathBuf {
        self.path.join("tmp")
    }
}

/// A file to be locked by the store's owner alone: readers who could lock it could hold up every
/// sweep.
fn open_lock(path: &Path) -> Result<File> {
    open_or_make(path).map_err(Error::io("open", path))
}

const DIRECTORIES: [&str; 5] = ["objects", "models", "names", "hints", "tmp"];

/// Lets everybody read `file`, whatever the umask.
pub(crate) fn readable(file: &File) -> std::io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    file.set_permissions(fs::Permissions::from_mode(0o444))
}

/// Makes a symbolic link `path` to `target`, in place of another one if need be. At no moment is
/// there none.
pub(crate) fn replace_link(target: &str, path: &Path, tmp: &Path) -> Result<()> {
    use std::sync::atomic::{AtomicU64, Ordering};
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let failed = |error| Error::io("link", path)(error);
    loop {
        let unique = NEXT.fetch_add(1, Ordering::Relaxed);
        let hidden = tmp.join(format!("link-{}-{unique}", std::process::id()));
        match std::os::unix::fs::symlink(target, &hidden) {
            Ok(()) => match fs::rename(&hidden, path) {
                // Swept away between the two calls: this process must have slept for a minute.
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                renamed => return renamed.map_err(failed),
            },
            // Left behind by a process that had this number before us.
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
            Err(error) => return Err(failed(error)),
        }
    }
}
