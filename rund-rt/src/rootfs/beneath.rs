//! Files below a directory, and never outside of it: every path is resolved by the kernel with
//! `RESOLVE_BENEATH`, so that neither `..` nor a symbolic link that an earlier entry planted leads
//! out, whoever changes the tree meanwhile.

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

use rustix::fs::{
    AtFlags, Dir, Mode, OFlags, RenameFlags, ResolveFlags, mkdirat, openat, openat2, renameat_with,
    unlinkat,
};
use rustix::io::Errno;

/// A directory that paths cannot leave.
#[derive(Debug)]
pub(super) struct Beneath {
    root: OwnedFd,
}

/// Why a path was refused.
#[derive(Debug)]
pub(super) enum Refused {
    /// It leads out, or would.
    Escapes(&'static str),
    /// The operating system said so.
    Io(io::Error),
}

impl From<rustix::io::Errno> for Refused {
    fn from(why: rustix::io::Errno) -> Self {
        match why {
            rustix::io::Errno::XDEV => Self::Escapes("a symbolic link on the way leads out"),
            rustix::io::Errno::LOOP => Self::Escapes("symbolic links on the way go in a circle"),
            why => Self::Io(why.into()),
        }
    }
}

/// The host's path of the regular file at `inside` in `root`: an absolute link begins at the root.
pub(crate) fn find_in_root(root: &Path, inside: &Path) -> io::Result<PathBuf> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let folder = rustix::fs::open(root, flags, Mode::empty())?;
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let rules = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    let file = openat2(&folder, inside, flags, Mode::empty(), rules)?;
    let kind = rustix::fs::FileType::from_raw_mode(rustix::fs::fstat(&file)?.st_mode);
    if kind != rustix::fs::FileType::RegularFile {
        return Err(io::Error::other("it is no regular file"));
    }
    std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

impl Beneath {
    pub(super) fn open(root: &Path) -> io::Result<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(Self {
            root: rustix::fs::open(root, flags, Mode::empty())?,
        })
    }

    fn resolve(&self, path: &Path, flags: OFlags) -> Result<OwnedFd, Refused> {
        let flags = flags | OFlags::CLOEXEC;
        let rules = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
        Ok(openat2(&self.root, path, flags, Mode::empty(), rules)?)
    }

    /// The directory at `path`, itself not through a link at its end.
    pub(super) fn directory(&self, path: &Path) -> Result<OwnedFd, Refused> {
        let path = if path.as_os_str().is_empty() {
            Path::new(".")
        } else {
            path
        };
        self.resolve(path, OFlags::RDONLY | OFlags::DIRECTORY)
    }

    /// The directory that holds `path`, made where it is missing, and the last name of `path`.
    pub(super) fn parent<'a>(&self, path: &'a Path) -> Result<(OwnedFd, &'a OsStr), Refused> {
        let name = path
            .file_name()
            .ok_or(Refused::Escapes("it names no file"))?;
        let folder = path.parent().unwrap_or(Path::new(""));
        match self.directory(folder) {
            Err(Refused::Io(why)) if why.kind() == io::ErrorKind::NotFound => {
                let mut so_far = PathBuf::new();
                for part in folder.components() {
                    let above = self.directory(&so_far)?;
                    so_far.push(part);
                    match mkdirat(&above, part.as_os_str(), Mode::from_raw_mode(0o755)) {
                        Ok(()) | Err(rustix::io::Errno::EXIST) => {}
                        Err(why) => return Err(why.into()),
                    }
                }
                Ok((self.directory(folder)?, name))
            }
            found => Ok((found?, name)),
        }
    }
}

/// `path` as it lies below a root: `./a//b` and `/a/b` are `a/b`; `..` is refused.
pub(super) fn normal(path: &Path) -> Result<PathBuf, Refused> {
    let mut normal = PathBuf::new();
    for part in path.components() {
        match part {
            Component::Normal(name) => normal.push(name),
            Component::CurDir | Component::RootDir => {}
            Component::ParentDir => return Err(Refused::Escapes("it has a `..`")),
            Component::Prefix(_) => return Err(Refused::Escapes("it has a drive")),
        }
    }
    Ok(normal)
}

