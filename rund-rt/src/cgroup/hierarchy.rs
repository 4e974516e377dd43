//! Which control groups this machine has, and where: version 1, one mount for each controller or
//! a few together; version 2, one tree; or both side by side.

use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// What a control group can count or limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Controller {
    /// Processor time, as a share and as a quota.
    Cpu,
    /// Processor time, counted. Part of [`Cpu`](Self::Cpu) in version 2.
    Cpuacct,
    /// Memory, with an OOM killer of its own.
    Memory,
    /// The number of processes and threads.
    Pids,
    /// Stopping and resuming all members. Part of every group in version 2.
    Freezer,
}

impl Controller {
    /// All that this crate uses.
    pub const ALL: [Self; 5] = [
        Self::Cpu,
        Self::Cpuacct,
        Self::Memory,
        Self::Pids,
        Self::Freezer,
    ];

    /// The kernel's name of it, in version 1.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Cpuacct => "cpuacct",
            Self::Memory => "memory",
            Self::Pids => "pids",
            Self::Freezer => "freezer",
        }
    }

    fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|one| one.name() == name)
    }
}

impl fmt::Display for Controller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Which of the kernel's two interfaces.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Version {
    /// A tree for each controller, or for a few together.
    V1,
    /// One tree for all.
    V2,
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V1 => "v1",
            Self::V2 => "v2",
        })
    }
}

/// One tree, and what it controls.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Tree {
    /// Below which pools lie.
    pub(super) directory: PathBuf,
    pub(super) controllers: BTreeSet<Controller>,
}

/// The control groups to use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hierarchy {
    version: Version,
    trees: Vec<Tree>,
}

impl Hierarchy {
    /// What this machine has: version 2 where that has the memory controller, else version 1.
    ///
    /// Pools lie at the root of what is mounted, which in a container is the container's own group.
    ///
    /// # Errors
    /// Where no control groups are mounted.
    pub fn detect() -> Result<Self> {
        let mounts = read(Path::new("/proc/self/mountinfo"))?;
        let (v1, v2) = parse_mounts(&mounts);
        let v2 = match v2 {
            Some(directory) => Some(Self::v2_at(directory)?),
            None => None,
        };
        match v2 {
            Some(v2) if v2.has(Controller::Memory) || v1.is_empty() => Ok(v2),
            _ if !v1.is_empty() => Ok(Self {
                version: Version::V1,
                trees: v1,
            }),
            _ => Err(not_mounted()),
        }
    }

    /// Version 1, as it is mounted here.
    ///
    /// # Errors
    /// Where none of its controllers is mounted.
    pub fn v1() -> Result<Self> {
        let (trees, _) = parse_mounts(&read(Path::new("/proc/self/mountinfo"))?);
        if trees.is_empty() {
            return Err(not_mounted());
        }
        Ok(Self {
            version: Version::V1,
            trees,
        })
    }

    /// Version 2, as it is mounted here, whatever controllers it has.
    ///
    /// # Errors
    /// Where it is not mounted.
    pub fn v2() -> Result<Self> {
        let (_, v2) = parse_mounts(&read(Path::new("/proc/self/mountinfo"))?);
        Self::v2_at(v2.ok_or(not_mounted())?)
    }

    /// Version 2 below `directory`, a group that was delegated to this process and has no members
    /// of its own (the kernel's "no internal processes" rule).
    ///
    /// # Errors
    /// Where it is no group of version 2.
    pub fn v2_at(directory: impl Into<PathBuf>) -> Result<Self> {
        let directory = directory.into();
        let names = read(&directory.join("cgroup.controllers"))?;
        Ok(Self {
            version: Version::V2,
            trees: vec![Tree {
                controllers: v2_controllers(&names),
                directory,
            }],
        })
    }

    /// The same, without the controllers that are not in `wanted`: fewer trees cost less.
    #[must_use]
    pub fn only(mut self, wanted: &[Controller]) -> Self {
        for tree in &mut self.trees {
            tree.controllers.retain(|one| wanted.contains(one));
        }
        if self.version == Version::V1 {
            self.trees.retain(|tree| !tree.controllers.is_empty());
        }
        self
    }

    /// This tree alone.
    pub(super) fn only_tree(mut self, tree: &Tree) -> Self {
        self.trees = vec![tree.clone()];
        self
    }

    /// Which interface.
    pub fn version(&self) -> Version {
        self.version
    }

    /// What can be limited or counted.
    pub fn controllers(&self) -> BTreeSet<Controller> {
        let all = self.trees.iter().flat_map(|tree| &tree.controllers);
        all.copied().collect()
    }

    /// Whether `controller` is among them.
    pub fn has(&self, controller: Controller) -> bool {
        self.tree_of(controller).is_some()
    }

