//! Images mounted once, and an overlay over them for each sandbox.

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use carlsbad_types::ByteSize;
use rustix::fs::{Gid, Mode, OFlags, Uid, fchmod, fchown, fstat, mkdirat, openat};
use rustix::mount::{MountAttrFlags, OpenTreeFlags, open_tree};

use super::beneath::remove_tree;
use super::image::{Format, Image};
use super::loop_device::LoopDevice;
use super::mounts::{attach, detached, make_private, path_of, take_down};
use super::sweep::{POINT, own, remove, sweep};
use crate::error::{Error, Result};

/// Where shared writable layers lie in the store's tmpfs.
const UPPERS: &str = "upper";
/// What a store without shared writable layers needs of its tmpfs: mount points.
const MOUNT_POINTS: ByteSize = ByteSize::mib(4);

/// Where the writable layers lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Upper {
    /// All on one tmpfs of this size: the fastest. Its pages count against the memory limit of the
    /// sandbox that writes them, but a sandbox without one can fill it for all.
    Shared {
        /// Of all writable layers together.
        size: ByteSize,
    },
    /// Each on a tmpfs of its own of this size: a sandbox that fills it is alone with ENOSPC.
    Own {
        /// Of each writable layer.
        size: ByteSize,
    },
}

/// How a store is kept.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct RootfsConfig {
    /// Below this directory stores have their mount points, each in a directory of its own.
    pub run_dir: PathBuf,
    /// Where the writable layers lie.
    pub upper: Upper,
}

impl Default for RootfsConfig {
    fn default() -> Self {
        Self {
            run_dir: "/run/rund-rt/rootfs".into(),
            upper: Upper::Own {
                size: ByteSize::mib(64),
            },
        }
    }
}

/// Images mounted once, from which split root file systems are made.
///
/// Needs `CAP_SYS_ADMIN`. Starts no thread. Its mounts are private to this mount namespace, and go
/// when the store and the last [`Rootfs`] of it are dropped; those of a killed owner go with the
/// next store's beginning, or by [`sweep`].
#[derive(Debug, Clone)]
pub struct RootfsStore {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    folder: PathBuf,
    point: PathBuf,
    /// The root of the tmpfs at `point`.
    tmpfs: OwnedFd,
    upper: Upper,
    serial: AtomicU64,
    lowers: Mutex<HashMap<Image, Weak<Mounted>>>,
    /// Says that the owner lives.
    _lock: File,
}

/// An image that is mounted, as long as somebody holds it: a [`Rootfs`] over it does.
#[derive(Debug, Clone)]
pub struct Lower {
    image: Image,
    mounted: Arc<Mounted>,
}

#[derive(Debug)]
struct Mounted {
    root: OwnedFd,
    /// Where it is attached; nothing for a directory.
    point: Option<PathBuf>,
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if let Some(point) = &self.point {
            // The store's end may have come first, and taken it along.
            let _gone = take_down(point);
            let _gone = std::fs::remove_dir(point);
        }
    }
}

impl Lower {
    /// Which image.
    pub fn image(&self) -> &Image {
        &self.image
    }

    /// Its root: the file system of an image, mounted read-only, or the directory itself, which whoever
    /// has the right to can write to.
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.mounted.root.as_fd()
    }
}

/// A root file system of one sandbox's own: a shared image below, a writable layer above. Both the
/// mount and what was written go away with it.
#[derive(Debug)]
pub struct Rootfs {
    /// `None` only while it is being dropped.
    mount: Option<OwnedFd>,
    name: String,
    upper: Upper,
    lower: Lower,
    store: Arc<Inner>,
}

impl RootfsStore {
    /// Sweeps what killed owners left below `run_dir`, and mounts the store's tmpfs.
    ///
    /// # Errors
    /// Where this process may not mount, or the directory cannot be made.
    pub fn open(config: &RootfsConfig) -> Result<Self> {
        let swept = sweep(&config.run_dir)?;
        if swept.owners > 0 {
            tracing::info!(?swept, "took down mounts of killed owners");
        }
        let (folder, lock) = own(&config.run_dir)?;
        match Inner::mount(&folder, config.upper, lock) {
            Ok(inner) => Ok(Self {
                inner: Arc::new(inner),
            }),
            Err(why) => {
                let _the_first_error_counts = remove(&folder);
                Err(why)
            }
        }
    }

    /// Mounts an image, or finds it mounted.
    ///
    /// # Errors
    /// Where the kernel does not take it.
    pub fn lower(&self, image: &Image) -> Result<Lower> {
        let lowers = &self.inner.lowers;
        let mut lowers = lowers.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(mounted) = lowers.get(image).and_then(Weak::upgrade) {
            return Ok(Lower {
                image: image.clone(),
                mounted,
            });
        }
        lowers.retain(|_, mounted| mounted.strong_count() > 0);
        let mounted = Arc::new(self.inner.mount_image(image)?);
        lowers.insert(image.clone(), Arc::downgrade(&mounted));
        Ok(Lower {
            image: image.clone(),
            mounted,
        })
    }

