//! The ValidMR store: every node publishes its regions in a table that peers READ, and callers keep
//! what they read for one lease. Deregistration takes the entry from the table at once and the
//! region away one lease later, so that no caller's entry outlives the region (section 4.4).

use std::sync::Arc;
use std::time::Duration;

use carlsbad_types::ByteSize;

use crate::error::{Error, Result};
use crate::region::{Access, MemoryRegion, RKey, Sealed};

/// How many regions a node may have registered.
pub(crate) const MAX_REGIONS: usize = 4096;
/// Bytes of one entry of the table.
pub(crate) const ENTRY: u64 = 32;
/// The table is itself a region, under the key that every peer knows.
pub(crate) const TABLE_KEY: RKey = RKey(0);
/// Where receivers of large messages say that they have fetched them.
pub(crate) const ACKS_KEY: RKey = RKey(1);
/// Keys below are the node's own.
pub(crate) const RESERVED_KEYS: u32 = 16;

/// What the table says of a region.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RegionEntry {
    pub(crate) len: u64,
    pub(crate) access: Access,
}

/// Where the entry of a key is: the low bits of a key are its slot, the others a generation.
pub(crate) fn offset(key: RKey) -> u64 {
    u64::from(key.0) % MAX_REGIONS as u64 * ENTRY
}

fn sum(words: [u64; 3]) -> u64 {
    words.iter().fold(0x6B72_636F_7265, |sum, word| {
        (sum ^ word)
            .wrapping_mul(0x9E37_79B9_7F4A_7C15)
            .rotate_left(29)
    })
}

pub(crate) fn encode(key: RKey, entry: RegionEntry) -> [u8; ENTRY as usize] {
    let access = match entry.access {
        Access::Local => 0,
        Access::Read => 1,
        Access::ReadWrite => 2,
    };
    let words = [u64::from(key.0), entry.len, access];
    let mut bytes = [0; ENTRY as usize];
    for (to, word) in bytes
        .chunks_exact_mut(8)
        .zip([words[0], words[1], words[2], sum(words)])
    {
        to.copy_from_slice(&word.to_le_bytes());
    }
    bytes
}

/// The entry, where the bytes are one, whole, and of that key.
pub(crate) fn decode(key: RKey, bytes: &[u8; ENTRY as usize]) -> Option<RegionEntry> {
    let mut words = [0; 4];
    for (word, from) in words.iter_mut().zip(bytes.as_chunks::<8>().0) {
        *word = u64::from_le_bytes(*from);
    }
    let [named, len, access, check] = words;
    if check != sum([named, len, access]) || named != u64::from(key.0) {
        return None;
    }
    let access = match access {
        0 => Access::Local,
        1 => Access::Read,
        2 => Access::ReadWrite,
        _ => return None,
    };
    Some(RegionEntry { len, access })
}

/// A node's own regions.
#[derive(Debug)]
pub(crate) struct Regions {
    pub(crate) table: Arc<MemoryRegion>,
    owner: u64,
    free: Vec<u32>,
    live: Vec<Arc<MemoryRegion>>,
    leaving: Vec<(Duration, RKey)>,
}

impl Regions {
    pub(crate) fn new(owner: u64) -> Result<Self> {
        let size = ByteSize::new(MAX_REGIONS as u64 * ENTRY);
        let table = MemoryRegion::create(size, Access::Read, TABLE_KEY, owner)?;
        // A key's next generation is the key plus MAX_REGIONS.
        let free = (RESERVED_KEYS..MAX_REGIONS as u32).rev().collect();
        Ok(Self {
            table,
            owner,
            free,
            live: Vec::new(),
            leaving: Vec::new(),
        })
    }

    pub(crate) fn len(&self) -> usize {
        self.live.len()
    }

