//! Nothing is left behind: a snapshot before, a comparison after.
//!
//! [`LeakGuard::beneath`] looks only at what lies under one directory, so that tests which run side
//! by side in one process do not see each other. [`LeakGuard::process`] looks at everything this
//! process holds, and is for a test that has its process to itself.

use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How long [`LeakGuard::check`] waits for what is on its way out, such as a killed child.
const PATIENCE: Duration = Duration::from_secs(2);

/// What was there before the test.
#[derive(Debug)]
#[must_use = "call `check` at the end of the test"]
pub struct LeakGuard {
    beneath: Option<PathBuf>,
    before: BTreeSet<Resource>,
}

/// Something that a test could leave behind.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Resource {
    /// An open descriptor of this process, and what it is open on.
    Descriptor(u32, String),
    /// A mapped file of this process.
    Mapping(String),
    /// A mount in this process' namespace.
    Mount(String),
    /// An entry of `/dev/shm`.
    SharedMemory(String),
    /// A child of this process.
    Child(u32, String),
    /// A thread of this process.
    Thread(String),
    /// A control group below this process' own.
    ControlGroup(String),
    /// A System V shared memory segment.
    SystemVSegment(String),
}

impl fmt::Display for Resource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Descriptor(fd, target) => write!(f, "descriptor {fd} on {target}"),
            Self::Mapping(path) => write!(f, "mapping of {path}"),
            Self::Mount(path) => write!(f, "mount at {path}"),
            Self::SharedMemory(name) => write!(f, "/dev/shm/{name}"),
            Self::Child(pid, name) => write!(f, "child {pid} ({name})"),
            Self::Thread(name) => write!(f, "thread {name}"),
            Self::ControlGroup(path) => write!(f, "control group {path}"),
            Self::SystemVSegment(id) => write!(f, "System V shared memory segment {id}"),
        }
    }
}

impl LeakGuard {
    /// Watches everything that this process holds, its children, and `/dev/shm`.
    pub fn process() -> Self {
        Self {
            beneath: None,
            before: snapshot(None),
        }
    }

    /// Watches descriptors, mappings and mounts at or below `directory`.
    pub fn beneath(directory: impl Into<PathBuf>) -> Self {
        let directory = directory.into();
        Self {
            before: snapshot(Some(&directory)),
            beneath: Some(directory),
        }
    }

