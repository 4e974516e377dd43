//! A pool: opening, and every change to its namespaces.

use std::collections::{BTreeSet, HashMap};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use carlsbad_types::ByteSize;
use uuid::Uuid;

use crate::backend::{Backend, Health};
use crate::catalog::{Catalog, bad_name};
use crate::error::{Error, Result};
use crate::host::{Epoch, HostId, Role};
use crate::layout::{EXTENT, Extent, HostState, LOCK_APPEND, Operation, Record, Superblock};
use crate::lease::{self, Table};
use crate::lock::{self, Kind};
use crate::log::{Log, State};
use crate::medium::{Access, Medium};
use crate::namespace::{Contents, Handle, Inner, Namespace, NamespaceInfo, NamespaceOptions};

/// How long a lock is waited for. Holders keep one for microseconds, or while a namespace is zeroed.
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);

/// Named namespaces in the memory of a backend.
///
/// It can be cloned, and used from any thread. Several processes, and several hosts, may have the
/// same pool open. A process that is forked opens it anew: what it inherits answers
/// [`Error::Forked`].
#[derive(Debug, Clone)]
pub struct Pool {
    pub(crate) shared: Arc<Shared>,
}

#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) backend: Arc<dyn Backend>,
    pub(crate) log: Log,
    /// This host's area, mapped for writing, where the rest is mapped for reading.
    own: Option<Box<dyn Medium>>,
    pub(crate) host: HostId,
    /// With which this handle writes; nothing for a reader.
    pub(crate) epoch: Option<Epoch>,
    pub(crate) state: Mutex<State>,
    /// What this handle is attached to. A lock of the kernel is held once for all of them.
    pub(crate) attached: Mutex<HashMap<u64, Vec<Weak<Inner>>>>,
    /// Which opened it.
    process: u32,
    _descriptor: Option<Descriptor>,
}

/// Descriptors that pools of this process are open on.
static DESCRIPTORS: Mutex<BTreeSet<RawFd>> = Mutex::new(BTreeSet::new());

/// A descriptor that one pool of this process uses.
#[derive(Debug)]
struct Descriptor(RawFd);

impl Descriptor {
    fn claim(backend: &dyn Backend) -> Option<Self> {
        let fd = backend.as_fd().as_raw_fd();
        locked(&DESCRIPTORS).insert(fd).then(|| Self(fd))
    }
}

impl Drop for Descriptor {
    fn drop(&mut self) {
        locked(&DESCRIPTORS).remove(&self.0);
    }
}

/// What is in a pool, in numbers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PoolInfo {
    /// The pool's name for life.
    pub uuid: Uuid,
    /// All of it.
    pub length: ByteSize,
    /// Not used by a namespace, nor in quarantine, nor for the log.
    pub free: ByteSize,
    /// The longest free piece: what can still be created.
    pub largest_free: ByteSize,
    /// Removed, and still attached by somebody when it was last looked: see [`Pool::reclaim`].
    pub quarantined: ByteSize,
    /// Namespaces there are.
    pub namespaces: usize,
    /// The most there can be.
    pub most_namespaces: u64,
    /// The epoch in force.
    pub epoch: Epoch,
    /// Who writes.
    pub writer: HostId,
    /// Areas that the pool has.
    pub hosts: u16,
}

