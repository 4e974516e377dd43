//! What a sandbox may use, and how that is written into a control group: plain values in, file
//! names and texts out.

use carlsbad_types::ByteSize;

use super::hierarchy::{Controller, Version};
use crate::backend::Limits;
use crate::error::{Error, Result};

/// The kernel's default period of a processor quota, in microseconds
/// (Documentation/scheduler/sched-bwc.rst).
const PERIOD_US: u64 = 100_000;
/// The least quota that the kernel takes, in microseconds.
const LEAST_QUOTA_US: u64 = 1_000;
/// More processors than any machine has: a quota beyond it is a mistake.
const MOST_CPUS: f64 = 65_536.0;
/// The page size of x86-64: memory limits are in force in whole pages.
const PAGE: u64 = 4096;

/// What a group can limit of what a sandbox may use. `None` is no limit.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(super) struct Bounds {
    /// Memory, with page cache and the pages of tmpfs files that its members write. None of it may
    /// go to swap, where the kernel counts that.
    pub(super) memory: Option<ByteSize>,
    /// Processor time, in processors: 0.5 is 50 ms of every 100 ms.
    pub(super) cpus: Option<f64>,
    /// Processes and threads.
    pub(super) pids: Option<u32>,
}

impl From<&Limits> for Bounds {
    fn from(limits: &Limits) -> Self {
        Self {
            memory: limits.memory,
            cpus: limits.cpus,
            pids: limits.processes,
        }
    }
}

/// What the kernel says is in force. `None` is no limit.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct InForce {
    /// Memory, in whole pages.
    pub memory: Option<ByteSize>,
    /// Memory and swap together.
    pub memory_and_swap: Option<ByteSize>,
    /// Processor time, in processors.
    pub cpus: Option<f64>,
    /// Processes and threads.
    pub pids: Option<u32>,
}

/// One text for one file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Setting {
    pub(super) limit: &'static str,
    pub(super) controller: Controller,
    pub(super) file: &'static str,
    pub(super) value: String,
    /// Whether a kernel without the file is as good: swap that nobody counts.
    pub(super) optional: bool,
}

impl Bounds {
    /// What to write to have these limits in a fresh group that has the limits `before`.
    pub(super) fn settings(&self, before: &Self, version: Version) -> Result<Vec<Setting>> {
        let mut settings = Vec::new();
        let mut set = |limit, controller, file, value: String, optional| {
            settings.push(Setting {
                limit,
                controller,
                file,
                value,
                optional,
            });
        };
        if self.memory != before.memory {
            let bytes = match self.memory {
                None => None,
                Some(size) if size.get() < PAGE => {
                    return Err(bad("memory limit", "less than a page"));
                }
                Some(size) => Some(size.get()),
            };
            match version {
                Version::V1 => {
                    let text = bytes.map_or("-1".to_owned(), |bytes| bytes.to_string());
                    let memory = ("memory", "memory.limit_in_bytes", false);
                    let both = ("memory", "memory.memsw.limit_in_bytes", true);
                    // The kernel wants memory <= memory and swap at any time.
                    let raises = match (self.memory, before.memory) {
                        (_, None) => false,
                        (None, Some(_)) => true,
                        (Some(new), Some(old)) => new > old,
                    };
                    let order = if raises {
                        [both, memory]
                    } else {
                        [memory, both]
                    };
                    for (limit, file, optional) in order {
                        set(limit, Controller::Memory, file, text.clone(), optional);
                    }
                }
                Version::V2 => {
                    let text = bytes.map_or("max".to_owned(), |bytes| bytes.to_string());
                    let swap = if bytes.is_some() { "0" } else { "max" };
                    set("memory", Controller::Memory, "memory.max", text, false);
                    set(
                        "memory",
                        Controller::Memory,
                        "memory.swap.max",
                        swap.into(),
                        true,
                    );
                    // One process of a sandbox is no use without the others.
                    set(
                        "memory",
                        Controller::Memory,
                        "memory.oom.group",
                        "1".into(),
                        true,
                    );
                }
            }
        }
        if self.cpus != before.cpus {
            let quota = self.cpus.map(quota_us).transpose()?;
            match version {
                Version::V1 => {
                    let text = quota.map_or("-1".to_owned(), |quota| quota.to_string());
                    set("cpu", Controller::Cpu, "cpu.cfs_quota_us", text, false);
                }
                Version::V2 => {
                    let text = quota.map_or("max".to_owned(), |quota| quota.to_string());
                    let text = format!("{text} {PERIOD_US}");
                    set("cpu", Controller::Cpu, "cpu.max", text, false);
                }
            }
        }
        if self.pids != before.pids {
            if self.pids == Some(0) {
                return Err(bad("pids limit", "a sandbox is one process at least"));
            }
            let text = self.pids.map_or("max".to_owned(), |pids| pids.to_string());
            set("pids", Controller::Pids, "pids.max", text, false);
        }
        Ok(settings)
    }
}

fn bad(what: &'static str, why: &str) -> Error {
    Error::BadSetting {
        what,
        why: why.to_owned(),
    }
}

fn quota_us(cpus: f64) -> Result<u64> {
    let bad = |why| Err(bad("cpu limit", why));
    if !cpus.is_finite() || cpus <= 0.0 {
        return bad("must be a positive number of processors");
    }
    if cpus > MOST_CPUS {
        return bad("more processors than a machine has");
    }
    let quota = (cpus * PERIOD_US as f64).round() as u64;
    if quota < LEAST_QUOTA_US {
        return bad("less than 0.01 processors, which is the kernel's least");
    }
    Ok(quota)
}

