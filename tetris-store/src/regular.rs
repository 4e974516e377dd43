//! Small files of a store, opened so that nothing in their place can hold up or mislead who reads.
//!
//! A link could lead anywhere, and a pipe or a device could make a reader wait for ever, or never
//! end. The store writes regular files; what is anything else is damage.

use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, ErrorKind, Read};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::OFlag;

use crate::error::{Error, Result};

/// The most that is read of one: manifests of models with tokenizers and graphs of many megabytes
/// fit, and memory is safe from a file with a hole of terabytes.
const LARGEST: u64 = 1 << 30;

/// The regular file at `path`, to be read; `None` where nothing goes by that name.
///
/// # Errors
/// [`Error::Damaged`] where it is no regular file; [`Error::Io`].
pub(crate) fn open(path: &Path) -> Result<Option<File>> {
    let opened = OpenOptions::new()
        .read(true)
        .custom_flags((OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK).bits())
        .open(path);
    match opened {
        Ok(file) => check(&file, || path.to_owned()).map(|()| Some(file)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        // ELOOP: a symbolic link. ENXIO: a socket.
        Err(error)
            if [Errno::ELOOP, Errno::ENXIO]
                .iter()
                .any(|errno| error.raw_os_error() == Some(*errno as i32)) =>
        {
            Err(no_regular_file(path.to_owned()))
        }
        Err(error) => Err(Error::io("open", path)(error)),
    }
}

/// Fails with [`Error::Damaged`] unless `file`, opened at `path`, is a regular file.
pub(crate) fn check(file: &File, path: impl FnOnce() -> PathBuf) -> Result<()> {
    match file.metadata() {
        Ok(metadata) if metadata.is_file() => Ok(()),
        Ok(_) => Err(no_regular_file(path())),
        Err(error) => Err(Error::io("look at", path())(error)),
    }
}

/// What is said of `path`, where something else lies.
pub(crate) fn no_regular_file(path: PathBuf) -> Error {
    Error::Damaged {
        path,
        why: "it is not a regular file".to_owned(),
    }
}

/// All of `file`, which was opened at `path`.
///
/// # Errors
/// [`Error::Damaged`] where that is more than any such file has; [`Error::Io`].
pub(crate) fn read(file: &mut File, path: &Path) -> Result<Vec<u8>> {
    let len = file.metadata().map_err(Error::io("look at", path))?.len();
    let mut bytes = Vec::new();
    if len <= LARGEST {
        // One more than there is, so that the end is found without growing.
        bytes.reserve_exact(len as usize + 1);
        let limited = file.take(LARGEST + 1).read_to_end(&mut bytes);
        limited.map_err(Error::io("read", path))?;
    }
    if len.max(bytes.len() as u64) > LARGEST {
        return Err(Error::Damaged {
            path: path.to_owned(),
            why: format!("it is larger than {LARGEST} bytes"),
        });
    }
    Ok(bytes)
}

/// The file at `path`, to be locked by the store's owner; made with mode 0600, whatever the umask,
/// where there is none. A link is refused: one that leads nowhere can be neither opened nor made.
pub(crate) fn open_or_make(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options
        .read(true)
        .write(true)
        .mode(0o600)
        .custom_flags(OFlag::O_NOFOLLOW.bits());
    loop {
        match options.open(path) {
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            opened => return opened,
        }
        match options.clone().create_new(true).open(path) {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
            made => {
                let file = made?;
                file.set_permissions(Permissions::from_mode(0o600))?;
                return Ok(file);
            }
        }
    }
}

/// Makes the directory `path` with this mode, whatever the umask; leaves one that is there alone.
pub(crate) fn make_dir(path: &Path, mode: u32) -> io::Result<()> {
    match DirBuilder::new().mode(mode).create(path) {
        Ok(()) => fs::set_permissions(path, Permissions::from_mode(mode)),
        Err(error) if error.kind() == ErrorKind::AlreadyExists && path.is_dir() => Ok(()),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_regular_file_is_damage_and_nobody_waits_for_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        std::os::unix::fs::symlink("/dev/zero", path("link")).unwrap();
        nix::unistd::mkfifo(&path("pipe"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        fs::create_dir(path("dir")).unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(path("socket")).unwrap();
        for name in ["link", "pipe", "dir", "socket"] {
            let error = open(&path(name)).unwrap_err();
            assert!(matches!(error, Error::Damaged { .. }), "{name}: {error}");
        }
        assert!(open(&path("nothing")).unwrap().is_none());
    }

    #[test]
    fn a_lock_that_is_a_link_is_refused_and_nobody_waits_for_it() {
        let dir = tempfile::tempdir().unwrap();
        let (lock, target) = (dir.path().join("lock"), dir.path().join("target"));
        std::os::unix::fs::symlink(&target, &lock).unwrap();
        for exists in [false, true] {
            if exists {
                fs::write(&target, "precious").unwrap();
            }
            let refused = open_or_make(&lock).unwrap_err();
            assert_eq!(refused.raw_os_error(), Some(Errno::ELOOP as i32));
        }
        assert_eq!(fs::read(&target).unwrap(), b"precious");
    }

    #[test]
    fn a_file_with_a_huge_hole_is_not_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("hole");
        File::create(&path).unwrap().set_len(1 << 40).unwrap();
        let mut file = open(&path).unwrap().unwrap();
        assert!(matches!(read(&mut file, &path), Err(Error::Damaged { .. })));
    }
}
