//! Changes of several words that happen all or not at all, whoever is killed when.
//!
//! The words are read through the transaction, changed in it, and written down in a redo record
//! first. When the record is in memory they are changed in place, and then the record is retired.
//! Whoever finds a record that is not retired does the rest: doing it twice is doing it once.

use crate::error::Result;
use crate::flush::Step;
use crate::medium::Medium;

/// Words that one record can hold: five for each of the 48 orders, and some.
pub(crate) const MOST: usize = 250;
/// Bytes of a record: number of words and crc, then pairs of place and value.
pub(crate) const SIZE: u64 = 4096;

/// A transaction on a medium.
pub(crate) struct Redo<'a> {
    medium: &'a dyn Medium,
    /// Where the record is.
    record: u64,
    changed: Vec<(u64, u64)>,
}

impl<'a> Redo<'a> {
    /// Finishes what a killed process left, and begins. The caller holds the lock.
    pub(crate) fn begin(medium: &'a dyn Medium, record: u64) -> Result<Self> {
        let mut redo = Self {
            medium,
            record,
            changed: Vec::new(),
        };
        medium.invalidate(record..record + SIZE, Step::AcquireHeap)?;
        let mut count = [0; 8];
        medium.load(record, &mut count)?;
        // Retired is the usual case: one word says so.
        if count != [0; 8] {
            redo.recover()?;
        }
        Ok(redo)
    }

    fn recover(&mut self) -> Result<()> {
        let mut bytes = [0; SIZE as usize];
        self.medium.load(self.record, &mut bytes)?;
        let (words, _) = bytes.as_chunks::<8>();
        let word = |i: usize| words.get(i).map_or(0, |word| u64::from_le_bytes(*word));
        let head = word(0);
        let (count, crc) = ((head & 0xffff_ffff) as usize, (head >> 32) as u32);
        // One that was not whole when its writer was killed describes nothing.
        if (1..=MOST).contains(&count) && crc == checksum(&bytes[8..8 + count * 16], count) {
            for pair in 0..count {
                self.changed.push((word(1 + 2 * pair), word(2 + 2 * pair)));
            }
            self.apply()?;
        }
        self.retire()
    }

    /// The word at a place, as the transaction has it.
    pub(crate) fn get(&self, at: u64) -> Result<u64> {
        if let Some((_, value)) = self.changed.iter().rev().find(|(place, _)| *place == at) {
            return Ok(*value);
        }
        let mut bytes = [0; 8];
        self.medium.load(at, &mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    }

    /// Changes the word at a place.
    pub(crate) fn set(&mut self, at: u64, value: u64) {
        match self.changed.iter_mut().find(|(place, _)| *place == at) {
            Some((_, old)) => *old = value,
            None => self.changed.push((at, value)),
        }
    }

    /// Whether a record can hold the changes.
    pub(crate) fn fits(&self) -> bool {
        self.changed.len() <= MOST
    }

    /// Makes the changes, all of them, which fit.
    pub(crate) fn commit(mut self) -> Result<()> {
        if self.changed.is_empty() {
            return Ok(());
        }
        let count = self.changed.len();
        let mut bytes = Vec::with_capacity(8 + count * 16);
        bytes.extend_from_slice(&[0; 8]);
        for (place, value) in &self.changed {
            bytes.extend_from_slice(&place.to_le_bytes());
            bytes.extend_from_slice(&value.to_le_bytes());
        }
        let head = count as u64 | u64::from(checksum(&bytes[8..], count)) << 32;
        bytes[..8].copy_from_slice(&head.to_le_bytes());
        self.medium.store(self.record, &bytes)?;
        let end = self.record + bytes.len() as u64;
        self.medium.write_back(self.record..end, Step::RedoRecord)?;
        self.apply()?;
        self.retire()
    }

    fn apply(&mut self) -> Result<()> {
        for (place, value) in &self.changed {
            self.medium.store(*place, &value.to_le_bytes())?;
        }
        for (place, _) in self.changed.drain(..) {
            self.medium
                .write_back(place..place + 8, Step::RedoApplied)?;
        }
        Ok(())
    }

    fn retire(&self) -> Result<()> {
        self.medium.store(self.record, &[0; 8])?;
        self.medium
            .write_back(self.record..self.record + 8, Step::RedoRetired)
    }
}

/// Of the pairs and their number, and never of nothing but zeroes.
fn checksum(pairs: &[u8], count: usize) -> u32 {
    crc32c::crc32c_append(count as u32 ^ 0xffff_ffff, pairs)
}