pub(crate) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What it protects is read anew from the medium before every use.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Pool {
    /// Opens the pool on a backend.
    ///
    /// On the host that writes already, a further process opens with [`Role::Writer`] and
    /// [`Epoch::CURRENT`]. Another host takes over with a later epoch than [`PoolInfo::epoch`].
    ///
    /// # Errors
    /// Where there is no pool, or the device is shorter than it, or the epoch is not a later one.
    pub fn open(backend: impl Backend + 'static, role: Role) -> Result<Self> {
        Self::open_shared(Arc::new(backend), role)
    }

    /// As [`Pool::open`], for a backend whose kind is not known when the program is built. One that a
    /// pool of this process uses already is opened anew.
    ///
    /// # Errors
    /// As of [`Pool::open`].
    pub fn open_shared(backend: Arc<dyn Backend>, role: Role) -> Result<Self> {
        // The kernel's locks are those of a descriptor: two pools on one would not exclude each other.
        let (backend, descriptor) = match Descriptor::claim(&*backend) {
            Some(descriptor) => (backend, Some(descriptor)),
            None => {
                let again = backend.reopen()?;
                let descriptor = Descriptor::claim(&*again);
                (again, descriptor)
            }
        };
        let superblock = crate::superblock::read(&backend)?;
        let host = backend.host();
        if host.0 >= superblock.hosts {
            return Err(Error::BadHost {
                host,
                hosts: superblock.hosts,
            });
        }
        let geometry = backend.geometry();
        let place = backend.place();
        if geometry.length.get() < superblock.length {
            return Err(Error::Shrunk {
                place,
                want: ByteSize::new(superblock.length),
                have: geometry.length,
            });
        }
        let writable = geometry.writable;
        if matches!(role, Role::Writer(_)) && !writable {
            return Err(Error::ReadOnly {
                what: "open the pool for writing",
            });
        }
        let access = match role {
            Role::Reader => Access::Read,
            Role::Writer(_) => Access::Write,
        };
        let everything = 0..superblock.data_start();
        let medium = Arc::clone(&backend).map(everything, access, false)?;
        let log = Log::new(medium, superblock, place);
        let own = if access == Access::Read && writable && superblock.hosts > 1 {
            let area = superblock.area(host.0);
            let range = area..area + superblock.area_length;
            Some(Arc::clone(&backend).map(range, Access::Write, false)?)
        } else {
            None
        };
        let mut shared = Shared {
            state: Mutex::new(State::unread(&superblock)),
            attached: Mutex::new(HashMap::new()),
            own,
            host,
            epoch: None,
            log,
            backend,
            process: std::process::id(),
            _descriptor: descriptor,
        };
        if let Role::Writer(epoch) = role {
            shared.epoch = Some(shared.take_over(epoch)?);
        }
        shared.begin_leases()?;
        let pool = Self {
            shared: Arc::new(shared),
        };
        pool.shared.log.refresh(&mut locked(&pool.shared.state))?;
        if pool.shared.epoch.is_some() {
            pool.repair()?;
        }
        Ok(pool)
    }

    /// Makes a namespace of at least `length` bytes, rounded up to 2 MiB, and attaches to it. Where
    /// that fails there is no namespace either.
    ///
    /// # Errors
    /// Where the name is taken or cannot be one, or there is no room in one piece; with `populate`
    /// [`Error::NoSpace`] where the file system has none.
    pub fn create(
        &self,
        name: &str,
        length: ByteSize,
        options: NamespaceOptions,
    ) -> Result<Namespace> {
        if let Some(why) = bad_name(name) {
            return Err(Error::BadName {
                name: name.to_owned(),
                why,
            });
        }
        let length = rounded("namespace", length)?;
        let shared = &self.shared;
        let (generation, extent) = shared.write(|writer| {
            if writer.state.catalog.by_name(name).is_some() {
                return Err(Error::NameTaken {
                    name: name.to_owned(),
                });
            }
            writer.room_for_one_more()?;
            let extent = writer.find(length)?;
            if options.contents == Contents::Zeroed {
                shared.zero(extent)?;
            }
            let generation = writer.state.catalog.next_generation();
            writer.append(Operation::Create {
                generation,
                extent,
                name: name.into(),
            })?;
            Ok((generation, extent))
        })?;
        // Both may take long: others are not kept waiting for the log meanwhile.
        let attached = if options.populate {
            shared.backend.reserve(extent.range()).map(drop)
        } else {
            Ok(())
        };
        let attached = attached.and_then(|()| {
            shared.attach(options.populate, |catalog| {
                catalog
                    .item(generation)
                    .map(|_| generation)
                    .ok_or_else(|| unknown(name))
            })
        });
        attached.inspect_err(|_| shared.unmake(generation))
    }

    /// Attaches to the namespace of this name.
    ///
    /// # Errors
    /// Where there is none.
    pub fn attach(&self, name: &str) -> Result<Namespace> {
        self.attach_with(name, false)
    }

    /// Attaches, and has the kernel map every page before this returns.
    ///
    /// # Errors
    /// Where there is no namespace of this name.
    pub fn attach_populated(&self, name: &str) -> Result<Namespace> {
        self.attach_with(name, true)
    }

    fn attach_with(&self, name: &str, populate: bool) -> Result<Namespace> {
        self.shared.attach(populate, |catalog| {
            let found = catalog.by_name(name).map(|(generation, _)| generation);
            found.ok_or_else(|| unknown(name))
        })
    }

    /// Attaches to what a handle names.
    ///
    /// # Errors
    /// [`Error::Stale`] where that is no more, has another length now, or is of another pool.
    pub fn resolve(&self, handle: Handle) -> Result<Namespace> {
        let superblock = &self.shared.log.superblock;
        let generation = handle.generation;
        let stale = Error::Stale { generation };
        if (handle.pool, handle.incarnation) != (superblock.uuid, superblock.incarnation) {
            return Err(stale);
        }
        self.shared.attach(false, |catalog| {
            let extent = catalog.item(generation).map(|item| item.extent);
            if extent.map(|extent| (extent.offset, extent.length))
                == Some((handle.offset, handle.length))
            {
                Ok(generation)
            } else {
                Err(Error::Stale { generation })
            }
        })
    }

    /// Removes a namespace. Its name is free at once; its memory when nobody is attached any more.
    ///
    /// # Errors
    /// Where there is none of this name.
    pub fn remove(&self, name: &str) -> Result<()> {
        self.shared.write(|writer| {
            let (generation, item) = writer
                .state
                .catalog
                .by_name(name)
                .ok_or_else(|| unknown(name))?;
            let extent = item.extent;
            writer.remove(generation, extent)
        })
    }

    /// Gives a namespace another length, rounded up to 2 MiB, where it lies. Who is attached keeps
    /// the old length, and attaches anew to see the new one; handles of the old length are stale.
    /// What is cut off is used again when nobody is attached any more.
    ///
    /// # Errors
    /// Where there is none of this name, or what lies behind it is in use.
    pub fn resize(&self, name: &str, length: ByteSize) -> Result<()> {
        let length = rounded("namespace", length)?;
        self.shared.write(|writer| {
            let (generation, item) = writer
                .state
                .catalog
                .by_name(name)
                .ok_or_else(|| unknown(name))?;
            let old = item.extent;
            let extent = Extent { length, ..old };
            match length.cmp(&old.length) {
                std::cmp::Ordering::Equal => return Ok(()),
                std::cmp::Ordering::Less => writer.room_for_one_more()?,
                std::cmp::Ordering::Greater => {
                    let more = Extent {
                        offset: old.end(),
                        length: length - old.length,
                    };
                    if !writer.state.catalog.space().is_free(more) {
                        writer.reclaim()?;
                    }
                    if !writer.state.catalog.space().is_free(more) {
                        return Err(writer.no_room(more.length));
                    }
                    writer.shared.zero(more)?;
                }
            }
            writer.append(Operation::Resize { generation, extent })?;
            if length < old.length && !writer.shared.is_leased(generation, &writer.state.catalog)? {
                let extent = Extent {
                    offset: extent.end(),
                    length: old.length - length,
                };
                writer.free(generation, extent)?;
            }
            Ok(())
        })
    }

    /// Gives back what is in quarantine and not attached any more; how much. Creating does it by
    /// itself where there is no room.
    ///
    /// # Errors
    /// Where the medium is gone, or another epoch writes.
    pub fn reclaim(&self) -> Result<ByteSize> {
        let freed = self.shared.write(|writer| {
            let freed = writer.reclaim()?;
            Ok(freed)
        });
        freed.map(ByteSize::new)
    }

    /// Declares a host dead: its leases do not count any more. That it runs no process that uses the
    /// pool is the caller's word: memory that such a process still maps may be given to others.
    ///
    /// # Errors
    /// Where the pool has no such host, or it is this one.
    pub fn evict(&self, host: HostId) -> Result<()> {
        let superblock = &self.shared.log.superblock;
        if host == self.shared.host {
            return Err(Error::OwnHost { host });
        }
        if host.0 >= superblock.hosts {
            return Err(Error::BadHost {
                host,
                hosts: superblock.hosts,
            });
        }
        self.shared.write(|writer| {
            if writer.state.catalog.evicted(host.0).is_none() {
                writer.room_for_an_eviction()?;
            }
            let head = writer.shared.table_of(host).head()?;
            let nonce = match head {
                Some(head) => head.nonce,
                // Whatever it was: nothing that the host writes from now on has it.
                None => writer
                    .state
                    .catalog
                    .evicted(host.0)
                    .map_or(0, |nonce| nonce.wrapping_add(1)),
            };
            writer.append(Operation::Evict {
                host: host.0,
                nonce,
            })
        })
    }

    /// The namespaces, by name.
    ///
    /// # Errors
    /// Where the medium is gone or damaged.
    pub fn list(&self) -> Result<Vec<NamespaceInfo>> {
        let mut state = locked(&self.shared.state);
        self.shared.log.refresh(&mut state)?;
        let mut all: Vec<_> = state
            .catalog
            .items()
            .map(|(generation, item)| NamespaceInfo {
                name: item.name.to_string(),
                generation,
                offset: item.extent.offset,
                length: ByteSize::new(item.extent.length),
            })
            .collect();
        all.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(all)
    }

    /// The pool in numbers.
    ///
    /// # Errors
    /// Where the medium is gone or damaged.
    pub fn info(&self) -> Result<PoolInfo> {
        let mut state = locked(&self.shared.state);
        self.shared.log.refresh(&mut state)?;
        let superblock = &self.shared.log.superblock;
        let space = state.catalog.space();
        Ok(PoolInfo {
            uuid: superblock.uuid,
            length: ByteSize::new(superblock.length),
            free: ByteSize::new(space.free()),
            largest_free: ByteSize::new(space.largest()),
            quarantined: ByteSize::new(state.catalog.quarantined()),
            namespaces: state.catalog.items().count(),
            most_namespaces: most(superblock),
            epoch: Epoch(state.record.epoch),
            writer: HostId(state.record.host),
            hosts: superblock.hosts,
        })
    }

    /// The epoch with which this handle writes; nothing for a reader.
    pub fn epoch(&self) -> Option<Epoch> {
        self.shared.epoch
    }

    /// Whether the memory is still there and whole.
    pub fn health(&self) -> Health {
        self.shared.backend.health()
    }
}

