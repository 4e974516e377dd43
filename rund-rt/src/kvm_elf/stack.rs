//! A program's first stack: arguments, environment, auxiliary vector.

use super::elf::LoadPlan;
use super::layout::{PAGE, STACK};
use super::memory::{Fault, GuestMemory};

/// The most bytes of arguments and environment, a quarter of the stack as on Linux.
pub const MOST_ARGUMENTS: usize = STACK as usize / 4;

/// What a program begins with.
#[derive(Debug, Clone)]
pub struct Beginning<'a> {
    /// Arguments, from `argv[0]` on.
    pub args: &'a [Vec<u8>],
    /// The environment.
    pub env: &'a [Vec<u8>],
    /// Path of the program as it was called.
    pub path: &'a [u8],
    /// Sixteen bytes of entropy (`AT_RANDOM`).
    pub random: [u8; 16],
    /// User and group.
    pub ids: (u32, u32),
    /// Feature bits of the processor, as `AT_HWCAP` has them (leaf 1, edx).
    pub hwcap: u64,
}

/// Auxiliary vector keys (`include/uapi/linux/auxvec.h`).
const AT_PHDR: u64 = 3;
const AT_PHENT: u64 = 4;
const AT_PHNUM: u64 = 5;
const AT_PAGESZ: u64 = 6;
const AT_BASE: u64 = 7;
const AT_FLAGS: u64 = 8;
const AT_ENTRY: u64 = 9;
const AT_UID: u64 = 11;
const AT_EUID: u64 = 12;
const AT_GID: u64 = 13;
const AT_EGID: u64 = 14;
const AT_PLATFORM: u64 = 15;
const AT_HWCAP: u64 = 16;
const AT_CLKTCK: u64 = 17;
const AT_SECURE: u64 = 23;
const AT_RANDOM: u64 = 25;
const AT_HWCAP2: u64 = 26;
const AT_EXECFN: u64 = 31;

/// Ring 3 may use `monitor`: no; FSGSBASE instructions: yes.
const HWCAP2: u64 = 2;
/// Clock ticks in a second, a constant of Linux' interface.
const TICKS: u64 = 100;

/// Writes the stack below `top`; gives its pointer and where the entropy lies.
///
/// # Errors
/// [`Fault`] where it does not fit.
pub fn write(
    memory: &GuestMemory,
    plan: &LoadPlan,
    top: u64,
    beginning: &Beginning<'_>,
) -> Result<(u64, u64), Fault> {
    let strings: usize = beginning
        .args
        .iter()
        .chain(beginning.env)
        .map(|s| s.len() + 1 + 8)
        .sum();
    if strings > MOST_ARGUMENTS {
        return Err(Fault);
    }
    // Built as one block that ends at the top, and copied at once.
    let mut tail = Vec::new();
    let mut pointers = Vec::new();
    let mut offsets = Vec::new();
    for text in beginning.args.iter().chain(beginning.env) {
        offsets.push(tail.len());
        tail.extend_from_slice(text);
        tail.push(0);
    }
    let path = tail.len();
    tail.extend_from_slice(beginning.path);
    tail.push(0);
    let platform = tail.len();
    tail.extend_from_slice(b"x86_64\0");
    let random = tail.len();
    tail.extend_from_slice(&beginning.random);
    let tail_at = (top - 16 - tail.len() as u64) & !15;
    let at = |offset: usize| tail_at + offset as u64;

    pointers.push(beginning.args.len() as u64);
    pointers.extend(offsets.iter().take(beginning.args.len()).map(|o| at(*o)));
    pointers.push(0);
    pointers.extend(offsets.iter().skip(beginning.args.len()).map(|o| at(*o)));
    pointers.push(0);
    let (uid, gid) = (u64::from(beginning.ids.0), u64::from(beginning.ids.1));
    let vector = [
        (AT_PHDR, plan.headers),
        (AT_PHENT, plan.header_size),
        (AT_PHNUM, plan.header_count),
        (AT_PAGESZ, PAGE),
        (AT_BASE, 0),
        (AT_FLAGS, 0),
        (AT_ENTRY, plan.entry),
        (AT_UID, uid),
        (AT_EUID, uid),
        (AT_GID, gid),
        (AT_EGID, gid),
        (AT_SECURE, 0),
        (AT_HWCAP, beginning.hwcap),
        (AT_HWCAP2, HWCAP2),
        (AT_CLKTCK, TICKS),
        (AT_PLATFORM, at(platform)),
        (AT_EXECFN, at(path)),
        (AT_RANDOM, at(random)),
        (0, 0),
    ];
    pointers.extend(vector.iter().flat_map(|(key, value)| [*key, *value]));
    let pointer = (tail_at - pointers.len() as u64 * 8) & !15;
    let words: Vec<u8> = pointers
        .iter()
        .flat_map(|word| word.to_le_bytes())
        .collect();
    memory.write(pointer, &words)?;
    memory.write(tail_at, &tail)?;
    Ok((pointer, at(random)))
}
