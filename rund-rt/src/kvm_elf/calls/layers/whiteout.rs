//! Names that hide: what is deleted of the lower layer is hidden by an empty file `.wh.NAME` in the
//! upper one, and a directory that hides the lower one of its name holds `.wh..wh..opq`, as in OCI image
//! layers.

use std::os::fd::BorrowedFd;

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::stat::Mode;
use nix::unistd::{UnlinkatFlags, unlinkat};

use super::super::account::NAME;
use super::{Layers, Place, join, open_in, parent_in, split, stat_in};

/// Beginning of the names that hide.
pub(super) const HIDDEN: &[u8] = b".wh.";
/// The file in a directory that hides all of the lower one.
pub(super) const OPAQUE: &[u8] = b".wh..wh..opq";

pub(super) fn hidden_name(path: &[u8]) -> Vec<u8> {
    let (parent, name) = split(path);
    join(parent, &[HIDDEN, name].concat())
}

/// An empty file of this name.
fn mark(upper: BorrowedFd<'_>, name: &[u8]) -> Result<(), Errno> {
    let mode = Mode::from_bits_truncate(0o600);
    let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL;
    open_in(upper, name, flags, mode).map(drop)
}

impl Layers {
    /// Lets the name `path` show again; whether it was hidden.
    pub(super) fn unhide(&mut self, path: &[u8]) -> bool {
        let hidden = hidden_name(path);
        let gone = self.upper().is_some_and(|upper| {
            parent_in(upper, &hidden)
                .and_then(|(parent, name)| unlinkat(&parent, name, UnlinkatFlags::NoRemoveDir))
                .is_ok()
        });
        if gone {
            self.free(NAME);
        }
        gone
    }

    fn mark(&mut self, name: &[u8]) -> Result<(), Errno> {
        match self.add_name(|upper| mark(upper, name)) {
            Err(Errno::EEXIST) => Ok(()),
            other => other,
        }
    }

    /// Hides all that the lower layer has in the directory `path`.
    pub(super) fn make_opaque(&mut self, path: &[u8]) -> Result<(), Errno> {
        self.mark(&join(path, OPAQUE))
    }

    /// Hides what the lower layer has at `path`.
    pub(super) fn hide(&mut self, path: &[u8]) -> Result<(), Errno> {
        self.make_parents(path)?;
        self.mark(&hidden_name(path))
    }

    /// Whether the lower layer has something at `path` that would show.
    pub(super) fn shows_through(&mut self, place: &Place) -> bool {
        place.parent.lower
            && self
                .lower()
                .is_some_and(|lower| stat_in(lower, &place.path).is_some())
    }
}