impl State {
    /// A state that no log has, so that the first look reads everything.
    pub(crate) fn unread(superblock: &Superblock) -> Self {
        Self {
            record: Record::idle(u16::MAX),
            position: 0,
            catalog: Catalog::new(superblock.data(), 1),
            damaged: Vec::new(),
        }
    }
}

fn unknown(name: &str) -> Error {
    Error::UnknownNamespace {
        name: name.to_owned(),
    }
}

/// Live and quarantined extents that the log may hold. A quarter of the arena stays free, so that
/// an arena is begun after many operations, whose cost it shares.
fn most(superblock: &Superblock) -> u64 {
    superblock.entries / 4 * 3
}

fn rounded(what: &'static str, length: ByteSize) -> Result<u64> {
    if length == ByteSize::ZERO {
        return Err(Error::ZeroLength { what });
    }
    let rounded = length.round_up(ByteSize::new(EXTENT));
    rounded.map(ByteSize::get).ok_or(Error::OutOfRange {
        start: 0,
        end: length.get(),
        length,
        why: "no memory is that large",
    })
}

/// The right to append, while it is held.
pub(crate) struct Writer<'a> {
    pub(crate) shared: &'a Shared,
    pub(crate) state: &'a mut State,
    epoch: Epoch,
}

impl Writer<'_> {
    /// Appends an operation, in a new arena where this one is full.
    pub(crate) fn append(&mut self, operation: Operation) -> Result<()> {
        let log = &self.shared.log;
        if self.state.position >= log.superblock.entries {
            log.begin_turn(self.state, self.shared.host.0, self.epoch)?;
        }
        log.append(self.state, operation)
    }

    /// Takes a namespace away, and frees its extent if nobody is attached.
    fn remove(&mut self, generation: u64, extent: Extent) -> Result<()> {
        self.append(Operation::Remove { generation })?;
        // From here on nobody attaches: whoever did before shows by its lease.
        if !self.shared.is_leased(generation, &self.state.catalog)? {
            self.free(generation, extent)?;
        }
        Ok(())
    }

    /// Frees an extent that was in quarantine, and gives its memory back to the file system: the
    /// namespace that gets it next may be long in coming, and another extent's pages are wanted now.
    fn free(&mut self, generation: u64, extent: Extent) -> Result<()> {
        self.append(Operation::Free { generation, extent })?;
        if let Err(why) = self.shared.backend.discard(extent.range()) {
            // It is free, and is zeroed before it is used again.
            tracing::debug!(generation, %why, "the memory of a free extent was not given back");
        }
        Ok(())
    }

    /// Refuses where the log is full; what is in quarantine is looked at first.
    fn room_for_one_more(&mut self) -> Result<()> {
        let most = most(&self.shared.log.superblock);
        if self.state.catalog.weight() >= most {
            self.reclaim()?;
        }
        let used = self.state.catalog.weight();
        if used >= most {
            return Err(Error::LogFull { used, most });
        }
        Ok(())
    }

    /// As [`Writer::room_for_one_more`], with the quarter of the arena that stays free otherwise:
    /// leases of a dead host may be all that the log is full of. One entry stays for what is freed.
    fn room_for_an_eviction(&self) -> Result<()> {
        let used = self.state.catalog.weight();
        let most = self.shared.log.superblock.entries.saturating_sub(2);
        if used >= most {
            return Err(Error::LogFull { used, most });
        }
        Ok(())
    }

    /// The extent for `length` bytes; what is in quarantine is looked at where there is none.
    fn find(&mut self, length: u64) -> Result<Extent> {
        if let Some(extent) = self.state.catalog.space().find(length) {
            return Ok(extent);
        }
        self.reclaim()?;
        let found = self.state.catalog.space().find(length);
        found.ok_or_else(|| self.no_room(length))
    }

    fn no_room(&self, length: u64) -> Error {
        let catalog = &self.state.catalog;
        Error::NoRoom {
            asked: ByteSize::new(length),
            free: ByteSize::new(catalog.space().free()),
            largest: ByteSize::new(catalog.space().largest()),
            quarantined: ByteSize::new(catalog.quarantined()),
        }
    }

    /// Frees what is in quarantine without a lease; how many bytes.
    fn reclaim(&mut self) -> Result<u64> {
        let mut freed = 0;
        let all: Vec<_> = self.state.catalog.quarantine().collect();
        for (generation, extent) in all {
            if !self.shared.is_leased(generation, &self.state.catalog)? {
                self.free(generation, extent)?;
                freed += extent.length;
            }
        }
        Ok(freed)
    }
}

