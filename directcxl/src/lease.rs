//! Leases: what keeps the extent of a removed namespace in quarantine.
//!
//! On one host a lease is a shared lock of the kernel, which ends with its process, whoever kills
//! it; no process id and no clock is involved. For other hosts it is a slot in this host's area.

use std::os::fd::BorrowedFd;
use std::time::Duration;

use crate::HostId;
use crate::error::{Error, Result};
use crate::flush::Step;
use crate::layout::{
    LEASE_HEAD, LEASE_SLOTS, LEASES, LOCK_LEASE, LOCK_LEASES, Lease, LeaseHead, MOST_GENERATION,
    Seed, Superblock,
};
use crate::lock::{self, Guard, Kind};
use crate::medium::Medium;

/// The leases of one host, in its area.
pub(crate) struct Table<'a> {
    pub(crate) medium: &'a dyn Medium,
    /// Where the area begins in `medium`.
    pub(crate) area: u64,
    pub(crate) seed: Seed,
}

impl Table<'_> {
    /// The head. Where it cannot be read every slot counts, and no eviction is known.
    pub(crate) fn head(&self) -> Result<Option<LeaseHead>> {
        let at = self.area + LEASE_HEAD;
        let mut bytes = [0; LeaseHead::SIZE];
        let range = at..at + bytes.len() as u64;
        self.medium.invalidate(range, Step::AcquireLease)?;
        self.medium.load(at, &mut bytes)?;
        Ok(LeaseHead::decode(&bytes, self.seed))
    }

    fn write_head(&self, head: LeaseHead) -> Result<()> {
        let at = self.area + LEASE_HEAD;
        let bytes = head.encode(self.seed);
        self.medium.store(at, &bytes)?;
        self.medium
            .write_back(at..at + bytes.len() as u64, Step::Lease)
    }

    /// A head that says nothing of what is free.
    fn write_head_anew(&self, nonce: u64) -> Result<LeaseHead> {
        let head = LeaseHead {
            nonce: nonce.max(1),
            used: LEASES as u32,
        };
        self.write_head(head)?;
        Ok(head)
    }

    /// Every slot that may be in use.
    pub(crate) fn slots(&self) -> Result<Vec<Lease>> {
        let used = self.head()?.map_or(LEASES, |head| head.used as usize);
        let mut bytes = vec![0; used.min(LEASES) * Lease::SIZE];
        let at = self.area + LEASE_SLOTS;
        let range = at..at + bytes.len() as u64;
        self.medium.invalidate(range, Step::AcquireLease)?;
        self.medium.load(at, &mut bytes)?;
        let (slots, _) = bytes.as_chunks::<{ Lease::SIZE }>();
        Ok(slots.iter().map(Lease::decode).collect())
    }

    fn write(&self, slot: usize, lease: Lease) -> Result<()> {
        let at = self.area + LEASE_SLOTS + (slot * Lease::SIZE) as u64;
        let bytes = lease.encode();
        self.medium.store(at, &bytes)?;
        self.medium
            .write_back(at..at + bytes.len() as u64, Step::Lease)
    }

    /// Writes a lease, and gives the nonce under which it counts. The table is locked.
    ///
    /// A damaged head is written anew with `nonce`; every slot counts from then on.
    pub(crate) fn insert(&self, generation: u64, host: HostId, nonce: u64) -> Result<u64> {
        let head = match self.head()? {
            Some(head) => head,
            None => self.write_head_anew(nonce)?,
        };
        let slots = self.slots()?;
        if slots.contains(&Lease::Of(generation)) {
            return Ok(head.nonce);
        }
        let slot = slots
            .iter()
            .position(|slot| *slot == Lease::Free)
            .unwrap_or(slots.len());
        if slot >= LEASES {
            return Err(Error::TooManyLeases { host, most: LEASES });
        }
        // The slot first: a slot that the head does not count yet is no lease, and nobody relies on
        // it before this returns.
        self.write(slot, Lease::Of(generation))?;
        if slot >= head.used as usize {
            self.write_head(LeaseHead {
                used: slot as u32 + 1,
                ..head
            })?;
        }
        Ok(head.nonce)
    }

    /// Writes anew what is damaged, with `nonce` where the head is, and what is lost of the leases that
    /// the kernel knows of, `held`; how much. The table is locked.
    pub(crate) fn mend(
        &self,
        host: HostId,
        nonce: u64,
        held: impl FnOnce() -> Result<Vec<u64>>,
    ) -> Result<usize> {
        let head = self.head()?;
        let is_damaged = |slot: &Lease| *slot == Lease::Damaged;
        if head.is_some() && !self.slots()?.iter().any(is_damaged) {
            return Ok(0);
        }
        let nonce = head.map_or(nonce, |head| head.nonce);
        let all = self.write_head_anew(nonce)?;
        let mut slots = self.slots()?;
        let damaged = slots.iter().filter(|slot| is_damaged(slot)).count();
        // A damaged slot holds everything until what it may have held has a slot again.
        for generation in held()? {
            if slots.contains(&Lease::Of(generation)) {
                continue;
            }
            let free = slots.iter().position(|slot| *slot == Lease::Free);
            let slot = free
                .or_else(|| slots.iter().position(is_damaged))
                .ok_or(Error::TooManyLeases { host, most: LEASES })?;
            slots[slot] = Lease::Of(generation);
            self.write(slot, slots[slot])?;
        }
        for (i, slot) in slots.iter_mut().enumerate() {
            if is_damaged(slot) {
                *slot = Lease::Free;
                self.write(i, *slot)?;
            }
        }
        let last = slots.iter().rposition(|slot| *slot != Lease::Free);
        self.write_head(LeaseHead {
            used: last.map_or(0, |last| last as u32 + 1),
            ..all
        })?;
        Ok(damaged + usize::from(head.is_none()))
    }

    /// Clears every slot of which `is_over` says so. The table is locked.
    pub(crate) fn clear(&self, mut is_over: impl FnMut(u64) -> Result<bool>) -> Result<()> {
        for (i, slot) in self.slots()?.into_iter().enumerate() {
            let over = match slot {
                // Whose a damaged one is nobody knows: it is for `mend`.
                Lease::Free | Lease::Damaged => false,
                Lease::Of(generation) => is_over(generation)?,
            };
            if over {
                self.write(i, Lease::Free)?;
            }
        }
        Ok(())
    }

    /// Clears everything, and begins anew under another nonce. The table is locked.
    pub(crate) fn renew(&self, nonce: u64) -> Result<LeaseHead> {
        let free = Lease::Free.encode().repeat(LEASES);
        let at = self.area + LEASE_SLOTS;
        self.medium.store(at, &free)?;
        self.medium
            .write_back(at..at + free.len() as u64, Step::Lease)?;
        let head = LeaseHead {
            nonce: nonce.max(1),
            ..LeaseHead::FIRST
        };
        self.write_head(head)?;
        Ok(head)
    }

    /// Whether a lease here holds what was of `generation`.
    pub(crate) fn holds(&self, generation: u64, evicted: Option<u64>) -> Result<bool> {
        let head = self.head()?;
        if let (Some(head), Some(nonce)) = (head, evicted)
            && head.nonce == nonce
        {
            return Ok(false);
        }
        Ok(self
            .slots()?
            .iter()
            .any(|slot| matches!(slot, Lease::Damaged) || *slot == Lease::Of(generation)))
    }
}

/// Locks the leases of this host.
pub(crate) fn lock_table(fd: BorrowedFd<'_>, patience: Duration) -> Result<Guard<'_>> {
    lock::acquire(fd, LOCK_LEASES, Kind::Exclusive, patience, "the leases")
}

/// The lock of the kernel that is a lease on this host.
pub(crate) fn byte(generation: u64) -> u64 {
    LOCK_LEASE + generation
}

/// Whether a process of this host, other than through this descriptor, is attached.
pub(crate) fn is_attached_elsewhere(fd: BorrowedFd<'_>, generation: u64) -> Result<bool> {
    lock::is_held_elsewhere(fd, byte(generation))
}

/// Whether any process of this host, other than through this descriptor, is attached to anything.
pub(crate) fn is_anybody_attached(fd: BorrowedFd<'_>) -> Result<bool> {
    lock::is_any_held_elsewhere(fd, LOCK_LEASE, MOST_GENERATION)
}

/// Where a host's area is, for a medium that maps everything from the beginning.
pub(crate) fn area(superblock: &Superblock, host: HostId) -> u64 {
    superblock.area(host.0)
}
