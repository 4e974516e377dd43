//! A sub-allocator inside a namespace: a buddy allocator whose state lies in the memory itself.
//!
//! Every process of the host that is attached can allocate and free; all see the same heap, since
//! there is nothing of it anywhere else. A process that is killed in the middle leaves a redo record,
//! and the next one to take the lock finishes it. Places are offsets in the namespace, and mean the
//! same everywhere.
//!
//! ```text
//! 0      magic "DCXLHEAP", 8 bytes
//! 8      log2 of the smallest block, 8 bytes
//! 16     where the blocks begin, 8 bytes
//! 24     number of smallest blocks, 8 bytes
//! 32     bytes in use, 8 bytes
//! 64     64 roots of 8 bytes: where programs keep what they find everything else by
//! 576    48 heads of free lists of 8 bytes, by order; 0 is none
//! 4096   redo record, 4,096 bytes
//! 8192   map: one byte for each smallest block: 0 inside a block, 1 + order where a free one begins,
//!        129 + order where a used one begins
//! ```
//!
//! A free block begins with the places of the next and the previous one of its list.

use std::fmt;
use std::sync::MutexGuard;

use carlsbad_types::ByteSize;

use crate::error::{Error, Result};
use crate::layout::LOCK_HEAP;
use crate::lock::{self, Kind};
use crate::namespace::Namespace;
use crate::pool::{PATIENCE, locked};
use crate::redo::{self, Redo};

const MAGIC: u64 = u64::from_le_bytes(*b"DCXLHEAP");
const SHIFT: u64 = 8;
const BLOCKS_AT: u64 = 16;
const COUNT: u64 = 24;
const USED: u64 = 32;
const ROOTS_AT: u64 = 64;
const HEADS_AT: u64 = 576;
const RECORD_AT: u64 = 4096;
const MAP_AT: u64 = 8192;

/// Roots that a heap has.
pub const ROOTS: usize = 64;
/// Orders that a heap can have.
const ORDERS: u32 = 48;
/// The smallest block: two words for a free list, and never two blocks in one line.
const LEAST_SHIFT: u32 = 6;
const FREE: u8 = 1;
const TAKEN: u8 = 129;

/// How a heap is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeapOptions {
    /// The smallest block: a power of two, from 64 bytes to a quarter of the namespace. Each costs a
    /// byte besides.
    pub smallest: ByteSize,
}

impl Default for HeapOptions {
    fn default() -> Self {
        Self {
            smallest: ByteSize::new(64),
        }
    }
}

/// An allocator in a namespace.
#[derive(Debug, Clone)]
pub struct Heap {
    namespace: Namespace,
    shape: Shape,
}

/// What a heap's head says; it does not change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Shape {
    shift: u32,
    blocks: u64,
    count: u64,
}

/// A place in a heap: an offset in its namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Place(pub u64);

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// How much of a heap is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct HeapStats {
    /// Bytes of blocks that are in use.
    pub used: ByteSize,
    /// Bytes of blocks that are not.
    pub free: ByteSize,
    /// Blocks that are in use.
    pub blocks: u64,
}

impl Heap {
    /// Makes an empty heap of all of a namespace; what was there is lost.
    ///
    /// # Errors
    /// Where the namespace was attached for reading, or the smallest block is none.
    pub fn format(namespace: &Namespace, options: HeapOptions) -> Result<Self> {
        let smallest = options.smallest.get();
        let length = namespace.length().get();
        if !smallest.is_power_of_two() || smallest < 1 << LEAST_SHIFT || smallest > length / 4 {
            return Err(Error::OutOfRange {
                start: 0,
                end: smallest,
                length: namespace.length(),
                why: "the smallest block is a power of two from 64 bytes to a quarter of the namespace",
            });
        }
        let shift = smallest.trailing_zeros();
        // One byte of map for each: the largest number for which both fit.
        let count = (length - MAP_AT) / (smallest + 1);
        let blocks = (MAP_AT + count).next_multiple_of(smallest);
        let shape = Shape {
            shift,
            blocks,
            count: count.min((length - blocks) >> shift),
        };
        let heap = Self {
            namespace: namespace.clone(),
            shape,
        };
        heap.clear()?;
        Ok(heap)
    }

