//! Where everything is: in the guest's address space, and in its memory.
//!
//! Everything is mapped before the guest's first instruction and stays so: under a KVM that shadows
//! page tables, what the host edits in live ones is not seen.

use carlsbad_types::ByteSize;

use super::elf::{LoadPlan, Segment};

/// Size of a page.
pub const PAGE: u64 = 4096;
/// Size of a large page.
pub const LARGE: u64 = 2 << 20;

/// Lowest address of a program: as Linux' `mmap_min_addr`, so that null pointers fault.
pub const IMAGE_START: u64 = 0x1_0000;
/// Where a position-independent program is loaded.
pub const PIE_BASE: u64 = 0x40_0000;
/// Highest end of a program: everything else lies above.
pub const IMAGE_END: u64 = 0x7e_0000_0000;
/// Beginning of the area for `mmap`.
pub const MMAP_START: u64 = 0x7f_0000_0000;
/// End of the stack.
pub const STACK_TOP: u64 = 0x7f_8000_0000;
/// Beginning of the guest's side of this backend: tables, the system call entry, the shim's data.
pub const SYSTEM_START: u64 = 0x7f_c000_0000;

/// Size of the stack.
pub const STACK: u64 = 2 << 20;
/// The most memory of a guest: page frames are 8 bytes each in the host's kernel.
pub const MOST_MEMORY: u64 = 1 << 30;
/// The largest address space that the tables describe for `mmap`.
const MOST_MMAP: u64 = 1 << 30;

/// Offsets of the guest's side, in its memory and from [`SYSTEM_START`].
pub mod system {
    use super::PAGE;

    /// Global descriptor table and task state segment (supervisor).
    pub const GDT: u64 = PAGE;
    /// The task state segment, with the map of the ports that user mode may use.
    pub const TSS: u64 = GDT + 0x200;
    /// Interrupt descriptor table (supervisor).
    pub const IDT: u64 = 2 * PAGE;
    /// Stack of the exception handlers (supervisor); it grows down from here.
    pub const EXCEPTION_STACK_TOP: u64 = 4 * PAGE;
    /// System call entry, shim and exception handlers (user, read and execute).
    pub const CODE: u64 = 4 * PAGE;
    /// The shim's data (user, read and write).
    pub const DATA: u64 = 5 * PAGE;
    /// What the guest wrote to standard output and error and nobody has taken yet (user).
    pub const OUTPUT: u64 = 6 * PAGE;
    /// Bytes of it.
    pub const OUTPUT_LEN: u64 = 8 * PAGE;
    /// Windows on files that are open for reading (user).
    pub const INPUT: u64 = OUTPUT + OUTPUT_LEN;
    /// Bytes of one window at most: leaving the machine for the next piece costs some 30 µs, which
    /// is little beside what a program does with 256 KiB.
    pub const INPUT_LEN: u64 = 64 * PAGE;
    /// Bytes of a file's first window: most files are smaller, and pages that were written to have
    /// to be set back.
    pub const FIRST_INPUT_LEN: u64 = 16 * PAGE;
    /// Number of windows.
    pub const INPUTS: u64 = 4;
    /// First page of the page tables (in no address space).
    pub const TABLES: u64 = INPUT + INPUTS * INPUT_LEN;
}

/// `address` rounded down to a page.
pub const fn page_down(address: u64) -> u64 {
    address & !(PAGE - 1)
}

/// `address` rounded up to a page; for addresses far from the end of the address space.
pub const fn page_up(address: u64) -> u64 {
    page_down(address + (PAGE - 1))
}

const fn large_up(address: u64) -> u64 {
    (address + (LARGE - 1)) & !(LARGE - 1)
}

/// A part of the guest's address space that is one piece of its memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Region {
    /// First address.
    pub address: u64,
    /// Bytes.
    pub len: u64,
    /// Where it begins in the guest's memory.
    pub offset: u64,
    /// Whether the guest may write to it.
    pub write: bool,
    /// Whether the guest may execute it.
    pub execute: bool,
    /// Whether it is mapped by large pages.
    pub large: bool,
}

impl Region {
    /// Its end.
    pub const fn end(&self) -> u64 {
        self.address + self.len
    }
}

/// A guest's address space.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    /// Bytes of memory, all regions and tables together.
    pub memory: u64,
    /// The program's segments, then heap, `mmap` area and stack.
    pub regions: Vec<Region>,
    /// The heap, from its beginning to the highest break.
    pub heap: Region,
    /// The area for `mmap`.
    pub mmap: Region,
    /// The stack.
    pub stack: Region,
}

impl Layout {
    /// Places the program of `plan` in a guest with `memory`.
    ///
    /// # Errors
    /// Where the memory is too small or too large for it, in words.
    pub fn new(plan: &LoadPlan, memory: ByteSize) -> Result<Self, String> {
        let total = memory.get() & !(LARGE - 1);
        if total > MOST_MEMORY {
            return Err(format!(
                "{memory} of memory: a guest has at most {}",
                ByteSize::new(MOST_MEMORY)
            ));
        }
        let image: u64 = plan
            .segments
            .iter()
            .map(|s| s.pages().end - s.pages().start)
            .sum();
        // Tables first, then the stack, the program, the heap and the rest.
        let image_at = LARGE + STACK;
        let heap_at = large_up(image_at + image);
        let room = total.saturating_sub(heap_at);
        let heap_len = (room / 4) & !(LARGE - 1);
        let mmap_len = (room - heap_len).min(MOST_MMAP) & !(LARGE - 1);
        if heap_len == 0 {
            return Err(format!(
                "{memory} of memory: the program needs {} and at least {} more",
                ByteSize::new(image),
                ByteSize::new(image_at + 4 * LARGE)
            ));
        }
        let mut offset = image_at;
        let mut regions: Vec<Region> = plan
            .segments
            .iter()
            .map(|segment| region(segment, &mut offset))
            .collect();
        let data = |address, len, offset| Region {
            address,
            len,
            offset,
            write: true,
            execute: false,
            large: true,
        };
        let heap = data(large_up(plan.end()), heap_len, heap_at);
        let mmap = data(MMAP_START, mmap_len, heap_at + heap_len);
        let stack = data(STACK_TOP - STACK, STACK, LARGE);
        regions.extend([heap, mmap, stack]);
        Ok(Self {
            memory: total,
            regions,
            heap,
            mmap,
            stack,
        })
    }
}

fn region(segment: &Segment, offset: &mut u64) -> Region {
    let pages = segment.pages();
    let region = Region {
        address: pages.start,
        len: pages.end - pages.start,
        offset: *offset,
        write: segment.write,
        execute: segment.execute,
        large: false,
    };
    *offset += region.len;
    region
}
