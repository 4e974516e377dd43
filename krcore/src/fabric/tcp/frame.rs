//! The frames of the protocol. Requests go from who dialled to who accepted, replies back. Decoding
//! takes any bytes and allocates nothing: what a frame carries is borrowed from the record it came
//! in, so that nothing grows with what a peer merely announces.

use serde::de::{Deserializer, Visitor};
use serde::ser::Serializer;
use serde::{Deserialize, Serialize};

use crate::fabric::{DcAddress, SEND_HEADER};

/// The most bytes of a READ or a WRITE that one frame carries.
pub(super) const CHUNK: usize = 16 << 10;
/// The longest frame: a chunk, and what goes before it.
pub(super) const LONGEST: usize = CHUNK + 128;

/// Bytes that are borrowed from the record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Bytes<'a>(pub(super) &'a [u8]);

impl Serialize for Bytes<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(self.0)
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for Bytes<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Borrowed;
        impl<'de> Visitor<'de> for Borrowed {
            type Value = Bytes<'de>;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("bytes")
            }
            fn visit_borrowed_bytes<E>(self, bytes: &'de [u8]) -> Result<Self::Value, E> {
                Ok(Bytes(bytes))
            }
        }
        deserializer.deserialize_bytes(Borrowed)
    }
}

/// Whose request it is: a queue pair of the dialling side, and how many it had posted before.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Tag {
    pub(super) pair: u64,
    pub(super) seq: u64,
}

/// Where at the accepting side.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Place {
    pub(super) to: DcAddress,
    pub(super) key: u32,
    pub(super) offset: u64,
}

/// One frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Frame<'a> {
    /// What each side says first: after how many milliseconds of silence it gives the link up, and
    /// the port at which it listens, or 0.
    Hello {
        limit: u32,
        port: u16,
    },
    /// A node that can be reached on the dialling side.
    Node(DcAddress),
    /// A node that no longer can.
    Left(DcAddress),
    /// Where is this node?
    Ask {
        question: u64,
        node: u64,
    },
    /// There, or not on this side.
    Told {
        question: u64,
        address: Option<DcAddress>,
    },
    /// The dialling side says this when it has said nothing for a while.
    Ping,
    /// And the accepting side this.
    Pong,
    /// A pair that broke is no more: its number can be forgotten.
    Close {
        pair: u64,
    },
    Read {
        tag: Tag,
        at: Place,
        len: u64,
    },
    /// Bytes `from` and on of a WRITE of `len`.
    Write {
        tag: Tag,
        at: Place,
        len: u64,
        from: u64,
        #[serde(borrow)]
        bytes: Bytes<'a>,
    },
    CompareSwap {
        tag: Tag,
        at: Place,
        expected: u64,
        new: u64,
    },
    FetchAdd {
        tag: Tag,
        at: Place,
        add: u64,
    },
    Send {
        tag: Tag,
        to: DcAddress,
        service: u16,
        #[serde(borrow)]
        header: Bytes<'a>,
        #[serde(borrow)]
        body: Bytes<'a>,
    },
    /// Bytes `from` and on of what a READ or an atomic found.
    Data {
        tag: Tag,
        from: u64,
        #[serde(borrow)]
        bytes: Bytes<'a>,
    },
    /// This request of the pair and all before it are done.
    Done(Tag),
    /// All before it are done, and this one has failed.
    Failed {
        tag: Tag,
        status: u8,
    },
}

/// The bytes are no frame of this protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Garbled;

impl<'a> Frame<'a> {
    /// Appends the frame to a record.
    pub(super) fn encode(&self, record: &mut Vec<u8>) {
        // An encoder that only appends cannot fail.
        if let Ok(longer) = postcard::to_extend(self, std::mem::take(record)) {
            *record = longer;
        }
    }

    /// The first frame of `record`, and what follows it.
    pub(super) fn decode(record: &'a [u8]) -> Result<(Self, &'a [u8]), Garbled> {
        let (frame, rest) = postcard::take_from_bytes::<Self>(record).map_err(|_| Garbled)?;
        let fits = match frame {
            Self::Write {
                len, from, bytes, ..
            } => {
                // Chunks are never empty, so that a WRITE comes to its end.
                !bytes.0.is_empty()
                    && bytes.0.len() <= CHUNK
                    && from
                        .checked_add(bytes.0.len() as u64)
                        .is_some_and(|end| end <= len)
            }
            Self::Data { bytes, .. } => !bytes.0.is_empty() && bytes.0.len() <= CHUNK,
            Self::Send { header, body, .. } => {
                header.0.len() == SEND_HEADER && body.0.len() <= CHUNK
            }
            _ => true,
        };
        if fits {
            Ok((frame, rest))
        } else {
            Err(Garbled)
        }
    }
}

