//! The record of a host: whether it writes, with which epoch, and in which arena.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::Seed;

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
    claim: U64,
    zeroes: U32,
    crc: U32,
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
    /// A later epoch that a host claims while the pool's state is still what it wrote with `epoch`;
    /// zero where it claims none.
    pub claim: u64,
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
            claim: 0,
        }
    }

    /// The latest epoch that it names.
    pub fn latest(&self) -> u64 {
        self.epoch.max(self.claim)
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
            claim: self.claim.into(),
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
            claim: raw.claim.get(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::flips;
    use super::*;

    #[test]
    fn what_is_written_is_read_and_one_flipped_bit_is_noticed() {
        let seed = Seed::of(7);
        let record = Record {
            epoch: 5,
            state: HostState::Active,
            claim: 7,
            ..Record::idle(2)
        };
        let bytes = record.encode(seed);
        assert_eq!(Record::decode(&bytes, seed), Some(record));
        assert_eq!(Record::decode(&bytes, Seed::of(1)), None);
        for flipped in flips(bytes) {
            assert_eq!(Record::decode(&flipped, seed), None, "{flipped:x?}");
        }
    }
}
