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
    if segments.len() > MOST_SEGMENTS {
        return Err(format!("it has more than {MOST_SEGMENTS} segments"));
    }
    if segments.is_empty() {
        return Err("it has nothing to load".into());
    }
    segments.sort_by_key(|segment| segment.address);
    for pair in segments.windows(2) {
        if pair[0].pages().end > pair[1].pages().start {
            return Err(format!(
                "its segments at {:#x} and {:#x} overlap",
                pair[0].address, pair[1].address
            ));
        }
    }
    let entry = base
        .checked_add(header.e_entry(endian))
        .ok_or("its entry point overflows")?;
    let executable =
        |s: &Segment| s.execute && s.address <= entry && entry - s.address < s.len.max(1);
    if !segments.iter().any(executable) {
        return Err(format!(
            "its entry point {entry:#x} is in no executable segment"
        ));
    }
    if headers_at == 0 {
        headers_at = headers_in(&segments, header.e_phoff(endian));
    }
    let size = u64::from(header.e_phentsize(endian));
    let inside = |s: &Segment| {
        s.address <= headers_at
            && headers_at.saturating_add(size * headers.len() as u64) <= s.address + s.len
    };
    if headers_at != 0 && !segments.iter().any(inside) {
        return Err("its program headers are in no segment".into());
    }
    Ok(LoadPlan {
        entry,
        headers: headers_at,
        header_size: size,
        header_count: headers.len() as u64,
        segments,
    })
}

/// Where the program headers are in memory, going by where they are in the file.
fn headers_in(segments: &[Segment], offset: u64) -> u64 {
    segments
        .iter()
        .find(|s| s.file_offset <= offset && offset - s.file_offset < s.file_len)
        .map_or(0, |s| s.address + (offset - s.file_offset))
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
    let end = address
        .checked_add(len)
        .ok_or_else(|| format!("the segment at {address:#x} overflows"))?;
    if address < IMAGE_START || end > IMAGE_END {
        return Err(format!(
            "the segment at {address:#x} lies outside of {IMAGE_START:#x} to {IMAGE_END:#x}"
        ));
    }
    if file_len > len {
        return Err(format!(
            "the segment at {address:#x} has more bytes in the file than in memory"
        ));
    }
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