    /// The heap that a namespace holds.
    ///
    /// # Errors
    /// [`Error::NotAHeap`] where it holds none, [`Error::CorruptHeap`] where it is damaged.
    pub fn open(namespace: &Namespace) -> Result<Self> {
        let length = namespace.length().get();
        let mut bytes = [0; 32];
        let medium = &*namespace.inner.medium;
        // All of it: another host may have changed any free block since this one last looked.
        medium.invalidate(0..length, crate::flush::Step::AcquireHeap)?;
        medium.load(0, &mut bytes)?;
        let (words, _) = bytes.as_chunks::<8>();
        let [magic, shift, blocks, count] = [0, 1, 2, 3].map(|i| u64::from_le_bytes(words[i]));
        let possible = magic == MAGIC
            && (u64::from(LEAST_SHIFT)..u64::from(ORDERS)).contains(&shift)
            && count > 0
            && count < length
            && blocks >= MAP_AT + count
            && blocks % (1 << shift) == 0
            && count
                .checked_mul(1 << shift)
                .and_then(|bytes| bytes.checked_add(blocks))
                .is_some_and(|end| end <= length);
        // Zeroes are a namespace without a heap, or with one that was not finished.
        if magic == 0 {
            return Err(Error::NotAHeap {
                namespace: namespace.name().to_owned(),
            });
        }
        if !possible {
            return Err(Error::CorruptHeap {
                namespace: namespace.name().to_owned(),
                what: "its head is none (or something else is there)",
            });
        }
        Ok(Self {
            namespace: namespace.clone(),
            shape: Shape {
                shift: shift as u32,
                blocks,
                count,
            },
        })
    }

    /// The namespace that it is in.
    pub fn namespace(&self) -> &Namespace {
        &self.namespace
    }

    /// Takes a block of at least `length` bytes; it begins at a multiple of 64 in the namespace, and
    /// holds whatever was there. If this process is killed before it has written down where the
    /// block is, the block is lost: [`Heap::allocate_into`] writes it down in the same step.
    ///
    /// # Errors
    /// [`Error::NoRoom`] where no free block is large enough.
    pub fn allocate(&self, length: ByteSize) -> Result<Place> {
        self.change(|redo| self.take(redo, length))
    }

    /// Takes a block, and writes its place to the 8 bytes at `to` in the same step: after a crash
    /// both have happened or neither.
    ///
    /// # Errors
    /// As of [`Heap::allocate`]; where `to` is not a root, nor 8 aligned bytes of a block in use.
    pub fn allocate_into(&self, length: ByteSize, to: Place) -> Result<Place> {
        self.change(|redo| {
            self.check_slot(redo, to)?;
            let place = self.take(redo, length)?;
            redo.set(to.0, place.0);
            Ok(place)
        })
    }

    /// Gives a block back.
    ///
    /// # Errors
    /// Where `place` is not one of a block in use.
    pub fn free(&self, place: Place) -> Result<()> {
        self.change(|redo| self.give(redo, place))
    }

    /// Gives back the block whose place is in the 8 bytes at `from`, and writes 0 there in the same
    /// step.
    ///
    /// # Errors
    /// Where that is not the place of a block in use, and as of [`Heap::allocate_into`].
    pub fn free_from(&self, from: Place) -> Result<()> {
        self.change(|redo| {
            self.check_slot(redo, from)?;
            let place = Place(redo.get(from.0)?);
            self.give(redo, place)?;
            redo.set(from.0, 0);
            Ok(())
        })
    }

    /// The place of a root: 8 bytes that are 0 in a new heap.
    ///
    /// # Errors
    /// Where `index` is not below [`ROOTS`].
    pub fn root(&self, index: usize) -> Result<Place> {
        if index >= ROOTS {
            return Err(Error::OutOfRange {
                start: index as u64,
                end: index as u64 + 1,
                length: ByteSize::new(ROOTS as u64),
                why: "a heap has 64 roots",
            });
        }
        Ok(Place(ROOTS_AT + 8 * index as u64))
    }

    /// Bytes of the block at `place`: what was asked for, rounded up to a power of two.
    ///
    /// # Errors
    /// Where `place` is not one of a block in use.
    pub fn length_of(&self, place: Place) -> Result<ByteSize> {
        let _thread = self.lock_thread();
        let _process = self.lock_process()?;
        let redo = Redo::begin(&*self.namespace.inner.medium, RECORD_AT)?;
        let (_, order) = self.used_block(&redo, place)?;
        Ok(ByteSize::new(1 << (order + self.shape.shift)))
    }

