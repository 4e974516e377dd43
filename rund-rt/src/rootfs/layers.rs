//! Layers of an image, as containers ship them: directories, or tar files with whiteouts (OCI image
//! specification, "Layer Filesystem Changeset"). Each is somebody else's: no entry gets outside of
//! the directory they are unpacked into.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, BufReader, Read, Seek};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use carlsbad_types::ByteSize;
use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, Timespec, Timestamps, Uid, chmodat, chownat, linkat,
    mkdirat, openat, statat, symlinkat, utimensat,
};

use super::beneath::{Beneath, Refused, normal, remove_tree};
use crate::error::{Error, Result};

/// What a name begins with that stands for the absence of another.
const WHITEOUT: &[u8] = b".wh.";
/// The name that stands for the absence of everything that lower layers have in its directory.
const OPAQUE: &[u8] = b".wh..wh..opq";
/// How a gzip file begins (RFC 1952).
const GZIP: [u8; 2] = [0x1f, 0x8b];

/// One layer.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Layer {
    /// A directory, copied as it is.
    Directory(PathBuf),
    /// A tar file, plain or in gzip, with whiteouts.
    Tar(PathBuf),
}

/// How much layers may unpack to, since a small file can hold a very large one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerLimits {
    /// Bytes of all files together.
    pub bytes: ByteSize,
    /// Files, directories and links together.
    pub entries: u64,
}

impl Default for LayerLimits {
    fn default() -> Self {
        Self {
            bytes: ByteSize::gib(16),
            entries: 2_000_000,
        }
    }
}

/// Unpacks layers, lowest first, into the directory `into`, which is there.
///
/// Owners are kept where this process is root. Extended attributes are not kept.
///
/// # Errors
/// Where an entry names a place outside of `into`, by `..` or through a symbolic link; where it is
/// a device; where a file is no tar file, or is cut short; where there is more than `limits` allow;
/// where the disk is full. What was unpacked until then stays.
pub fn unpack(layers: &[Layer], into: &Path, limits: &LayerLimits) -> Result<()> {
    let mut unpacking = Unpacking {
        root: Beneath::open(into).map_err(Error::rootfs("open", into))?,
        left: *limits,
        keeps_owners: rustix::process::geteuid().is_root(),
    };
    for layer in layers {
        match layer {
            Layer::Directory(from) => {
                let source = Beneath::open(from).map_err(Error::rootfs("open", from))?;
                unpacking
                    .copy_root(&source)
                    .map_err(|why| refusal(from, Path::new("/"), why))?;
                unpacking.copy(&source, Path::new(""), from)?;
            }
            Layer::Tar(path) => unpacking.tar(path)?,
        }
    }
    Ok(())
}

struct Unpacking {
    root: Beneath,
    left: LayerLimits,
    keeps_owners: bool,
}

/// What an entry has beside its name and contents.
struct Attributes {
    mode: u32,
    uid: u32,
    gid: u32,
    mtime: i64,
}

impl Unpacking {
    fn tar(&mut self, path: &Path) -> Result<()> {
        let mut file = File::open(path).map_err(Error::rootfs("open", path))?;
        let mut magic = [0; GZIP.len()];
        let known = file.read_exact(&mut magic).is_ok();
        file.rewind().map_err(Error::rootfs("read", path))?;
        let file = BufReader::with_capacity(1 << 18, file);
        if known && magic == GZIP {
            self.entries(
                tar::Archive::new(flate2::read::MultiGzDecoder::new(file)),
                path,
            )
        } else {
            self.entries(tar::Archive::new(file), path)
        }
    }

    fn entries<R: Read>(&mut self, mut archive: tar::Archive<R>, layer: &Path) -> Result<()> {
        let bad = || Error::rootfs::<io::Error>("read the layer", layer);
        for entry in archive.entries().map_err(bad())? {
            let mut entry = entry.map_err(bad())?;
            let name: PathBuf = OsString::from_vec(entry.path_bytes().into_owned()).into();
            self.entry(&mut entry, &name)
                .map_err(|why| refusal(layer, &name, why))?;
        }
        Ok(())
    }

