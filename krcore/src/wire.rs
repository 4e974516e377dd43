//! What stands in the slots of a lane's rings. Decoding takes any bytes: they are a hostile
//! client's.

use crate::fabric::{Op, Status};
use crate::node::{NodeId, Service};
use crate::region::{RKey, RemoteSlice};

/// Words of a submission: one cache line.
pub(crate) const SUBMISSION: usize = 8;
/// Words of a completion.
pub(crate) const COMPLETION: usize = 1;

/// Tells a completion's request apart, and the life of the virtual queue that posted it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Cookie {
    /// Index in the client's table of what is outstanding.
    pub(crate) index: u8,
    /// 24 bits.
    pub(crate) generation: u32,
}

/// The generations of a lane.
pub(crate) const GENERATIONS: u32 = 1 << 24;

impl Cookie {
    pub(crate) fn encode(self) -> u32 {
        u32::from(self.index) | self.generation << 8
    }

    pub(crate) fn decode(word: u32) -> Self {
        Self {
            index: word as u8,
            generation: word >> 8,
        }
    }
}

/// A request as a client writes it for the daemon.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Submission {
    pub(crate) op: Op,
    pub(crate) cookie: Cookie,
    pub(crate) peer: NodeId,
    pub(crate) local: RKey,
    pub(crate) offset: u64,
    pub(crate) len: u64,
    pub(crate) remote: RemoteSlice,
}

const READ: u64 = 1;
const WRITE: u64 = 2;
const COMPARE_SWAP: u64 = 3;
const FETCH_ADD: u64 = 4;
const SEND: u64 = 5;
const FENCE: u64 = 6;

impl Submission {
    pub(crate) fn encode(&self) -> [u64; SUBMISSION] {
        // The length of an atomic is 8 whatever is said, so that its word is free for an operand.
        let (op, len, operand) = match self.op {
            Op::Read => (READ, self.len, 0),
            Op::Write => (WRITE, self.len, 0),
            Op::CompareSwap { expected, new } => (COMPARE_SWAP, expected, new),
            Op::FetchAdd { add } => (FETCH_ADD, 0, add),
            Op::Send(service) => (SEND, self.len, u64::from(service.0)),
            Op::Fence => (FENCE, 0, 0),
        };
        [
            op | u64::from(self.cookie.encode()) << 32,
            self.peer.0,
            u64::from(self.local.0) | u64::from(self.remote.key.0) << 32,
            self.offset,
            len,
            self.remote.offset,
            operand,
            0,
        ]
    }

    /// The cookie, and the request where there is such an operation.
    pub(crate) fn decode(words: [u64; SUBMISSION]) -> (Cookie, Option<Self>) {
        let [head, peer, keys, offset, len, far, operand, _] = words;
        let cookie = Cookie::decode((head >> 32) as u32);
        let (op, len) = match head & 0xFFFF_FFFF {
            READ => (Op::Read, len),
            WRITE => (Op::Write, len),
            COMPARE_SWAP => {
                let op = Op::CompareSwap {
                    expected: len,
                    new: operand,
                };
                (op, 8)
            }
            FETCH_ADD => (Op::FetchAdd { add: operand }, 8),
            SEND => match u16::try_from(operand) {
                Ok(service) => (Op::Send(Service(service)), len),
                Err(_) => return (cookie, None),
            },
            FENCE => (Op::Fence, 0),
            _ => return (cookie, None),
        };
        let submission = Self {
            op,
            cookie,
            peer: NodeId(peer),
            local: RKey(keys as u32),
            offset,
            len,
            remote: RemoteSlice {
                key: RKey((keys >> 32) as u32),
                offset: far,
            },
        };
        (cookie, Some(submission))
    }
}

pub(crate) fn encode_completion(cookie: Cookie, status: Status) -> u64 {
    u64::from(cookie.encode()) | u64::from(status.to_code()) << 32
}

/// `None` for a status that there is not.
pub(crate) fn decode_completion(word: u64) -> Option<(Cookie, Status)> {
    let status = Status::from_code((word >> 32) as u32)?;
    Some((Cookie::decode(word as u32), status))
}

/// Decodes a ring entry from raw bytes and encodes it again: for the fuzz target.
#[doc(hidden)]
pub fn fuzz_entry(bytes: &[u8]) {
    let mut words = [0; SUBMISSION];
    for (word, from) in words.iter_mut().zip(bytes.as_chunks::<8>().0) {
        *word = u64::from_le_bytes(*from);
    }
    let (cookie, submission) = Submission::decode(words);
    if let Some(submission) = submission {
        assert_eq!(
            Submission::decode(submission.encode()),
            (cookie, Some(submission))
        );
    }
    if let Some((cookie, status)) = decode_completion(words[0]) {
        assert_eq!(
            decode_completion(encode_completion(cookie, status)),
            Some((cookie, status))
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Malformed;

    #[test]
    fn a_submission_says_what_it_was_made_of() {
        let ops = [
            Op::Read,
            Op::Write,
            Op::CompareSwap {
                expected: u64::MAX,
                new: 7,
            },
            Op::FetchAdd { add: 1 << 63 },
            Op::Send(Service(u16::MAX)),
            Op::Fence,
        ];
        for op in ops {
            let len = match op {
                Op::Fence => 0,
                Op::CompareSwap { .. } | Op::FetchAdd { .. } => 8,
                _ => 1 << 33,
            };
            let one = Submission {
                op,
                cookie: Cookie {
                    index: 127,
                    generation: GENERATIONS - 1,
                },
                peer: NodeId(u64::MAX),
                local: RKey(3),
                offset: u64::MAX,
                len,
                remote: RemoteSlice {
                    key: RKey(u32::MAX),
                    offset: 5,
                },
            };
            assert_eq!(
                Submission::decode(one.encode()),
                (one.cookie, Some(one)),
                "{op:?}"
            );
        }
    }

    #[test]
    fn any_words_decode_to_something_or_nothing() {
        let mut rng = fastrand::Rng::with_seed(7);
        for _ in 0..100_000 {
            let mut bytes = [0; 64];
            rng.fill(&mut bytes);
            // Half of them with an operation that there is.
            if rng.bool() {
                bytes[..4].copy_from_slice(&rng.u32(0..8).to_le_bytes());
            }
            fuzz_entry(&bytes);
        }
    }

    #[test]
    fn every_status_has_a_code() {
        let cookie = Cookie {
            index: 1,
            generation: 2,
        };
        for status in [
            Status::Success,
            Status::Flushed,
            Status::RetryExceeded,
            Status::Refused(Malformed::StaleKey),
            Status::Refused(Malformed::Disconnected),
        ] {
            let word = encode_completion(cookie, status);
            assert_eq!(decode_completion(word), Some((cookie, status)));
        }
        assert_eq!(decode_completion(77 << 32), None);
    }
}
