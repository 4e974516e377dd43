//! The pool: groups made ahead of need, leased once each, and replaced in the background.

use std::collections::HashSet;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::hierarchy::{Hierarchy, Version};
use super::lease::CgroupLease;
use super::slot::{Folder, Slot};
use super::sweep::{BASE, lock, sweep};
use crate::backend::Limits;
use crate::error::{Error, Result};

/// How long a killed member may take before it is spoken of.
const SLOW_REMOVAL: Duration = Duration::from_secs(5);
/// How often a group whose members are still dying is looked at again.
const AGAIN: Duration = Duration::from_millis(2);
/// While leases come closer together than this the worker stands back, so that it does not hold the
/// kernel's lock over all groups against them; unless few are left.
const LULL: Duration = Duration::from_millis(5);
/// The share of the ready groups that is few.
const FEW: usize = 4;
/// How often another name is tried where the first is taken.
const NAMES: usize = 16;

/// How a ready group becomes a sandbox's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Claim {
    /// By descriptor: the group keeps its name, and nothing happens in the file system.
    #[default]
    Descriptor,
    /// By renaming it to the lease's name, as the paper does (section 4.3). Version 1 only.
    Rename,
}

/// How a pool is kept.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct PoolConfig {
    /// The first part of the pool's directory name: 1 to 64 of `A-Z a-z 0-9 . _ -`.
    pub name: String,
    /// How many groups to have ready. Each holds one descriptor for each tree.
    pub ready: usize,
    /// How many groups there may be at once, ready, leased or on their way out.
    pub capacity: usize,
    /// How a ready group becomes a sandbox's.
    pub claim: Claim,
    /// What is written into a group while it waits: a lease of the same limits writes nothing.
    pub limits: Limits,
    /// How long [`CgroupPool::lease`] waits for a group.
    pub patience: Duration,
}

impl Default for PoolConfig {
    fn default() -> Self {
        Self {
            name: "pool".to_owned(),
            ready: 64,
            capacity: 4096,
            claim: Claim::default(),
            limits: Limits::default(),
            patience: Duration::from_secs(5),
        }
    }
}

/// What a pool has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PoolStats {
    /// Groups that wait for a lease.
    pub ready: usize,
    /// Groups that are leased.
    pub leased: usize,
    /// Groups that came back and are not removed yet.
    pub retired: usize,
    /// Leases given so far.
    pub leases: u64,
    /// Leases that found no ready group and waited.
    pub waited: u64,
}

/// Control groups made ahead of need.
///
/// One thread, `rund-cgroups`, makes and removes groups; it is joined when the pool is dropped.
/// Leases may outlive the pool: the last one takes the directory with it. A pool whose owner was
/// killed is removed by the next pool's beginning, or by [`sweep`].
#[derive(Debug)]
pub struct CgroupPool {
    shared: Arc<Shared>,
    worker: Option<JoinHandle<()>>,
}

#[derive(Debug)]
pub(super) struct Shared {
    pub(super) hierarchy: Hierarchy,
    pub(super) folders: Vec<Folder>,
    config: PoolConfig,
    state: Mutex<State>,
    /// For the worker: there is something to do.
    work: Condvar,
    /// For who waits for a group: one is ready, or none will be.
    ready: Condvar,
}

#[derive(Debug, Default)]
struct State {
    ready: Vec<Slot>,
    retired: Vec<Slot>,
    /// Names of live leases.
    names: HashSet<String>,
    /// Ready, retired, leased, and being made.
    total: usize,
    serial: u64,
    leases: u64,
    waited: u64,
    last_lease: Option<Instant>,
    /// Why no group could be made: the error's number, and on what.
    failure: Option<(PathBuf, i32)>,
    closing: bool,
}

