//! A ring between one producer and one consumer that do not trust each other, in memory that both
//! map. Each side keeps its own index to itself and believes of the other's only what can be true;
//! whoever consumes copies a slot out before looking at it, and looks at the copy only. The memory is
//! never seen as anything but atomics.

use super::sync::{AtomicU32, AtomicU64, Ordering};

/// The other side's index cannot be true.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Corrupt;

/// The memory of a ring: a power of two of slots, each of the same number of words.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ring<'a> {
    /// How many slots were ever consumed.
    pub(crate) head: &'a AtomicU32,
    /// How many slots were ever produced.
    pub(crate) tail: &'a AtomicU32,
    pub(crate) words: &'a [AtomicU64],
    /// Words of a slot.
    pub(crate) width: usize,
}

impl<'a> Ring<'a> {
    fn slots(&self) -> u32 {
        (self.words.len() / self.width) as u32
    }

    /// The slot of an index, however wild the index is.
    fn slot(&self, index: u32) -> &'a [AtomicU64] {
        let at = (index & (self.slots() - 1)) as usize * self.width;
        &self.words[at..at + self.width]
    }
}

/// The producer's side: what it has produced, and published.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Producer {
    tail: u32,
    head: u32,
}

impl Producer {
    /// How many slots are free.
    pub(crate) fn room(&mut self, ring: &Ring<'_>) -> Result<u32, Corrupt> {
        let used = self.tail.wrapping_sub(self.head);
        if used < ring.slots() {
            return Ok(ring.slots() - used);
        }
        self.look(ring)
    }

    /// How many slots are free, as the consumer says now.
    pub(crate) fn look(&mut self, ring: &Ring<'_>) -> Result<u32, Corrupt> {
        let head = ring.head.load(Ordering::Acquire);
        // It can have consumed only what it had not, of what was produced.
        if head.wrapping_sub(self.head) > self.tail.wrapping_sub(self.head) {
            return Err(Corrupt);
        }
        self.head = head;
        Ok(ring.slots() - self.tail.wrapping_sub(head))
    }

    /// Writes the next slot; false where there is none free. The consumer sees it after
    /// [`publish`](Self::publish).
    pub(crate) fn write(
        &mut self,
        ring: &Ring<'_>,
        words: impl IntoIterator<Item = u64>,
    ) -> Result<bool, Corrupt> {
        if self.room(ring)? == 0 {
            return Ok(false);
        }
        for (to, word) in ring.slot(self.tail).iter().zip(words) {
            to.store(word, Ordering::Relaxed);
        }
        self.tail = self.tail.wrapping_add(1);
        Ok(true)
    }

    /// Lets the consumer see what was written.
    pub(crate) fn publish(&self, ring: &Ring<'_>) {
        ring.tail.store(self.tail, Ordering::Release);
    }
}

/// The consumer's side: what it has consumed.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Consumer {
    head: u32,
    tail: u32,
}

impl Consumer {
    /// Whether something is there that was not consumed.
    pub(crate) fn has_next(&mut self, ring: &Ring<'_>) -> Result<bool, Corrupt> {
        if self.tail == self.head {
            let tail = ring.tail.load(Ordering::Acquire);
            if tail.wrapping_sub(self.head) > ring.slots() {
                return Err(Corrupt);
            }
            self.tail = tail;
        }
        Ok(self.tail != self.head)
    }

    /// Copies the next slot out, as much of it as fits; false where there is none. The producer may
    /// use the slot again after [`release`](Self::release).
    pub(crate) fn read(&mut self, ring: &Ring<'_>, out: &mut [u64]) -> Result<bool, Corrupt> {
        if !self.has_next(ring)? {
            return Ok(false);
        }
        for (word, from) in out.iter_mut().zip(ring.slot(self.head)) {
            *word = from.load(Ordering::Relaxed);
        }
        self.head = self.head.wrapping_add(1);
        Ok(true)
    }

    /// Lets the producer use what was read again.
    pub(crate) fn release(&self, ring: &Ring<'_>) {
        ring.head.store(self.head, Ordering::Release);
    }
}