    fn entry<R: Read>(&mut self, entry: &mut tar::Entry<'_, R>, name: &Path) -> Tried {
        use tar::EntryType as T;

        let kind = entry.header().entry_type();
        if matches!(kind, T::XGlobalHeader) {
            return Ok(());
        }
        self.count(entry.size())?;
        let name = normal(name)?;
        let header = entry.header();
        let attributes = Attributes {
            mode: header.mode()? & 0o7777,
            uid: u32::try_from(header.uid()?).unwrap_or(0),
            gid: u32::try_from(header.gid()?).unwrap_or(0),
            mtime: i64::try_from(header.mtime()?).unwrap_or(0),
        };
        if name.as_os_str().is_empty() {
            // The root itself: only its mode matters.
            let root = self.root.directory(&name)?;
            rustix::fs::fchmod(root, Mode::from_raw_mode(attributes.mode))?;
            return Ok(());
        }
        if let Some(hidden) = whiteout(&name) {
            return self.white_out(&name, hidden);
        }
        match kind {
            T::Directory => self.make_directory(&name, &attributes),
            T::Regular | T::Continuous | T::GNUSparse => self.write_file(&name, entry, &attributes),
            T::Symlink => {
                let target = entry.link_name_bytes().unwrap_or_default().into_owned();
                self.make_symlink(&name, OsStr::from_bytes(&target), &attributes)
            }
            T::Link => {
                let target = entry.link_name_bytes().unwrap_or_default().into_owned();
                self.make_hard_link(&name, Path::new(OsStr::from_bytes(&target)))
            }
            T::Fifo => Err(Refused::Escapes("it is a pipe, which images do not have")),
            T::Char | T::Block => Err(Refused::Escapes("it is a device")),
            _ => Err(Refused::Escapes("it is of an unknown kind")),
        }
    }

    fn count(&mut self, bytes: u64) -> Tried {
        let more = Refused::Escapes("the layers unpack to more than the limits allow");
        match (
            self.left.entries.checked_sub(1),
            self.left.bytes.get().checked_sub(bytes),
        ) {
            (Some(entries), Some(bytes)) => {
                self.left.entries = entries;
                self.left.bytes = ByteSize::new(bytes);
                Ok(())
            }
            _ => Err(more),
        }
    }

    fn white_out(&self, name: &Path, hidden: Hidden) -> Tried {
        let (parent, _) = self.root.parent(name)?;
        match hidden {
            Hidden::One(name) => remove(&parent, &name),
            Hidden::All => {
                for entry in rustix::fs::Dir::read_from(&parent)? {
                    let name = OsStr::from_bytes(entry?.file_name().to_bytes()).to_owned();
                    if name != "." && name != ".." {
                        remove(&parent, &name)?;
                    }
                }
                Ok(())
            }
        }
    }

    fn make_directory(&self, name: &Path, attributes: &Attributes) -> Tried {
        let (parent, last) = self.root.parent(name)?;
        match statat(&parent, last, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(there) if FileType::from_raw_mode(there.st_mode) == FileType::Directory => {}
            Ok(_) => {
                remove(&parent, last)?;
                mkdirat(&parent, last, Mode::from_raw_mode(0o700))?;
            }
            Err(_) => mkdirat(&parent, last, Mode::from_raw_mode(0o700))?,
        }
        self.attribute(parent.as_fd(), last, attributes, true)
    }

    fn write_file(&self, name: &Path, from: &mut dyn Read, attributes: &Attributes) -> Tried {
        let (parent, last) = self.root.parent(name)?;
        remove(&parent, last)?;
        // Exclusive: what another entry put there is never written through.
        let flags =
            OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = openat(&parent, last, flags, Mode::from_raw_mode(0o600))?;
        io::copy(from, &mut File::from(file))?;
        self.attribute(parent.as_fd(), last, attributes, true)
    }

    fn make_symlink(&self, name: &Path, target: &OsStr, attributes: &Attributes) -> Tried {
        let (parent, last) = self.root.parent(name)?;
        remove(&parent, last)?;
        symlinkat(target, &parent, last)?;
        self.attribute(parent.as_fd(), last, attributes, false)
    }

    fn make_hard_link(&self, name: &Path, target: &Path) -> Tried {
        let target = normal(target)?;
        let (from, old) = self.root.parent(&target)?;
        let (parent, last) = self.root.parent(name)?;
        remove(&parent, last)?;
        // Without AT_SYMLINK_FOLLOW: a link to a link is a link to the link itself.
        linkat(&from, old, &parent, last, AtFlags::empty())?;
        Ok(())
    }

    fn attribute(
        &self,
        parent: impl AsFd,
        name: &OsStr,
        attributes: &Attributes,
        has_mode: bool,
    ) -> Tried {
        let link = AtFlags::SYMLINK_NOFOLLOW;
        if self.keeps_owners {
            let (uid, gid) = (Uid::from_raw(attributes.uid), Gid::from_raw(attributes.gid));
            chownat(&parent, name, Some(uid), Some(gid), link)?;
        }
        if has_mode {
            // After the owner, which clears set-uid. Not a link: it was just made, exclusively.
            let mode = Mode::from_raw_mode(attributes.mode);
            chmodat(&parent, name, mode, AtFlags::empty())?;
        }
        let time = Timespec {
            tv_sec: attributes.mtime,
            tv_nsec: 0,
        };
        let times = Timestamps {
            last_access: time,
            last_modification: time,
        };
        utimensat(&parent, name, &times, link)?;
        Ok(())
    }

