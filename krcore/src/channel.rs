//! The memory that a process and its daemon share: lanes, one for a virtual queue, each with a ring
//! of submissions and one of completions; and a doorbell, which says in which lanes something was
//! submitted.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64};

use crate::error::{Error, Result};
use crate::region::Sealed;
use crate::ring::Ring;
use crate::wire::{COMPLETION, SUBMISSION};

/// Lanes of a channel: bits of a doorbell.
pub(crate) const LANES: usize = 64;
/// Requests that may be outstanding in a lane.
pub(crate) const DEPTH: usize = 128;

/// What two sides write lies on different cache lines, and not on a pair that is fetched together.
const APART: usize = 128;
const DOORBELL: usize = 0;
const SLEEPING: usize = APART;
const HEAD: usize = 2 * APART;

const SQ_TAIL: usize = 0;
const SQ_HEAD: usize = APART;
const CQ_TAIL: usize = 2 * APART;
const CQ_HEAD: usize = 3 * APART;
const CQ_WAITING: usize = CQ_HEAD + 64;
const SQ: usize = 4 * APART;
const CQ: usize = SQ + DEPTH * SUBMISSION * 8;
const LANE: usize = CQ + DEPTH * COMPLETION * 8;

/// A channel's memory. The views below are made once for each access, and cost nothing but a
/// comparison: the memory has the length that they need, or it is no channel.
#[derive(Debug, Clone)]
pub(crate) struct Channel {
    memory: Arc<Sealed>,
}

/// What a lane consists of.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Lane<'a> {
    pub(crate) submissions: Ring<'a>,
    pub(crate) completions: Ring<'a>,
    /// Not 0 while the client sleeps on the completions' tail.
    pub(crate) waiting: &'a AtomicU32,
}

impl Channel {
    #[cfg(feature = "daemon")]
    pub(crate) fn create() -> Result<Self> {
        let memory = Sealed::create(c"krcore-channel", (HEAD + LANES * LANE) as u64)?;
        Self::over(memory)
    }

    pub(crate) fn over(memory: Sealed) -> Result<Self> {
        if memory.len() < (HEAD + LANES * LANE) as u64 {
            return Err(Error::Protocol("a channel is too short"));
        }
        Ok(Self {
            memory: Arc::new(memory),
        })
    }

    #[cfg(feature = "daemon")]
    pub(crate) fn memory(&self) -> &Sealed {
        &self.memory
    }

    /// In which lanes something was submitted since the daemon looked.
    pub(crate) fn doorbell(&self) -> Option<&AtomicU64> {
        self.memory.words(DOORBELL, 1)?.first()
    }

    /// Not 0 while the daemon sleeps, and has to be woken.
    pub(crate) fn sleeping(&self) -> Option<&AtomicU32> {
        self.memory.half(SLEEPING)
    }

    /// `None` for a lane that there is not.
    pub(crate) fn lane(&self, index: usize) -> Option<Lane<'_>> {
        if index >= LANES {
            return None;
        }
        let at = HEAD + index * LANE;
        Some(Lane {
            submissions: Ring {
                head: self.memory.half(at + SQ_HEAD)?,
                tail: self.memory.half(at + SQ_TAIL)?,
                words: self.memory.words(at + SQ, DEPTH * SUBMISSION)?,
                width: SUBMISSION,
            },
            completions: Ring {
                head: self.memory.half(at + CQ_HEAD)?,
                tail: self.memory.half(at + CQ_TAIL)?,
                words: self.memory.words(at + CQ, DEPTH * COMPLETION)?,
                width: COMPLETION,
            },
            waiting: self.memory.half(at + CQ_WAITING)?,
        })
    }
}

/// The memory of a listener of an attached process: the daemon produces messages, the process
/// consumes them.
#[derive(Debug)]
pub(crate) struct MessageRing {
    memory: Sealed,
}

/// A message in the ring: its length, its header, its bytes.
pub(crate) const MESSAGE_WORDS: usize =
    1 + crate::fabric::SEND_HEADER / 8 + crate::check::MAX_INLINE as usize / 8;

impl MessageRing {
    const TAIL: usize = 0;
    const HEAD: usize = APART;
    const WAITING: usize = APART + 64;
    const SLOTS: usize = 2 * APART;
    const BYTES: usize = Self::SLOTS + crate::message::BUFFERS * MESSAGE_WORDS * 8;

    #[cfg(feature = "daemon")]
    pub(crate) fn create() -> Result<Self> {
        let memory = Sealed::create(c"krcore-messages", Self::BYTES as u64)?;
        Self::over(memory)
    }

    pub(crate) fn over(memory: Sealed) -> Result<Self> {
        if memory.len() < Self::BYTES as u64 {
            return Err(Error::Protocol("a ring of messages is too short"));
        }
        Ok(Self { memory })
    }

    #[cfg(feature = "daemon")]
    pub(crate) fn memory(&self) -> &Sealed {
        &self.memory
    }

    pub(crate) fn ring(&self) -> Option<(Ring<'_>, &AtomicU32)> {
        let words = crate::message::BUFFERS * MESSAGE_WORDS;
        let ring = Ring {
            head: self.memory.half(Self::HEAD)?,
            tail: self.memory.half(Self::TAIL)?,
            words: self.memory.words(Self::SLOTS, words)?,
            width: MESSAGE_WORDS,
        };
        Some((ring, self.memory.half(Self::WAITING)?))
    }
}
