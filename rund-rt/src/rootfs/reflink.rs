//! Copies that share their blocks until one side writes (FICLONE): the paper's pre-formatted
//! writable image is such a copy.

use std::fs::File;
use std::io;
use std::path::Path;

use crate::error::{Error, Result};

/// How a file was copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Copied {
    /// Its blocks are shared until written: no byte was copied.
    Reflinked,
    /// Byte by byte, since the file system cannot share blocks.
    Bytes,
}

/// Copies a file: shares its blocks where the file system can (XFS, btrfs), else copies bytes. A
/// copy that fails leaves nothing.
///
/// # Errors
/// Where `to` is there already, or one of them cannot be opened, or the disk is full.
pub fn copy_file(from: &Path, to: &Path) -> Result<Copied> {
    let mut source = File::open(from).map_err(Error::rootfs("open", from))?;
    let mut target = File::create_new(to).map_err(Error::rootfs("make", to))?;
    let copied = match rustix::fs::ioctl_ficlone(&target, &source) {
        Ok(()) => Ok(Copied::Reflinked),
        Err(_) => io::copy(&mut source, &mut target).map(|_| Copied::Bytes),
    };
    copied.map_err(|why| {
        let _best_effort = std::fs::remove_file(to);
        Error::rootfs("copy to", to)(why)
    })
}