    /// A root file system for one sandbox, with the configuration's writable layer.
    ///
    /// # Errors
    /// Where the kernel does not take it, or the store's tmpfs is full.
    pub fn split(&self, lower: &Lower) -> Result<Rootfs> {
        self.split_with(lower, self.inner.upper)
    }

    /// The same with a writable layer of its own of this size.
    ///
    /// # Errors
    /// As [`split`](Self::split).
    pub fn split_sized(&self, lower: &Lower, size: ByteSize) -> Result<Rootfs> {
        self.split_with(lower, Upper::Own { size })
    }

    fn split_with(&self, lower: &Lower, upper: Upper) -> Result<Rootfs> {
        let inner = &self.inner;
        let serial = inner.serial.fetch_add(1, Ordering::Relaxed);
        let mut rootfs = Rootfs {
            mount: None,
            name: serial.to_string(),
            upper,
            lower: lower.clone(),
            store: Arc::clone(inner),
        };
        // From here on its drop removes what there is.
        rootfs.mount = Some(inner.overlay(lower, &rootfs.place(), upper)?);
        Ok(rootfs)
    }
}

impl Inner {
    fn mount(folder: &Path, upper: Upper, lock: File) -> Result<Self> {
        let point = folder.join(POINT);
        std::fs::create_dir(&point).map_err(Error::rootfs("make", &point))?;
        let size = match upper {
            Upper::Shared { size } => size,
            Upper::Own { .. } => MOUNT_POINTS,
        };
        let mounted = tmpfs(size, "0700").map_err(Error::mount("mount a tmpfs for", &point))?;
        attach(mounted.as_fd(), &point).map_err(Error::mount("mount", &point))?;
        make_private(&point).map_err(Error::mount("make private", &point))?;
        let tmpfs = open_directory(&point).map_err(Error::mount("open", &point))?;
        mkdirat(&tmpfs, UPPERS, Mode::from_raw_mode(0o700))
            .map_err(Error::mount("make", &point.join(UPPERS)))?;
        Ok(Self {
            folder: folder.to_owned(),
            point,
            tmpfs,
            upper,
            serial: AtomicU64::new(0),
            lowers: Mutex::default(),
            _lock: lock,
        })
    }

    fn mount_image(&self, image: &Image) -> Result<Mounted> {
        let path = image.path();
        if image.format() == Format::Directory {
            return Ok(Mounted {
                root: open_directory(path).map_err(Error::mount("open", path))?,
                point: None,
            });
        }
        let serial = self.serial.fetch_add(1, Ordering::Relaxed);
        let point = self.point.join(format!("image-{serial}"));
        std::fs::create_dir_all(&point).map_err(Error::rootfs("make", &point))?;
        let mount = mount_file(image)?;
        attach(mount.as_fd(), &point).map_err(Error::mount("mount", path))?;
        Ok(Mounted {
            root: open_directory(&point).map_err(Error::mount("open", &point))?,
            point: Some(point),
        })
    }

    /// Makes the writable layer and lays it over the image.
    fn overlay(&self, lower: &Lower, place: &str, upper: Upper) -> Result<OwnedFd> {
        let path = self.point.join(place);
        let failed = |what: &'static str| Error::mount(what, &path);
        mkdirat(&self.tmpfs, place, Mode::from_raw_mode(0o700)).map_err(failed("make"))?;
        if let Upper::Own { size } = upper {
            let own = tmpfs(size, "0700").map_err(failed("mount a tmpfs for"))?;
            attach(own.as_fd(), &path).map_err(failed("mount"))?;
        }
        let folder =
            openat(&self.tmpfs, place, DIRECTORY, Mode::empty()).map_err(failed("open"))?;
        for name in ["upper", "work"] {
            mkdirat(&folder, name, Mode::from_raw_mode(0o755)).map_err(failed("make"))?;
        }
        // The writable layer's root is what the sandbox sees of the root's owner and mode.
        let root = fstat(lower.descriptor()).map_err(failed("stat the image for"))?;
        let top = openat(&folder, "upper", DIRECTORY, Mode::empty()).map_err(failed("open"))?;
        let (uid, gid) = (Uid::from_raw(root.st_uid), Gid::from_raw(root.st_gid));
        fchown(&top, Some(uid), Some(gid)).map_err(failed("chown"))?;
        fchmod(&top, Mode::from_raw_mode(root.st_mode & 0o7777)).map_err(failed("chmod"))?;

        let at = |descriptor: BorrowedFd<'_>, name: &str| {
            let path = path_of(descriptor).join(name);
            path.to_string_lossy().into_owned()
        };
        detached(
            "overlay",
            &[
                ("source", "rund-rt"),
                ("lowerdir", &at(lower.descriptor(), "")),
                ("upperdir", &at(folder.as_fd(), "upper")),
                ("workdir", &at(folder.as_fd(), "work")),
            ],
            // Nothing that a sandbox writes has to reach a disk.
            &["volatile"],
            MountAttrFlags::MOUNT_ATTR_NODEV | MountAttrFlags::MOUNT_ATTR_NOSUID,
        )
        .map_err(failed("mount an overlay for"))
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        if let Err(why) = remove(&self.folder) {
            tracing::warn!(%why, "mounts stay behind until the next sweep");
        }
    }
}

