//! Free space of a pool: which extent a new namespace gets. Pure: plain values in and out.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use crate::layout::Extent;

/// Free extents, none of which touches another.
#[derive(Debug, Clone, Default)]
pub(crate) struct Space {
    by_offset: BTreeMap<u64, u64>,
    /// Length, then offset: the smallest that is large enough, at the lowest place.
    by_size: BTreeSet<(u64, u64)>,
    free: u64,
}

impl Space {
    /// All of `range` free.
    pub(crate) fn new(range: Range<u64>) -> Self {
        let mut space = Self::default();
        if range.start < range.end {
            space.insert(range.start, range.end - range.start);
        }
        space
    }

    /// Bytes that are free.
    pub(crate) fn free(&self) -> u64 {
        self.free
    }

    /// The longest free extent.
    pub(crate) fn largest(&self) -> u64 {
        self.by_size.last().map_or(0, |(length, _)| *length)
    }

    /// The extent that one of `length` bytes would get: best fit, since holes of whole huge pages
    /// are filled exactly often enough to keep large ones whole.
    pub(crate) fn find(&self, length: u64) -> Option<Extent> {
        let (_, offset) = self.by_size.range((length, 0)..).next()?;
        Some(Extent {
            offset: *offset,
            length,
        })
    }

    /// Whether all of it is free.
    pub(crate) fn is_free(&self, extent: Extent) -> bool {
        self.around(extent).is_some()
    }

    /// Takes an extent. Says whether it was free.
    #[must_use]
    pub(crate) fn take(&mut self, extent: Extent) -> bool {
        let Some((offset, length)) = self.around(extent) else {
            return false;
        };
        self.delete(offset, length);
        if offset < extent.offset {
            self.insert(offset, extent.offset - offset);
        }
        if extent.end() < offset + length {
            self.insert(extent.end(), offset + length - extent.end());
        }
        true
    }

    /// Gives an extent back. Says whether none of it was free.
    #[must_use]
    pub(crate) fn give(&mut self, extent: Extent) -> bool {
        let before = self.by_offset.range(..=extent.offset).next_back();
        let before = before.map(|(offset, length)| (*offset, *length));
        let after = self.by_offset.range(extent.offset..).next();
        let after = after.map(|(offset, length)| (*offset, *length));
        if extent.length == 0
            || extent.offset.checked_add(extent.length).is_none()
            || before.is_some_and(|(offset, length)| offset + length > extent.offset)
            || after.is_some_and(|(offset, _)| offset < extent.end())
        {
            return false;
        }
        let (mut offset, mut length) = (extent.offset, extent.length);
        if let Some((start, size)) = before
            && start + size == extent.offset
        {
            self.delete(start, size);
            (offset, length) = (start, length + size);
        }
        if let Some((start, size)) = after
            && start == extent.end()
        {
            self.delete(start, size);
            length += size;
        }
        self.insert(offset, length);
        true
    }

    fn around(&self, extent: Extent) -> Option<(u64, u64)> {
        let end = extent.offset.checked_add(extent.length)?;
        let (offset, length) = self.by_offset.range(..=extent.offset).next_back()?;
        (extent.length > 0 && end <= offset + length).then_some((*offset, *length))
    }

    fn insert(&mut self, offset: u64, length: u64) {
        self.by_offset.insert(offset, length);
        self.by_size.insert((length, offset));
        self.free += length;
    }

    fn delete(&mut self, offset: u64, length: u64) {
        self.by_offset.remove(&offset);
        self.by_size.remove(&(length, offset));
        self.free -= length;
    }
}

#[cfg(test)]
mod tests {
    use super::Space;
    use crate::layout::Extent;
    use proptest::prelude::*;

    proptest! {
        /// Brute force: a flag for each unit.
        #[test]
        fn it_agrees_with_a_flag_for_each_unit(
            steps in prop::collection::vec((any::<bool>(), 0u64..40, 0u64..9), 1..200)
        ) {
            let mut space = Space::new(0..40);
            let mut free = [true; 40];
            for (take, offset, length) in steps {
                let extent = Extent { offset, length };
                let range = offset as usize..(offset + length) as usize;
                let all = |free: &[bool; 40], wanted: bool| {
                    length > 0 && range.end <= 40 && free[range.clone()].iter().all(|f| *f == wanted)
                };
                if take {
                    let expected = all(&free, true);
                    prop_assert_eq!(space.is_free(extent), expected);
                    prop_assert_eq!(space.take(extent), expected);
                    if expected { free[range].fill(false); }
                } else if range.end <= 40 {
                    let expected = all(&free, false);
                    prop_assert_eq!(space.give(extent), expected);
                    if expected { free[range].fill(true); }
                }
                prop_assert_eq!(space.free(), free.iter().filter(|f| **f).count() as u64);
                let longest = free.split(|f| !f).map(<[bool]>::len).max().unwrap_or(0) as u64;
                prop_assert_eq!(space.largest(), longest);
                for length in 1..=longest {
                    let found = space.find(length).unwrap();
                    prop_assert!(space.is_free(found) && found.length == length);
                }
                prop_assert!(space.find(longest + 1).is_none());
            }
        }
    }
}
