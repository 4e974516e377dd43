//! The guest's page tables: written once, into memory that the guest cannot address.

use super::layout::{IMAGE_END, LARGE, Layout, PAGE, Region, SYSTEM_START, system};

/// Entry bits (Intel SDM, volume 3A, 4.5).
const PRESENT: u64 = 1;
const WRITE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
const LARGE_PAGE: u64 = 1 << 7;
const NO_EXECUTE: u64 = 1 << 63;
/// Entries of a table.
const ENTRIES: u64 = PAGE / 8;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// Where tables are written to: 64-bit words of the guest's memory.
pub trait Words {
    /// Reads the word at `offset`.
    fn word(&self, offset: u64) -> u64;
    /// Writes the word at `offset`.
    fn set_word(&mut self, offset: u64, value: u64);
}

/// Writes the tables of `layout` from `root` on, where the memory is zero; gives their end.
///
/// # Errors
/// Where the tables do not fit into the room for them, in words.
pub fn write(memory: &mut impl Words, layout: &Layout, root: u64) -> Result<u64, String> {
    let mut tables = Tables {
        memory,
        root,
        next: root + PAGE,
    };
    let user = |region: &Region| {
        let mut bits = PRESENT | USER | ACCESSED;
        if region.write {
            bits |= WRITE | DIRTY;
        }
        if !region.execute {
            bits |= NO_EXECUTE;
        }
        bits
    };
    for region in &layout.regions {
        let step = if region.large { LARGE } else { PAGE };
        let size = if region.large { LARGE_PAGE } else { 0 };
        for at in (0..region.len).step_by(usize::try_from(step).unwrap_or(usize::MAX)) {
            let entry = (region.offset + at) | user(region) | size;
            tables.map(region.address + at, entry, region.large)?;
        }
    }
    let supervisor = PRESENT | WRITE | ACCESSED | DIRTY | NO_EXECUTE;
    let data = supervisor | USER;
    let parts = [
        (system::GDT, system::CODE, supervisor),
        (system::CODE, system::DATA, PRESENT | USER | ACCESSED),
        (system::DATA, system::TABLES, data),
    ];
    for (from, to, bits) in parts {
        for offset in (from..to).step_by(PAGE as usize) {
            tables.map(SYSTEM_START + offset, offset | bits, false)?;
        }
    }
    const { assert!(IMAGE_END < SYSTEM_START) };
    Ok(tables.next)
}

/// End of the last table that hangs on `root`.
pub fn end(memory: &impl Words, root: u64) -> u64 {
    /// Pages among which the tables are.
    const PAGES: usize = (LARGE / PAGE) as usize;
    // Those that were seen: a template's file could hold tables that point to each other.
    let mut seen = [false; PAGES];
    let mut left = vec![(root, 3)];
    let mut end = root;
    while let Some((table, level)) = left.pop() {
        match seen.get_mut((table / PAGE) as usize) {
            Some(seen) if !*seen => *seen = true,
            _ => continue,
        }
        end = end.max(table + PAGE);
        if level == 0 {
            continue;
        }
        for i in 0..ENTRIES {
            let entry = memory.word(table + i * 8);
            if entry & PRESENT != 0 && entry & LARGE_PAGE == 0 {
                left.push((entry & ADDRESS, level - 1));
            }
        }
    }
    end
}

struct Tables<'a, M> {
    memory: &'a mut M,
    root: u64,
    /// The next free page.
    next: u64,
}

impl<M: Words> Tables<'_, M> {
    /// Maps one page, small or large.
    fn map(&mut self, address: u64, entry: u64, large: bool) -> Result<(), String> {
        let mut table = self.root;
        let last = if large { 1 } else { 0 };
        for level in (last + 1..4).rev() {
            table = self.below(table + index(address, level) * 8)?;
        }
        self.memory
            .set_word(table + index(address, last) * 8, entry);
        Ok(())
    }

    /// The table that the entry at `place` points to; a new one where it points to none.
    fn below(&mut self, place: u64) -> Result<u64, String> {
        let entry = self.memory.word(place);
        if entry & PRESENT != 0 {
            return Ok(entry & ADDRESS);
        }
        if self.next >= LARGE {
            return Err("the program is scattered over more memory than its tables hold".into());
        }
        let table = self.next;
        self.next += PAGE;
        self.memory
            .set_word(place, table | PRESENT | WRITE | USER | ACCESSED);
        Ok(table)
    }
}

/// Which entry of the table at `level` (0 the lowest) stands for `address`.
const fn index(address: u64, level: u64) -> u64 {
    (address >> (12 + 9 * level)) & 511
}
