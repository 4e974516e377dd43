//! The superblock: how a pool is divided.

use std::ops::Range;

use uuid::Uuid;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{ARENAS, ENTRY, EXTENT, LEAST_ENTRIES, MAGIC, MOST_HOSTS, Seed, VERSION};

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
    /// A pool is being made here, or its making was cut short.
    Unfinished,
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

    /// Writes what is there while a pool is made: eight bytes, so that it is there or not.
    pub fn unfinished() -> [u8; Self::SIZE] {
        let mut bytes = [0; Self::SIZE];
        bytes[..MAGIC.len()].copy_from_slice(&MAGIC);
        bytes
    }

    /// Reads one. What it says of lengths is checked, and can be computed with.
    pub fn decode(bytes: &[u8; Self::SIZE]) -> Found {
        if bytes.iter().all(|byte| *byte == 0) {
            return Found::Nothing;
        }
        if *bytes == Self::unfinished() {
            return Found::Unfinished;
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

#[cfg(test)]
mod tests {
    use super::super::tests::flips;
    use super::*;

    const INCARNATION: u64 = 0x0123_4567_89ab_cdef;

    #[test]
    fn what_is_written_is_read_and_one_flipped_bit_is_noticed() {
        let superblock = Superblock {
            hosts: 3,
            uuid: Uuid::from_u128(7),
            incarnation: INCARNATION,
            generation: 1,
            length: 64 * EXTENT,
            area_length: 2 * EXTENT,
            entries: 100,
        };
        let bytes = superblock.encode();
        assert_eq!(Superblock::decode(&bytes), Found::Valid(superblock));
        for flipped in flips(bytes) {
            assert_eq!(Superblock::decode(&flipped), Found::Damaged, "{flipped:x?}");
        }
    }

    #[test]
    fn a_superblock_that_contradicts_itself_is_damaged() {
        let good = Superblock {
            hosts: 1,
            uuid: Uuid::nil(),
            incarnation: INCARNATION,
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
