//! An entry of the log: one change to the namespaces of a pool.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{Extent, HALF, MOST_NAME, Seed};

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

#[cfg(test)]
mod tests {
    use super::super::EXTENT;
    use super::super::tests::flips;
    use super::*;

    #[test]
    fn what_is_written_is_read_and_one_flipped_bit_is_noticed() {
        assert_eq!(size_of::<RawHalf>() as u64, HALF);
        let seed = Seed::of(7);
        let generation = 9;
        let extent = Extent {
            offset: 8 * EXTENT,
            length: EXTENT,
        };
        let longest = "n".repeat(MOST_NAME).into_boxed_str();
        for operation in [
            Operation::Create {
                generation,
                extent,
                name: longest,
            },
            Operation::Remove { generation },
            Operation::Free { generation, extent },
            Operation::Resize { generation, extent },
            Operation::Quarantined { generation, extent },
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
            for flipped in flips(bytes) {
                assert_eq!(Entry::decode(&flipped, seed), None, "{flipped:x?}");
            }
        }
    }
}
