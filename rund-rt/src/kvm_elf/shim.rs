//! The guest's side of a system call, and the page through which it and the host speak.
//!
//! The guest can write to that page. What the host reads there is a hint at most: every number is
//! clamped to where it may lie before it is used.

use super::layout::{PAGE, SYSTEM_START, system};

core::arch::global_asm!(include_str!("shim.s"));

unsafe extern "C" {
    static rund_rt_shim_start: u8;
    static rund_rt_shim_exit: u8;
    static rund_rt_shim_return: u8;
    static rund_rt_shim_exceptions: u8;
    static rund_rt_shim_end: u8;
}

/// Port of a system call.
pub const CALL_PORT: u16 = 0x80;
/// Port of exception 0; the others follow.
pub const EXCEPTION_PORT: u16 = 0xa0;
/// Size of one exception handler.
const HANDLER: u64 = 4;

/// Offsets into the data page; `shim.s` has the same.
pub mod data {
    /// Calls that were answered inside.
    pub const SERVED: u64 = 0x00;
    /// Process id, parent's id, user id, group id.
    pub const IDS: u64 = 0x08;
    /// Beginning of the heap, its break, and the highest break.
    pub const BRK: u64 = 0x28;
    /// Next free address for `mmap`, and the end of its area.
    pub const MMAP: u64 = 0x40;
    /// Time stamp counter at which the clocks stood at their bases.
    pub const TSC: u64 = 0x50;
    /// Which of the first eight clocks can be read inside: one bit each.
    pub const CLOCKS: u64 = 0x58;
    /// Nanoseconds for each 2^32 counts.
    pub const SCALE: u64 = 0x60;
    /// Nanoseconds of the first eight clocks at that counter.
    pub const CLOCK_BASES: u64 = 0x80;
    /// Standard output: address of the buffer, bytes in it, its size; standard error behind it.
    pub const OUTPUTS: u64 = 0xc0;
    /// Bytes of one output's entry.
    pub const OUTPUT_SIZE: u64 = 0x20;
    /// One byte for each of the first 32 descriptors: the number of its window, 0 for none.
    pub const WINDOW_OF: u64 = 0x100;
    /// Descriptors that can have a window.
    pub const WINDOWED: u64 = 32;
    /// Entry of window 1: next address, bytes left, whether the file ends behind them.
    pub const WINDOWS: u64 = 0x120;
    /// Bytes of one window's entry.
    pub const WINDOW_SIZE: u64 = 0x20;
    /// Where a handler keeps rcx, rdi, rsi, rdx and rax.
    pub const SAVED: u64 = 0x1c0;
    /// The limit of the stack, in bytes.
    pub const STACK_LIMIT: u64 = 0x200;
    /// Bytes of entropy that were not given out, of those at [`ENTROPY`].
    pub const ENTROPY_LEFT: u64 = 0x208;
    /// Whether a handler was changed inside.
    pub const ACTIONS_CHANGED: u64 = 0x210;
    /// The process' name, 16 bytes with a zero at the end.
    pub const NAME: u64 = 0x220;
    /// Entropy, given out from its end.
    pub const ENTROPY: u64 = 0x300;
    /// Bytes of it.
    pub const ENTROPY_LEN: u64 = 0x80;
    /// The handlers of signals 1 to 64, as `rt_sigaction` gives them.
    pub const ACTIONS: u64 = 0x800;
}

/// How the entry code goes back to the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Return {
    /// It runs at the guest's own privilege: a jump.
    Jump,
    /// It runs in ring 0: only `sysretq` leaves that.
    Sysret,
}

impl Return {
    const fn code(self) -> [u8; 3] {
        match self {
            // jmp rcx; nop
            Self::Jump => [0xff, 0xe1, 0x90],
            // sysretq
            Self::Sysret => [0x48, 0x0f, 0x07],
        }
    }
}

/// The code page.
pub fn code(way_back: Return) -> Vec<u8> {
    let start = &raw const rund_rt_shim_start;
    let len = offset(&raw const rund_rt_shim_end);
    debug_assert!(len <= PAGE as usize);
    // SAFETY: start and end are labels around the same constant bytes of this program.
    let mut code = unsafe { std::slice::from_raw_parts(start, len) }.to_vec();
    let back = offset(&raw const rund_rt_shim_return);
    if let Some(place) = code.get_mut(back..back + 3) {
        place.copy_from_slice(&way_back.code());
    }
    code
}

fn offset(label: *const u8) -> usize {
    label.addr() - (&raw const rund_rt_shim_start).addr()
}

/// Where a system call enters: the shim, or the exit alone where it runs in ring 0.
pub fn entry(way_back: Return) -> u64 {
    SYSTEM_START
        + system::CODE
        + match way_back {
            Return::Jump => 0,
            Return::Sysret => offset(&raw const rund_rt_shim_exit) as u64,
        }
}

/// Address of the instruction that leaves the machine for a system call.
pub fn exit_address() -> u64 {
    SYSTEM_START + system::CODE + offset(&raw const rund_rt_shim_exit) as u64
}

/// Address of the handler of exception `vector`.
pub fn handler(vector: u64) -> u64 {
    SYSTEM_START
        + system::CODE
        + offset(&raw const rund_rt_shim_exceptions) as u64
        + vector * HANDLER
}

/// Whether `rip` lies in the code page.
pub fn is_inside(rip: u64) -> bool {
    (SYSTEM_START + system::CODE..SYSTEM_START + system::DATA).contains(&rip)
}