impl Shared {
    /// Does `work` as the only writer of this host, and as the writer of the pool.
    pub(crate) fn write<T>(&self, work: impl FnOnce(&mut Writer<'_>) -> Result<T>) -> Result<T> {
        let Some(epoch) = self.epoch else {
            return Err(Error::ReadOnly {
                what: "change a namespace",
            });
        };
        self.is_this_process()?;
        let mut state = locked(&self.state);
        let _lock = self.lock_append()?;
        self.log.refresh(&mut state)?;
        self.log.fence_after(&state, self.host.0, epoch)?;
        let done = work(&mut Writer {
            shared: self,
            state: &mut state,
            epoch,
        });
        if done.is_err() {
            // What was applied here may not be on the medium: it is read anew.
            *state = State::unread(&self.log.superblock);
            return done;
        }
        // Of a claim and what was appended one comes first. If this sees no claim, whoever claims
        // later sees what was appended.
        if self.log.superblock.hosts > 1 {
            self.log.fence(self.host.0, epoch)?;
        }
        done
    }

    /// Takes away what was made and could not be attached to: whoever is told that it failed does not
    /// expect to find it.
    fn unmake(&self, generation: u64) {
        let unmade = self.write(|writer| match writer.state.catalog.item(generation) {
            Some(item) => {
                let extent = item.extent;
                writer.remove(generation, extent)
            }
            // Somebody else was quicker.
            None => Ok(()),
        });
        if let Err(why) = unmade {
            tracing::warn!(generation, %why, "a namespace that could not be attached to is left");
        }
    }

    /// Refuses a process that was forked from the one that opened the pool: a lock of one is a lock of
    /// the other.
    pub(crate) fn is_this_process(&self) -> Result<()> {
        if std::process::id() == self.process {
            return Ok(());
        }
        Err(Error::Forked {
            place: self.backend.place(),
            opened_by: self.process,
        })
    }

    fn lock_append(&self) -> Result<lock::Guard<'_>> {
        lock::acquire(
            self.backend.as_fd(),
            LOCK_APPEND,
            Kind::Exclusive,
            PATIENCE,
            "the log",
        )
    }

