//! Reserving: the extent of a namespace is taken before it is filled, and filled while nobody waits.
//!
//! To fill it takes long, and writes where others may have theirs. So an extent is first put in
//! quarantine, under a generation of its own that this host holds a lease of; then it is filled,
//! mapped and made ready without the log; and then one change frees it and gives it to its namespace.
//!
//! Nobody else gets it meanwhile. The lease is in memory before the entry, and the entry before this
//! host looks whether it still writes: whoever claims a later epoch afterwards finds both (see
//! [`crate::take_over`]), and what is in quarantine under a lease is not given away. If one has claimed
//! before, nothing is filled. A pool of one host, whose memory can be given back, needs none of this
//! for zeroes: they are there at once, under the kernel's lock. Of a process that is killed the lease ends, and what it had reserved is
//! reclaimed as anything else in quarantine. Only an eviction ends the lease of one that lives: it is
//! somebody's word that none does.

use std::sync::Arc;

use crate::error::{Error, Result};
use crate::flush::Step;
use crate::layout::{EXTENT, Extent, Operation};
use crate::namespace::Inner;
use crate::pool::Shared;
use crate::writer::Writer;

impl Writer<'_> {
    /// Takes an extent that is free, for what will be called so. It is this handle's until what is
    /// returned is dropped.
    pub(crate) fn reserve(&mut self, extent: Extent, name: &str) -> Result<Arc<Inner>> {
        let held = self.shared.hold(&self.state.catalog, extent, name)?;
        let generation = held.generation;
        self.append(Operation::Quarantined { generation, extent })?;
        Ok(held)
    }

    /// Makes a free extent read as zero, where that takes no time and no other host can have it by now;
    /// whether it does.
    pub(crate) fn clear(&self, extent: Extent) -> Result<bool> {
        // The lock keeps it free on this host only.
        if self.shared.log.superblock.hosts > 1 {
            return Ok(false);
        }
        self.shared.backend.discard(extent.range())
    }

    /// Makes a namespace at once, of which nothing takes long. The lease comes first: whoever removes it
    /// then leaves it to this handle.
    pub(crate) fn create(&mut self, extent: Extent, name: &str) -> Result<Arc<Inner>> {
        let held = self.shared.hold(&self.state.catalog, extent, name)?;
        let generation = held.generation;
        self.append(Operation::Create {
            generation,
            extent,
            name: name.into(),
        })?;
        Ok(held)
    }

    /// Frees what was reserved, for the operation that comes next.
    pub(crate) fn release(&mut self, reserved: &Inner) -> Result<()> {
        let (generation, extent) = (reserved.generation, reserved.extent);
        if !self.state.catalog.is_quarantined(generation, extent) {
            // Nothing else ends a lease that is held.
            let host = self.shared.host;
            return Err(Error::Evicted { host });
        }
        self.append(Operation::Free { generation, extent })
    }
}

impl Shared {
    /// Fills what was reserved with zeroes.
    pub(crate) fn zero(&self, reserved: &Inner) -> Result<()> {
        let extent = reserved.extent;
        if self.backend.discard(extent.range())? {
            return Ok(());
        }
        let zeroes = vec![0; EXTENT as usize];
        for at in (0..extent.length).step_by(zeroes.len()) {
            reserved.medium.store(at, &zeroes)?;
        }
        reserved.medium.write_back(0..extent.length, Step::Publish)
    }

    /// Gives back what was reserved and is not needed.
    pub(crate) fn abandon(self: &Arc<Self>, reserved: Arc<Inner>) {
        let (generation, extent) = (reserved.generation, reserved.extent);
        drop(reserved);
        let freed = self.write(|writer| {
            if writer.state.catalog.is_quarantined(generation, extent) {
                writer.free(generation, extent)?;
            }
            Ok(())
        });
        if let Err(why) = freed {
            // It has no lease any more: whoever writes next finds it in quarantine.
            tracing::debug!(generation, %why, "what was reserved is left in quarantine");
        }
    }
}
