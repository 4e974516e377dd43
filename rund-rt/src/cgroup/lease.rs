//! A group in somebody's hands.

use std::io::{self, ErrorKind};
use std::os::fd::BorrowedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use carlsbad_types::ByteSize;
use serde::{Deserialize, Serialize};

use super::hierarchy::{Controller, Version};
use super::limits::{InForce, parse_bytes, parse_cpu_max, parse_keyed, parse_quota};
use super::pool::Shared;
use super::slot::Slot;
use crate::backend::Limits;
use crate::error::{Error, Result};

/// What the members of a group have used. `None` where no mounted controller counts it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Usage {
    /// Memory now, with page cache.
    pub memory: Option<ByteSize>,
    /// The most memory so far.
    pub memory_peak: Option<ByteSize>,
    /// Processor time so far.
    pub cpu: Option<Duration>,
    /// Processes and threads now.
    pub pids: Option<u64>,
    /// Members that the OOM killer of this group has ended. Where the whole group is ended at once
    /// (version 2), the kernel counts the member that it chose first twice.
    pub oom_kills: Option<u64>,
}

/// A control group of one sandbox's own. When it is dropped its members are killed, and the group
/// is removed in the background; it is never leased again.
#[derive(Debug)]
pub struct CgroupLease {
    shared: Arc<Shared>,
    /// `None` only while it is being dropped.
    slot: Option<Slot>,
    name: String,
}

impl CgroupLease {
    pub(super) fn new(shared: Arc<Shared>, slot: Slot, name: String) -> Self {
        Self {
            shared,
            slot: Some(slot),
            name,
        }
    }

    fn slot(&self) -> Result<&Slot> {
        // Gone only in `drop` and `close`, which nobody can call this after.
        self.slot.as_ref().ok_or(gone())
    }

    /// The lease's name, unique among the pool's live leases.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Which interface enforces the limits.
    pub fn version(&self) -> Version {
        self.shared.hierarchy.version()
    }

    /// The group's directory in the tree of `controller`, for tools that want a path.
    pub fn path(&self, controller: Controller) -> Option<PathBuf> {
        let tree = self.shared.hierarchy.tree_of(controller)?;
        let slot = self.slot.as_ref()?;
        Some(self.shared.folders[tree].path.join(&slot.name))
    }

