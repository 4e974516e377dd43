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
//! 48   8  zero
//! 56   4  zero
//! 60   4  crc
//! ```
//!
//! The pool's state is the log in the arena of the *active* record with the highest epoch. A host
//! that wants to write claims an epoch (`claiming`), reads that log to its end, writes what it says
//! to its own next arena, and becomes `active`. A writer that finds a record with a later epoch than
//! its own, claiming or active, after it has appended an entry, must not say that the entry holds.
//! Of claim and entry one comes first: either the writer sees the claim, or the claimer sees the
//! entry.
//!
//! # Entry
//!
//! Two equal halves of 128 bytes. A half is valid if its crc is right, and its turn, epoch and
//! sequence are the expected ones; an entry is valid if one of its halves is, and that one mends the
//! other. The log ends at the first entry that is not valid; if one of the eight behind it is valid,
//! or if it belongs to the checkpoint, the log is damaged.
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
//! | 5 quarantined | in a checkpoint: an extent in quarantine |
//! | 6 evict | the host's leases with this nonce do not count any more |
//!
//! # Leases of a host
//!
//! The head: nonce (8 bytes), number of slots that may be in use (4 bytes), crc over these 12 bytes
//! (4 bytes, from the incarnation). A slot: generation (8 bytes) and its bitwise complement; zero
//! and zero is free. A slot that is neither names an unknown generation, and holds everything in
//! quarantine until its host writes it anew.
//!
//! On one host the kernel knows who is alive: each process that is attached has a shared lock (an
//! open file description lock, `F_OFD_SETLK`) on byte 2^61 + generation of the device or file. A
//! slot whose byte nobody has locked is left over, and its host clears it. Appending is done with
//! byte 2^62 locked, leases are changed with byte 2^62 + 1 locked, and a heap with byte
//! 2^60 + generation.

use std::ops::Range;

use uuid::Uuid;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

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

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone, Copy)]
#[repr(C)]
struct RawSuperblock {
    magic: [u8; 8],
    version: U32,
    hosts: U16,
    zero: U16,
    uuid: [u8; 16],
    incarnation: U64,
    generation: U64,
    length: U64,
    area_length: U64,
    data_start: U64,
    entries: U64,
    zeroes: [u8; 44],
    crc: U32,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone, Copy)]
#[repr(C)]
struct RawRecord {
    generation: U64,
    epoch: U64,
    turn: U64,
    first_sequence: U64,
    next_generation: U64,
    checkpoint: U32,
    host: U16,
    state: U16,
    zero: U64,
    zeroes: U32,
    crc: U32,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone, Copy)]
#[repr(C)]
struct RawHalf {
    sequence: U64,
    epoch: U64,
    turn: U64,
    generation: U64,
    offset: U64,
    length: U64,
    operation: U16,
    name_length: u8,
    zero: u8,
    zeroes: [U32; 2],
    crc: U32,
    name: [u8; MOST_NAME],
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone, Copy)]
#[repr(C)]
struct RawLeaseHead {
    nonce: U64,
    used: U32,
    crc: U32,
}

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

/// A superblock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Superblock {
    /// Areas there are.
    pub hosts: u16,
    /// The pool's name for life.
    pub uuid: Uuid,
    /// New with every format.
    pub incarnation: u64,
    /// Of the superblock itself.
    pub generation: u64,
    /// Bytes of the pool.
    pub length: u64,
    /// Bytes of an area.
    pub area_length: u64,
    /// Entries that an arena holds.
    pub entries: u64,
}

/// What a place where a superblock should be holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Found {
    /// A valid superblock.
    Valid(Superblock),
    /// A superblock of another version.
    OtherVersion(u32),
    /// Zeroes.
    Nothing,
    /// Anything else.
    Damaged,
}

impl Superblock {
    /// Its bytes.
    pub const SIZE: usize = size_of::<RawSuperblock>();

    /// Where the extents begin.
    pub fn data_start(&self) -> u64 {
        EXTENT + u64::from(self.hosts) * self.area_length
    }

    /// Where a host's area begins.
    pub fn area(&self, host: u16) -> u64 {
        EXTENT + u64::from(host) * self.area_length
    }

    /// Where an entry is.
    pub fn entry(&self, host: u16, turn: u64, index: u64) -> u64 {
        self.area(host) + ARENAS + (turn % 2 * self.entries + index) * ENTRY
    }

