//! What a static Linux ELF file asks to be loaded: parsed and checked, nothing is mapped yet.
//!
//! The file is untrusted. Whatever it says, the answer is a plan whose parts lie inside the file
//! and inside the guest's address space without overlapping, or a reason why not.

use object::elf::{
    EM_X86_64, ET_DYN, ET_EXEC, FileHeader64, PF_W, PF_X, PT_INTERP, PT_LOAD, PT_PHDR,
};
use object::read::elf::{FileHeader, ProgramHeader};
use object::{Endianness, FileKind};

use super::layout::{IMAGE_END, IMAGE_START, PAGE, PIE_BASE, page_down, page_up};

/// The most segments that a program may have; linkers make four to six.
const MOST_SEGMENTS: usize = 32;

/// How to load a program.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct LoadPlan {
    /// Address of the first instruction.
    pub entry: u64,
    /// Address of the program headers, 0 where no segment holds them.
    pub headers: u64,
    /// Size of one program header.
    pub header_size: u64,
    /// Number of program headers.
    pub header_count: u64,
    /// What to load, in ascending order of addresses.
    pub segments: Vec<Segment>,
}

/// A part of the file, and where it goes.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Segment {
    /// Address of its first byte.
    pub address: u64,
    /// Bytes in memory; those beyond `file_len` are zero.
    pub len: u64,
    /// Where it begins in the file.
    pub file_offset: u64,
    /// Bytes that come from the file.
    pub file_len: u64,
    /// Whether the guest may write to it.
    pub write: bool,
    /// Whether the guest may execute it.
    pub execute: bool,
}

impl Segment {
    /// Its pages, from the first byte of the first to the end of the last.
    pub fn pages(&self) -> std::ops::Range<u64> {
        // Within IMAGE_START..IMAGE_END, where nothing overflows.
        page_down(self.address)..page_up(self.address + self.len)
    }
}

impl LoadPlan {
    /// Whether its parts lie where programs may, apart from each other and in order, and begin where
    /// one of them can be executed.
    ///
    /// # Errors
    /// What is wrong with it, in words.
    pub fn check(&self) -> Result<(), String> {
        if self.segments.len() > MOST_SEGMENTS {
            return Err(format!("it has more than {MOST_SEGMENTS} segments"));
        }
        if self.segments.is_empty() {
            return Err("it has nothing to load".into());
        }
        for segment in &self.segments {
            let address = segment.address;
            let end = address.checked_add(segment.len);
            let end = end.ok_or_else(|| format!("the segment at {address:#x} overflows"))?;
            if address < IMAGE_START || end > IMAGE_END || segment.len == 0 {
                return Err(format!(
                    "the segment at {address:#x} lies outside of {IMAGE_START:#x} to {IMAGE_END:#x}"
                ));
            }
            if segment.file_len > segment.len {
                return Err(format!(
                    "the segment at {address:#x} has more bytes in the file than in memory"
                ));
            }
        }
        for pair in self.segments.windows(2) {
            if pair[0].pages().end > pair[1].pages().start {
                return Err(format!(
                    "its segments at {:#x} and {:#x} overlap",
                    pair[0].address, pair[1].address
                ));
            }
        }
        let entry = self.entry;
        let executable = |s: &Segment| s.execute && s.address <= entry && entry - s.address < s.len;
        if !self.segments.iter().any(executable) {
            return Err(format!(
                "its entry point {entry:#x} is in no executable segment"
            ));
        }
        let size = self.header_size.saturating_mul(self.header_count);
        let inside = |s: &Segment| {
            s.address <= self.headers && self.headers.saturating_add(size) <= s.address + s.len
        };
        if self.headers != 0 && !self.segments.iter().any(inside) {
            return Err("its program headers are in no segment".into());
        }
        Ok(())
    }

    /// End of the last page of the program.
    pub fn end(&self) -> u64 {
        self.segments.last().map_or(0, |s| s.pages().end)
    }
}