    /// Makes this host the writer with `epoch`, or joins it where it is that already.
    fn take_over(&self, epoch: Epoch) -> Result<Epoch> {
        let _lock = self.lock_append()?;
        let log = &self.log;
        let records = log.records()?;
        let own = records
            .get(usize::from(self.host.0))
            .copied()
            .unwrap_or(Record::idle(self.host.0));
        let current = log.current()?;
        let highest = records
            .iter()
            .filter(|record| record.state != HostState::Idle)
            .max_by_key(|record| (record.epoch, record.host == self.host.0))
            .copied()
            .unwrap_or(current);
        let mine = highest.host == self.host.0;
        let by = HostId(highest.host);
        let theirs = Epoch(highest.epoch);
        let epoch = match epoch {
            epoch if epoch > Epoch::LAST => {
                let last = Epoch::LAST;
                return Err(Error::BadEpoch { epoch, last });
            }
            Epoch::CURRENT if mine => theirs,
            Epoch::CURRENT => return Err(Error::NotWriter { epoch: theirs, by }),
            ours if ours < theirs => return Err(Error::Fenced { ours, theirs, by }),
            ours if ours == theirs && !mine => return Err(Error::EpochTaken { epoch: ours, by }),
            ours => ours,
        };
        if current.host == self.host.0 && current.epoch == epoch.0 {
            return Ok(epoch);
        }
        // The record of the pool's state is not written over; every other one may be.
        if current.host != self.host.0 {
            log.write_record(&Record {
                generation: own.generation.saturating_add(1),
                epoch: epoch.0,
                state: HostState::Claiming,
                ..own
            })?;
            if let Err(why) = log.fence(self.host.0, epoch) {
                log.write_record(&Record {
                    generation: own.generation.saturating_add(2),
                    epoch: 0,
                    state: HostState::Idle,
                    ..own
                })?;
                return Err(why);
            }
        }
        let mut state = State::unread(&log.superblock);
        log.refresh(&mut state)?;
        log.begin_turn(&mut state, self.host.0, epoch)?;
        log.fence(self.host.0, epoch)?;
        tracing::info!(host = self.host.0, epoch = epoch.0, "writes from now on");
        Ok(epoch)
    }