    /// Where extents may be.
    pub fn data(&self) -> Range<u64> {
        self.data_start()..self.length
    }

    /// What the structures of this pool start their crc from.
    pub fn seed(&self) -> Seed {
        Seed::of(self.incarnation)
    }

    /// Writes it.
    pub fn encode(&self) -> [u8; Self::SIZE] {
        let mut raw = RawSuperblock {
            magic: MAGIC,
            version: VERSION.into(),
            hosts: self.hosts.into(),
            zero: 0.into(),
            uuid: self.uuid.into_bytes(),
            incarnation: self.incarnation.into(),
            generation: self.generation.into(),
            length: self.length.into(),
            area_length: self.area_length.into(),
            data_start: self.data_start().into(),
            entries: self.entries.into(),
            zeroes: [0; 44],
            crc: 0.into(),
        };
        raw.crc = crc32c::crc32c(raw.as_bytes()).into();
        zerocopy::transmute!(raw)
    }

    /// Reads one. What it says of lengths is checked, and can be computed with.
    pub fn decode(bytes: &[u8; Self::SIZE]) -> Found {
        if bytes.iter().all(|byte| *byte == 0) {
            return Found::Nothing;
        }
        let mut raw: RawSuperblock = zerocopy::transmute!(*bytes);
        let crc = std::mem::replace(&mut raw.crc, 0.into());
        if raw.magic != MAGIC || crc32c::crc32c(raw.as_bytes()) != crc.get() {
            return Found::Damaged;
        }
        if raw.version.get() != VERSION {
            return Found::OtherVersion(raw.version.get());
        }
        let superblock = Self {
            hosts: raw.hosts.get(),
            uuid: Uuid::from_bytes(raw.uuid),
            incarnation: raw.incarnation.get(),
            generation: raw.generation.get(),
            length: raw.length.get(),
            area_length: raw.area_length.get(),
            entries: raw.entries.get(),
        };
        if superblock.is_possible() && superblock.data_start() == raw.data_start.get() {
            Found::Valid(superblock)
        } else {
            Found::Damaged
        }
    }

    /// Whether everything lies where it can, without overflow.
    pub(crate) fn is_possible(&self) -> bool {
        let areas = self.area_length.checked_mul(u64::from(self.hosts));
        let arenas = self.entries.checked_mul(2 * ENTRY);
        (1..=MOST_HOSTS).contains(&self.hosts)
            && self.area_length >= EXTENT
            && self.area_length.is_multiple_of(EXTENT)
            && self.entries >= LEAST_ENTRIES
            && arenas
                .and_then(|bytes| bytes.checked_add(ARENAS))
                .is_some_and(|bytes| bytes <= self.area_length)
            && self.length.is_multiple_of(EXTENT)
            && self.length <= i64::MAX as u64
            && areas
                .and_then(|areas| areas.checked_add(2 * EXTENT))
                .is_some_and(|least| least <= self.length)
    }
}

/// Whether a host writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum HostState {
    /// It does not.
    Idle,
    /// It is about to take over.
    Claiming,
    /// It does, unless another's epoch is later.
    Active,
}

/// A host's record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Record {
    /// Of the record itself.
    pub generation: u64,
    /// With which this host writes.
    pub epoch: u64,
    /// Arenas this host has begun.
    pub turn: u64,
    /// Of the first entry of the arena.
    pub first_sequence: u64,
    /// That the next namespace got when the arena was begun.
    pub next_generation: u64,
    /// Entries that stand for all that was before.
    pub checkpoint: u32,
    /// Whose it is.
    pub host: u16,
    /// Whether it writes.
    pub state: HostState,
}

impl Record {
    /// Its bytes: one line.
    pub const SIZE: usize = size_of::<RawRecord>();

    /// The record of a host that has never written.
    pub fn idle(host: u16) -> Self {
        Self {
            generation: 0,
            epoch: 0,
            turn: 0,
            first_sequence: 1,
            next_generation: 1,
            checkpoint: 0,
            host,
            state: HostState::Idle,
        }
    }