impl Rootfs {
    /// Where its writable layer lies in the store's tmpfs.
    fn place(&self) -> String {
        match self.upper {
            Upper::Shared { .. } => format!("{UPPERS}/{}", self.name),
            Upper::Own { .. } => self.name.clone(),
        }
    }

    /// The mount: it is attached nowhere, and is there as long as somebody holds a descriptor of
    /// it. Files are opened below it by `openat`; a child that inherits it can make it its root.
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        match &self.mount {
            Some(mount) => mount.as_fd(),
            // Only while `split_with` makes it, which hands out no reference.
            None => self.lower.descriptor(),
        }
    }

    /// A path by which *this process* reaches the mount.
    pub fn path(&self) -> PathBuf {
        path_of(self.descriptor())
    }

    /// The same mount once more, to be attached elsewhere. Before Linux 6.15 it is the mount
    /// itself, which can be attached once.
    ///
    /// # Errors
    /// Where there are no descriptors left.
    pub fn mount_again(&self) -> Result<OwnedFd> {
        let flags = OpenTreeFlags::OPEN_TREE_CLONE
            | OpenTreeFlags::OPEN_TREE_CLOEXEC
            | OpenTreeFlags::AT_EMPTY_PATH;
        let again = match open_tree(self.descriptor(), "", flags) {
            Ok(again) => Ok(again),
            Err(_) => rustix::io::fcntl_dupfd_cloexec(self.descriptor(), 0),
        };
        again.map_err(Error::mount("mount again", &self.store.point))
    }

    /// The image below.
    pub fn lower(&self) -> &Lower {
        &self.lower
    }

    /// Where its writable layer lies.
    pub fn upper(&self) -> Upper {
        self.upper
    }
}

impl Drop for Rootfs {
    fn drop(&mut self) {
        drop(self.mount.take());
        let place = self.place();
        let path = self.store.point.join(&place);
        if matches!(self.upper, Upper::Own { .. })
            && let Err(why) = take_down(&path)
        {
            tracing::warn!(path = %path.display(), %why, "cannot unmount a writable layer");
        }
        if let Err(why) = remove_tree(&self.store.tmpfs, &place) {
            tracing::warn!(path = %path.display(), %why, "cannot remove a writable layer");
        }
    }
}

const DIRECTORY: OFlags = OFlags::RDONLY
    .union(OFlags::DIRECTORY)
    .union(OFlags::CLOEXEC)
    .union(OFlags::NOFOLLOW);

pub(super) fn open_directory(path: &Path) -> rustix::io::Result<OwnedFd> {
    rustix::fs::open(path, DIRECTORY, Mode::empty())
}

fn tmpfs(size: ByteSize, mode: &str) -> rustix::io::Result<OwnedFd> {
    let bytes = size.get().to_string();
    let options = [("source", "rund-rt"), ("size", &bytes), ("mode", mode)];
    let attributes = MountAttrFlags::MOUNT_ATTR_NODEV | MountAttrFlags::MOUNT_ATTR_NOSUID;
    detached("tmpfs", &options, &[], attributes)
}

/// An image file as a detached mount: without a loop device where the file system can, else with
/// one.
fn mount_file(image: &Image) -> Result<OwnedFd> {
    let path = image.path();
    let kind = image.format().kernel_name();
    let file = File::open(path).map_err(Error::rootfs("open", path))?;
    let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOSUID;
    let from = |source: &str| detached(kind, &[("source", source)], &["ro"], attributes);
    if image.format() == Format::Erofs {
        let source = path_of(&file);
        match from(&source.to_string_lossy()) {
            Ok(mount) => return Ok(mount),
            // Before Linux 6.12 it wants a block device.
            Err(rustix::io::Errno::NOTBLK) => {}
            Err(why) => return Err(Error::mount("mount", path)(why)),
        }
    }
    let device = LoopDevice::read_only(&file).map_err(Error::rootfs("loop-mount", path))?;
    from(&device.path().to_string_lossy()).map_err(Error::mount("mount", path))
}
