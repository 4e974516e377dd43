//! The on-media format, version 1: every byte of it, so that a program in any language can read it.
//!
//! Numbers are little-endian. Places are offsets from the beginning of the device or file, never
//! addresses. `crc` is CRC-32C (Castagnoli) over the structure with its own four bytes as zero,
//! started from the CRC-32C of the pool's incarnation (8 bytes) where a structure belongs to a pool.
//!
//! # The whole
//!
//! ```text
//! 0            superblock, first copy                            128 bytes
//! 4096         superblock, second copy                           128 bytes
//! 2 MiB        area of host 0                                    `area_length` bytes
//! ...          area of host 1, 2, ... `hosts` - 1
//! data_start   extents of namespaces, each at a multiple of 2 MiB, until `length`
//! ```
//!
//! Each host writes to its own area only, so that no line of it is written by two hosts, and nothing
//! in the format needs an atomic operation between hosts. An area is a multiple of 2 MiB, so that a
//! reader can map its own for writing and everything else read-only.
//!
//! # Superblock
//!
//! A magic and 120 zeroes in either place are a pool whose formatting was not finished: it is written
//! there first, and the superblock last.
//!
//! ```text
//! 0    8  magic "DCXLPOOL"
//! 8    4  version, 1
//! 12   2  hosts: areas there are, 1 to 64
//! 14   2  zero
//! 16  16  uuid of the pool
//! 32   8  incarnation: random, new with every format
//! 40   8  generation: of the superblock; the valid copy with the higher one holds
//! 48   8  length of the pool, a multiple of 2 MiB
//! 56   8  area_length
//! 64   8  data_start, 2 MiB + hosts x area_length
//! 72   8  entries: that an arena holds
//! 80  44  zero
//! 124  4  crc (from zero: the incarnation is inside)
//! ```
//!
//! # Area of a host
//!
//! ```text
//! 0        record, first copy                 64 bytes
//! 4096     record, second copy                64 bytes
//! 8192     head of the leases                 64 bytes
//! 8256     leases: 2048 of 16 bytes
//! 65536    arena 0: `entries` entries of 256 bytes
//! ...      arena 1: as many, directly behind
//! ```
//!
//! # Record of a host
//!
//! ```text
//! 0    8  generation of this record; the valid copy with the higher one holds
//! 8    8  epoch with which this host writes
//! 16   8  turn: counts the arenas this host has begun; the arena in use is turn mod 2
//! 24   8  sequence of the first entry
//! 32   8  generation that the next namespace gets, when the arena was begun
//! 40   4  checkpoint: so many entries at the beginning stand for all that was before
//! 44   2  host
//! 46   2  state: 0 idle, 1 claiming, 2 active
//! 48   8  claim: a later epoch that an active host claims, or zero
//! 56   4  zero
//! 60   4  crc
//! ```
//!
//! The first copy is written first: where it is valid it is the later one. Formatting writes an idle
//! record for every host. Zeroes are no record: they are what a lost line or page looks like.
//!
//! The pool's state is the log in the arena of the *active* record with the highest epoch. A host
//! that wants to write claims an epoch (`claiming`), reads that log to its end, writes what it says
//! to its own next arena, and becomes `active`. Where the log is in its own arena its record has to
//! stay active: it claims in that record's field for it. A writer that finds a record with a later
//! epoch or claim than its own, after it has appended an entry, must not say that the entry holds.
//! Of claim and entry one comes first: either the writer sees the claim, or the claimer sees the
//! entry.
//!
//! # Entry
//!
//! Two equal halves of 128 bytes. A half is valid if its crc is right, and its turn, epoch and
//! sequence are the expected ones; an entry is valid if one of its halves is, and that one mends the
//! other. The log ends at the first entry that is not valid; if one of the 256 behind it in the arena is
//! valid, or if it belongs to the checkpoint, the log is damaged.
//!
//! ```text
//! 0    8  sequence
//! 8    8  epoch
//! 16   8  turn
//! 24   8  generation of the namespace (operation 6: the nonce of the evicted host's leases)
//! 32   8  offset (operation 6: the host)
//! 40   8  length in bytes, a multiple of 2 MiB
//! 48   2  operation
//! 50   1  length of the name
//! 51   1  zero
//! 52   4  zero
//! 56   4  zero
//! 60   4  crc
//! 64  64  name, UTF-8
//! ```
//!
//! | operation | |
//! |---|---|
//! | 1 create | the extent is the namespace's, under this name |
//! | 2 remove | the name is free; the extent is in quarantine until no lease names the generation |
//! | 3 free | the extent, which was in quarantine, can be used again |
//! | 4 resize | the extent, which begins where it did, replaces the old one; a cut tail is in quarantine |
//! | 5 quarantined | the extent is in quarantine: in a checkpoint, or reserved for a namespace that is being made |
//! | 6 evict | the host's leases with this nonce do not count any more |
//!
//! # Leases of a host
//!
//! ```text
//! 0    8  nonce, from 1: another one when the host comes back after it was evicted
//! 8    4  used: slots from this one on are free
//! 12   4  crc over these 16 bytes
//! ```
//!
//! A slot:
//!
//! ```text
//! 0    8  generation that a process of the host is attached to; 0 in a slot that is free
//! 8    8  its bitwise complement, also in a slot that is free
//! ```
//!
//! Formatting writes a head with nonce 1, and 2048 free slots. Neither has a copy: damage, zeroes
//! among it, gives nothing away. A slot that is none of these names an unknown generation, and holds
//! everything in quarantine; where the head is damaged every slot counts, whatever was evicted. So it
//! is until the host writes them anew.
//!
//! On one host the kernel knows who is alive: each process that is attached has a shared lock (an
//! open file description lock, `F_OFD_SETLK`) on byte 2^61 + generation of the device or file. A
//! slot whose byte nobody has locked is left over, and its host clears it. Appending is done with
//! byte 2^62 locked, leases are changed with byte 2^62 + 1 locked, and a heap with byte
//! 2^60 + generation.