    /// Writes it.
    pub fn encode(&self, seed: Seed) -> [u8; Self::SIZE] {
        let mut raw = RawRecord {
            generation: self.generation.into(),
            epoch: self.epoch.into(),
            turn: self.turn.into(),
            first_sequence: self.first_sequence.into(),
            next_generation: self.next_generation.into(),
            checkpoint: self.checkpoint.into(),
            host: self.host.into(),
            state: match self.state {
                HostState::Idle => 0,
                HostState::Claiming => 1,
                HostState::Active => 2,
            }
            .into(),
            zero: 0.into(),
            zeroes: 0.into(),
            crc: 0.into(),
        };
        raw.crc = seed.crc(raw.as_bytes()).into();
        zerocopy::transmute!(raw)
    }

    /// Reads one, if it is valid.
    pub fn decode(bytes: &[u8; Self::SIZE], seed: Seed) -> Option<Self> {
        let mut raw: RawRecord = zerocopy::transmute!(*bytes);
        let crc = std::mem::replace(&mut raw.crc, 0.into());
        if seed.crc(raw.as_bytes()) != crc.get() {
            return None;
        }
        Some(Self {
            generation: raw.generation.get(),
            epoch: raw.epoch.get(),
            turn: raw.turn.get(),
            first_sequence: raw.first_sequence.get(),
            next_generation: raw.next_generation.get(),
            checkpoint: raw.checkpoint.get(),
            host: raw.host.get(),
            state: match raw.state.get() {
                0 => HostState::Idle,
                1 => HostState::Claiming,
                2 => HostState::Active,
                _ => return None,
            },
        })
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

/// What an entry says.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Operation {
    /// A namespace is there.
    Create {
        /// Its generation.
        generation: u64,
        /// Where it lies.
        extent: Extent,
        /// What it is called.
        name: Box<str>,
    },
    /// Its name is free, and its extent in quarantine.
    Remove {
        /// Its generation.
        generation: u64,
    },
    /// An extent leaves quarantine.
    Free {
        /// Of the namespace that it was part of.
        generation: u64,
        /// What can be used again.
        extent: Extent,
    },
    /// A namespace has another length.
    Resize {
        /// Its generation.
        generation: u64,
        /// Where it lies from now on.
        extent: Extent,
    },
    /// An extent is in quarantine.
    Quarantined {
        /// Of the namespace that it was part of.
        generation: u64,
        /// What cannot be used yet.
        extent: Extent,
    },
    /// A host is dead, and its leases with it.
    Evict {
        /// The host.
        host: u16,
        /// Of its leases.
        nonce: u64,
    },
}

/// An entry: what it says, and where in the log it belongs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Counts the entries of the pool, over all arenas.
    pub sequence: u64,
    /// Of the writer.
    pub epoch: u64,
    /// Of the arena.
    pub turn: u64,
    /// What it says.
    pub operation: Operation,
}

impl Entry {
    /// Writes one of its two halves.
    pub fn encode(&self, seed: Seed) -> [u8; HALF as usize] {
        let none = Extent {
            offset: 0,
            length: 0,
        };
        let (operation, generation, extent, name) = match &self.operation {
            Operation::Create {
                generation,
                extent,
                name,
            } => (1, *generation, *extent, &**name),
            Operation::Remove { generation } => (2, *generation, none, ""),
            Operation::Free { generation, extent } => (3, *generation, *extent, ""),
            Operation::Resize { generation, extent } => (4, *generation, *extent, ""),
            Operation::Quarantined { generation, extent } => (5, *generation, *extent, ""),
            Operation::Evict { host, nonce } => {
                let host = Extent {
                    offset: (*host).into(),
                    length: 0,
                };
                (6, *nonce, host, "")
            }
        };
        let mut raw = RawHalf {
            sequence: self.sequence.into(),
            epoch: self.epoch.into(),
            turn: self.turn.into(),
            generation: generation.into(),
            offset: extent.offset.into(),
            length: extent.length.into(),
            operation: operation.into(),
            name_length: 0,
            zero: 0,
            zeroes: [0.into(); 2],
            crc: 0.into(),
            name: [0; MOST_NAME],
        };
        // Names are checked where they come in; a longer one would be cut, and fail to be read.
        for (to, from) in raw.name.iter_mut().zip(name.bytes()) {
            *to = from;
            raw.name_length += 1;
        }
        raw.crc = seed.crc(raw.as_bytes()).into();
        zerocopy::transmute!(raw)
    }

