//! Setting a guest's memory back to its template: the pages that differ are found by
//! `PAGEMAP_SCAN` and copied back, and stay mapped. That is cheaper than mapping the template anew:
//! neither the host nor the guest has to find them again.

use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;

use super::layout::PAGE;
use super::memory::{Extent, GuestMemory};
use super::template::Pages;

/// `struct pm_scan_arg` of `include/uapi/linux/fs.h`.
#[repr(C)]
#[derive(Debug, Default)]
struct Scan {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// `struct page_region`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Found {
    start: u64,
    end: u64,
    categories: u64,
}

const FILE: u64 = 1 << 2;
const PRESENT: u64 = 1 << 3;
const SWAPPED: u64 = 1 << 4;
const ZERO_PAGE: u64 = 1 << 5;

nix::ioctl_readwrite!(pagemap_scan, b'f', 16, Scan);

/// The request number, for the filter.
pub const PAGEMAP_SCAN: u64 = nix::request_code_readwrite!(b'f', 16, size_of::<Scan>()) as u64;

/// Beyond this many pages, what a guest has dirtied is given back to the host instead of being
/// kept for the next one.
const MOST_KEPT: u64 = 4096;

/// Ranges of the memory, as offsets, that this process has pages of its own for.
///
/// # Errors
/// Where the kernel has no `PAGEMAP_SCAN` (before 6.7).
pub fn own_pages(pagemap: &OwnedFd, memory: &GuestMemory) -> nix::Result<Vec<(u64, u64)>> {
    let base = memory.host_address();
    let end = base + memory.len();
    let mut ranges = Vec::new();
    let mut found = [Found::default(); 256];
    let mut start = base;
    while start < end {
        let mut scan = Scan {
            size: size_of::<Scan>() as u64,
            start,
            end,
            vec: found.as_mut_ptr().addr() as u64,
            vec_len: found.len() as u64,
            // Neither a page of the template's file nor the zero page, but something.
            category_inverted: FILE | ZERO_PAGE,
            category_mask: FILE | ZERO_PAGE,
            category_anyof_mask: PRESENT | SWAPPED,
            return_mask: PRESENT | SWAPPED,
            ..Default::default()
        };
        // SAFETY: the structure is what the call expects, and points to an array of its length.
        let n = unsafe { pagemap_scan(pagemap.as_raw_fd(), &raw mut scan) }?;
        let found = found
            .get(..usize::try_from(n).unwrap_or(0))
            .unwrap_or_default();
        ranges.extend(found.iter().map(|f| (f.start - base, f.end - base)));
        if scan.walk_end <= start {
            return Err(Errno::EIO);
        }
        start = scan.walk_end;
    }
    Ok(ranges)
}

/// Copies the template's pages back over those in `ranges`; gives how many pages that were.
///
/// # Errors
/// Where the template is shorter than it says.
pub fn copy_back(
    memory: &GuestMemory,
    ranges: &[(u64, u64)],
    extents: &[Extent],
    pages: &Pages,
) -> nix::Result<u64> {
    let dirty: u64 = ranges.iter().map(|(from, to)| (to - from) / PAGE).sum();
    let give_back = dirty > MOST_KEPT;
    for (from, to) in ranges {
        let mut at = *from;
        while at < *to {
            // The extent that holds `at`, or the next one.
            let i = extents.partition_point(|e| e.offset + e.len <= at);
            let (end, source) = match extents.get(i) {
                Some(e) if e.offset <= at => (
                    (e.offset + e.len).min(*to),
                    Some(e.file_offset + (at - e.offset)),
                ),
                Some(e) => (e.offset.min(*to), None),
                None => (*to, None),
            };
            let len = end - at;
            match source {
                Some(offset) => {
                    let bytes = pages.at(offset, len as usize).ok_or(Errno::EIO)?;
                    memory.write_offset(at, bytes);
                }
                None => memory.clear_offset(at, len, give_back)?,
            }
            at = end;
        }
    }
    Ok(dirty)
}

/// Where the memory differs from the template: offsets of pages, at most a few.
pub fn differences(memory: &GuestMemory, extents: &[Extent], pages: &Pages) -> Vec<u64> {
    const MOST: usize = 16;
    let zeros = [0; PAGE as usize];
    let mut page = [0; PAGE as usize];
    let mut found = Vec::new();
    let mut at = 0;
    while at < memory.len() && found.len() < MOST {
        memory.read_offset(at, &mut page);
        let i = extents.partition_point(|e| e.offset + e.len <= at);
        let expected = match extents.get(i) {
            Some(e) if e.offset <= at => pages.at(e.file_offset + (at - e.offset), PAGE as usize),
            _ => Some(&zeros[..]),
        };
        if expected != Some(&page[..]) {
            found.push(at);
        }
        at += PAGE;
    }
    found
}
