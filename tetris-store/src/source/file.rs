//! Files of a model: opened so that nothing hangs and nothing leaves the model's folder, read by
//! position.

#[cfg(feature = "daemon")]
use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs::{File, OpenOptions};
use std::io::ErrorKind;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Component, Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat, openat2};
use nix::sys::stat::Mode;

use crate::error::{Error, Result};

/// A FIFO without a writer must not hang us, and a terminal must not become ours.
const FLAGS: OFlag = OFlag::O_RDONLY
    .union(OFlag::O_NONBLOCK)
    .union(OFlag::O_NOCTTY)
    .union(OFlag::O_CLOEXEC);

/// Longest path that the kernel takes (PATH_MAX).
const MAX_LOCATION: usize = 4096;

/// A regular file that is read by position. Its length is what it was when it was opened.
#[derive(Debug)]
pub(crate) struct ModelFile {
    path: PathBuf,
    content: Content,
    len: u64,
}

#[derive(Debug)]
enum Content {
    File(File),
    /// A small file that the store has kept as a sidecar.
    Memory(Vec<u8>),
}

impl ModelFile {
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(FLAGS.bits())
            .open(path)
            .map_err(Error::io("open", path))?;
        Self::from_file(file, path)
    }

    /// `path` is for messages only.
    pub(crate) fn from_file(file: File, path: &Path) -> Result<Self> {
        let meta = file.metadata().map_err(Error::io("inspect", path))?;
        let kind = meta.file_type();
        if !kind.is_file() {
            return Err(Error::NotAFile {
                path: path.to_owned(),
                kind: if kind.is_dir() {
                    "a folder"
                } else if kind.is_fifo() {
                    "a FIFO"
                } else if kind.is_socket() {
                    "a socket"
                } else {
                    "a device"
                },
            });
        }
        Ok(Self {
            path: path.to_owned(),
            len: meta.len(),
            content: Content::File(file),
        })
    }

    /// Bytes in memory, read as if they were in a file.
    pub(crate) fn from_bytes(bytes: Vec<u8>, path: &Path) -> Self {
        Self {
            path: path.to_owned(),
            len: bytes.len() as u64,
            content: Content::Memory(bytes),
        }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The open file itself and its name in `folder`, to be passed on.
    #[cfg(feature = "daemon")]
    pub(crate) fn passed(&self, folder: Option<&Path>) -> Result<(String, File)> {
        let below = folder.and_then(|folder| self.path.strip_prefix(folder).ok());
        let name = below.unwrap_or(&self.path).to_str();
        let (Some(name), Content::File(file)) = (name, &self.content) else {
            return Err(Error::NotAModel {
                path: self.path.clone(),
                why: "it cannot be passed on: its name is no UTF-8 text",
            });
        };
        let file = file.try_clone().map_err(Error::io("open", &self.path))?;
        Ok((name.to_owned(), file))
    }

    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    pub(crate) fn read_exact_at(&self, offset: u64, into: &mut [u8]) -> Result<()> {
        let read = match &self.content {
            Content::File(file) => file.read_exact_at(into, offset),
            Content::Memory(bytes) => {
                let start = usize::try_from(offset).ok();
                let held = start
                    .and_then(|start| bytes.get(start..)?.get(..into.len()))
                    .ok_or_else(|| ErrorKind::UnexpectedEof.into());
                held.map(|held| into.copy_from_slice(held))
            }
        };
        read.map_err(Error::io("read", &self.path))
    }

    /// The `len` bytes from `offset` on, which must be within the file: what is allocated is never
    /// more than there is to read.
    pub(crate) fn read_vec(&self, offset: u64, len: u64) -> Result<Vec<u8>> {
        let within = offset.checked_add(len).is_some_and(|end| end <= self.len);
        let size = usize::try_from(len).ok().filter(|_| within);
        let mut bytes = vec![
            0;
            size.ok_or_else(|| Error::Io {
                what: "read",
                path: self.path.clone(),
                source: ErrorKind::UnexpectedEof.into(),
            })?
        ];
        self.read_exact_at(offset, &mut bytes)?;
        Ok(bytes)
    }

    pub(crate) fn bad(&self, format: &'static str, why: impl Into<String>) -> Error {
        Error::BadModel {
            path: self.path.clone(),
            format,
            why: why.into(),
        }
    }
}