    /// Reads one of its halves, if it is valid.
    pub fn decode(half: &[u8; HALF as usize], seed: Seed) -> Option<Self> {
        let mut raw: RawHalf = zerocopy::transmute!(*half);
        let crc = std::mem::replace(&mut raw.crc, 0.into());
        if seed.crc(raw.as_bytes()) != crc.get() {
            return None;
        }
        let generation = raw.generation.get();
        let extent = Extent {
            offset: raw.offset.get(),
            length: raw.length.get(),
        };
        let name = raw.name.get(..raw.name_length.into())?;
        let name = std::str::from_utf8(name).ok()?;
        let operation = match raw.operation.get() {
            1 => Operation::Create {
                generation,
                extent,
                name: name.into(),
            },
            2 => Operation::Remove { generation },
            3 => Operation::Free { generation, extent },
            4 => Operation::Resize { generation, extent },
            5 => Operation::Quarantined { generation, extent },
            6 => Operation::Evict {
                host: extent.offset.try_into().ok()?,
                nonce: generation,
            },
            _ => return None,
        };
        Some(Self {
            sequence: raw.sequence.get(),
            epoch: raw.epoch.get(),
            turn: raw.turn.get(),
            operation,
        })
    }
}

/// The head of a host's leases.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LeaseHead {
    /// New when the host has been evicted.
    pub nonce: u64,
    /// Slots from this one on are free.
    pub used: u32,
}

impl LeaseHead {
    /// Its bytes.
    pub const SIZE: usize = size_of::<RawLeaseHead>();

    /// Writes it.
    pub fn encode(&self, seed: Seed) -> [u8; Self::SIZE] {
        let mut raw = RawLeaseHead {
            nonce: self.nonce.into(),
            used: self.used.into(),
            crc: 0.into(),
        };
        raw.crc = seed.crc(raw.as_bytes()).into();
        zerocopy::transmute!(raw)
    }

    /// Reads one, if it is valid.
    pub fn decode(bytes: &[u8; Self::SIZE], seed: Seed) -> Option<Self> {
        let mut raw: RawLeaseHead = zerocopy::transmute!(*bytes);
        let crc = std::mem::replace(&mut raw.crc, 0.into());
        (seed.crc(raw.as_bytes()) == crc.get()).then_some(Self {
            nonce: raw.nonce.get(),
            used: raw.used.get(),
        })
    }
}

/// What a slot of the leases holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Lease {
    /// Nothing.
    Free,
    /// A generation that this host is attached to.
    Of(u64),
    /// Something that cannot be read.
    Damaged,
}

impl Lease {
    /// Bytes of a slot.
    pub const SIZE: usize = 16;

    /// Writes it; a damaged one as free.
    pub fn encode(self) -> [u8; Self::SIZE] {
        let mut bytes = [0; Self::SIZE];
        if let Self::Of(generation) = self {
            bytes[..8].copy_from_slice(&generation.to_le_bytes());
            bytes[8..].copy_from_slice(&(!generation).to_le_bytes());
        }
        bytes
    }