/// The part of a file that has to hold its headers, from its beginning: Linux allows program headers
/// of 64 KiB, and linkers put them first.
pub const HEAD: u64 = 64 << 10;

/// Reads what a file of `len` bytes that begins with `head` asks for.
///
/// # Errors
/// Why it cannot be loaded, in words.
pub fn plan(head: &[u8], len: u64) -> Result<LoadPlan, String> {
    match FileKind::parse(head) {
        Ok(FileKind::Elf64) => {}
        Ok(FileKind::Elf32) => return Err("it is a 32-bit program".into()),
        _ => return Err("it is no ELF file".into()),
    }
    let header: &FileHeader64<Endianness> =
        FileHeader::parse(head).map_err(|why| why.to_string())?;
    let endian = header.endian().map_err(|why| why.to_string())?;
    if endian != Endianness::Little || header.e_machine(endian) != EM_X86_64 {
        return Err("it is no program for x86-64".into());
    }
    let base = match header.e_type(endian) {
        ET_EXEC => 0,
        ET_DYN => PIE_BASE,
        _ => return Err("it is an object file, not a program".into()),
    };
    let headers = header
        .program_headers(endian, head)
        .map_err(|why| format!("its program headers: {why}"))?;

    let mut segments = Vec::new();
    let mut headers_at = 0;
    for one in headers {
        match one.p_type(endian) {
            PT_INTERP => {
                return Err(
                    "it is linked dynamically; link it statically (cc -static, or \
                     -C target-feature=+crt-static)"
                        .into(),
                );
            }
            PT_PHDR => {
                headers_at = base.checked_add(one.p_vaddr(endian)).unwrap_or(0);
            }
            PT_LOAD => {
                if let Some(segment) = segment(one, endian, base, len)? {
                    segments.push(segment);
                }
            }
            _ => {}
        }
    }
    segments.sort_by_key(|segment| segment.address);
    if headers_at == 0 {
        headers_at = headers_in(&segments, header.e_phoff(endian));
    }
    let plan = LoadPlan {
        entry: base
            .checked_add(header.e_entry(endian))
            .ok_or("its entry point overflows")?,
        headers: headers_at,
        header_size: u64::from(header.e_phentsize(endian)),
        header_count: headers.len() as u64,
        segments,
    };
    plan.check()?;
    Ok(plan)
}

/// Where the program headers are in memory, going by where they are in the file.
fn headers_in(segments: &[Segment], offset: u64) -> u64 {
    segments
        .iter()
        .find(|s| s.file_offset <= offset && offset - s.file_offset < s.file_len)
        .map_or(0, |s| s.address.saturating_add(offset - s.file_offset))
}

fn segment(
    header: &impl ProgramHeader<Endian = Endianness, Word = u64>,
    endian: Endianness,
    base: u64,
    file_size: u64,
) -> Result<Option<Segment>, String> {
    let (len, file_len) = (header.p_memsz(endian), header.p_filesz(endian));
    let (offset, flags) = (header.p_offset(endian), header.p_flags(endian));
    if len == 0 {
        return Ok(None);
    }
    let address = base
        .checked_add(header.p_vaddr(endian))
        .ok_or("a segment's address overflows")?;
    if offset
        .checked_add(file_len)
        .is_none_or(|end| end > file_size)
    {
        return Err(format!("the segment at {address:#x} goes beyond the file"));
    }
    if file_len > 0 && offset % PAGE != address % PAGE {
        return Err(format!(
            "the segment at {address:#x} cannot be mapped from its place in the file"
        ));
    }
    Ok(Some(Segment {
        address,
        len,
        file_offset: offset,
        file_len,
        write: flags.0 & PF_W.0 != 0,
        execute: flags.0 & PF_X.0 != 0,
    }))
}

#[cfg(test)]
mod tests {
    use carlsbad_types::ByteSize;
    use proptest::prelude::*;

    use super::super::fuzzing::Tables;
    use super::super::layout::{LARGE, Layout, system};
    use super::super::page_table;
    use super::*;