    /// Gives the root the owner and mode of the source's.
    fn copy_root(&self, source: &Beneath) -> Tried {
        let stat = rustix::fs::fstat(source.directory(Path::new(""))?)?;
        let root = self.root.directory(Path::new(""))?;
        if self.keeps_owners {
            let (uid, gid) = (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid));
            rustix::fs::fchown(&root, Some(uid), Some(gid))?;
        }
        rustix::fs::fchmod(&root, Mode::from_raw_mode(stat.st_mode & 0o7777))?;
        Ok(())
    }

    /// Copies what lies in `source` at `at`.
    fn copy(&mut self, source: &Beneath, at: &Path, layer: &Path) -> Result<()> {
        let refused = |why| refusal(layer, at, why);
        let folder = source.directory(at).map_err(refused)?;
        let entries =
            rustix::fs::Dir::read_from(&folder).map_err(|why| refusal(layer, at, why.into()))?;
        for entry in entries {
            let entry = entry.map_err(|why| refusal(layer, at, why.into()))?;
            let last = OsStr::from_bytes(entry.file_name().to_bytes());
            if last == "." || last == ".." {
                continue;
            }
            let name = at.join(last);
            let is_directory = self
                .copy_one(&folder, last, &name)
                .map_err(|why| refusal(layer, &name, why))?;
            if is_directory {
                self.copy(source, &name, layer)?;
            }
        }
        Ok(())
    }

    /// Copies one entry; whether it is a directory, whose contents are still to come.
    fn copy_one(
        &mut self,
        folder: &OwnedFd,
        last: &OsStr,
        name: &Path,
    ) -> std::result::Result<bool, Refused> {
        let stat = statat(folder, last, AtFlags::SYMLINK_NOFOLLOW)?;
        let kind = FileType::from_raw_mode(stat.st_mode);
        let size = match kind {
            FileType::RegularFile => u64::try_from(stat.st_size).unwrap_or(0),
            _ => 0,
        };
        self.count(size)?;
        let attributes = Attributes {
            mode: stat.st_mode & 0o7777,
            uid: stat.st_uid,
            gid: stat.st_gid,
            mtime: stat.st_mtime,
        };
        match kind {
            FileType::Directory => self.make_directory(name, &attributes)?,
            FileType::RegularFile => {
                let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let mut from = File::from(openat(folder, last, flags, Mode::empty())?);
                self.write_file(name, &mut from, &attributes)?;
            }
            FileType::Symlink => {
                let target = rustix::fs::readlinkat(folder, last, Vec::new())?;
                self.make_symlink(name, OsStr::from_bytes(target.to_bytes()), &attributes)?;
            }
            FileType::Fifo | FileType::Socket => {}
            _ => return Err(Refused::Escapes("it is a device")),
        }
        Ok(kind == FileType::Directory)
    }
}

type Tried = std::result::Result<(), Refused>;

impl From<io::Error> for Refused {
    fn from(why: io::Error) -> Self {
        Self::Io(why)
    }
}

fn refusal(layer: &Path, entry: &Path, why: Refused) -> Error {
    let shown: String = entry.to_string_lossy().chars().take(200).collect();
    let why = match why {
        Refused::Escapes(why) => format!("entry `{shown}` is refused: {why}"),
        Refused::Io(why) => format!("cannot unpack entry `{shown}`: {why}"),
    };
    Error::Rootfs {
        path: layer.to_owned(),
        why,
    }
}

/// What a whiteout hides.
enum Hidden {
    One(OsString),
    All,
}

fn whiteout(name: &Path) -> Option<Hidden> {
    let last = name.file_name()?.as_bytes();
    if last == OPAQUE {
        return Some(Hidden::All);
    }
    let hidden = last.strip_prefix(WHITEOUT)?;
    (!hidden.is_empty()).then(|| Hidden::One(OsStr::from_bytes(hidden).to_owned()))
}

/// Removes whatever `name` is, with all that is in it; what is not there is removed.
fn remove(parent: &OwnedFd, name: &OsStr) -> Tried {
    if name == ".." || name == "." || name.as_bytes().contains(&b'/') {
        return Err(Refused::Escapes("it would remove something else"));
    }
    Ok(remove_tree(parent, name)?)
}