    /// Reads one.
    pub fn decode(bytes: &[u8; Self::SIZE]) -> Self {
        let (pair, _): (&[[u8; 8]], _) = bytes.as_chunks::<8>();
        let (generation, complement) = (u64::from_le_bytes(pair[0]), u64::from_le_bytes(pair[1]));
        match generation {
            0 if complement == 0 => Self::Free,
            _ if generation == !complement => Self::Of(generation),
            _ => Self::Damaged,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SEED: u64 = 0x0123_4567_89ab_cdef;

    #[test]
    fn structures_have_the_sizes_that_the_format_says() {
        assert_eq!(Superblock::SIZE, 128);
        assert_eq!(Record::SIZE, 64);
        assert_eq!(size_of::<RawHalf>() as u64, HALF);
        assert_eq!(LeaseHead::SIZE, 16);
        let slots = LEASE_SLOTS + (LEASES * Lease::SIZE) as u64;
        assert!(slots <= ARENAS && ARENAS < EXTENT);
    }

    #[test]
    fn what_is_written_is_read_and_one_flipped_bit_is_noticed() {
        let superblock = Superblock {
            hosts: 3,
            uuid: Uuid::from_u128(7),
            incarnation: SEED,
            generation: 1,
            length: 64 * EXTENT,
            area_length: 2 * EXTENT,
            entries: 100,
        };
        let bytes = superblock.encode();
        assert_eq!(Superblock::decode(&bytes), Found::Valid(superblock));
        for bit in 0..bytes.len() * 8 {
            let mut flipped = bytes;
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(Superblock::decode(&flipped), Found::Damaged, "bit {bit}");
        }

        let seed = superblock.seed();
        let record = Record {
            epoch: 5,
            state: HostState::Active,
            ..Record::idle(2)
        };
        let bytes = record.encode(seed);
        assert_eq!(Record::decode(&bytes, seed), Some(record));
        assert_eq!(Record::decode(&bytes, Seed::of(1)), None);
        for bit in 0..bytes.len() * 8 {
            let mut flipped = bytes;
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(Record::decode(&flipped, seed), None, "bit {bit}");
        }

        let extent = Extent {
            offset: 8 * EXTENT,
            length: EXTENT,
        };
        let longest = "n".repeat(MOST_NAME).into_boxed_str();
        for operation in [
            Operation::Create {
                generation: 9,
                extent,
                name: longest,
            },
            Operation::Remove { generation: 9 },
            Operation::Free {
                generation: 9,
                extent,
            },
            Operation::Resize {
                generation: 9,
                extent,
            },
            Operation::Quarantined {
                generation: 9,
                extent,
            },
            Operation::Evict { host: 3, nonce: 4 },
        ] {
            let entry = Entry {
                sequence: 3,
                epoch: 5,
                turn: 1,
                operation,
            };
            let bytes = entry.encode(seed);
            assert_eq!(Entry::decode(&bytes, seed), Some(entry));
            for bit in 0..bytes.len() * 8 {
                let mut flipped = bytes;
                flipped[bit / 8] ^= 1 << (bit % 8);
                assert_eq!(Entry::decode(&flipped, seed), None, "bit {bit}");
            }
        }

        let head = LeaseHead { nonce: 9, used: 4 };
        assert_eq!(LeaseHead::decode(&head.encode(seed), seed), Some(head));
        for lease in [Lease::Free, Lease::Of(1), Lease::Of(u64::MAX / 2)] {
            let bytes = lease.encode();
            assert_eq!(Lease::decode(&bytes), lease);
            for bit in 0..bytes.len() * 8 {
                let mut flipped = bytes;
                flipped[bit / 8] ^= 1 << (bit % 8);
                assert_eq!(Lease::decode(&flipped), Lease::Damaged, "bit {bit}");
            }
        }
    }

    #[test]
    fn a_superblock_that_contradicts_itself_is_damaged() {
        let good = Superblock {
            hosts: 1,
            uuid: Uuid::nil(),
            incarnation: SEED,
            generation: 1,
            length: 8 * EXTENT,
            area_length: EXTENT,
            entries: 8,
        };
        assert!(matches!(
            Superblock::decode(&good.encode()),
            Found::Valid(_)
        ));
        for bad in [
            Superblock { hosts: 0, ..good },
            Superblock {
                hosts: MOST_HOSTS + 1,
                ..good
            },
            Superblock {
                area_length: 0,
                ..good
            },
            Superblock {
                area_length: 1 << 62,
                ..good
            },
            Superblock {
                area_length: EXTENT + 1,
                ..good
            },
            Superblock { entries: 7, ..good },
            Superblock {
                entries: 1 << 40,
                ..good
            },
            Superblock {
                length: EXTENT,
                ..good
            },
            Superblock {
                length: u64::MAX - EXTENT + 1,
                ..good
            },
        ] {
            // `data_start` would overflow in some: they are written by hand.
            let mut raw: RawSuperblock = zerocopy::transmute!(good.encode());
            raw.hosts = bad.hosts.into();
            raw.area_length = bad.area_length.into();
            raw.length = bad.length.into();
            raw.entries = bad.entries.into();
            raw.crc = 0.into();
            raw.crc = crc32c::crc32c(raw.as_bytes()).into();
            let bytes: [u8; Superblock::SIZE] = zerocopy::transmute!(raw);
            assert_eq!(Superblock::decode(&bytes), Found::Damaged, "{bad:?}");
        }
    }
}
