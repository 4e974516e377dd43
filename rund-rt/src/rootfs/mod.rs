//! A root file system split in two (RunD, USENIX ATC'22, section 4.1): an image that is read-only
//! and shared, in one page cache, and a writable layer of each sandbox's own whose contents need
//! not outlive it.
//!
//! An [`Image`] is an erofs or squashfs file, or a plain directory. A [`RootfsStore`] mounts it
//! once, however many sandboxes use it, and lays an overlay over it for each: its writable layer
//! lies on a tmpfs, and is mounted `volatile`, so that nothing waits for a disk.
//!
//! The overlays are never attached anywhere: a [`Rootfs`] is a descriptor of a detached mount,
//! which goes with its process. Images and the tmpfs lie below one private mount point of each
//! store, which [`sweep`] takes down when its owner is gone.

mod beneath;
mod image;
mod layers;
mod loop_device;
mod mounts;
mod reflink;
mod store;
mod sweep;

pub(crate) use beneath::find_in_root;
pub use image::{Format, Image};
pub use layers::{Layer, LayerLimits, unpack};
pub use reflink::{Copied, copy_file};
pub use store::{Lower, Rootfs, RootfsConfig, RootfsStore, Upper};
pub use sweep::{SweptMounts, sweep};

use std::fmt;
use std::io;
use std::path::Path;

use crate::error::Error;

impl Error {
    /// For `map_err`: what was tried on which file of a root file system.
    fn rootfs<E: fmt::Display>(what: &str, path: &Path) -> impl FnOnce(E) -> Self + use<E> {
        let (what, path) = (what.to_owned(), path.to_owned());
        move |why| Self::Rootfs {
            path,
            why: format!("cannot {what}: {why}"),
        }
    }

    /// The same for what needs a right: says which.
    fn mount(what: &str, path: &Path) -> impl FnOnce(rustix::io::Errno) -> Self + use<> {
        let (what, path) = (what.to_owned(), path.to_owned());
        move |why| {
            let hint = match why {
                rustix::io::Errno::PERM | rustix::io::Errno::ACCESS => {
                    "; mounting needs CAP_SYS_ADMIN: run as root"
                }
                rustix::io::Errno::NODEV => "; this kernel lacks the file system",
                rustix::io::Errno::NOSPC => "; sysctl fs.mount-max, or a larger writable layer",
                _ => "",
            };
            Self::Rootfs {
                path,
                why: format!("cannot {what}: {}{hint}", io::Error::from(why)),
            }
        }
    }
}