    /// Walks the whole heap: every free list, and the map. Finds what contradicts itself.
    ///
    /// # Errors
    /// [`Error::CorruptHeap`] where something does.
    pub fn check(&self) -> Result<HeapStats> {
        let _thread = self.lock_thread();
        let _process = self.lock_process()?;
        let redo = Redo::begin(&*self.namespace.inner.medium, RECORD_AT)?;
        let mut stats = HeapStats::default();
        let (mut block, mut free_blocks) = (0, 0u64);
        while block < self.shape.count {
            let mark = self.mark(&redo, block)?;
            let (order, used) = match mark {
                TAKEN.. => (u32::from(mark - TAKEN), true),
                FREE..TAKEN => (u32::from(mark - FREE), false),
                0 => return Err(self.corrupt("a block begins nowhere")),
            };
            let size = 1u64 << order.min(63);
            if order >= ORDERS || block % size != 0 || block + size > self.shape.count {
                return Err(self.corrupt("a block does not lie as its order says"));
            }
            for inside in block + 1..block + size {
                if self.mark(&redo, inside)? != 0 {
                    return Err(self.corrupt("a block overlaps another"));
                }
            }
            let bytes = size << self.shape.shift;
            if used {
                stats.blocks += 1;
                stats.used = ByteSize::new(stats.used.get() + bytes);
            } else {
                free_blocks += 1;
                stats.free = ByteSize::new(stats.free.get() + bytes);
            }
            block += size;
        }
        for order in 0..ORDERS {
            let mut previous = 0;
            let mut at = redo.get(head(order))?;
            while at != 0 {
                let block = self.listed(&redo, at, order)?;
                if redo.get(at + 8)? != previous {
                    return Err(self.corrupt("a free list is torn"));
                }
                let _valid = block;
                free_blocks = free_blocks
                    .checked_sub(1)
                    .ok_or_else(|| self.corrupt("a free list has a block twice"))?;
                previous = at;
                at = redo.get(at)?;
            }
        }
        if free_blocks != 0 {
            return Err(self.corrupt("a free block is in no list"));
        }
        if redo.get(USED)? != stats.used.get() {
            return Err(self.corrupt("the number of bytes in use is wrong"));
        }
        Ok(stats)
    }

