//! A pool: opening, and what can be done with its namespaces.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use carlsbad_types::ByteSize;
use uuid::Uuid;

use crate::backend::{Backend, Health};
use crate::catalog::bad_name;
use crate::error::{Error, Result};
use crate::host::{Epoch, HostId, Role};
use crate::layout::{EXTENT, Extent, Operation};
use crate::lock;
use crate::log::{Log, State};
use crate::medium::{Access, Medium};
use crate::namespace::{Contents, Handle, Inner, Namespace, NamespaceInfo, NamespaceOptions};
use crate::writer::{Writer, most};

/// How long a lock is waited for. Holders keep one for microseconds, or while memory is given back.
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
    pub(crate) own: Option<Box<dyn Medium>>,
    pub(crate) host: HostId,
    /// With which this handle writes; nothing for a reader.
    pub(crate) epoch: Option<Epoch>,
    pub(crate) state: Mutex<State>,
    /// What this handle is attached to. A lock of the kernel is held once for all of them.
    pub(crate) attached: Mutex<HashMap<u64, Vec<Weak<Inner>>>>,
    /// Which opened it.
    process: u32,
    _descriptor: Option<lock::Descriptor>,
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
    /// Removed, and still attached by somebody when it was last looked: see [`Pool::reclaim`]. And
    /// what is reserved for namespaces that are being made.
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
        let (backend, descriptor) = match lock::Descriptor::claim(&*backend) {
            Some(descriptor) => (backend, Some(descriptor)),
            None => {
                let again = backend.reopen()?;
                let descriptor = lock::Descriptor::claim(&*again);
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
            if superblock.hosts == 1 {
                pool.shared.log.is_only_this_hosts();
            }
        }
        Ok(pool)
    }

    /// Makes a namespace of at least `length` bytes, rounded up to 2 MiB, and attaches to it. Where
    /// that fails there is no namespace either. While it is filled with zeroes, which takes long where
    /// memory cannot be given back, others change the pool; its name is taken when it is ready.
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
        let is_new = |writer: &Writer<'_>| match writer.state.catalog.by_name(name) {
            None => Ok(()),
            Some(_) => Err(Error::NameTaken {
                name: name.to_owned(),
            }),
        };
        let (held, is_made) = shared.write(|writer| {
            is_new(writer)?;
            writer.room_for_one_more()?;
            let extent = writer.find(length)?;
            let takes_long = options.populate
                || (options.contents == Contents::Zeroed && !writer.clear(extent)?);
            if takes_long {
                Ok((writer.reserve(extent, name)?, false))
            } else {
                Ok((writer.create(extent, name)?, true))
            }
        })?;
        if is_made {
            return Ok(Namespace { inner: held });
        }
        let made = (|| {
            if options.contents == Contents::Zeroed {
                shared.zero(&held)?;
            }
            let ready = if options.populate {
                shared.populated(&held)?
            } else {
                Arc::clone(&held)
            };
            shared.write(|writer| {
                is_new(writer)?;
                writer.release(&held)?;
                let (generation, extent) = (held.generation, held.extent);
                let name = name.into();
                writer.append(Operation::Create {
                    generation,
                    extent,
                    name,
                })
            })?;
            Ok(ready)
        })();
        match made {
            Ok(inner) => Ok(Namespace { inner }),
            Err(why) => {
                shared.abandon(held);
                Err(why)
            }
        }
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
        // Once, unless others resize it meanwhile.
        while let Some((generation, old, more)) = self.shrink_or_reserve(name, length)? {
            let grown = self.shared.zero(&more).and_then(|()| {
                self.shared.write(|writer| {
                    let item = writer.state.catalog.item(generation);
                    if item.map(|item| item.extent) != Some(old) {
                        return Ok(false);
                    }
                    writer.release(&more)?;
                    let extent = Extent { length, ..old };
                    writer.append(Operation::Resize { generation, extent })?;
                    Ok(true)
                })
            });
            if matches!(grown, Ok(true)) {
                break;
            }
            self.shared.abandon(more);
            grown?;
        }
        Ok(())
    }

    /// Cuts a namespace, or takes what it is to grow by: with it, which one it is and what it has.
    fn shrink_or_reserve(
        &self,
        name: &str,
        length: u64,
    ) -> Result<Option<(u64, Extent, Arc<Inner>)>> {
        self.shared.write(|writer| {
            let (generation, item) = writer
                .state
                .catalog
                .by_name(name)
                .ok_or_else(|| unknown(name))?;
            let old = item.extent;
            if length > old.length {
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
                writer.room_for_a_last_one()?;
                let more = writer.reserve(more, name)?;
                return Ok(Some((generation, old, more)));
            }
            if length < old.length {
                writer.room_for_one_more()?;
                let extent = Extent { length, ..old };
                writer.append(Operation::Resize { generation, extent })?;
                if !writer.shared.is_leased(generation, &writer.state.catalog)? {
                    let extent = Extent {
                        offset: extent.end(),
                        length: old.length - length,
                    };
                    writer.free(generation, extent)?;
                }
            }
            Ok(None)
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
    /// pool is the caller's word: memory that such a process still maps may be given to others. Leases
    /// whose head is damaged count nevertheless, until a process of that host opens the pool.
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
                writer.room_for_a_last_one()?;
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

fn unknown(name: &str) -> Error {
    Error::UnknownNamespace {
        name: name.to_owned(),
    }
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

impl Shared {
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
}