/// The folder that a model's files must stay in.
///
/// A snapshot in a Hugging Face cache is a folder of links to `../../blobs`: there, the repository
/// (the folder of `snapshots` and `blobs`) is what files must stay in.
#[derive(Debug)]
pub(crate) struct ModelFolder {
    place: Place,
    path: PathBuf,
}

#[derive(Debug)]
enum Place {
    Directory {
        /// Nothing outside is ever opened.
        root: OwnedFd,
        /// From `root` to the folder.
        prefix: PathBuf,
    },
    /// Files that another process opened and passed on, by name.
    #[cfg(feature = "daemon")]
    Given(BTreeMap<PathBuf, File>),
}

impl ModelFolder {
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let real = path.canonicalize().map_err(Error::io("open", path))?;
        let root = real
            .ancestors()
            .filter(|folder| folder.file_name() == Some(OsStr::new("snapshots")))
            .filter_map(Path::parent)
            .find(|repository| repository.join("blobs").is_dir())
            .unwrap_or(&real);
        let prefix = real.strip_prefix(root).unwrap_or(Path::new("")).to_owned();
        let root = OpenOptions::new()
            .read(true)
            .custom_flags((FLAGS | OFlag::O_DIRECTORY).bits())
            .open(root)
            .map_err(Error::io("open", root))?;
        Ok(Self {
            place: Place::Directory {
                root: root.into(),
                prefix,
            },
            path: path.to_owned(),
        })
    }

    #[cfg(feature = "daemon")]
    /// Open files as a folder; nothing else is ever opened. `path` is for messages.
    pub(crate) fn of_files(files: impl IntoIterator<Item = (String, File)>, path: &Path) -> Self {
        // As `components` spells it: `./a//b` is `a/b`.
        let plain = |name: String| -> PathBuf {
            let parts = Path::new(&name).components();
            parts.filter(|part| *part != Component::CurDir).collect()
        };
        let files = files.into_iter().map(|(name, file)| (plain(name), file));
        Self {
            place: Place::Given(files.collect()),
            path: path.to_owned(),
        }
    }

    /// The names of what is in the folder, not below, in no particular order.
    pub(crate) fn names(&self) -> Result<Vec<OsString>> {
        match &self.place {
            Place::Directory { .. } => std::fs::read_dir(&self.path)
                .and_then(|entries| entries.map(|entry| Ok(entry?.file_name())).collect())
                .map_err(Error::io("list", &self.path)),
            #[cfg(feature = "daemon")]
            Place::Given(files) => Ok(files
                .keys()
                .filter(|name| name.components().count() == 1)
                .map(|name| name.clone().into_os_string())
                .collect()),
        }
    }

    /// The folder that `file` is in.
    pub(crate) fn of(file: &Path) -> Result<Self> {
        match file.parent() {
            Some(parent) if parent != Path::new("") => Self::open(parent),
            _ => Self::open(Path::new(".")),
        }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Opens what a model calls `location`.
    ///
    /// # Errors
    /// [`Error::OutsideModel`] where it is absolute, has `..`, or a link leads out of the folder.
    pub(crate) fn file(&self, location: &str) -> Result<ModelFile> {
        let outside = |why| Error::OutsideModel {
            folder: self.path.clone(),
            location: location.chars().take(200).collect(),
            why,
        };
        if location.is_empty() || location.len() > MAX_LOCATION {
            return Err(outside("a name has 1 to 4,096 bytes"));
        }
        if location.contains('\0') {
            return Err(outside("a name has no NUL"));
        }
        let inside = Path::new(location)
            .components()
            .all(|part| matches!(part, Component::Normal(_) | Component::CurDir));
        if !inside {
            return Err(outside("a name is relative and has no `..`"));
        }
        let shown = self.path.join(location);
        let (root, prefix) = match &self.place {
            Place::Directory { root, prefix } => (root, prefix),
            #[cfg(feature = "daemon")]
            Place::Given(files) => {
                let parts = Path::new(location).components();
                let name: PathBuf = parts.filter(|part| *part != Component::CurDir).collect();
                let given = files
                    .get(&name)
                    .ok_or(std::io::Error::from(ErrorKind::NotFound))
                    .and_then(File::try_clone)
                    .map_err(Error::io("open", &shown))?;
                return ModelFile::from_file(given, &shown);
            }
        };
        let below = prefix.join(location);
        let how = OpenHow::new()
            .flags(FLAGS)
            .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_MAGICLINKS);
        let opened = match openat2(root, &below, how) {
            // Before Linux 5.6, or kept from us by a seccomp filter that does not know the call.
            Err(Errno::ENOSYS | Errno::EPERM) => walk(root, &below),
            other => other,
        };
        match opened {
            Ok(file) => ModelFile::from_file(file.into(), &shown),
            Err(Errno::EXDEV | Errno::ELOOP) => Err(outside("a link leads out of the folder")),
            Err(errno) => Err(Error::io("open", shown)(errno)),
        }
    }
}

