//! Attaching: a lease first, then a second look whether the namespace is still there, then its
//! mapping. And the way back. Of what is being made the lease comes before the namespace.

use std::sync::{Arc, Mutex, Weak};

use crate::catalog::Catalog;
use crate::error::{Error, Result};
use crate::host::HostId;
use crate::layout::{Extent, MOST_GENERATION};
use crate::lease::{self, Table};
use crate::lock::{self, Kind};
use crate::log::State;
use crate::medium::Access;
use crate::namespace::{Inner, Namespace};
use crate::pool::{PATIENCE, Shared, locked};

impl Shared {
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
    pub(crate) fn begin_leases(&self) -> Result<()> {
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
    pub(crate) fn is_leased(&self, generation: u64, catalog: &Catalog) -> Result<bool> {
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
    pub(crate) fn attach(
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
        let heap = known
            .first()
            .map_or_else(Arc::default, |other| Arc::clone(&other.heap));
        let inner = self.mapping(generation, item.extent, &item.name, populate, heap)?;
        Ok(Some(inner))
    }

    fn mapping(
        self: &Arc<Self>,
        generation: u64,
        extent: Extent,
        name: &str,
        populate: bool,
        heap: Arc<Mutex<()>>,
    ) -> Result<Arc<Inner>> {
        let access = match self.epoch {
            Some(_) => Access::Write,
            None => Access::Read,
        };
        let medium = Arc::clone(&self.backend).map(extent.range(), access, populate)?;
        Ok(Arc::new(Inner {
            shared: Arc::clone(self),
            generation,
            extent,
            name: name.to_owned(),
            medium,
            heap,
            process: std::process::id(),
        }))
    }

    /// A lease of the next generation, which nobody has yet, and the mapping of what will be its extent.
    pub(crate) fn hold(
        self: &Arc<Self>,
        catalog: &Catalog,
        extent: Extent,
        name: &str,
    ) -> Result<Arc<Inner>> {
        let generation = catalog.next_generation();
        if generation >= MOST_GENERATION {
            return Err(Error::corrupt(&self.log.place, "the number of generations"));
        }
        let evicted = catalog.evicted(self.host.0);
        let mut attached = locked(&self.attached);
        let (guard, ours) = self.lease(generation, evicted)?;
        let made = if ours.is_some() && ours == evicted {
            Err(Error::Evicted { host: self.host })
        } else {
            self.mapping(generation, extent, name, false, Arc::default())
        };
        match made {
            Ok(inner) => {
                // `Inner` gives it back.
                guard.keep();
                let all = attached.entry(generation).or_default();
                all.push(Arc::downgrade(&inner));
                Ok(inner)
            }
            Err(why) => {
                self.end_lease(generation, guard);
                Err(why)
            }
        }
    }

    /// What is held, with every page mapped by the kernel.
    pub(crate) fn populated(self: &Arc<Self>, held: &Arc<Inner>) -> Result<Arc<Inner>> {
        self.backend.reserve(held.extent.range())?;
        let heap = Arc::clone(&held.heap);
        let inner = self.mapping(held.generation, held.extent, &held.name, true, heap)?;
        let mut attached = locked(&self.attached);
        let all = attached.entry(held.generation).or_default();
        all.push(Arc::downgrade(&inner));
        Ok(inner)
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
}