impl CgroupPool {
    /// Sweeps what killed owners left, makes the pool's directory in each tree and a first group,
    /// so that what does not work fails here, and begins to fill in the background.
    ///
    /// # Errors
    /// Where the configuration means nothing, renaming is asked of version 2, a limit is not
    /// enforceable here, or the kernel refuses a group.
    pub fn new(hierarchy: Hierarchy, config: PoolConfig) -> Result<Self> {
        check_name(&config.name)?;
        if config.capacity == 0 || config.ready > config.capacity {
            let why = "`capacity` must be at least 1 and at least `ready`";
            return Err(bad("cgroup pool", why));
        }
        if config.claim == Claim::Rename && hierarchy.version() == Version::V2 {
            let why = "version 2 cannot rename groups (EPERM): claim by descriptor";
            return Err(bad("cgroup claim", why));
        }
        let swept = sweep(&hierarchy)?;
        if swept.slots > 0 {
            tracing::info!(?swept, "removed control groups of killed owners");
        }
        let shared = Arc::new(Shared {
            folders: make_folders(&hierarchy, &config.name)?,
            hierarchy,
            config,
            state: Mutex::default(),
            work: Condvar::new(),
            ready: Condvar::new(),
        });
        let first = shared.make(0)?;
        {
            let mut state = shared.lock();
            state.ready.push(first);
            state.total = 1;
            state.serial = 1;
        }
        let worker = {
            let shared = Arc::clone(&shared);
            thread::Builder::new()
                .name("rund-cgroups".to_owned())
                .spawn(move || shared.keep_filled())
                .map_err(Error::cgroup(
                    "start the thread of",
                    "rund-cgroups".as_ref(),
                ))?
        };
        Ok(Self {
            shared,
            worker: Some(worker),
        })
    }

    /// A group with these limits, of a name of the pool's choice. Waits for one as long as the
    /// configuration says.
    ///
    /// # Errors
    /// As [`lease_as`](Self::lease_as).
    pub fn lease(&self, limits: &Limits) -> Result<CgroupLease> {
        self.claim(None, limits, self.shared.config.patience)
    }

    /// A group with these limits for the sandbox `name`, within `patience`.
    ///
    /// # Errors
    /// Where a lease of that name is alive, the name cannot be a group's, no group is to be had in
    /// time, or a limit is not enforceable here.
    pub fn lease_as(&self, name: &str, limits: &Limits, patience: Duration) -> Result<CgroupLease> {
        check_name(name)?;
        self.claim(Some(name.to_owned()), limits, patience)
    }

    fn claim(
        &self,
        name: Option<String>,
        limits: &Limits,
        patience: Duration,
    ) -> Result<CgroupLease> {
        let shared = &self.shared;
        let (mut slot, name) = shared.take(name, patience)?;
        let claimed = match shared.config.claim {
            Claim::Descriptor => Ok(()),
            Claim::Rename => slot.rename(name.clone(), &shared.folders),
        }
        .and_then(|()| slot.set(limits.into(), &shared.hierarchy, &shared.folders));
        // From here on the lease's end gives the group back, whatever came of it.
        let lease = CgroupLease::new(Arc::clone(shared), slot, name);
        claimed.map(|()| lease)
    }

    /// What there is now.
    pub fn stats(&self) -> PoolStats {
        let state = self.shared.lock();
        PoolStats {
            ready: state.ready.len(),
            leased: state.names.len(),
            retired: state.retired.len(),
            leases: state.leases,
            waited: state.waited,
        }
    }

    /// Waits until as many groups are ready as the configuration asks for; whether they are.
    pub fn wait_filled(&self, patience: Duration) -> bool {
        let start = Instant::now();
        let shared = &self.shared;
        let mut state = shared.lock();
        loop {
            let room = shared.config.capacity.saturating_sub(state.names.len());
            if state.ready.len() >= shared.config.ready.min(room) {
                return true;
            }
            let left = patience.saturating_sub(start.elapsed());
            if left.is_zero() || state.failure.is_some() {
                return false;
            }
            state = shared.wait(&shared.ready, state, left);
        }
    }

    /// The hierarchy it was made in.
    pub fn hierarchy(&self) -> &Hierarchy {
        &self.shared.hierarchy
    }
}