/// Decodes a record from raw bytes and encodes it again: for the fuzz target.
pub(crate) fn fuzz(bytes: &[u8]) {
    let mut rest = bytes;
    let mut again = Vec::new();
    while !rest.is_empty() {
        let Ok((frame, after)) = Frame::decode(rest) else {
            return;
        };
        assert!(after.len() < rest.len(), "a frame takes bytes");
        again.clear();
        frame.encode(&mut again);
        assert!(again.len() <= LONGEST);
        assert_eq!(Frame::decode(&again), Ok((frame, &[][..])));
        rest = after;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn address() -> impl Strategy<Value = DcAddress> {
        (any::<u32>(), any::<u32>(), any::<u16>(), any::<u16>()).prop_map(
            |(number, key, lid, gid)| DcAddress {
                number,
                key,
                lid,
                gid,
            },
        )
    }

    fn tag() -> impl Strategy<Value = Tag> {
        (any::<u64>(), any::<u64>()).prop_map(|(pair, seq)| Tag { pair, seq })
    }

    fn place() -> impl Strategy<Value = Place> {
        (address(), any::<u32>(), any::<u64>()).prop_map(|(to, key, offset)| Place {
            to,
            key,
            offset,
        })
    }

    proptest! {
        #[test]
        fn a_frame_says_what_it_was_made_of(
            tag in tag(), at in place(), from in 0..1_u64 << 40, word in any::<u64>(),
            bytes in proptest::collection::vec(any::<u8>(), 1..CHUNK),
            header in proptest::array::uniform32(any::<u8>()), small in any::<u16>(),
        ) {
            let header = [header, header].concat();
            let (bytes, to) = (Bytes(&bytes), at.to);
            let len = from + bytes.0.len() as u64;
            let all = [
                Frame::Hello { limit: at.key, port: small },
                Frame::Node(to), Frame::Left(to),
                Frame::Ask { question: from, node: word },
                Frame::Told { question: from, address: small.is_multiple_of(2).then_some(to) }, Frame::Ping, Frame::Pong,
                Frame::Close { pair: tag.pair },
                Frame::Read { tag, at, len: word },
                Frame::Write { tag, at, len, from, bytes },
                Frame::CompareSwap { tag, at, expected: word, new: len },
                Frame::FetchAdd { tag, at, add: word },
                Frame::Send { tag, to, service: small, header: Bytes(&header), body: bytes },
                Frame::Data { tag, from, bytes },
                Frame::Done(tag),
                Frame::Failed { tag, status: small as u8 },
            ];
            let mut record = Vec::new();
            for frame in &all {
                let before = record.len();
                frame.encode(&mut record);
                prop_assert!(record.len() - before <= LONGEST);
            }
            let mut rest = &record[..];
            for frame in all {
                let (decoded, after) = Frame::decode(rest).unwrap();
                prop_assert_eq!(decoded, frame);
                rest = after;
            }
            prop_assert!(rest.is_empty());
        }

        #[test]
        fn any_bytes_are_frames_or_garbled(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            fuzz(&bytes);
        }

        #[test]
        fn a_frame_that_is_cut_off_is_garbled(tag in tag(), at in place(), cut in 0..40_usize) {
            let mut record = Vec::new();
            Frame::Write { tag, at, len: 40, from: 0, bytes: Bytes(&[7; 40]) }.encode(&mut record);
            prop_assert_eq!(Frame::decode(&record[..record.len() - 1 - cut]), Err(Garbled));
        }
    }

    #[test]
    fn lengths_that_are_announced_and_not_there_are_garbled() {
        // A WRITE whose bytes would be 2^63 long, and one that reaches over its end.
        let tag = Tag { pair: 1, seq: 1 };
        let at = Place {
            to: DcAddress {
                number: 1,
                key: 1,
                lid: 0,
                gid: 0,
            },
            key: 1,
            offset: 0,
        };
        let mut record = Vec::new();
        let frame = |len, from, bytes| Frame::Write {
            tag,
            at,
            len,
            from,
            bytes: Bytes(bytes),
        };
        frame(8, 0, &[1; 8]).encode(&mut record);
        let announced = record.len() - 9;
        record.truncate(announced);
        record.extend([0xFF; 9]);
        record.push(0x7F);
        assert_eq!(Frame::decode(&record), Err(Garbled));
        for (len, from, bytes) in [(8, 1, &[1; 8][..]), (8, u64::MAX, &[1; 8]), (8, 0, &[])] {
            record.clear();
            frame(len, from, bytes).encode(&mut record);
            assert_eq!(Frame::decode(&record), Err(Garbled), "{len} {from}");
        }
    }
}