    /// An ELF file with program headers `(type, flags, offset, address, file length, length)`.
    fn file(kind: u16, entry: u64, headers: &[(u32, u32, u64, u64, u64, u64)]) -> Vec<u8> {
        let mut file = b"\x7fELF\x02\x01\x01".to_vec();
        file.resize(16, 0);
        file.extend_from_slice(&kind.to_le_bytes());
        file.extend_from_slice(&62u16.to_le_bytes());
        file.extend_from_slice(&1u32.to_le_bytes());
        file.extend_from_slice(&entry.to_le_bytes());
        file.extend_from_slice(&64u64.to_le_bytes()); // program headers
        file.extend_from_slice(&0u64.to_le_bytes()); // no sections
        file.extend_from_slice(&0u32.to_le_bytes());
        for half in [64, 56, headers.len() as u16, 64, 0, 0] {
            file.extend_from_slice(&half.to_le_bytes());
        }
        for (kind, flags, offset, address, file_len, len) in headers {
            file.extend_from_slice(&kind.to_le_bytes());
            file.extend_from_slice(&flags.to_le_bytes());
            for word in [*offset, *address, *address, *file_len, *len, PAGE] {
                file.extend_from_slice(&word.to_le_bytes());
            }
        }
        file
    }

    const LOAD: u32 = 1;
    const EXECUTE: u32 = 5;
    const WRITE: u32 = 6;
    const HERE: u64 = 0x40_0000;

    fn refusal(headers: &[(u32, u32, u64, u64, u64, u64)]) -> String {
        plan(&file(2, HERE + 0x100, headers), 1 << 20).unwrap_err()
    }

    #[test]
    fn a_plain_program_is_planned() {
        let text = (LOAD, EXECUTE, 0, HERE, 0x1000, 0x1000);
        let data = (LOAD, WRITE, 0x1800, HERE + 0x2800, 0x100, 0x5000);
        let plan = plan(&file(2, HERE + 0x100, &[data, text]), 1 << 20).unwrap();
        assert_eq!(plan.entry, HERE + 0x100);
        assert_eq!(plan.headers, HERE + 64);
        assert_eq!(plan.segments.len(), 2);
        assert_eq!(plan.segments[0].address, HERE);
        assert_eq!(plan.segments[1].pages(), HERE + 0x2000..HERE + 0x8000);
    }

    #[test]
    fn what_cannot_be_loaded_is_refused_with_the_reason() {
        let text = (LOAD, EXECUTE, 0, HERE, 0x1000, 0x1000);
        let with = |other| refusal(&[text, other]);
        assert!(with((LOAD, WRITE, 0x800, HERE + 0x800, 1, 1)).contains("overlap"));
        assert!(with((LOAD, WRITE, 0, u64::MAX - 0xfff, 0, 0x2000)).contains("overflows"));
        assert!(with((LOAD, WRITE, 0, 0x1000, 0, 0x1000)).contains("outside"));
        assert!(with((LOAD, WRITE, 0, HERE + 0x2000, 0x2000, 0x1000)).contains("more bytes"));
        assert!(with((LOAD, WRITE, 1 << 20, HERE + 0x2000, 1, 1)).contains("beyond the file"));
        assert!(with((LOAD, WRITE, u64::MAX, HERE + 0x2fff, 2, 2)).contains("beyond the file"));
        assert!(with((LOAD, WRITE, 0x10, HERE + 0x2000, 1, 1)).contains("cannot be mapped"));
        assert!(with((3, 4, 0, 0, 0, 0)).contains("dynamically"));
        assert!(refusal(&[(LOAD, WRITE, 0, HERE, 0x1000, 0x1000)]).contains("entry point"));
        assert!(refusal(&[]).contains("nothing to load"));
        for len in 0..200 {
            let whole = file(2, HERE + 0x100, &[text, text]);
            let cut = whole.get(..len.min(whole.len())).unwrap();
            plan(cut, cut.len() as u64).unwrap_err();
        }
    }

