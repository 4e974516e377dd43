//! One control group, in every tree, behind descriptors of its directories.

use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, Mode, OFlags, mkdirat, openat, renameat, unlinkat};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::hierarchy::{Controller, Hierarchy, Version};
use super::limits::{Bounds, Setting};
use crate::error::{Error, Result};

/// The members of a group, one process id a line, in both versions.
const MEMBERS: &str = "cgroup.procs";
/// No control file that is read here is longer, but for the members of a very large group.
const CONTROL_FILE_BYTES: usize = 4096;

/// A directory of groups in one tree.
#[derive(Debug)]
pub(super) struct Folder {
    pub(super) path: PathBuf,
    pub(super) descriptor: OwnedFd,
}

/// A group: one directory in each tree, in the order of the hierarchy.
#[derive(Debug)]
pub(super) struct Slot {
    pub(super) name: String,
    folders: Vec<OwnedFd>,
    /// What is written in it.
    pub(super) bounds: Bounds,
    /// Since when it has been waiting to be removed.
    pub(super) retired: Option<Instant>,
}

impl Slot {
    /// Makes the group in every tree. What was made is removed where one of them fails.
    pub(super) fn create(parents: &[Folder], name: String) -> Result<Self> {
        let mut slot = Self {
            name,
            folders: Vec::with_capacity(parents.len()),
            bounds: Bounds::default(),
            retired: None,
        };
        for parent in parents {
            let made = mkdirat(&parent.descriptor, &slot.name, Mode::from_raw_mode(0o755))
                .and_then(|()| open_directory(parent.descriptor.as_fd(), &slot.name));
            match made {
                Ok(descriptor) => slot.folders.push(descriptor),
                Err(why) => {
                    slot.unlink(parents);
                    let path = parent.path.join(&slot.name);
                    return Err(Error::cgroup("make", &path)(why.into()));
                }
            }
        }
        Ok(slot)
    }

    /// Opens a group that somebody else made, as far as it is there.
    pub(super) fn open(parent: &Folder, name: String) -> Result<Self> {
        let folder = open_directory(parent.descriptor.as_fd(), &name)
            .map_err(|why| Error::cgroup("open", &parent.path.join(&name))(why.into()))?;
        Ok(Self {
            name,
            folders: vec![folder],
            bounds: Bounds::default(),
            retired: None,
        })
    }

    fn unlink(&self, parents: &[Folder]) {
        for parent in parents.iter().take(self.folders.len() + 1) {
            let _not_there = unlinkat(&parent.descriptor, &self.name, AtFlags::REMOVEDIR);
        }
    }