    pub(super) fn trees(&self) -> &[Tree] {
        &self.trees
    }

    pub(super) fn tree_of(&self, controller: Controller) -> Option<usize> {
        self.trees
            .iter()
            .position(|tree| tree.controllers.contains(&controller))
    }
}

fn not_mounted() -> Error {
    Error::NoController {
        what: "anything",
        why: "no control groups are mounted; mount cgroup2 at /sys/fs/cgroup".to_owned(),
    }
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).map_err(Error::cgroup("read", path))
}

/// What version 2 lists, in this crate's terms: counting processor time and freezing need no
/// controller there.
fn v2_controllers(names: &str) -> BTreeSet<Controller> {
    let named = names.split_whitespace().filter_map(Controller::parse);
    named
        .chain([Controller::Cpuacct, Controller::Freezer])
        .collect()
}

/// The trees of version 1 and the directory of version 2 in the text of a `mountinfo`.
fn parse_mounts(text: &str) -> (Vec<Tree>, Option<PathBuf>) {
    let mut v1: Vec<Tree> = Vec::new();
    let mut v2 = None;
    for line in text.lines() {
        // 36 35 98:0 /root /mount/point rw,opts optional... - type source super-options
        let Some((left, right)) = line.split_once(" - ") else {
            continue;
        };
        let Some(directory) = left.split(' ').nth(4).map(unescape) else {
            continue;
        };
        let mut right = right.split(' ');
        let (kind, options) = (right.next(), right.nth(1).unwrap_or_default());
        match kind {
            Some("cgroup") => {
                let controllers: BTreeSet<_> =
                    options.split(',').filter_map(Controller::parse).collect();
                // The same tree may be mounted twice: the first will do.
                let known = |tree: &Tree| !tree.controllers.is_disjoint(&controllers);
                if !controllers.is_empty() && !v1.iter().any(known) {
                    v1.push(Tree {
                        directory,
                        controllers,
                    });
                }
            }
            Some("cgroup2") if v2.is_none() => v2 = Some(directory),
            _ => {}
        }
    }
    (v1, v2)
}

/// Undoes the octal escapes of space, tab, newline and backslash in `/proc/self/mountinfo`.
pub(crate) fn unescape(field: &str) -> PathBuf {
    use std::os::unix::ffi::OsStringExt;

    let bytes = field.as_bytes();
    let mut plain = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let code = bytes
            .get(at + 1..at + 4)
            .filter(|_| bytes[at] == b'\\')
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match code {
            Some(byte) => {
                plain.push(byte);
                at += 4;
            }
            None => {
                plain.push(bytes[at]);
                at += 1;
            }
        }
    }
    std::ffi::OsString::from_vec(plain).into()
}

#[cfg(test)]
mod tests {
    use super::{Controller, parse_mounts, unescape, v2_controllers};
    use std::path::PathBuf;

    const HYBRID: &str = "\
30 1 0:26 / /sys/fs/cgroup rw shared:2 - tmpfs tmpfs rw,mode=755
31 30 0:27 / /sys/fs/cgroup/unified rw - cgroup2 cgroup rw
32 30 0:28 / /sys/fs/cgroup/cpu,cpuacct rw,nosuid shared:9 - cgroup cgroup rw,cpu,cpuacct
33 30 0:29 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory
34 30 0:30 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd
35 30 0:29 / /mnt/again rw - cgroup cgroup rw,memory
garbage";

    #[test]
    fn controllers_mounted_together_are_one_tree() {
        let (v1, v2) = parse_mounts(HYBRID);
        assert_eq!(v2, Some(PathBuf::from("/sys/fs/cgroup/unified")));
        assert_eq!(v1.len(), 2, "{v1:?}");
        assert!(v1[0].controllers.contains(&Controller::Cpuacct));
        assert_eq!(v1[1].directory, PathBuf::from("/sys/fs/cgroup/memory"));
    }

    #[test]
    fn the_unified_tree_alone() {
        let line = "25 20 0:22 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate";
        let (v1, v2) = parse_mounts(line);
        assert!(v1.is_empty());
        assert_eq!(v2, Some(PathBuf::from("/sys/fs/cgroup")));
        let found = v2_controllers("cpuset cpu io memory hugetlb pids\n");
        assert_eq!(found.len(), 5);
    }

    #[test]
    fn nothing_mounted_is_nothing_found() {
        assert_eq!(parse_mounts(""), (vec![], None));
    }

    #[test]
    fn escapes_of_mountinfo_are_undone() {
        assert_eq!(unescape(r"/a\040b\134"), PathBuf::from(r"/a b\"));
        assert_eq!(unescape(r"/a\9"), PathBuf::from(r"/a\9"));
    }
}