    /// The leases of this host, where this handle may write them.
    pub(crate) fn own_table(&self) -> Option<Table<'_>> {
        let seed = self.log.seed;
        if self.log.superblock.hosts == 1 {
            return None;
        }
        if let Some(own) = &self.own {
            return Some(Table {
                medium: &**own,
                area: 0,
                seed,
            });
        }
        // A writer maps everything for writing; a reader without a mapping of its own has no right
        // to write.
        self.epoch.map(|_| self.table_of(self.host))
    }

    /// The leases of a host, for reading.
    pub(crate) fn table_of(&self, host: HostId) -> Table<'_> {
        Table {
            medium: &*self.log.medium,
            area: lease::area(&self.log.superblock, host),
            seed: self.log.seed,
        }
    }

    /// Clears what processes of this host left behind that were killed, and begins anew where this
    /// host was evicted.
    fn begin_leases(&self) -> Result<()> {
        let Some(table) = self.own_table() else {
            return Ok(());
        };
        let fd = self.backend.as_fd();
        let _lock = lease::lock_table(fd, PATIENCE)?;
        let mut state = locked(&self.state);
        self.log.refresh(&mut state)?;
        let evicted = state.catalog.evicted(self.host.0);
        if let Some(nonce) = evicted
            && table.head()?.is_some_and(|head| head.nonce == nonce)
        {
            table.renew(nonce.wrapping_add(1))?;
            return Ok(());
        }
        self.mend_leases(&table, &state.catalog, &locked(&self.attached))?;
        table.clear(|generation| Ok(!lease::is_attached_elsewhere(fd, generation)?))
    }

    /// Whether somebody is attached to a generation, on this host or another.
    fn is_leased(&self, generation: u64, catalog: &Catalog) -> Result<bool> {
        let here = locked(&self.attached)
            .get(&generation)
            .is_some_and(|all| all.iter().any(|inner| inner.strong_count() > 0));
        if here || lease::is_attached_elsewhere(self.backend.as_fd(), generation)? {
            return Ok(true);
        }
        for host in (0..self.log.superblock.hosts).map(HostId) {
            // On this host the kernel has said all there is to say.
            if host != self.host
                && self
                    .table_of(host)
                    .holds(generation, catalog.evicted(host.0))?
            {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Attaches to what `choose` picks: first a lease, then a second look whether it is still there.
    fn attach(
        self: &Arc<Self>,
        populate: bool,
        choose: impl Fn(&Catalog) -> Result<u64>,
    ) -> Result<Namespace> {
        self.is_this_process()?;
        // In this order everywhere: state, attached, the lock on the leases.
        let mut state = locked(&self.state);
        self.log.refresh(&mut state)?;
        loop {
            let generation = choose(&state.catalog)?;
            let evicted = state.catalog.evicted(self.host.0);
            let mut attached = locked(&self.attached);
            let known: Vec<_> = attached
                .get(&generation)
                .into_iter()
                .flatten()
                .filter_map(Weak::upgrade)
                .collect();
            let lease = if known.is_empty() {
                Some(self.lease(generation, evicted)?)
            } else {
                None
            };
            let made = self.look_again(&mut state, generation, &lease, &known, populate);
            match (made, lease) {
                (Ok(Some(inner)), lease) => {
                    if let Some((guard, _)) = lease {
                        // `Inner` gives it back.
                        guard.keep();
                    }
                    let all = attached.entry(generation).or_default();
                    all.retain(|inner| inner.strong_count() > 0);
                    if !known.iter().any(|known| Arc::ptr_eq(known, &inner)) {
                        all.push(Arc::downgrade(&inner));
                    }
                    drop(attached);
                    return Ok(Namespace { inner });
                }
                (made, lease) => {
                    if let Some((guard, _)) = lease {
                        self.end_lease(generation, guard);
                    }
                    // What was known goes when nobody looks at `attached` any more.
                    drop(attached);
                    made?;
                    // It was removed meanwhile; the name may be another's now.
                }
            }
        }
    }

    /// With the lease in memory: the mapping of what has it, if that is still there.
    fn look_again(
        self: &Arc<Self>,
        state: &mut State,
        generation: u64,
        lease: &Option<(lock::Guard<'_>, Option<u64>)>,
        known: &[Arc<Inner>],
        populate: bool,
    ) -> Result<Option<Arc<Inner>>> {
        self.log.refresh(state)?;
        if let Some((_, Some(ours))) = lease
            && state.catalog.evicted(self.host.0) == Some(*ours)
        {
            return Err(Error::Evicted { host: self.host });
        }
        let Some(item) = state.catalog.item(generation) else {
            return Ok(None);
        };
        // One that was resized is mapped anew: its lease is the same.
        if let Some(inner) = known.iter().find(|inner| inner.extent == item.extent) {
            return Ok(Some(Arc::clone(inner)));
        }
        let access = match self.epoch {
            Some(_) => Access::Write,
            None => Access::Read,
        };
        let medium = Arc::clone(&self.backend).map(item.extent.range(), access, populate)?;
        Ok(Some(Arc::new(Inner {
            shared: Arc::clone(self),
            generation,
            extent: item.extent,
            name: item.name.to_string(),
            medium,
            heap: known
                .first()
                .map_or_else(Arc::default, |other| Arc::clone(&other.heap)),
            process: std::process::id(),
        })))
    }

    /// A lease on this host, and for other hosts; the nonce under which it counts there.
    fn lease(
        &self,
        generation: u64,
        evicted: Option<u64>,
    ) -> Result<(lock::Guard<'_>, Option<u64>)> {
        let fd = self.backend.as_fd();
        let byte = lease::byte(generation);
        let guard = lock::acquire(fd, byte, Kind::Shared, PATIENCE, "a namespace")?;
        let Some(table) = self.own_table() else {
            return Ok((guard, None));
        };
        let _lock = lease::lock_table(fd, PATIENCE)?;
        let fresh = evicted.map_or(0, |nonce| nonce.wrapping_add(1));
        let nonce = table.insert(generation, self.host, fresh)?;
        Ok((guard, Some(nonce)))
    }

    /// Gives a lease back: on this host, and for others where nobody here is attached any more.
    fn end_lease(&self, generation: u64, guard: lock::Guard<'_>) {
        let ended = (|| {
            let Some(table) = self.own_table() else {
                drop(guard);
                return Ok(());
            };
            let fd = self.backend.as_fd();
            let _lock = lease::lock_table(fd, PATIENCE)?;
            drop(guard);
            if lease::is_attached_elsewhere(fd, generation)? {
                return Ok(());
            }
            table.clear(|other| Ok(other == generation))
        })();
        if let Err(why) = ended {
            // It stays until a process of this host opens the pool: later, not lost.
            tracing::warn!(generation, %why, "a lease could not be cleared");
        }
    }

    /// When the last use of a namespace through this handle goes.
    pub(crate) fn detach(&self, generation: u64) {
        let mut attached = locked(&self.attached);
        let Some(all) = attached.get_mut(&generation) else {
            return;
        };
        all.retain(|inner| inner.strong_count() > 0);
        if !all.is_empty() {
            return;
        }
        attached.remove(&generation);
        let guard = lock::Guard::held(self.backend.as_fd(), lease::byte(generation));
        self.end_lease(generation, guard);
    }

    /// Fills an extent with zeroes.
    fn zero(&self, extent: Extent) -> Result<()> {
        if self.backend.discard(extent.range())? {
            return Ok(());
        }
        let medium = Arc::clone(&self.backend).map(extent.range(), Access::Write, false)?;
        let zeroes = vec![0; EXTENT as usize];
        let mut at = 0;
        while at < extent.length {
            medium.store(at, &zeroes)?;
            at += EXTENT;
        }
        medium.write_back(0..extent.length, crate::flush::Step::Publish)
    }
}