mod entry;
mod lease;
mod record;
mod superblock;

use std::ops::Range;

pub use entry::{Entry, Operation};
pub use lease::{Lease, LeaseHead};
pub use record::{HostState, Record};
pub use superblock::{Found, Superblock};

/// Extents begin and end at multiples of it, as do areas: the size of a huge page.
pub const EXTENT: u64 = 2 << 20;
/// The version of the format.
pub const VERSION: u32 = 1;
/// What a superblock begins with.
pub const MAGIC: [u8; 8] = *b"DCXLPOOL";
/// The most hosts that a pool may have areas for.
pub const MOST_HOSTS: u16 = 64;
/// The longest name, in bytes.
pub const MOST_NAME: usize = 64;
/// Where the two copies of the superblock are.
pub const SUPERBLOCKS: [u64; 2] = [0, 4096];
/// Where the two copies of the record are in an area.
pub const RECORDS: [u64; 2] = [0, 4096];
/// Where the head of the leases is in an area.
pub const LEASE_HEAD: u64 = 8192;
/// Where the slots are in an area.
pub const LEASE_SLOTS: u64 = LEASE_HEAD + 64;
/// How many slots there are.
pub const LEASES: usize = 2048;
/// Where arena 0 is in an area.
pub const ARENAS: u64 = 65536;
/// Bytes of an entry: two halves.
pub const ENTRY: u64 = 256;
/// The smallest arena.
pub const LEAST_ENTRIES: u64 = 8;
/// Bytes of half an entry.
pub const HALF: u64 = 128;

/// The lock on appending to the log.
pub(crate) const LOCK_APPEND: u64 = 1 << 62;
/// The lock on the leases of this host.
pub(crate) const LOCK_LEASES: u64 = (1 << 62) + 1;
/// The shared lock of whoever is attached to generation 0; others follow.
pub(crate) const LOCK_LEASE: u64 = 1 << 61;
/// The lock of the heap in generation 0; others follow.
pub(crate) const LOCK_HEAP: u64 = 1 << 60;
/// Generations stay below it, so that lock ranges do not meet.
pub(crate) const MOST_GENERATION: u64 = 1 << 59;

/// What every crc of a pool starts from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seed(u32);

impl Seed {
    /// Of a pool's incarnation.
    pub fn of(incarnation: u64) -> Self {
        Self(crc32c::crc32c(&incarnation.to_le_bytes()))
    }

    fn crc(self, bytes: &[u8]) -> u32 {
        crc32c::crc32c_append(self.0, bytes)
    }
}

/// A piece of the pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Extent {
    /// Where it begins.
    pub offset: u64,
    /// Its bytes.
    pub length: u64,
}

impl Extent {
    /// Where it ends.
    pub fn end(&self) -> u64 {
        self.offset.saturating_add(self.length)
    }

    /// From beginning to end.
    pub fn range(&self) -> Range<u64> {
        self.offset..self.end()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structures_have_the_sizes_that_the_format_says() {
        assert_eq!(Superblock::SIZE, 128);
        assert_eq!(Record::SIZE, 64);
        assert_eq!(HALF * 2, ENTRY);
        assert_eq!(LeaseHead::SIZE, 16);
        let slots = LEASE_SLOTS + (LEASES * Lease::SIZE) as u64;
        assert!(slots <= ARENAS && ARENAS < EXTENT);
    }

    /// Every bit of a structure, flipped one at a time.
    pub(super) fn flips<const N: usize>(bytes: [u8; N]) -> impl Iterator<Item = [u8; N]> {
        (0..N * 8).map(move |bit| {
            let mut flipped = bytes;
            flipped[bit / 8] ^= 1 << (bit % 8);
            flipped
        })
    }
}
