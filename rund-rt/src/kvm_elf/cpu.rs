//! The virtual processor as a guest program finds it: long mode, user privilege.

use kvm_bindings::{kvm_dtable, kvm_segment, kvm_sregs};

use super::layout::{SYSTEM_START, system};
use super::machine::XSAVE_WORDS;
use super::page_table::Words;
use super::shim::{self, Return};

/// Selectors, with the requested privilege.
const KERNEL_CODE: u16 = 0x10;
const USER_DATA: u16 = 0x2b;
const USER_CODE: u16 = 0x33;
const TASK: u16 = 0x38;

/// Protection, monitoring, extension type, numeric errors, write protection, alignment, paging.
const CR0: u64 = 0x8005_0033;
/// PAE, OSFXSR, OSXMMEXCPT, FSGSBASE, OSXSAVE. With PCIDE a PVM-type KVM refuses the registers.
const CR4: u64 = 0x5_0620;
/// System call extensions, long mode enabled and active, no-execute.
const EFER: u64 = 0xd01;
/// x87, SSE, AVX and AVX-512 state: what of XCR0 a guest gets where the processor has it.
pub const XCR0: u64 = 0xe7;

/// MSR numbers (AMD64 manual, volume 2, appendix A).
pub const MSR_STAR: u32 = 0xc000_0081;
pub const MSR_LSTAR: u32 = 0xc000_0082;
pub const MSR_SFMASK: u32 = 0xc000_0084;
/// Base selectors of `syscall` (kernel) and `sysret` (user).
pub const STAR: u64 = 0x23 << 48 | 0x10 << 32;

/// Size of the task state segment without its port map.
const TSS_SIZE: u64 = 0x68;
/// Ports whose permission is described: up to those of the exceptions.
const PORTS: u64 = 0xc0;

/// The flags that a system call clears. In ring 0 a guest's trap flag would raise an exception with
/// the stack that the guest has chosen; `sysretq` puts the flags back, a jump does not.
pub const fn masked_flags(way_back: Return) -> u64 {
    const TRAP: u64 = 1 << 8;
    const DIRECTION: u64 = 1 << 10;
    const NESTED: u64 = 1 << 14;
    const ALIGNMENT: u64 = 1 << 18;
    match way_back {
        Return::Jump => 0,
        Return::Sysret => TRAP | DIRECTION | NESTED | ALIGNMENT,
    }
}

/// Writes descriptor tables and the task state segment.
pub fn write_tables(memory: &mut impl Words, way_back: Return) {
    let gdt = [
        (2, code_descriptor(0)),
        (3, data_descriptor(0)),
        (4, data_descriptor(3)),
        (5, data_descriptor(3)),
        (6, code_descriptor(3)),
    ];
    for (slot, descriptor) in gdt {
        memory.set_word(system::GDT + slot * 8, descriptor);
    }
    let tss = SYSTEM_START + system::TSS;
    let limit = TSS_SIZE + PORTS / 8;
    let low = limit | (tss & 0xff_ffff) << 16 | 0x89 << 40 | (tss >> 24 & 0xff) << 56;
    memory.set_word(system::GDT + u64::from(TASK), low);
    memory.set_word(system::GDT + u64::from(TASK) + 8, tss >> 32);

    // rsp0 lies at offset 4, across two words; then the port map's offset at 0x66.
    let stack = SYSTEM_START + system::EXCEPTION_STACK_TOP;
    memory.set_word(system::TSS, stack << 32);
    memory.set_word(system::TSS + 8, stack >> 32);
    // Where system calls run in ring 0, an exception has this stack whatever ring it comes from: the
    // first of the interrupt stack table, at offset 0x24.
    let stack_table = match way_back {
        Return::Jump => 0,
        Return::Sysret => 1,
    };
    memory.set_word(system::TSS + 0x20, stack << 32);
    memory.set_word(system::TSS + 0x28, stack >> 32);
    memory.set_word(system::TSS + 0x60, TSS_SIZE << 48);
    // A bit for each port: set is forbidden. Only those of the shim are not.
    let open = |port: u64| {
        // A word goes to four ports at once.
        (u64::from(shim::CALL_PORT)..u64::from(shim::CALL_PORT) + 4).contains(&port)
            || (u64::from(shim::EXCEPTION_PORT)..u64::from(shim::EXCEPTION_PORT) + 32)
                .contains(&port)
    };
    for word in 0..PORTS / 64 {
        let bits = (0..64).fold(0, |bits, bit| {
            bits | u64::from(!open(word * 64 + bit)) << bit
        });
        memory.set_word(system::TSS + TSS_SIZE + word * 8, bits);
    }
    memory.set_word(system::TSS + TSS_SIZE + PORTS / 8, u64::MAX);

    for vector in 0..32 {
        let handler = shim::handler(vector);
        // Breakpoints may be raised by user mode itself.
        let privilege = if matches!(vector, 3 | 4) { 3 } else { 0 };
        let low = (handler & 0xffff)
            | u64::from(KERNEL_CODE) << 16
            | stack_table << 32
            | (0x8e | privilege << 5) << 40
            | (handler >> 16 & 0xffff) << 48;
        memory.set_word(system::IDT + vector * 16, low);
        memory.set_word(system::IDT + vector * 16 + 8, handler >> 32);
    }
}