impl Drop for CgroupPool {
    fn drop(&mut self) {
        self.shared.lock().closing = true;
        self.shared.work.notify_all();
        self.shared.ready.notify_all();
        if let Some(worker) = self.worker.take() {
            let _panicked = worker.join();
        }
        let (ready, retired) = {
            let mut state = self.shared.lock();
            (
                std::mem::take(&mut state.ready),
                std::mem::take(&mut state.retired),
            )
        };
        for slot in ready.into_iter().chain(retired) {
            self.shared.remove(&slot);
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(
        &self,
        on: &Condvar,
        state: MutexGuard<'a, State>,
        at_most: Duration,
    ) -> MutexGuard<'a, State> {
        let waited = on.wait_timeout(state, at_most);
        waited.unwrap_or_else(PoisonError::into_inner).0
    }

    fn make(&self, serial: u64) -> Result<Slot> {
        let mut slot = Slot::create(&self.folders, format!("slot-{serial}"))?;
        if let Err(why) = slot.set((&self.config.limits).into(), &self.hierarchy, &self.folders) {
            self.remove(&slot);
            return Err(why);
        }
        Ok(slot)
    }

    fn remove(&self, slot: &Slot) {
        if let Err(why) = slot.remove(&self.hierarchy, &self.folders, SLOW_REMOVAL) {
            tracing::warn!(%why, "a control group stays behind");
        }
    }

    /// A ready group and the name of its lease.
    fn take(&self, name: Option<String>, patience: Duration) -> Result<(Slot, String)> {
        let start = Instant::now();
        let mut waited = false;
        let mut state = self.lock();
        if let Some(name) = &name
            && state.names.contains(name)
        {
            return Err(Error::DuplicateId { id: name.clone() });
        }
        loop {
            if let Some(slot) = state.ready.pop() {
                let name = match name {
                    Some(name) if state.names.contains(&name) => {
                        state.ready.push(slot);
                        return Err(Error::DuplicateId { id: name });
                    }
                    Some(name) => name,
                    None => format!("lease-{}", state.leases),
                };
                state.leases += 1;
                state.waited += u64::from(waited);
                state.names.insert(name.clone());
                state.last_lease = Some(Instant::now());
                let low = state.ready.len() < self.config.ready;
                drop(state);
                if low {
                    self.work.notify_one();
                }
                return Ok((slot, name));
            }
            if let Some((path, code)) = state.failure.take() {
                // The worker tries again for the next one.
                self.work.notify_one();
                let why = io::Error::from_raw_os_error(code);
                return Err(Error::cgroup("make", &path)(why));
            }
            waited = true;
            let left = patience.saturating_sub(start.elapsed());
            if left.is_zero() || state.closing {
                return Err(Error::PoolExhausted {
                    what: "control group",
                    waited: patience,
                });
            }
            self.work.notify_one();
            state = self.wait(&self.ready, state, left);
        }
    }

    /// Takes a lease's group back. Where nobody works for the pool any more, removes it at once.
    pub(super) fn retire(&self, mut slot: Slot, name: &str) {
        slot.retired = Some(Instant::now());
        let mut state = self.lock();
        state.names.remove(name);
        if state.closing {
            drop(state);
            self.remove(&slot);
        } else {
            state.retired.push(slot);
            drop(state);
            self.work.notify_one();
        }
    }

    /// Says that a lease's group is removed already.
    pub(super) fn forget(&self, name: &str) {
        let mut state = self.lock();
        state.names.remove(name);
        state.total = state.total.saturating_sub(1);
        drop(state);
        self.work.notify_one();
    }

    /// The worker: makes what is wanted, removes what came back, one at a time, and never while it
    /// holds the lock.
    fn keep_filled(&self) {
        let mut state = self.lock();
        while !state.closing {
            let wanted = state.ready.len() < self.config.ready.max(1)
                && state.total < self.config.capacity
                && state.failure.is_none();
            let busy = state.last_lease.is_some_and(|then| then.elapsed() < LULL)
                && state.ready.len() > self.config.ready / FEW;
            if busy && (wanted || !state.retired.is_empty()) {
                state = self.wait(&self.work, state, LULL);
            } else if wanted {
                state.total += 1;
                let serial = state.serial;
                state.serial += 1;
                drop(state);
                let made = self.make(serial);
                state = self.lock();
                match made {
                    Ok(slot) => state.ready.push(slot),
                    Err(why) => {
                        state.total -= 1;
                        state.failure = Some(failure_of(&why));
                        tracing::warn!(%why, "no control group for the pool");
                    }
                }
                self.ready.notify_all();
            } else if let Some(slot) = state.retired.pop() {
                drop(state);
                let removed = slot.try_remove(&self.hierarchy, &self.folders);
                state = self.lock();
                if removed {
                    state.total -= 1;
                } else {
                    if slot
                        .retired
                        .is_some_and(|since| since.elapsed() > SLOW_REMOVAL)
                    {
                        tracing::debug!(name = slot.name, "members survive SIGKILL so far");
                    }
                    state.retired.insert(0, slot);
                    state = self.wait(&self.work, state, AGAIN);
                }
            } else {
                state = self
                    .work
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner);
            }
        }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        for folder in &self.folders {
            let _others_groups = std::fs::remove_dir(&folder.path);
            if let Some(base) = folder.path.parent() {
                let _others_pools = std::fs::remove_dir(base);
            }
        }
    }
}

