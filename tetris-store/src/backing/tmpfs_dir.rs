//! Stored files in a directory, which is meant to be on a tmpfs.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, ErrorKind};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use carlsbad_types::ByteSize;
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, OFlag, openat};
use nix::sys::stat::{Mode, fstatat};
use nix::unistd::linkat;

use super::{Backing, Objects, StoredObject};
use crate::error::{Error, Result};
use crate::id::ObjectId;
use crate::lifecycle::Moment;
use crate::regular::{self, make_dir};
use crate::stamp;

/// `<dir>/<first two digits>/<id>`, mode 0444.
#[derive(Debug)]
pub(crate) struct TmpfsDir {
    path: PathBuf,
    /// The same directory: paths relative to it are shorter to walk.
    dir: File,
}

impl TmpfsDir {
    /// The directory `path`, which exists.
    pub(crate) fn open(path: PathBuf) -> Result<Self> {
        let dir = File::open(&path).map_err(Error::io("open", &path))?;
        Ok(Self { path, dir })
    }

    fn relative(id: &ObjectId) -> String {
        format!("{id:.2}/{id}")
    }

    fn absolute(&self, id: &ObjectId) -> PathBuf {
        self.path.join(Self::relative(id))
    }
}

/// An empty file without a name in `dir`; the kernel frees it if it never gets one.
pub(crate) fn unnamed(dir: &Path) -> io::Result<File> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .mode(0o600)
        .custom_flags(OFlag::O_TMPFILE.bits())
        .open(dir)?;
    // Whatever the umask: it is opened again by those who look for abandoned ones.
    file.set_permissions(Permissions::from_mode(0o600))?;
    Ok(file)
}

/// Gives an unnamed file the name `path`; false where that is taken.
pub(crate) fn name(file: &File, path: &Path) -> io::Result<bool> {
    let by_descriptor = format!("/proc/self/fd/{}", file.as_raw_fd());
    match linkat(
        AT_FDCWD,
        by_descriptor.as_str(),
        AT_FDCWD,
        path,
        AtFlags::AT_SYMLINK_FOLLOW,
    ) {
        Ok(()) => Ok(true),
        Err(Errno::EEXIST) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

impl Objects for TmpfsDir {
    fn open(&self, id: &ObjectId) -> Result<Option<File>> {
        // Not to wait where a pipe has been put in its place.
        let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK;
        match openat(&self.dir, Self::relative(id).as_str(), flags, Mode::empty()) {
            Ok(file) => {
                let file = File::from(file);
                regular::check(&file, || self.absolute(id)).map(|()| Some(file))
            }
            Err(Errno::ENOENT) => Ok(None),
            Err(Errno::ELOOP | Errno::ENXIO) => Err(regular::no_regular_file(self.absolute(id))),
            Err(errno) => Err(Error::io("open", self.absolute(id))(errno)),
        }
    }

    fn path(&self, id: &ObjectId) -> Option<PathBuf> {
        Some(self.absolute(id))
    }
}

impl Backing for TmpfsDir {
    fn begin(&self) -> Result<File> {
        unnamed(&self.path).map_err(Error::io("create a file in", &self.path))
    }

    fn publish(&self, file: File, id: &ObjectId, at: Moment) -> Result<bool> {
        let path = self.absolute(id);
        let failed = |error| Error::io("publish", &path)(error);
        file.set_permissions(Permissions::from_mode(0o444))
            .map_err(failed)?;
        stamp::write(&file, at).map_err(failed)?;
        match name(&file, &path) {
            Err(error) if error.kind() == ErrorKind::NotFound => {
                let folder = self.path.join(format!("{id:.2}"));
                make_dir(&folder, 0o755).map_err(Error::io("create", &folder))?;
                name(&file, &path).map_err(failed)
            }
            named => named.map_err(failed),
        }
    }

    fn contains(&self, id: &ObjectId) -> Result<bool> {
        match fstatat(
            &self.dir,
            Self::relative(id).as_str(),
            AtFlags::AT_SYMLINK_NOFOLLOW,
        ) {
            Ok(_) => Ok(true),
            Err(Errno::ENOENT) => Ok(false),
            Err(errno) => Err(Error::io("look for", self.absolute(id))(errno)),
        }
    }

    fn touch(&self, id: &ObjectId, at: Moment) -> Result<bool> {
        let Some(file) = self.open(id)? else {
            return Ok(false);
        };
        stamp::write(&file, at).map_err(Error::io("stamp", self.absolute(id)))?;
        Ok(true)
    }

    fn evict(&self, id: &ObjectId) -> Result<()> {
        let path = self.absolute(id);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                Err(Error::io("remove", path)(error))
            }
            _ => Ok(()),
        }
    }

    fn list(&self) -> Result<Vec<StoredObject>> {
        let mut objects = Vec::new();
        for folder in read_dir(&self.path)? {
            for file in read_dir(&folder.path())? {
                let Some(id) = file.file_name().to_str().and_then(|name| name.parse().ok()) else {
                    continue;
                };
                let metadata = match file.metadata() {
                    Ok(metadata) => metadata,
                    // Evicted meanwhile.
                    Err(error) if error.kind() == ErrorKind::NotFound => continue,
                    Err(error) => return Err(Error::io("look at", file.path())(error)),
                };
                objects.push(StoredObject {
                    id,
                    bytes: ByteSize::new(metadata.blocks() * 512),
                    views: metadata.nlink().saturating_sub(1),
                    stamp: stamp::read(
                        metadata
                            .modified()
                            .map_err(Error::io("look at", file.path()))?,
                    ),
                });
            }
        }
        Ok(objects)
    }
}

/// The entries of `dir`; none where it has gone.
pub(crate) fn read_dir(dir: &Path) -> Result<Vec<fs::DirEntry>> {
    match fs::read_dir(dir) {
        Ok(entries) => entries.collect::<io::Result<_>>(),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    }
    .map_err(Error::io("list", dir))
}
