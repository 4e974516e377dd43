//! Huge pages: fewer page faults and page tables for large tensors.
//!
//! A tmpfs has them by its own mount option, whatever the kernel's default for shared memory is.
//! The option asked for here is `huge=within_size`: a huge page only where the file covers all of
//! it, so that the ends of files and small tensors waste nothing (`always` would waste a megabyte
//! a file on average).

use std::fs;
use std::path::{Path, PathBuf};

use nix::mount::{MsFlags, mount};

use crate::error::{Error, Result};
use crate::store::{Store, StoreConfig};

/// Whether a store gets a mount of its own for the sake of huge pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum HugePages {
    /// The root stays on the file system it is on.
    #[default]
    AsMounted,
    /// Where the root is not on a tmpfs with huge pages yet, one is mounted there, as large as the
    /// quota. It stays until somebody unmounts it. Needs CAP_SYS_ADMIN and an empty directory.
    Mount,
}

/// Which tensors get huge pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum HugePagesInForce {
    /// The store is not on a tmpfs: its pages are those of a page cache.
    NotTmpfs,
    /// None.
    Never,
    /// Those in mappings that ask for it by `madvise`.
    Advise,
    /// Those parts of stored files that fill a huge page.
    WithinSize,
    /// All, rounded up to whole huge pages.
    Always,
}

impl Store {
    /// Which tensors get huge pages, by the store's mount and the kernel's setting.
    ///
    /// # Errors
    /// [`Error::Io`] where `/proc` or the root cannot be read.
    pub fn huge_pages(&self) -> Result<HugePagesInForce> {
        in_force(self.root())
    }
}

/// Mounts a tmpfs for the store where that is configured and not done.
pub(crate) fn mount_if_configured(config: &StoreConfig) -> Result<()> {
    if config.huge_pages == HugePages::AsMounted {
        return Ok(());
    }
    let root = &config.root;
    fs::create_dir_all(root).map_err(Error::io("create", root))?;
    if matches!(
        in_force(root)?,
        HugePagesInForce::WithinSize | HugePagesInForce::Always
    ) {
        return Ok(());
    }
    let entries = fs::read_dir(root).map_err(Error::io("list", root))?;
    if entries.count() > 0 {
        let why = "it is not empty, and huge pages need a mount over it".to_owned();
        return Err(Error::NotAStore {
            path: root.clone(),
            why,
        });
    }
    let size = config.quota.map_or_else(String::new, |quota| {
        // Beside the tensors: the directories, the manifests and the names.
        format!(",size={}", quota.get().saturating_add(16 << 20))
    });
    let options = format!("huge=within_size,mode=0755{size}");
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(
        Some("tetris-store"),
        root,
        Some("tmpfs"),
        flags,
        Some(options.as_str()),
    )
    .map_err(Error::io("mount a tmpfs with huge pages on", root))
}

fn in_force(root: &Path) -> Result<HugePagesInForce> {
    let root = fs::canonicalize(root).map_err(Error::io("look at", root))?;
    let table = PathBuf::from("/proc/self/mountinfo");
    let mounts = fs::read_to_string(&table).map_err(Error::io("read", table))?;
    let setting = PathBuf::from("/sys/kernel/mm/transparent_hugepage/shmem_enabled");
    // Absent where the kernel was built without.
    let kernel = fs::read_to_string(setting).unwrap_or_else(|_| "[deny]".to_owned());
    Ok(of_mount(&mounts, &root, &kernel))
}

/// Pure: what holds for `root` by the table of mounts (proc(5)) and the kernel's setting for shared
/// memory, whose `deny` and `force` overrule every mount.
fn of_mount(mounts: &str, root: &Path, kernel: &str) -> HugePagesInForce {
    let mut best: Option<(usize, HugePagesInForce)> = None;
    for line in mounts.lines() {
        let Some((left, right)) = line.split_once(" - ") else {
            continue;
        };
        let Some(point) = left.split(' ').nth(4).map(unescape) else {
            continue;
        };
        let depth = Path::new(&point).components().count();
        // A later mount on the same point hides an earlier one.
        if !root.starts_with(&point) || best.is_some_and(|(deepest, _)| depth < deepest) {
            continue;
        }
        let mut right = right.splitn(3, ' ');
        let found = if right.next() == Some("tmpfs") {
            let options = right.nth(1).unwrap_or_default();
            match options
                .split(',')
                .find_map(|option| option.strip_prefix("huge="))
            {
                Some("always") => HugePagesInForce::Always,
                Some("within_size") => HugePagesInForce::WithinSize,
                Some("advise") => HugePagesInForce::Advise,
                _ => HugePagesInForce::Never,
            }
        } else {
            HugePagesInForce::NotTmpfs
        };
        best = Some((depth, found));
    }
    match best {
        None | Some((_, HugePagesInForce::NotTmpfs)) => HugePagesInForce::NotTmpfs,
        Some(_) if kernel.contains("[deny]") => HugePagesInForce::Never,
        Some(_) if kernel.contains("[force]") => HugePagesInForce::Always,
        Some((_, found)) => found,
    }
}

/// Undoes the octal escapes of the table of mounts.
fn unescape(field: &str) -> String {
    [
        ("\\040", " "),
        ("\\011", "\t"),
        ("\\012", "\n"),
        ("\\134", "\\"),
    ]
    .iter()
    .fold(field.to_owned(), |text, (escape, plain)| {
        text.replace(escape, plain)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_deepest_and_latest_mount_counts_and_the_kernel_overrules() {
        let mounts = "\
            20 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw\n\
            30 20 0:25 / /dev/shm rw,nosuid shared:2 - tmpfs tmpfs rw,size=24684096k\n\
            31 30 0:26 / /dev/shm/a\\040b rw - tmpfs x rw,huge=within_size\n\
            32 30 0:27 / /dev/shm/c rw - tmpfs x rw,huge=advise\n\
            33 32 0:28 / /dev/shm/c rw - tmpfs x rw,huge=always\n";
        let of = |root: &str, kernel| of_mount(mounts, Path::new(root), kernel);
        let never = "always within_size advise [never] deny force";
        assert_eq!(of("/srv", never), HugePagesInForce::NotTmpfs);
        assert_eq!(of("/dev/shm/x", never), HugePagesInForce::Never);
        assert_eq!(of("/dev/shm/a b/x", never), HugePagesInForce::WithinSize);
        assert_eq!(of("/dev/shm/c", never), HugePagesInForce::Always);
        assert_eq!(of("/dev/shm/cd", never), HugePagesInForce::Never);
        assert_eq!(
            of("/dev/shm/c", "never [deny] force"),
            HugePagesInForce::Never
        );
        assert_eq!(
            of("/dev/shm/x", "never deny [force]"),
            HugePagesInForce::Always
        );
        assert_eq!(of("/srv", "never deny [force]"), HugePagesInForce::NotTmpfs);
    }
}