    /// What is there now and was not before. Waits up to two seconds for it to go away.
    pub fn leaked(&self) -> Vec<Resource> {
        let start = Instant::now();
        loop {
            let now = snapshot(self.beneath.as_deref());
            let leaked: Vec<_> = now.difference(&self.before).cloned().collect();
            if leaked.is_empty() || start.elapsed() > PATIENCE {
                return leaked;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Ends the watch.
    ///
    /// # Panics
    /// Where something was left behind; the message lists it.
    #[track_caller]
    pub fn check(self) {
        let leaked = self.leaked();
        if !leaked.is_empty() {
            let list: Vec<_> = leaked.iter().map(Resource::to_string).collect();
            panic!("left behind:\n  {}", list.join("\n  "));
        }
    }
}

fn snapshot(beneath: Option<&Path>) -> BTreeSet<Resource> {
    let inside = |target: &str| match beneath {
        Some(directory) => Path::new(target.trim_end_matches(" (deleted)")).starts_with(directory),
        None => true,
    };
    let mut found = BTreeSet::new();
    // Listing a directory opens it: the descriptors that vanish meanwhile are ours.
    for entry in fs::read_dir("/proc/self/fd")
        .into_iter()
        .flatten()
        .flatten()
    {
        let Ok(target) = fs::read_link(entry.path()) else {
            continue;
        };
        let target = target.to_string_lossy().into_owned();
        if !target.ends_with(&format!("/proc/{}/fd", std::process::id()))
            && inside(&target)
            && let Some(fd) = number(&entry)
        {
            found.insert(Resource::Descriptor(fd, target));
        }
    }
    for line in read("/proc/self/maps").lines() {
        if let Some(path) = line.splitn(6, ' ').nth(5).map(str::trim)
            && path.starts_with('/')
            && inside(path)
        {
            found.insert(Resource::Mapping(path.to_owned()));
        }
    }
    for line in read("/proc/self/mountinfo").lines() {
        if let Some(path) = line.split(' ').nth(4)
            && inside(path)
        {
            found.insert(Resource::Mount(path.to_owned()));
        }
    }
    if beneath.is_none() {
        found.extend(names("/dev/shm").map(Resource::SharedMemory));
        found.extend(threads());
        found.extend(children());
        found.extend(control_groups());
        found.extend(
            read("/proc/sysvipc/shm")
                .lines()
                .skip(1)
                .filter_map(|line| line.split_whitespace().nth(1))
                .map(|id| Resource::SystemVSegment(id.to_owned())),
        );
    }
    found
}

fn threads() -> impl Iterator<Item = Resource> {
    names("/proc/self/task").map(|tid| {
        let name = read(&format!("/proc/self/task/{tid}/comm"));
        Resource::Thread(format!("{tid} {}", name.trim()))
    })
}

/// Children of every thread of this process, zombies included: a child that nobody waited for is
/// left behind too.
fn children() -> Vec<Resource> {
    let mut found = Vec::new();
    for tid in names("/proc/self/task") {
        for pid in read(&format!("/proc/self/task/{tid}/children")).split_whitespace() {
            if let Ok(number) = pid.parse() {
                let name = read(&format!("/proc/{pid}/comm"));
                found.push(Resource::Child(number, name.trim().to_owned()));
            }
        }
    }
    found
}

/// Control groups that were made below the ones this process is in.
fn control_groups() -> Vec<Resource> {
    let mut found = Vec::new();
    for line in read("/proc/self/cgroup").lines() {
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(controller), Some(path)) = (fields.next(), fields.next()) else {
            continue;
        };
        let mount = match controller.strip_prefix("name=").unwrap_or(controller) {
            "" => "unified",
            name => name,
        };
        let directory = Path::new("/sys/fs/cgroup")
            .join(mount)
            .join(path.trim_start_matches('/'));
        for entry in fs::read_dir(&directory).into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                found.push(Resource::ControlGroup(
                    entry.path().to_string_lossy().into_owned(),
                ));
            }
        }
    }
    found
}

fn names(directory: &str) -> impl Iterator<Item = String> + use<> {
    fs::read_dir(directory)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
}

fn number(entry: &fs::DirEntry) -> Option<u32> {
    entry.file_name().to_str()?.parse().ok()
}

fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::{LeakGuard, Resource};
    use std::fs::File;

    #[test]
    fn a_descriptor_beneath_the_directory_is_seen_until_it_is_closed() {
        let directory = crate::scratch::on_disk().unwrap();
        let guard = LeakGuard::beneath(directory.path());
        let file = File::create(directory.path().join("open")).unwrap();
        let elsewhere = tempfile::tempfile().unwrap();
        let leaked = guard.leaked();
        assert!(
            matches!(&leaked[..], [Resource::Descriptor(_, path)] if path.ends_with("open")),
            "{leaked:?}"
        );
        drop((file, elsewhere));
        guard.check();
    }

    #[test]
    fn a_child_and_a_shared_memory_entry_are_seen_until_they_are_gone() {
        let guard = LeakGuard::process();
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .unwrap();
        let directory = crate::scratch::on_tmpfs().unwrap();
        let on_shm = directory.path().starts_with("/dev/shm");
        let leaked = guard.leaked();
        assert!(leaked.contains(&Resource::Child(child.id(), "sleep".to_owned())));
        let name = directory.path().file_name().unwrap().to_string_lossy();
        assert_eq!(
            on_shm,
            leaked.contains(&Resource::SharedMemory(name.into_owned()))
        );
        child.kill().unwrap();
        child.wait().unwrap();
        let gone = directory.path().to_owned();
        drop(directory);
        // Other tests of this process come and go meanwhile: look for ours only.
        let leaked = guard.leaked();
        assert!(!leaked.contains(&Resource::Child(child.id(), "sleep".to_owned())));
        assert!(!gone.exists());
    }
}