fn failure_of(why: &Error) -> (PathBuf, i32) {
    match why {
        Error::Cgroup { path, source, .. } => {
            (path.clone(), source.raw_os_error().unwrap_or(libc::EIO))
        }
        _ => (PathBuf::new(), libc::EIO),
    }
}

/// The pool's directory in every tree, locked: its lock is what says that the owner lives.
fn make_folders(hierarchy: &Hierarchy, name: &str) -> Result<Vec<Folder>> {
    let mut folders = Vec::new();
    for tree in hierarchy.trees() {
        let base = tree.directory.join(BASE);
        if hierarchy.version() == Version::V2 {
            delegate(hierarchy, &tree.directory)?;
        }
        let folder = make_folder(&base, name);
        match folder {
            Ok(folder) => folders.push(folder),
            Err(why) => {
                for folder in folders {
                    let _empty = std::fs::remove_dir(folder.path);
                }
                return Err(why);
            }
        }
        if hierarchy.version() == Version::V2 {
            delegate(hierarchy, &base)?;
            if let Some(folder) = folders.last() {
                delegate(hierarchy, &folder.path)?;
            }
        }
    }
    Ok(folders)
}

fn make_folder(base: &std::path::Path, name: &str) -> Result<Folder> {
    let mut last = io::Error::from(io::ErrorKind::AlreadyExists);
    for _ in 0..NAMES {
        if let Err(why) = std::fs::create_dir(base)
            && why.kind() != io::ErrorKind::AlreadyExists
        {
            return Err(Error::cgroup("make", base)(why));
        }
        let path = base.join(format!("{name}.{:016x}", fastrand::u64(..)));
        match std::fs::create_dir(&path) {
            // A sweep that came before our lock has removed it: another name.
            Ok(()) => match lock(&path)? {
                Some(folder) => return Ok(folder),
                None => continue,
            },
            // Another pool's end took the base with it.
            Err(why)
                if matches!(
                    why.kind(),
                    io::ErrorKind::AlreadyExists | io::ErrorKind::NotFound
                ) =>
            {
                last = why;
            }
            Err(why) => return Err(Error::cgroup("make", &path)(why)),
        }
    }
    Err(Error::cgroup("make a pool in", base)(last))
}

/// Lets the children of a group of version 2 have its controllers.
fn delegate(hierarchy: &Hierarchy, group: &std::path::Path) -> Result<()> {
    use super::hierarchy::Controller as C;

    let names: Vec<_> = hierarchy
        .controllers()
        .into_iter()
        .filter(|one| !matches!(one, C::Cpuacct | C::Freezer))
        .map(|one| format!("+{one}"))
        .collect();
    if names.is_empty() || !group.exists() {
        return Ok(());
    }
    let path = group.join("cgroup.subtree_control");
    std::fs::write(&path, names.join(" ")).map_err(Error::cgroup("write", &path))
}

/// A name that is one plain component of a path.
fn check_name(name: &str) -> Result<()> {
    let mut bytes = name.bytes();
    let good = (1..=64).contains(&name.len())
        && bytes
            .next()
            .is_some_and(|first| first.is_ascii_alphanumeric())
        && bytes.all(|one| one.is_ascii_alphanumeric() || b"._-".contains(&one));
    if good {
        return Ok(());
    }
    let shown: String = name.chars().take(80).collect();
    let rule = "use 1 to 64 of A-Z a-z 0-9 . _ - and begin with a letter or digit";
    Err(bad("name of a cgroup", &format!("`{shown}`: {rule}")))
}

fn bad(what: &'static str, why: &str) -> Error {
    Error::BadSetting {
        what,
        why: why.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::check_name;

    #[test]
    fn names_are_one_plain_component() {
        for good in ["a", "0-b_c.d", &"x".repeat(64)] {
            check_name(good).unwrap();
        }
        for bad in ["", ".", "..", "a/b", "-a", "a\n", "ä", &"x".repeat(65)] {
            assert!(check_name(bad).is_err(), "{bad}");
        }
    }
}