    fn number() -> impl Strategy<Value = u64> {
        prop_oneof![
            4 => (0..0x40u64).prop_map(|pages| HERE + pages * 0x1000),
            2 => (0..0x8000u64).prop_map(|bytes| HERE + bytes),
            4 => 0..0x8000u64,
            1 => any::<u64>(),
            1 => (0..0x2000u64).prop_map(|less| u64::MAX - less),
        ]
    }

    fn wild() -> impl Strategy<Value = (u32, u32, u64, u64, u64, u64)> {
        let kind = prop_oneof![8 => Just(LOAD), 1 => Just(6u32), 1 => any::<u32>()];
        let flags = prop_oneof![Just(EXECUTE), Just(WRITE), Just(7u32), any::<u32>()];
        (kind, flags, number(), number(), number(), number())
    }

    /// One that a linker might have made, in a place that others may have as well.
    fn likely() -> impl Strategy<Value = (u32, u32, u64, u64, u64, u64)> {
        let flags = prop_oneof![2 => Just(EXECUTE), 1 => Just(WRITE), 1 => Just(4u32)];
        (
            flags,
            0..12u64,
            0..0x1000u64,
            0..4u64,
            1..0x5000u64,
            0..0x5000u64,
        )
            .prop_map(|(flags, slot, rest, page, len, less)| {
                let (offset, address) = (page * PAGE + rest, HERE + slot * 0x4000 + rest);
                (LOAD, flags, offset, address, len.saturating_sub(less), len)
            })
    }

    fn header() -> impl Strategy<Value = (u32, u32, u64, u64, u64, u64)> {
        prop_oneof![20 => likely(), 1 => wild()]
    }

    #[test]
    fn whatever_is_planned_fits_into_the_guest() {
        const CASES: u32 = 4096;
        let fitted = std::cell::Cell::new(0);
        let headers = proptest::collection::vec(header(), 1..5);
        let entry = prop_oneof![20 => (0..64u64).prop_map(|at| at * 0x800), 1 => any::<u64>()];
        let input = (2..4u16, entry, headers, 0x8000..0x10000u64);
        let config = ProptestConfig::with_cases(CASES);
        let run = |(kind, entry, headers, len): (u16, u64, Vec<_>, u64)| {
            // From the beginning of an executable segment, mostly.
            let first = headers
                .iter()
                .find(|h: &&(_, u32, _, u64, _, _)| h.1 & 1 != 0);
            let entry = first.map_or(HERE, |h| h.3).wrapping_add(entry % 0x4000);
            let head = file(kind, entry, &headers);
            let Ok(plan) = plan(&head, len) else {
                return Ok(());
            };
            let Ok(layout) = Layout::new(&plan, ByteSize::mib(64)) else {
                return Ok(());
            };
            let mut tables = Tables::new();
            if page_table::write(&mut tables, &layout, system::TABLES).is_err() {
                return Ok(());
            }
            fitted.set(fitted.get() + 1);
            // Every region lies in memory, behind the tables, apart from the others.
            let mut places: Vec<_> = layout.regions.iter().map(|r| (r.offset, r.len)).collect();
            places.sort_unstable();
            let mut end = LARGE;
            for (offset, len) in places {
                prop_assert!(offset >= end && len % PAGE == 0, "{offset:#x} {end:#x}");
                end = offset + len;
            }
            prop_assert!(end <= layout.memory);
            // And so it is for the processor: a walk of the tables ends in the region's own page.
            for region in &layout.regions {
                for at in [0, region.len - PAGE] {
                    let entry = tables.walk(region.address + at);
                    prop_assert_eq!(entry.map(|e| e.0), Some(region.offset + at));
                    prop_assert_eq!(entry.map(|e| e.1), Some(region.write));
                    prop_assert_eq!(entry.map(|e| e.2), Some(region.execute));
                }
            }
            prop_assert_eq!(tables.walk(layout.heap.end()), None);
            Ok(())
        };
        proptest::test_runner::TestRunner::new(config)
            .run(&input, run)
            .unwrap();
        // The control: enough of them were programs.
        assert!(fitted.get() > CASES / 10, "{} of {CASES}", fitted.get());
    }
}