    /// The descriptor of its directory in the `tree`th tree.
    pub(super) fn folder(&self, tree: usize) -> BorrowedFd<'_> {
        self.folders[tree].as_fd()
    }

    /// Writes what it takes to have these limits.
    pub(super) fn set(&mut self, bounds: Bounds, in_: &Hierarchy, at: &[Folder]) -> Result<()> {
        for setting in bounds.settings(&self.bounds, in_.version())? {
            self.apply(&setting, in_, at)?;
        }
        self.bounds = bounds;
        Ok(())
    }

    fn apply(&self, setting: &Setting, in_: &Hierarchy, at: &[Folder]) -> Result<()> {
        let Some(tree) = in_.tree_of(setting.controller) else {
            return Err(Error::NoController {
                what: setting.limit,
                why: format!(
                    "the controller `{}` is not among {:?} (cgroup {})",
                    setting.controller,
                    in_.controllers(),
                    in_.version()
                ),
            });
        };
        match self.write(tree, setting.file, &setting.value) {
            Err(why) if setting.optional && why.kind() == ErrorKind::NotFound => Ok(()),
            done => done.map_err(Error::cgroup("write", &self.path(at, tree, setting.file))),
        }
    }

    pub(super) fn path(&self, at: &[Folder], tree: usize, file: &str) -> PathBuf {
        at[tree].path.join(&self.name).join(file)
    }

    pub(super) fn write(&self, tree: usize, file: &str, text: &str) -> io::Result<()> {
        write_at(self.folder(tree), file, text)
    }

    pub(super) fn read(&self, tree: usize, file: &str) -> io::Result<String> {
        read_at(self.folder(tree), file)
    }

    /// Gives the group another name, in every tree.
    pub(super) fn rename(&mut self, to: String, at: &[Folder]) -> Result<()> {
        for parent in at {
            let folder = &parent.descriptor;
            renameat(folder, &self.name, folder, &to)
                .map_err(|why| Error::cgroup("rename to", &parent.path.join(&to))(why.into()))?;
        }
        self.name = to;
        Ok(())
    }

    /// Its members. A process of another PID namespace counts as 0.
    pub(super) fn members(&self) -> io::Result<Vec<i32>> {
        let mut members = Vec::new();
        for tree in 0..self.folders.len() {
            let text = self.read(tree, MEMBERS)?;
            members.extend(text.lines().filter_map(|line| line.parse::<i32>().ok()));
        }
        members.sort_unstable();
        members.dedup();
        Ok(members)
    }

    /// Makes a process, with all its threads, a member.
    pub(super) fn add(&self, pid: u32, at: &[Folder]) -> Result<()> {
        let text = pid.to_string();
        for tree in 0..self.folders.len() {
            self.write(tree, MEMBERS, &text)
                .map_err(Error::cgroup("join", &self.path(at, tree, MEMBERS)))?;
        }
        Ok(())
    }

    pub(super) fn freeze(&self, frozen: bool, in_: &Hierarchy) -> io::Result<()> {
        let Some(tree) = in_.tree_of(Controller::Freezer) else {
            return Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP));
        };
        match (in_.version(), frozen) {
            (Version::V1, true) => self.write(tree, "freezer.state", "FROZEN"),
            (Version::V1, false) => self.write(tree, "freezer.state", "THAWED"),
            (Version::V2, true) => self.write(tree, "cgroup.freeze", "1"),
            (Version::V2, false) => self.write(tree, "cgroup.freeze", "0"),
        }
    }

    pub(super) fn is_frozen(&self, in_: &Hierarchy) -> io::Result<bool> {
        let Some(tree) = in_.tree_of(Controller::Freezer) else {
            return Ok(false);
        };
        match in_.version() {
            Version::V1 => Ok(self.read(tree, "freezer.state")?.trim() == "FROZEN"),
            Version::V2 => Ok(self.read(tree, "cgroup.events")?.contains("frozen 1")),
        }
    }

    /// Sends SIGKILL to every member, once.
    pub(super) fn kill(&self, in_: &Hierarchy) {
        if in_.version() == Version::V2 && self.write(0, "cgroup.kill", "1").is_ok() {
            return;
        }
        let Ok(members) = self.members() else { return };
        if members.is_empty() {
            return;
        }
        // Stopped, so that nobody forks faster than we kill; SIGKILL is taken on resuming.
        let stopped = self.freeze(true, in_);
        for pid in self.members().unwrap_or(members) {
            let Some(pid) = Pid::from_raw(pid) else {
                continue;
            };
            let Ok(process) = pidfd_open(pid, PidfdFlags::empty()) else {
                continue;
            };
            // Of the process that is a member *now* the descriptor speaks: an id may be used again.
            let is_member = |members: Vec<i32>| members.contains(&pid.as_raw_nonzero().get());
            if self.members().is_ok_and(is_member) {
                let _gone = pidfd_send_signal(&process, Signal::KILL);
            }
        }
        if stopped.is_ok() {
            let _gone = self.freeze(false, in_);
        }
    }

    /// Ends every member and removes the group, if that is possible without waiting; whether it was.
    pub(super) fn try_remove(&self, in_: &Hierarchy, at: &[Folder]) -> bool {
        if !self.unlink_all(at) {
            self.kill(in_);
            return self.unlink_all(at);
        }
        true
    }

    fn unlink_all(&self, at: &[Folder]) -> bool {
        let mut all = true;
        for parent in at {
            match unlinkat(&parent.descriptor, &self.name, AtFlags::REMOVEDIR) {
                Ok(()) | Err(rustix::io::Errno::NOENT) => {}
                Err(_) => all = false,
            }
        }
        all
    }

    /// Ends every member and removes the group, within `patience`.
    pub(super) fn remove(&self, in_: &Hierarchy, at: &[Folder], patience: Duration) -> Result<()> {
        let start = Instant::now();
        let mut pause = Duration::from_micros(200);
        while !self.try_remove(in_, at) {
            if start.elapsed() >= patience {
                return Err(Error::DeadlineExceeded {
                    what: "the end of a control group's members after SIGKILL",
                    deadline: patience,
                });
            }
            thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(10));
        }
        Ok(())
    }
}

fn open_directory(parent: BorrowedFd<'_>, name: &str) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    openat(parent, name, flags, Mode::empty())
}

impl Folder {
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        Ok(Self {
            descriptor: rustix::fs::open(path, flags, Mode::empty())?,
            path: path.to_owned(),
        })
    }
}

/// Control files want the whole text in one call.
fn write_at(folder: BorrowedFd<'_>, file: &str, text: &str) -> io::Result<()> {
    let flags = OFlags::WRONLY | OFlags::CLOEXEC;
    let descriptor = openat(folder, file, flags, Mode::empty())?;
    loop {
        match rustix::io::write(&descriptor, text.as_bytes()) {
            Ok(_) => return Ok(()),
            Err(rustix::io::Errno::INTR) => {}
            Err(why) => return Err(why.into()),
        }
    }
}

fn read_at(folder: BorrowedFd<'_>, file: &str) -> io::Result<String> {
    use std::io::Read;

    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let descriptor = openat(folder, file, flags, Mode::empty())?;
    let mut text = String::with_capacity(CONTROL_FILE_BYTES);
    std::fs::File::from(descriptor).read_to_string(&mut text)?;
    Ok(text)
}