/// What `openat2` does, less links, which are refused: one component after the other.
fn walk(root: &OwnedFd, below: &Path) -> nix::Result<OwnedFd> {
    let mut parts: Vec<&OsStr> = below
        .components()
        .filter_map(|part| match part {
            Component::Normal(name) => Some(name),
            _ => None,
        })
        .collect();
    let last = parts.pop().ok_or(Errno::EISDIR)?;
    let step = FLAGS | OFlag::O_NOFOLLOW;
    let mut folder = root.try_clone().map_err(|_| Errno::EMFILE)?;
    for part in parts {
        folder = openat(&folder, part, step | OFlag::O_DIRECTORY, Mode::empty())?;
    }
    openat(&folder, last, step, Mode::empty())
}

/// A file's bytes through a small buffer, for parsers that step from field to field and skip the
/// weights between.
#[derive(Debug)]
pub(crate) struct Window<'a> {
    file: &'a ModelFile,
    bytes: Vec<u8>,
    start: u64,
}

impl<'a> Window<'a> {
    const SIZE: u64 = 64 << 10;

    pub(crate) fn new(file: &'a ModelFile) -> Self {
        Self {
            file,
            bytes: Vec::new(),
            start: 0,
        }
    }

    pub(crate) fn file(&self) -> &'a ModelFile {
        self.file
    }

    /// Up to `len` (at most 64 KiB) bytes from `offset` on: fewer only at the end of the file.
    pub(crate) fn peek(&mut self, offset: u64, len: usize) -> Result<&[u8]> {
        let wanted = (len as u64)
            .min(Self::SIZE)
            .min(self.file.len.saturating_sub(offset));
        if wanted == 0 {
            return Ok(&[]);
        }
        let held = self.start + self.bytes.len() as u64;
        if offset < self.start || offset + wanted > held {
            let size = Self::SIZE.min(self.file.len.saturating_sub(offset));
            self.bytes = self.file.read_vec(offset, size)?;
            self.start = offset;
        }
        let from = (offset - self.start) as usize;
        Ok(&self.bytes[from..from + wanted as usize])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn walks(folder: &ModelFolder, location: &str) -> bool {
        #[allow(
            irrefutable_let_patterns,
            reason = "refutable with the feature `daemon`"
        )]
        let Place::Directory { root, prefix } = &folder.place else {
            panic!("not a directory")
        };
        walk(root, &prefix.join(location)).is_ok()
    }

    fn open_both_ways(folder: &ModelFolder, location: &str) -> [bool; 2] {
        [folder.file(location).is_ok(), walks(folder, location)]
    }

    #[cfg(feature = "daemon")]
    #[test]
    fn a_folder_of_given_files_has_those_and_no_others() {
        let file = || File::open("/proc/self/exe").unwrap();
        let given = [
            ("sub/./weights".to_owned(), file()),
            ("a".to_owned(), file()),
        ];
        let folder = ModelFolder::of_files(given, Path::new("given"));
        assert!(folder.file("./sub/weights").is_ok());
        assert_eq!(folder.names().unwrap(), ["a"]);
        for location in ["sub", "b", "../a", "/proc/self/exe"] {
            assert!(folder.file(location).is_err(), "{location}");
        }
    }

    #[test]
    fn nothing_outside_the_folder_is_opened() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("secret"), "s").unwrap();
        let model = dir.path().join("model");
        std::fs::create_dir_all(model.join("sub")).unwrap();
        std::fs::write(model.join("sub/weights"), "w").unwrap();
        symlink("../secret", model.join("out")).unwrap();
        symlink(dir.path().join("secret"), model.join("absolute")).unwrap();
        symlink("..", model.join("up")).unwrap();
        symlink("loop", model.join("loop")).unwrap();
        symlink("sub/weights", model.join("inside")).unwrap();
        let folder = ModelFolder::open(&model).unwrap();
        assert_eq!(open_both_ways(&folder, "sub/weights"), [true; 2]);
        assert_eq!(open_both_ways(&folder, "./sub/./weights"), [true; 2]);
        assert!(folder.file("inside").is_ok());
        for location in ["out", "absolute", "up/secret", "loop"] {
            let refused = folder.file(location);
            assert!(
                matches!(refused, Err(Error::OutsideModel { .. })),
                "{refused:?}"
            );
            assert!(!walks(&folder, location), "{location}");
        }
        let huge = "a/".repeat(3000);
        for location in [
            "../secret",
            "sub/../../secret",
            "/etc/passwd",
            "a\0b",
            "",
            &huge,
        ] {
            let refused = folder.file(location);
            assert!(
                matches!(refused, Err(Error::OutsideModel { .. })),
                "{refused:?}"
            );
        }
        assert!(matches!(folder.file("sub"), Err(Error::NotAFile { .. })));
        assert!(matches!(folder.file("absent"), Err(Error::Io { .. })));
    }

    #[test]
    fn a_cache_of_links_to_blobs_is_one_folder() {
        let dir = tempfile::tempdir().unwrap();
        let repository = dir.path().join("models--a--b");
        let snapshot = repository.join("snapshots/0123");
        std::fs::create_dir_all(&snapshot).unwrap();
        std::fs::create_dir(repository.join("blobs")).unwrap();
        std::fs::write(repository.join("blobs/ff"), "w").unwrap();
        std::fs::write(dir.path().join("secret"), "s").unwrap();
        symlink("../../blobs/ff", snapshot.join("weights")).unwrap();
        symlink("../../../secret", snapshot.join("out")).unwrap();
        let folder = ModelFolder::open(&snapshot).unwrap();
        assert_eq!(folder.file("weights").unwrap().len(), 1);
        assert!(folder.file("out").is_err());
    }

    #[test]
    fn a_fifo_does_not_hang_the_caller() {
        let dir = tempfile::tempdir().unwrap();
        let fifo = dir.path().join("fifo");
        nix::unistd::mkfifo(&fifo, Mode::S_IRWXU).unwrap();
        assert!(matches!(
            ModelFile::open(&fifo),
            Err(Error::NotAFile { kind: "a FIFO", .. })
        ));
        assert!(ModelFolder::open(dir.path()).unwrap().file("fifo").is_err());
    }

    #[test]
    fn a_window_shows_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("bytes");
        let bytes: Vec<u8> = (0..200_000u32).map(|i| (i % 251) as u8).collect();
        std::fs::write(&path, &bytes).unwrap();
        let file = ModelFile::open(&path).unwrap();
        let mut window = Window::new(&file);
        for at in [0, 65_530, 10, 199_995, 65_536, 200_000] {
            let end = (at + 16).min(bytes.len());
            assert_eq!(window.peek(at as u64, 16).unwrap(), &bytes[at..end]);
        }
        assert!(window.peek(u64::MAX, 16).unwrap().is_empty());
        assert!(file.read_vec(199_999, 2).is_err());
        assert!(file.read_vec(u64::MAX, 2).is_err());
    }
}