    /// The group's directory in version 2, for `clone3` with `CLONE_INTO_CGROUP`
    /// (`CLONE_INTO_CGROUP`). `None` in version 1.
    pub fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        let slot = self.slot.as_ref()?;
        (self.version() == Version::V2).then(|| slot.folder(0))
    }

    /// Makes the process `pid`, with all its threads, a member. What it forks from then on is one
    /// too.
    ///
    /// # Errors
    /// Where there is no such process, or the kernel refuses.
    pub fn add(&self, pid: u32) -> Result<()> {
        self.slot()?.add(pid, &self.shared.folders)
    }

    /// The process ids of its members, as this process' PID namespace knows them; 0 for others.
    ///
    /// # Errors
    /// Where the group was removed by somebody else.
    pub fn members(&self) -> Result<Vec<i32>> {
        let slot = self.slot()?;
        slot.members().map_err(self.io("list the members of"))
    }

    /// Changes the limits of a running sandbox.
    ///
    /// # Errors
    /// Where a limit means nothing, is not enforceable here, or the kernel refuses it: memory below
    /// what is used and cannot be reclaimed, for instance.
    pub fn set(&mut self, limits: &Limits) -> Result<()> {
        let Some(slot) = &mut self.slot else {
            return Err(gone());
        };
        slot.set(limits.into(), &self.shared.hierarchy, &self.shared.folders)
    }

    /// The limits as the kernel reports them.
    ///
    /// # Errors
    /// Where the group was removed by somebody else.
    pub fn in_force(&self) -> Result<InForce> {
        let bytes = |file| self.number(Controller::Memory, file, parse_bytes);
        let (memory, both, cpus) = match self.version() {
            Version::V1 => {
                let period = self.text(Controller::Cpu, "cpu.cfs_period_us")?;
                let period = period.unwrap_or_default();
                (
                    bytes("memory.limit_in_bytes")?,
                    bytes("memory.memsw.limit_in_bytes")?,
                    self.number(Controller::Cpu, "cpu.cfs_quota_us", |quota| {
                        parse_quota(quota, &period)
                    })?,
                )
            }
            Version::V2 => {
                let memory = bytes("memory.max")?;
                let swap = bytes("memory.swap.max")?;
                let both = memory.zip(swap).and_then(|(a, b)| a.checked_add(b));
                (
                    memory,
                    both,
                    self.number(Controller::Cpu, "cpu.max", parse_cpu_max)?,
                )
            }
        };
        Ok(InForce {
            memory,
            memory_and_swap: both,
            cpus,
            pids: self.number(Controller::Pids, "pids.max", |text| {
                text.trim().parse().ok()
            })?,
        })
    }

    /// What its members have used.
    ///
    /// # Errors
    /// Where the group was removed by somebody else.
    pub fn usage(&self) -> Result<Usage> {
        let plain = |text: &str| text.trim().parse::<u64>().ok();
        let bytes = |file| {
            self.number(Controller::Memory, file, |text| {
                plain(text).map(ByteSize::new)
            })
        };
        let keyed =
            |controller, file, key| self.number(controller, file, |text| parse_keyed(text, key));
        let (memory, peak, cpu, oom) = match self.version() {
            Version::V1 => (
                bytes("memory.usage_in_bytes")?,
                bytes("memory.max_usage_in_bytes")?,
                self.number(Controller::Cpuacct, "cpuacct.usage", plain)?
                    .map(Duration::from_nanos),
                keyed(Controller::Memory, "memory.oom_control", "oom_kill")?,
            ),
            Version::V2 => (
                bytes("memory.current")?,
                bytes("memory.peak")?,
                keyed(Controller::Cpuacct, "cpu.stat", "usage_usec")?.map(Duration::from_micros),
                keyed(Controller::Memory, "memory.events", "oom_kill")?,
            ),
        };
        Ok(Usage {
            memory,
            memory_peak: peak,
            cpu,
            pids: self.number(Controller::Pids, "pids.current", plain)?,
            oom_kills: oom,
        })
    }

    /// The text of a control file: `None` where no tree has the controller, or this kernel not the
    /// file.
    fn text(&self, controller: Controller, file: &str) -> Result<Option<String>> {
        let Some(tree) = self.shared.hierarchy.tree_of(controller) else {
            return Ok(None);
        };
        match self.slot()?.read(tree, file) {
            Ok(text) => Ok(Some(text)),
            Err(why) if why.kind() == ErrorKind::NotFound => Ok(None),
            Err(why) => Err(self.io("read")(why)),
        }
    }

    fn number<T>(
        &self,
        controller: Controller,
        file: &str,
        parse: impl FnOnce(&str) -> Option<T>,
    ) -> Result<Option<T>> {
        Ok(self.text(controller, file)?.as_deref().and_then(parse))
    }

    /// Stops every member, and waits until all are stopped.
    ///
    /// # Errors
    /// Where there is no freezer, or a member does not stop within `patience`; they run on then.
    pub fn freeze(&self, patience: Duration) -> Result<()> {
        let (slot, hierarchy) = (self.slot()?, &self.shared.hierarchy);
        let start = Instant::now();
        slot.freeze(true, hierarchy).map_err(self.io("freeze"))?;
        while !slot.is_frozen(hierarchy).map_err(self.io("freeze"))? {
            if start.elapsed() >= patience {
                slot.freeze(false, hierarchy).map_err(self.io("thaw"))?;
                return Err(self.io("freeze")(ErrorKind::TimedOut.into()));
            }
            std::thread::sleep(Duration::from_micros(100));
        }
        Ok(())
    }

    /// Lets its members run again.
    ///
    /// # Errors
    /// Where there is no freezer.
    pub fn thaw(&self) -> Result<()> {
        let thawed = self.slot()?.freeze(false, &self.shared.hierarchy);
        thawed.map_err(self.io("thaw"))
    }

    /// Sends SIGKILL to every member; does not wait for their end.
    pub fn kill(&self) {
        if let Some(slot) = &self.slot {
            slot.kill(&self.shared.hierarchy);
        }
    }

    /// Kills its members and removes the group now, rather than in the background.
    ///
    /// # Errors
    /// Where a member is still there after `patience`; the group is then removed in the background.
    pub fn close(mut self, patience: Duration) -> Result<()> {
        let shared = Arc::clone(&self.shared);
        self.slot()?
            .remove(&shared.hierarchy, &shared.folders, patience)?;
        self.slot = None;
        shared.forget(&self.name);
        Ok(())
    }

    fn io(&self, what: &'static str) -> impl FnOnce(io::Error) -> Error + use<> {
        let name = self.slot.as_ref().map_or("", |slot| &slot.name);
        Error::cgroup(what, &self.shared.folders[0].path.join(name))
    }
}

impl Drop for CgroupLease {
    fn drop(&mut self) {
        if let Some(slot) = self.slot.take() {
            self.shared.retire(slot, &self.name);
        }
    }
}

fn gone() -> Error {
    Error::Refused("the control group was given back".to_owned())
}
