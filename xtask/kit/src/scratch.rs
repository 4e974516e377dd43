//! A directory of a test's own, on tmpfs or on disk, that goes away with its handle.

use std::io;
use std::path::Path;

pub use tempfile::TempDir;

/// Where tmpfs is mounted on every Linux distribution.
const SHM: &str = "/dev/shm";

/// A directory on tmpfs where there is a writable `/dev/shm`, else on disk.
///
/// # Errors
/// Where neither place takes a directory.
pub fn on_tmpfs() -> io::Result<TempDir> {
    let builder = || {
        let mut builder = tempfile::Builder::new();
        builder.prefix("carlsbad-");
        builder
    };
    builder()
        .tempdir_in(Path::new(SHM))
        .or_else(|_| builder().tempdir())
}

/// A directory on disk, in `TMPDIR` or `/tmp`.
///
/// # Errors
/// Where that place takes no directory.
pub fn on_disk() -> io::Result<TempDir> {
    tempfile::Builder::new().prefix("carlsbad-").tempdir()
}