/// A number of bytes as the kernel prints a limit: `max`, or a number that is as good as none.
pub(super) fn parse_bytes(text: &str) -> Option<ByteSize> {
    // Version 1 prints "no limit" as the largest whole number of pages in an i64.
    const NO_LIMIT: u64 = i64::MAX as u64 / PAGE * PAGE;
    let bytes: u64 = text.trim().parse().ok()?;
    (bytes < NO_LIMIT).then_some(ByteSize::new(bytes))
}

/// Processors of a quota and a period as version 1 prints them; `-1` is no limit.
pub(super) fn parse_quota(quota: &str, period: &str) -> Option<f64> {
    let quota: f64 = quota.trim().parse().ok()?;
    let period: f64 = period.trim().parse().ok()?;
    (quota >= 0.0 && period > 0.0).then_some(quota / period)
}

/// Processors of version 2's `quota period`; `max` is no limit.
pub(super) fn parse_cpu_max(text: &str) -> Option<f64> {
    let (quota, period) = text.trim().split_once(' ')?;
    parse_quota(quota, period)
}

/// The number behind `key` in lines of `key number`.
pub(super) fn parse_keyed(text: &str, key: &str) -> Option<u64> {
    text.lines().find_map(|line| {
        let (name, number) = line.split_once(' ')?;
        (name == key).then(|| number.trim().parse().ok())?
    })
}

#[cfg(test)]
mod tests {
    use super::{Bounds, parse_bytes, parse_cpu_max, parse_keyed, parse_quota};
    use crate::cgroup::hierarchy::Version;
    use carlsbad_types::ByteSize;

    fn texts(limits: Bounds, before: Bounds, version: Version) -> Vec<(&'static str, String)> {
        let settings = limits.settings(&before, version).unwrap();
        settings.into_iter().map(|s| (s.file, s.value)).collect()
    }

    const SOME: Bounds = Bounds {
        memory: Some(ByteSize::mib(64)),
        cpus: Some(0.5),
        pids: Some(32),
    };

    #[test]
    fn what_is_written_in_version_1() {
        let fresh = texts(SOME, Bounds::default(), Version::V1);
        let bytes = "67108864".to_owned();
        assert_eq!(
            fresh,
            [
                ("memory.limit_in_bytes", bytes.clone()),
                ("memory.memsw.limit_in_bytes", bytes),
                ("cpu.cfs_quota_us", "50000".to_owned()),
                ("pids.max", "32".to_owned()),
            ]
        );
    }

    #[test]
    fn what_is_written_in_version_2() {
        let fresh = texts(SOME, Bounds::default(), Version::V2);
        assert_eq!(fresh[0], ("memory.max", "67108864".to_owned()));
        assert_eq!(fresh[1], ("memory.swap.max", "0".to_owned()));
        assert_eq!(fresh[3], ("cpu.max", "50000 100000".to_owned()));
    }

    #[test]
    fn equal_limits_need_no_write_and_raising_asks_for_swap_first() {
        assert!(texts(SOME, SOME, Version::V1).is_empty());
        let more = Bounds {
            memory: Some(ByteSize::mib(128)),
            ..SOME
        };
        assert_eq!(
            texts(more, SOME, Version::V1)[0].0,
            "memory.memsw.limit_in_bytes"
        );
        assert_eq!(texts(SOME, more, Version::V1)[0].0, "memory.limit_in_bytes");
        let none = Bounds {
            memory: None,
            ..SOME
        };
        assert_eq!(
            texts(none, SOME, Version::V1)[0],
            ("memory.memsw.limit_in_bytes", "-1".to_owned())
        );
    }

    #[test]
    fn limits_that_mean_nothing_are_refused() {
        for cpus in [0.0, -1.0, f64::NAN, f64::INFINITY, 0.001, 1e9] {
            let limits = Bounds {
                cpus: Some(cpus),
                ..Bounds::default()
            };
            assert!(limits.settings(&Bounds::default(), Version::V2).is_err());
        }
        let limits = Bounds {
            memory: Some(ByteSize::new(17)),
            ..Bounds::default()
        };
        assert!(limits.settings(&Bounds::default(), Version::V1).is_err());
        let limits = Bounds {
            pids: Some(0),
            ..Bounds::default()
        };
        assert!(limits.settings(&Bounds::default(), Version::V1).is_err());
    }

    #[test]
    fn what_the_kernel_prints_is_read() {
        assert_eq!(parse_bytes("9223372036854771712\n"), None);
        assert_eq!(parse_bytes("max\n"), None);
        assert_eq!(parse_bytes("4096\n"), Some(ByteSize::kib(4)));
        assert_eq!(parse_quota("-1\n", "100000\n"), None);
        assert_eq!(parse_quota("50000\n", "100000\n"), Some(0.5));
        assert_eq!(parse_cpu_max("max 100000\n"), None);
        assert_eq!(parse_cpu_max("20000 10000\n"), Some(2.0));
        assert_eq!(parse_keyed("low 0\noom_kill 3\n", "oom_kill"), Some(3));
        assert_eq!(parse_keyed("", "oom_kill"), None);
    }
}