/// Removes `name` below `base` with everything in it, however deep a sandbox has made it: every
/// directory is moved up before it is emptied, so that no depth needs a descriptor or a stack
/// frame of its own. What is not there is removed.
pub(super) fn remove_tree(base: &OwnedFd, name: impl AsRef<Path>) -> rustix::io::Result<()> {
    let name = name.as_ref();
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let top = match openat(base, name, flags, Mode::empty()) {
        Ok(top) => top,
        Err(Errno::NOENT) => return Ok(()),
        Err(Errno::NOTDIR | Errno::LOOP) => return unlinkat(base, name, AtFlags::empty()),
        Err(why) => return Err(why),
    };
    let mut serial = 0u64;
    let mut moved = Vec::new();
    flatten(&top, &top, &mut serial, &mut moved)?;
    while let Some(name) = moved.pop() {
        let folder = openat(&top, &name, flags, Mode::empty())?;
        flatten(&folder, &top, &mut serial, &mut moved)?;
        unlinkat(&top, &name, AtFlags::REMOVEDIR)?;
    }
    unlinkat(base, name, AtFlags::REMOVEDIR)
}

/// Removes the files of `folder`, and moves its directories to `top`.
fn flatten(
    folder: &OwnedFd,
    top: &OwnedFd,
    serial: &mut u64,
    moved: &mut Vec<String>,
) -> rustix::io::Result<()> {
    let entries: Vec<_> = Dir::read_from(folder)?.collect::<Result<_, _>>()?;
    for entry in entries {
        let name = entry.file_name();
        if [c".", c".."].contains(&name) {
            continue;
        }
        match unlinkat(folder, name, AtFlags::empty()) {
            Ok(()) => {}
            Err(Errno::ISDIR) => loop {
                let to = format!(".rund-gone-{serial}");
                *serial += 1;
                // A name that something else has already is passed over.
                match renameat_with(folder, name, top, &to, RenameFlags::NOREPLACE) {
                    Ok(()) => {
                        moved.push(to);
                        break;
                    }
                    Err(Errno::EXIST) => {}
                    Err(why) => return Err(why),
                }
            },
            Err(why) => return Err(why),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{Beneath, Refused, normal};
    use std::path::{Path, PathBuf};

    #[test]
    fn paths_are_made_plain_or_refused() {
        let plain = normal(Path::new("/./a//b/")).unwrap();
        assert_eq!(plain, PathBuf::from("a/b"));
        assert_eq!(normal(Path::new("./")).unwrap(), PathBuf::new());
        for bad in ["..", "a/../..", "a/../b"] {
            assert!(matches!(normal(Path::new(bad)), Err(Refused::Escapes(_))));
        }
    }

    #[test]
    fn a_link_that_leads_out_is_refused_and_one_that_stays_is_followed() {
        let outside = tempfile::tempdir().unwrap();
        let root = outside.path().join("root");
        std::fs::create_dir_all(root.join("usr/lib")).unwrap();
        let link = |to: &str, at: &str| std::os::unix::fs::symlink(to, root.join(at)).unwrap();
        link("usr/lib", "lib");
        link("..", "up");
        link("/", "slash");
        link("loop", "loop");
        let beneath = Beneath::open(&root).unwrap();
        beneath.parent(Path::new("lib/new/x")).unwrap();
        assert!(root.join("usr/lib/new").is_dir());
        for bad in ["up/x", "slash/x", "loop/x", "usr/../../x"] {
            let refused = beneath.parent(Path::new(bad));
            assert!(matches!(refused, Err(Refused::Escapes(_))), "{bad}");
        }
        assert_eq!(std::fs::read_dir(outside.path()).unwrap().count(), 1);
    }
}
