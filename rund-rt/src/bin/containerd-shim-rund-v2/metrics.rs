//! What the control group of a process has counted and limits, in containerd's terms.

use std::fs;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context, Result};
use containerd_shim::protos::cgroups::metrics::{
    CPUStat, CPUUsage, MemoryEntry, MemoryStat, Metrics, PidsStat,
};
use containerd_shim::protos::protobuf::MessageField;

/// From here on a number is version 1's way to say "no limit": the most pages that it can count.
const NO_LIMIT: u64 = i64::MAX as u64 - 0xffff;
const NS_PER_US: u64 = 1000;

/// What `pid` and all that it has started have used.
pub(crate) fn of(pid: u32) -> Result<Metrics> {
    let read = |path: &str| fs::read_to_string(path).with_context(|| format!("read {path}"));
    let groups = read(&format!("/proc/{pid}/cgroup"))?;
    let mounts = read("/proc/self/mountinfo")?;
    let group = |controller| Group::find(&groups, &mounts, controller);
    let mut metrics = Metrics::new();
    if let Some(group) = group("memory") {
        let names = match group.version {
            1 => [
                "memory.usage_in_bytes",
                "memory.limit_in_bytes",
                "memory.max_usage_in_bytes",
            ],
            _ => ["memory.current", "memory.max", "memory.peak"],
        };
        let [usage, limit, max] = names.map(|name| group.number(name).unwrap_or_default());
        metrics.memory = MessageField::some(MemoryStat {
            usage: MessageField::some(MemoryEntry {
                usage,
                max,
                limit: if limit < NO_LIMIT { limit } else { 0 },
                ..Default::default()
            }),
            ..Default::default()
        });
    }
    let cpu = match group("cpuacct").or_else(|| group("cpu")) {
        Some(group) if group.version == 1 => group.number("cpuacct.usage"),
        Some(group) => group
            .keyed("cpu.stat", "usage_usec")
            .map(|used| used * NS_PER_US),
        None => None,
    };
    if let Some(total) = cpu {
        metrics.cpu = MessageField::some(CPUStat {
            usage: MessageField::some(CPUUsage {
                total,
                ..Default::default()
            }),
            ..Default::default()
        });
    }
    if let Some(group) = group("pids") {
        metrics.pids = MessageField::some(PidsStat {
            current: group.number("pids.current").unwrap_or_default(),
            limit: group.number("pids.max").unwrap_or_default(),
            ..Default::default()
        });
    }
    Ok(metrics)
}

/// A control group's directory.
#[derive(Debug, PartialEq, Eq)]
struct Group {
    version: u8,
    folder: PathBuf,
}

impl Group {
    /// Finds the group that `controller` counts in, by the texts of `/proc/PID/cgroup` and
    /// `/proc/self/mountinfo`: one of version 1 where the controller has a tree there, else the
    /// unified one.
    fn find(groups: &str, mounts: &str, controller: &str) -> Option<Self> {
        let at = |wanted: &dyn Fn(&str) -> bool| {
            groups.lines().find_map(|line| {
                let (_, line) = line.split_once(':')?;
                let (controllers, path) = line.split_once(':')?;
                wanted(controllers).then_some(path)
            })
        };
        let mounted = |kind: &str, wanted: &dyn Fn(&str) -> bool| {
            mounts.lines().find_map(|line| {
                // 36 35 98:0 /root /mount/point rw,opts optional... - type source super-options
                let (left, right) = line.split_once(" - ")?;
                let mut left = left.split(' ').skip(3);
                let (root, point) = (left.next()?, left.next()?);
                let mut right = right.split(' ');
                let is_it = right.next()? == kind && wanted(right.nth(1)?);
                is_it.then_some((root, point))
            })
        };
        let has = |list: &str| list.split(',').any(|one| one == controller);
        let (version, path, (root, point)) = match (at(&has), mounted("cgroup", &has)) {
            (Some(path), Some(mount)) => (1, path, mount),
            _ => (2, at(&str::is_empty)?, mounted("cgroup2", &|_| true)?),
        };
        let below = Path::new(path).strip_prefix(root).ok()?;
        Some(Self {
            version,
            folder: Path::new(point).join(below),
        })
    }

    /// `None` for "max", and for what this kernel does not count.
    fn number(&self, file: &str) -> Option<u64> {
        let text = fs::read_to_string(self.folder.join(file)).ok()?;
        u64::from_str(text.trim()).ok()
    }

    fn keyed(&self, file: &str, key: &str) -> Option<u64> {
        let text = fs::read_to_string(self.folder.join(file)).ok()?;
        let mut pairs = text.lines().filter_map(|line| line.split_once(' '));
        let (_, value) = pairs.find(|(name, _)| *name == key)?;
        value.trim().parse().ok()
    }
}

#[cfg(test)]
mod tests {
    use super::Group;

    const HYBRID: &str = "\
31 30 0:27 / /sys/fs/cgroup/unified rw - cgroup2 cgroup rw
32 30 0:28 / /sys/fs/cgroup/cpu,cpuacct rw,nosuid shared:9 - cgroup cgroup rw,cpu,cpuacct
33 30 0:29 /outer /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory
garbage";

    #[test]
    fn a_group_is_below_its_controllers_mount_or_the_unified_one() {
        let groups = "4:memory:/outer/a\n3:cpu,cpuacct:/b\n0::/c\n";
        let found = |controller, mounts| {
            let group = Group::find(groups, mounts, controller)?;
            Some((group.version, group.folder.to_str()?.to_owned()))
        };
        let at = |version, folder: &str| Some((version, folder.to_owned()));
        assert_eq!(
            found("cpuacct", HYBRID),
            at(1, "/sys/fs/cgroup/cpu,cpuacct/b")
        );
        assert_eq!(found("memory", HYBRID), at(1, "/sys/fs/cgroup/memory/a"));
        assert_eq!(found("pids", HYBRID), at(2, "/sys/fs/cgroup/unified/c"));
        let unified = "25 20 0:22 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw,nsdelegate";
        assert_eq!(found("memory", unified), at(2, "/sys/fs/cgroup/c"));
        assert_eq!(found("memory", ""), None);
    }
}