/// Present, accessed, executable, readable, 64-bit.
const fn code_descriptor(privilege: u64) -> u64 {
    0x00af_9b00_0000_ffff | privilege << 45
}

/// Present, accessed, writable, 32-bit.
const fn data_descriptor(privilege: u64) -> u64 {
    0x00cf_9300_0000_ffff | privilege << 45
}

/// Code and stack segments of user privilege.
pub fn set_user_mode(sregs: &mut kvm_sregs) {
    sregs.cs = user_segment(USER_CODE, 11, 1);
    sregs.ss = user_segment(USER_DATA, 3, 0);
}

const fn user_segment(selector: u16, type_: u8, long: u8) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        dpl: 3,
        db: 1 - long,
        s: 1,
        l: long,
        g: 1,
        avl: 0,
        unusable: 0,
        padding: 0,
    }
}

/// Vector and floating point registers as a program finds them (System V ABI for x86-64, 3.4.1):
/// what is not named is in its initial state.
pub fn first_vectors() -> [u32; XSAVE_WORDS] {
    legacy_written_out(&[0; XSAVE_WORDS])
}

/// The same vectors, with the x87 and SSE parts written out where they are in their initial state.
/// Linux leaves MXCSR as it is where neither SSE nor AVX is said to be there
/// (`copy_uabi_to_xstate`): what one guest set would be the next one's.
pub fn legacy_written_out(area: &[u32; XSAVE_WORDS]) -> [u32; XSAVE_WORDS] {
    /// The header's first word says which parts are there (Intel SDM, volume 1, 13.4.2).
    const HEADER: usize = LEGACY / 4;
    let mut area = *area;
    let present = area[HEADER];
    if present & 0b001 == 0 {
        area[..MXCSR.start / 4].fill(0);
        area[MXCSR_MASK.end / 4..XMM.start / 4].fill(0);
        area[0] = FIRST_CONTROL.into();
    }
    if present & 0b010 == 0 {
        area[XMM.start / 4..XMM.end / 4].fill(0);
    }
    if present & 0b110 == 0 {
        area[MXCSR.start / 4] = FIRST_MXCSR;
    }
    area[HEADER] = present | 0b011;
    area
}

/// Bytes of the area of the legacy registers, and where what it holds begins (Intel SDM, volume 1,
/// table 13-1).
const LEGACY: usize = 512;
const MXCSR: std::ops::Range<usize> = 24..28;
const MXCSR_MASK: std::ops::Range<usize> = 28..32;
const XMM: std::ops::Range<usize> = 160..416;
/// The x87 control word: extended precision, exceptions masked.
const FIRST_CONTROL: u16 = 0x37f;
/// Exceptions masked, rounding to the nearest.
const FIRST_MXCSR: u32 = 0x1f80;

/// An area of vectors without what means nothing: parts that are in their initial state are written
/// out, which a processor may or may not do. `parts` are number, offset and size of the extended
/// ones.
pub fn plain_vectors(area: &[u32], parts: &[(u32, usize, usize)]) -> Vec<u8> {
    let mut bytes: Vec<u8> = area.iter().flat_map(|word| word.to_le_bytes()).collect();
    let present = bytes
        .get(LEGACY..LEGACY + 8)
        .and_then(|word| word.try_into().ok())
        .map_or(0, u64::from_le_bytes);
    let is_there = |part: u32| present >> part & 1 != 0;
    let mut put = |range: std::ops::Range<usize>, value: &[u8]| {
        if let Some(place) = bytes.get_mut(range) {
            place.fill(0);
            let len = value.len().min(place.len());
            place[..len].copy_from_slice(&value[..len]);
        }
    };
    put(MXCSR_MASK, &[]);
    put(416..LEGACY, &[]);
    if !is_there(0) {
        put(0..MXCSR.start, &FIRST_CONTROL.to_le_bytes());
        put(MXCSR_MASK.end..XMM.start, &[]);
    }
    if !is_there(1) {
        put(XMM, &[]);
    }
    if !is_there(1) && !is_there(2) {
        put(MXCSR, &FIRST_MXCSR.to_le_bytes());
    }
    for (part, offset, size) in parts {
        if !is_there(*part) {
            put(*offset..offset + size, &[]);
        }
    }
    put(LEGACY..LEGACY + 64, &[]);
    bytes
}

/// Sets the registers that a guest program cannot, on top of what the processor began with.
pub fn set_system_registers(sregs: &mut kvm_sregs, root: u64) {
    set_user_mode(sregs);
    let data = user_segment(USER_DATA, 3, 0);
    (sregs.ds, sregs.es) = (data, data);
    (sregs.fs, sregs.gs) = (data, data);
    sregs.tr = kvm_segment {
        base: SYSTEM_START + system::TSS,
        limit: (TSS_SIZE + PORTS / 8) as u32,
        selector: TASK,
        type_: 11,
        present: 1,
        dpl: 0,
        db: 0,
        s: 0,
        l: 0,
        g: 0,
        avl: 0,
        unusable: 0,
        padding: 0,
    };
    let table = |offset: u64, limit: u16| kvm_dtable {
        base: SYSTEM_START + offset,
        limit,
        padding: [0; 3],
    };
    sregs.gdt = table(system::GDT, TASK + 15);
    sregs.idt = table(system::IDT, 32 * 16 - 1);
    sregs.cr0 = CR0;
    sregs.cr3 = root;
    sregs.cr4 = CR4;
    sregs.efer = EFER;
}
