//! Mounts by the kernel's newer interface: made as descriptors, and attached only where somebody
//! else needs a path.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags, UnmountFlags,
    fsconfig_create, fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, mount_change,
    move_mount, unmount,
};

type Result<T> = std::result::Result<T, Errno>;

/// A file system with these options, mounted nowhere: it goes with its descriptor.
pub(super) fn detached(
    kind: &str,
    options: &[(&str, &str)],
    flags: &[&str],
    attributes: MountAttrFlags,
) -> Result<OwnedFd> {
    let context = fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC)?;
    for (key, value) in options {
        fsconfig_set_string(context.as_fd(), *key, *value)?;
    }
    for flag in flags {
        fsconfig_set_flag(context.as_fd(), *flag)?;
    }
    fsconfig_create(context.as_fd())?;
    fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes)
}

/// Attaches a detached mount at `target`, a directory.
pub(super) fn attach(mount: BorrowedFd<'_>, target: &Path) -> Result<()> {
    move_mount(
        mount,
        "",
        rustix::fs::CWD,
        target,
        MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH,
    )
}

/// What is mounted below `target` is seen by this mount namespace alone.
pub(super) fn make_private(target: &Path) -> Result<()> {
    mount_change(
        target,
        MountPropagationFlags::PRIVATE | MountPropagationFlags::REC,
    )
}

/// Takes down everything that is mounted at `target` and below, also where it is in use: it goes
/// with its last user. Nothing mounted is done.
pub(super) fn take_down(target: &Path) -> Result<()> {
    loop {
        match unmount(target, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
            // One above the other: the next.
            Ok(()) => {}
            Err(Errno::INVAL | Errno::NOENT) => return Ok(()),
            Err(why) => return Err(why),
        }
    }
}

/// A path that leads to an open directory, for interfaces that take no descriptor. Unlike the
/// directory's own path it needs no escapes.
pub(super) fn path_of(descriptor: impl AsFd) -> PathBuf {
    format!("/proc/self/fd/{}", descriptor.as_fd().as_raw_fd()).into()
}