    /// Gives memory a key. It is published when [`publish`](Self::publish) is called, after the
    /// fabric knows it.
    pub(crate) fn add(&mut self, memory: Sealed, access: Access) -> Result<Arc<MemoryRegion>> {
        let key = self.free.pop().ok_or(Error::TooManyRegions(MAX_REGIONS))?;
        let region = MemoryRegion::over(memory, access, RKey(key), self.owner);
        self.live.push(Arc::clone(&region));
        Ok(region)
    }

    pub(crate) fn publish(&self, region: &MemoryRegion) {
        let entry = RegionEntry {
            len: region.len() as u64,
            access: region.access(),
        };
        let _inside = self
            .table
            .write(offset(region.key()), &encode(region.key(), entry));
    }

    /// Takes a region from the table. Until `until` it may still be reached.
    pub(crate) fn remove(&mut self, region: &Arc<MemoryRegion>, until: Duration) -> Result<()> {
        let at = self
            .live
            .iter()
            .position(|one| Arc::ptr_eq(one, region))
            .ok_or(Error::NotRegistered)?;
        self.live.swap_remove(at);
        let key = region.key();
        let _inside = self.table.write(offset(key), &[0; ENTRY as usize]);
        self.leaving.push((until, key));
        Ok(())
    }

    /// The keys whose last lease has ended: they may be revoked.
    pub(crate) fn expired(&mut self, now: Duration) -> Vec<RKey> {
        let mut gone = Vec::new();
        self.leaving.retain(|(end, key)| {
            let stays = *end > now;
            if !stays {
                gone.push(*key);
            }
            stays
        });
        for key in &gone {
            // A slot whose generations are used up is never used again.
            if let Some(next) = key.0.checked_add(MAX_REGIONS as u32) {
                self.free.insert(0, next);
            }
        }
        gone
    }

    /// Takes every entry from the table: the node is leaving.
    pub(crate) fn clear(&mut self) {
        let _inside = self.table.write(0, &vec![0; MAX_REGIONS * ENTRY as usize]);
        self.live.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_says_what_it_was_made_of_and_only_whole_and_for_its_key() {
        let entry = RegionEntry {
            len: 4096,
            access: Access::ReadWrite,
        };
        let bytes = encode(RKey(77), entry);
        assert_eq!(decode(RKey(77), &bytes), Some(entry));
        assert_eq!(decode(RKey(77 + MAX_REGIONS as u32), &bytes), None);
        for bit in 0..bytes.len() * 8 {
            let mut torn = bytes;
            torn[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(decode(RKey(77), &torn), None, "bit {bit}");
        }
    }

    #[test]
    fn a_key_comes_back_only_as_another_generation() {
        let mut regions = Regions::new(1).unwrap();
        let memory = || Sealed::create(c"test", 4096).unwrap();
        let first = regions.add(memory(), Access::Read).unwrap();
        regions.remove(&first, Duration::from_secs(5)).unwrap();
        assert!(regions.expired(Duration::from_secs(4)).is_empty());
        assert_eq!(regions.expired(Duration::from_secs(5)), [first.key()]);
        assert!(regions.remove(&first, Duration::ZERO).is_err());
        assert_eq!(
            regions.free.first(),
            Some(&(first.key().0 + MAX_REGIONS as u32))
        );
    }

    /// Leases are counted by the monotonic clock, which the setting of the time does not move. A
    /// suspended machine makes it stand still; whatever it says, nothing goes before its time.
    #[test]
    fn a_clock_that_jumps_ends_no_lease_early_and_each_once() {
        let mut regions = Regions::new(1).unwrap();
        let memory = Sealed::create(c"test", 4096).unwrap();
        let region = regions.add(memory, Access::Read).unwrap();
        regions.remove(&region, Duration::from_secs(100)).unwrap();
        for now in [99, 0, 50] {
            assert!(regions.expired(Duration::from_secs(now)).is_empty());
        }
        assert_eq!(regions.expired(Duration::MAX), [region.key()]);
        assert!(regions.expired(Duration::MAX).is_empty());
    }
}
