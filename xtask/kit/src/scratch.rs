//! A directory of a test's own, on tmpfs or on disk, that goes away with its handle.

use std::fs;
use std::io;
use std::path::Path;

use nix::mount::{MntFlags, MsFlags, mount, umount2};

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

/// Where the kernel counts huge pages of 2 MiB.
const HUGE_PAGES: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";
const HUGE_PAGE: u64 = 2 << 20;

/// A hugetlbfs with pages set aside for it. Both go away with it.
#[derive(Debug)]
pub struct HugeDir {
    dir: TempDir,
    pages: u64,
}

impl HugeDir {
    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }
}

impl Drop for HugeDir {
    fn drop(&mut self) {
        let _not_mounted = umount2(self.dir.path(), MntFlags::MNT_DETACH);
        let _as_it_is = change_pages(|pages| pages.saturating_sub(self.pages));
    }
}

/// Changes how many huge pages there are; gives the number before and after.
fn change_pages(change: impl FnOnce(u64) -> u64) -> io::Result<(u64, u64)> {
    let read = || -> io::Result<u64> {
        let text = fs::read_to_string(HUGE_PAGES)?;
        text.trim().parse().map_err(io::Error::other)
    };
    let before = read()?;
    fs::write(HUGE_PAGES, change(before).to_string())?;
    Ok((before, read()?))
}

/// A hugetlbfs of `bytes`, rounded up to 2 MiB, whose pages are taken from the machine's free
/// memory.
///
/// # Errors
/// Where this process may not set pages aside or mount, or memory is too scattered for them.
pub fn on_hugetlbfs(bytes: u64) -> io::Result<HugeDir> {
    let pages = bytes.div_ceil(HUGE_PAGE);
    let (before, after) = change_pages(|before| before + pages)?;
    let made = after.saturating_sub(before);
    // From here on whatever was set aside is given back.
    let place = HugeDir {
        dir: on_disk()?,
        pages: made,
    };
    if made < pages {
        let text = format!("{made} of {pages} huge pages could be set aside");
        return Err(io::Error::other(text));
    }
    let options = format!("pagesize=2M,size={}", pages * HUGE_PAGE);
    mount(
        Some("hugetlbfs"),
        place.path(),
        Some("hugetlbfs"),
        MsFlags::empty(),
        Some(options.as_str()),
    )?;
    Ok(place)
}
