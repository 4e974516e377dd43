//! What of a template's memory a clone has of its own: the pages that it has written to.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};

use super::MEMORY_NAME;

/// Bytes of a page.
const PAGE: u64 = 4096;
/// Bits of a page's entry (Documentation/admin-guide/mm/pagemap.rst).
const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
const OF_THE_FILE: u64 = 1 << 61;

/// How many pages of the guest's memory are its own in the process `pid`.
pub(super) fn count(pid: u32) -> io::Result<u64> {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let mut pagemap = File::open(format!("/proc/{pid}/pagemap"))?;
    let mut own = 0;
    for (start, end) in mappings(&maps) {
        pagemap.seek(SeekFrom::Start(start / PAGE * 8))?;
        let mut entries = Vec::new();
        Read::by_ref(&mut pagemap)
            .take((end - start) / PAGE * 8)
            .read_to_end(&mut entries)?;
        own += entries
            .as_chunks()
            .0
            .iter()
            .filter(|entry| is_own(u64::from_ne_bytes(**entry)))
            .count() as u64;
    }
    Ok(own)
}

fn is_own(entry: u64) -> bool {
    entry & SWAPPED != 0 || entry & PRESENT != 0 && entry & OF_THE_FILE == 0
}

/// Where the guest's memory is mapped: begin and end.
fn mappings(maps: &str) -> impl Iterator<Item = (u64, u64)> {
    let name = format!("/memfd:{MEMORY_NAME} ");
    maps.lines()
        .filter(move |line| line.contains(&name))
        .filter_map(|line| {
            let (start, end) = line.split_once(' ')?.0.split_once('-')?;
            let number = |text| u64::from_str_radix(text, 16).ok();
            number(start).zip(number(end)).filter(|(a, b)| a < b)
        })
}

#[cfg(test)]
mod tests {
    use super::{OF_THE_FILE, PRESENT, SWAPPED, is_own, mappings};

    #[test]
    fn a_guests_memory_is_found_by_its_name() {
        let maps = "1000-2000 r-xp 0 00:00 0 /usr/bin/qemu\n\
                    3000-5000 rw-p 0 00:01 7  /memfd:rund-qemu (deleted)\n\
                    6000-7000 rw-p 0 00:01 7  /memfd:rund-qemu-other (deleted)\n";
        assert_eq!(mappings(maps).collect::<Vec<_>>(), [(0x3000, 0x5000)]);
    }

    #[test]
    fn a_page_is_its_own_unless_it_is_the_files_or_was_never_touched() {
        assert!(is_own(PRESENT) && is_own(SWAPPED));
        assert!(!is_own(0) && !is_own(PRESENT | OF_THE_FILE));
    }
}
