//! The leases of a host: which generations it is attached to, for other hosts to see.

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::Seed;

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone, Copy)]
#[repr(C)]
struct RawLeaseHead {
    nonce: U64,
    used: U32,
    crc: U32,
}

/// The head of a host's leases.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LeaseHead {
    /// New when the host has been evicted; never 0.
    pub nonce: u64,
    /// Slots from this one on are free.
    pub used: u32,
}

impl LeaseHead {
    /// Its bytes.
    pub const SIZE: usize = size_of::<RawLeaseHead>();

    /// Of a host that was never attached to anything.
    pub const FIRST: Self = Self { nonce: 1, used: 0 };

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
        let valid = seed.crc(raw.as_bytes()) == crc.get() && raw.nonce.get() != 0;
        valid.then_some(Self {
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
        let generation = match self {
            Self::Of(generation) => generation,
            Self::Free | Self::Damaged => 0,
        };
        let mut bytes = [0; Self::SIZE];
        bytes[..8].copy_from_slice(&generation.to_le_bytes());
        bytes[8..].copy_from_slice(&(!generation).to_le_bytes());
        bytes
    }

    /// Reads one.
    pub fn decode(bytes: &[u8; Self::SIZE]) -> Self {
        let (pair, _): (&[[u8; 8]], _) = bytes.as_chunks::<8>();
        let (generation, complement) = (u64::from_le_bytes(pair[0]), u64::from_le_bytes(pair[1]));
        match generation {
            _ if generation != !complement => Self::Damaged,
            0 => Self::Free,
            _ => Self::Of(generation),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::flips;
    use super::*;

    #[test]
    fn what_is_written_is_read_and_one_flipped_bit_is_noticed() {
        let seed = Seed::of(7);
        let head = LeaseHead { nonce: 9, used: 4 };
        let bytes = head.encode(seed);
        assert_eq!(LeaseHead::decode(&bytes, seed), Some(head));
        for flipped in flips(bytes) {
            assert_eq!(LeaseHead::decode(&flipped, seed), None, "{flipped:x?}");
        }
        // What a lost line or page looks like.
        assert_eq!(LeaseHead::decode(&[0; LeaseHead::SIZE], seed), None);
        assert_eq!(Lease::decode(&[0; Lease::SIZE]), Lease::Damaged);
        for lease in [Lease::Free, Lease::Of(1), Lease::Of(u64::MAX / 2)] {
            let bytes = lease.encode();
            assert_eq!(Lease::decode(&bytes), lease);
            for flipped in flips(bytes) {
                assert_eq!(Lease::decode(&flipped), Lease::Damaged, "{flipped:x?}");
            }
        }
    }
}