    fn lock_thread(&self) -> MutexGuard<'_, ()> {
        locked(&self.namespace.inner.heap)
    }

    fn lock_process(&self) -> Result<lock::Guard<'_>> {
        let inner = &self.namespace.inner;
        inner.shared.is_this_process()?;
        if inner.shared.epoch.is_none() {
            return Err(Error::ReadOnly { what: "use a heap" });
        }
        lock::acquire(
            inner.shared.backend.as_fd(),
            LOCK_HEAP + inner.generation,
            Kind::Exclusive,
            PATIENCE,
            "a heap",
        )
    }

    fn change<T>(&self, work: impl FnOnce(&mut Redo<'_>) -> Result<T>) -> Result<T> {
        let _thread = self.lock_thread();
        let _process = self.lock_process()?;
        let mut redo = Redo::begin(&*self.namespace.inner.medium, RECORD_AT)?;
        let done = work(&mut redo)?;
        if !redo.fits() {
            return Err(self.corrupt("a free list is torn"));
        }
        redo.commit()?;
        Ok(done)
    }

    fn corrupt(&self, what: &'static str) -> Error {
        Error::CorruptHeap {
            namespace: self.namespace.name().to_owned(),
            what,
        }
    }

    /// Writes an empty heap. The head last: before it is there, there is no heap.
    fn clear(&self) -> Result<()> {
        let _thread = self.lock_thread();
        let _process = self.lock_process()?;
        let medium = &*self.namespace.inner.medium;
        let step = crate::flush::Step::Publish;
        medium.store(0, &[0; 8])?;
        medium.write_back(0..8, step)?;
        let zeroes = vec![0; 1 << 20];
        let mut at = 8;
        while at < self.shape.blocks {
            let part = (self.shape.blocks - at).min(zeroes.len() as u64);
            medium.store(at, &zeroes[..part as usize])?;
            at += part;
        }
        // The largest blocks that fit, from the beginning.
        let mut heads = [0u64; ORDERS as usize];
        let mut block = 0;
        while block < self.shape.count {
            let room = (self.shape.count - block).ilog2();
            let order = if block == 0 {
                room
            } else {
                room.min(block.trailing_zeros())
            };
            let at = self.place(block);
            medium.store(MAP_AT + block, &[FREE + order as u8])?;
            let next = std::mem::replace(&mut heads[order as usize], at);
            medium.store(at, &next.to_le_bytes())?;
            medium.store(at + 8, &0u64.to_le_bytes())?;
            medium.write_back(at..at + 16, step)?;
            if next != 0 {
                medium.store(next + 8, &at.to_le_bytes())?;
                medium.write_back(next + 8..next + 16, step)?;
            }
            block += 1 << order;
        }
        for (order, at) in heads.iter().enumerate() {
            medium.store(head(order as u32), &at.to_le_bytes())?;
        }
        let Shape {
            shift,
            blocks,
            count,
        } = self.shape;
        for (at, word) in [
            (SHIFT, u64::from(shift)),
            (BLOCKS_AT, blocks),
            (COUNT, count),
        ] {
            medium.store(at, &word.to_le_bytes())?;
        }
        medium.write_back(0..self.shape.blocks, step)?;
        medium.store(0, &MAGIC.to_le_bytes())?;
        medium.write_back(0..8, step)
    }

    fn place(&self, block: u64) -> u64 {
        self.shape.blocks + (block << self.shape.shift)
    }

    /// The number of the smallest block that begins at a place.
    fn block(&self, place: u64) -> Option<u64> {
        let offset = place.checked_sub(self.shape.blocks)?;
        let block = offset >> self.shape.shift;
        (offset % (1 << self.shape.shift) == 0 && block < self.shape.count).then_some(block)
    }

    fn mark(&self, redo: &Redo<'_>, block: u64) -> Result<u8> {
        let at = MAP_AT + block;
        let word = redo.get(at / 8 * 8)?;
        Ok(word.to_le_bytes()[(at % 8) as usize])
    }

    fn set_mark(&self, redo: &mut Redo<'_>, block: u64, mark: u8) -> Result<()> {
        let at = MAP_AT + block;
        let mut word = redo.get(at / 8 * 8)?.to_le_bytes();
        word[(at % 8) as usize] = mark;
        redo.set(at / 8 * 8, u64::from_le_bytes(word));
        Ok(())
    }

    /// The block at a place that a free list of `order` names.
    fn listed(&self, redo: &Redo<'_>, at: u64, order: u32) -> Result<u64> {
        match self.block(at) {
            Some(block) if self.mark(redo, block)? == FREE + order as u8 => Ok(block),
            _ => Err(self.corrupt("a free list names what is not free")),
        }
    }

    /// Takes a free block out of its list.
    fn unlink(&self, redo: &mut Redo<'_>, block: u64, order: u32) -> Result<()> {
        let at = self.place(block);
        let (next, previous) = (redo.get(at)?, redo.get(at + 8)?);
        if next != 0 {
            self.listed(redo, next, order)?;
            redo.set(next + 8, previous);
        }
        if previous == 0 {
            if redo.get(head(order))? != at {
                return Err(self.corrupt("a free list is torn"));
            }
            redo.set(head(order), next);
        } else {
            self.listed(redo, previous, order)?;
            redo.set(previous, next);
        }
        Ok(())
    }

    /// Puts a free block into its list.
    fn link(&self, redo: &mut Redo<'_>, block: u64, order: u32) -> Result<()> {
        let at = self.place(block);
        let next = redo.get(head(order))?;
        if next != 0 {
            self.listed(redo, next, order)?;
            redo.set(next + 8, at);
        }
        redo.set(at, next);
        redo.set(at + 8, 0);
        redo.set(head(order), at);
        self.set_mark(redo, block, FREE + order as u8)
    }

    fn take(&self, redo: &mut Redo<'_>, length: ByteSize) -> Result<Place> {
        let shift = self.shape.shift;
        if length == ByteSize::ZERO {
            return Err(Error::ZeroLength { what: "block" });
        }
        let order = match length.get().checked_next_power_of_two() {
            Some(size) => size.trailing_zeros().saturating_sub(shift),
            None => ORDERS,
        };
        let mut found = None;
        for larger in order..ORDERS {
            let at = redo.get(head(larger))?;
            if at != 0 {
                found = Some((self.listed(redo, at, larger)?, larger));
                break;
            }
        }
        let Some((block, mut larger)) = found else {
            return Err(self.no_room(redo, length)?);
        };
        self.unlink(redo, block, larger)?;
        while larger > order {
            larger -= 1;
            self.link(redo, block + (1 << larger), larger)?;
        }
        self.set_mark(redo, block, TAKEN + order as u8)?;
        let used = redo.get(USED)?.saturating_add(1 << (order + shift));
        redo.set(USED, used);
        Ok(Place(self.place(block)))
    }

    fn no_room(&self, redo: &Redo<'_>, asked: ByteSize) -> Result<Error> {
        let all = self.shape.count << self.shape.shift;
        let mut largest = 0;
        for order in 0..ORDERS - self.shape.shift {
            if redo.get(head(order))? != 0 {
                largest = 1 << (order + self.shape.shift);
            }
        }
        Ok(Error::NoRoom {
            asked,
            free: ByteSize::new(all.saturating_sub(redo.get(USED)?)),
            largest: ByteSize::new(largest),
            quarantined: ByteSize::ZERO,
        })
    }

    /// The block in use that begins at a place, and its order.
    fn used_block(&self, redo: &Redo<'_>, place: Place) -> Result<(u64, u32)> {
        let refuse = |why| Error::NotAllocated {
            offset: place.0,
            why,
        };
        let block = self
            .block(place.0)
            .ok_or_else(|| refuse("no block begins there"))?;
        match self.mark(redo, block)? {
            mark @ TAKEN.. => {
                let order = u32::from(mark - TAKEN);
                let fits = order < ORDERS
                    && block % (1 << order) == 0
                    && block + (1 << order) <= self.shape.count;
                if fits {
                    Ok((block, order))
                } else {
                    Err(self.corrupt("a block does not lie as its order says"))
                }
            }
            0 => Err(refuse("it is inside a block")),
            _ => Err(refuse("it is free already")),
        }
    }

    fn give(&self, redo: &mut Redo<'_>, place: Place) -> Result<()> {
        let (mut block, mut order) = self.used_block(redo, place)?;
        let bytes = 1 << (order + self.shape.shift);
        let used = redo.get(USED)?;
        let used = used
            .checked_sub(bytes)
            .ok_or_else(|| self.corrupt("the number of bytes in use is wrong"))?;
        redo.set(USED, used);
        self.set_mark(redo, block, 0)?;
        while order + 1 < ORDERS {
            let buddy = block ^ (1 << order);
            if buddy + (1 << order) > self.shape.count
                || self.mark(redo, buddy)? != FREE + order as u8
            {
                break;
            }
            self.unlink(redo, buddy, order)?;
            self.set_mark(redo, buddy, 0)?;
            block = block.min(buddy);
            order += 1;
        }
        self.link(redo, block, order)
    }

    /// Refuses a place that is not 8 bytes of a program's own.
    fn check_slot(&self, redo: &Redo<'_>, slot: Place) -> Result<()> {
        let refuse = |why| Error::NotAllocated {
            offset: slot.0,
            why,
        };
        if !slot.0.is_multiple_of(8) {
            return Err(refuse("a place is written at a multiple of 8"));
        }
        if (ROOTS_AT..HEADS_AT).contains(&slot.0) {
            return Ok(());
        }
        let smallest = slot
            .0
            .checked_sub(self.shape.blocks)
            .map(|offset| offset >> self.shape.shift)
            .filter(|block| *block < self.shape.count)
            .ok_or_else(|| refuse("it is neither a root nor in a block"))?;
        // The block that it is in begins at a multiple of one of the orders.
        for order in 0..ORDERS {
            let begin = smallest >> order << order;
            match self.mark(redo, begin)? {
                mark @ TAKEN.. if u32::from(mark - TAKEN) >= order => return Ok(()),
                0 => {}
                _ => break,
            }
        }
        Err(refuse("it is in no block that is in use"))
    }
}

fn head(order: u32) -> u64 {
    HEADS_AT + 8 * u64::from(order)
}

const _: () = assert!(HEADS_AT + 8 * ORDERS as u64 <= RECORD_AT);
const _: () = assert!(RECORD_AT + redo::SIZE <= MAP_AT);
const _: () = assert!(16 * redo::MOST as u64 + 8 <= redo::SIZE);
