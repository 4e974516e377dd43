//! Copies and flushes that a bus error ends instead of the process.
//!
//! Memory of a device may go away, or report poison, while it is mapped; a file system may have no
//! room for a page that was never touched. The kernel says so by SIGBUS at the instruction that
//! touched it, and to flush a line is to touch it. Every copy and every flush of this crate goes
//! through one of the routines here. The handler looks whether the interrupted instruction is one of
//! theirs; if so it moves the instruction pointer to their exit, and otherwise it hands the signal on
//! to the handler that was there before. No `longjmp`, no allocation, no lock: nothing that a signal
//! handler may not do.

use std::ptr;

use crate::error::{Error, Result};

/// What a copy or a flush met.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// Nothing is there any more, or nothing could be put there: the backend knows which.
    Gone { address: usize },
    /// The memory reports an uncorrectable error.
    Poison { address: usize },
}

/// Copies `length` bytes. Eight bytes that are aligned on both sides are copied by one instruction
/// where `length` is a multiple of eight and at most 256.
///
/// # Safety
/// Both ranges belong to live mappings or objects, and do not overlap. Other processes may change
/// what is copied meanwhile. [`install`] has been called.
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
pub(crate) unsafe fn copy(
    to: *mut u8,
    from: *const u8,
    length: usize,
) -> std::result::Result<(), Fault> {
    guarded::answer(guarded::copy(to, from, length))
}

/// How a line is written back or dropped.
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum LineFlush {
    /// Written back; it stays in the cache. Ordered by `sfence` only.
    Clwb,
    /// Written back, and gone; ordered by `sfence` only.
    Clflushopt,
    /// Written back, and gone; each one waits for the one before.
    Clflush,
}

/// Flushes every line of `length` bytes. Fences are the caller's.
///
/// # Safety
/// The range belongs to a live mapping, and the processor has the instruction. [`install`] has been
/// called.
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
pub(crate) unsafe fn flush(
    how: LineFlush,
    start: *const u8,
    length: usize,
) -> std::result::Result<(), Fault> {
    guarded::answer(guarded::flush(how, start, length))
}

/// Elsewhere a copy is a copy.
///
/// # Safety
/// As of `ptr::copy_nonoverlapping`.
#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
pub(crate) unsafe fn copy(
    to: *mut u8,
    from: *const u8,
    length: usize,
) -> std::result::Result<(), Fault> {
    // SAFETY: the caller's.
    unsafe { ptr::copy_nonoverlapping(from, to, length) };
    Ok(())
}

/// Installs the handler, once in the life of the process.
pub(crate) fn install() -> Result<()> {
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    return guarded::install().map_err(|errno| Error::Io {
        what: "install a handler of",
        place: "SIGBUS".to_owned(),
        source: std::io::Error::from_raw_os_error(errno),
    });
    #[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
    Err(Error::Unsupported {
        what: "mapping a pool",
    })
}

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod guarded {
    use std::arch::{asm, global_asm};
    use std::cell::UnsafeCell;
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::{Fault, LineFlush, ptr};
    use crate::arch::LINE;

    // A copy: rdi, rsi, rcx: to, from, length. Ends with rax: 0, or the signal's code; rdx: its
    // address. Small copies by words, since a string instruction takes tens of cycles to start, and since
    // eight aligned bytes have to be copied whole.
    global_asm!(
        ".pushsection .text.directcxl_guarded,\"ax\",@progbits",
        ".balign 64",
        ".hidden directcxl_guarded",
        ".hidden directcxl_copy",
        ".hidden directcxl_clwb",
        ".hidden directcxl_clflushopt",
        ".hidden directcxl_clflush",
        ".hidden directcxl_guarded_end",
        ".hidden directcxl_guarded_out",
        ".globl directcxl_guarded",
        "directcxl_guarded:",
        // rdi, rsi: the first line and the end, at least one line apart. Returns as a copy does.
        ".globl directcxl_clwb",
        "directcxl_clwb:",
        "clwb [rdi]",
        "add rdi, 64",
        "cmp rdi, rsi",
        "jb directcxl_clwb",
        "jmp 4f",
        ".globl directcxl_clflushopt",
        "directcxl_clflushopt:",
        "clflushopt [rdi]",
        "add rdi, 64",
        "cmp rdi, rsi",
        "jb directcxl_clflushopt",
        "jmp 4f",
        ".globl directcxl_clflush",
        "directcxl_clflush:",
        "clflush [rdi]",
        "add rdi, 64",
        "cmp rdi, rsi",
        "jb directcxl_clflush",
        "jmp 4f",
        ".balign 64",
        ".globl directcxl_copy",
        "directcxl_copy:",
        "test cl, 7",
        "jnz 3f",
        "shr rcx, 3",
        "jz 4f",
        "cmp rcx, 32",
        "ja 5f",
        "2:",
        "mov rax, [rsi]",
        "mov [rdi], rax",
        "add rsi, 8",
        "add rdi, 8",
        "dec rcx",
        "jnz 2b",
        "jmp 4f",
        "5:",
        "rep movsq",
        "jmp 4f",
        "3:",
        "rep movsb",
        "4:",
        "xor eax, eax",
        ".globl directcxl_guarded_end",
        "directcxl_guarded_end:",
        "ret",
        ".globl directcxl_guarded_out",
        "directcxl_guarded_out:",
        "ret",
        ".popsection",
    );

    /// The code of memory that is bad, and that nobody touched (sigaction(2)).
    const BUS_MCEERR_AO: libc::c_int = 5;

    unsafe extern "C" {
        // Symbols of the routines above: only their addresses are used.
        static directcxl_guarded: u8;
        static directcxl_copy: u8;
        static directcxl_clwb: u8;
        static directcxl_clflushopt: u8;
        static directcxl_clflush: u8;
        static directcxl_guarded_end: u8;
        static directcxl_guarded_out: u8;
    }

    /// What the signal's code and address mean.
    pub(super) fn answer((code, address): (u64, usize)) -> Result<(), Fault> {
        match code {
            0 => Ok(()),
            // BUS_MCEERR_AR (sigaction(2)).
            4 => Err(Fault::Poison { address }),
            _ => Err(Fault::Gone { address }),
        }
    }

    /// Calls the routine for the lines of a range; gives the signal's code, or 0, and its address.
    pub(super) fn flush(how: LineFlush, start: *const u8, length: usize) -> (u64, usize) {
        if length == 0 {
            return (0, 0);
        }
        let first = start.wrapping_sub(start.addr() % LINE);
        let end = start.wrapping_add(length);
        macro_rules! call {
            ($routine:ident) => {{
                let (code, address): (u64, usize);
                // SAFETY: the caller of `super::flush` vouches for the range, and for the
                // instruction. The routine changes the registers named here; it uses 8 bytes of
                // stack for its return address, hence no `nostack`. It is an order on memory.
                unsafe {
                    asm!(
                        "call {routine}",
                        routine = sym $routine,
                        inout("rdi") first => _,
                        in("rsi") end,
                        out("rax") code,
                        lateout("rdx") address,
                    );
                }
                (code, address)
            }};
        }
        match how {
            LineFlush::Clwb => call!(directcxl_clwb),
            LineFlush::Clflushopt => call!(directcxl_clflushopt),
            LineFlush::Clflush => call!(directcxl_clflush),
        }
    }

    /// Calls the routine; gives the signal's code, or 0, and its address.
    pub(super) fn copy(to: *mut u8, from: *const u8, length: usize) -> (u64, usize) {
        let (code, address): (u64, usize);
        // SAFETY: the caller of `super::copy` vouches for both ranges. The routine changes the
        // registers named here and memory, nothing else; it uses 8 bytes of stack for its return
        // address, hence no `nostack`.
        unsafe {
            asm!(
                "call {routine}",
                routine = sym directcxl_copy,
                inout("rdi") to => _,
                inout("rsi") from => _,
                inout("rcx") length => _,
                out("rax") code,
                lateout("rdx") address,
            );
        }
        (code, address)
    }

    struct Action(UnsafeCell<libc::sigaction>);
    // SAFETY: written once, before the handler that reads it is installed.
    unsafe impl Sync for Action {}
    /// The handler that was there before ours.
    // SAFETY: all zeroes is a value of this type.
    static PREVIOUS: Action = Action(UnsafeCell::new(unsafe { std::mem::zeroed() }));
    /// Ours.
    // SAFETY: all zeroes is a value of this type.
    static OURS: Action = Action(UnsafeCell::new(unsafe { std::mem::zeroed() }));
    /// Whether the one before ours has put the default in its place.
    static TOOK_ITSELF_AWAY: AtomicBool = AtomicBool::new(false);

    pub(super) fn install() -> Result<(), i32> {
        static INSTALLED: OnceLock<Result<(), i32>> = OnceLock::new();
        *INSTALLED.get_or_init(|| {
            let failed = || Err(std::io::Error::last_os_error().raw_os_error().unwrap_or(0));
            // First a look at what is there, so that a signal that comes between finds it.
            // SAFETY: `sigaction` with no new action writes the old one to where the pointer says.
            let read = unsafe { libc::sigaction(libc::SIGBUS, ptr::null(), PREVIOUS.0.get()) };
            if read != 0 {
                return failed();
            }
            // SAFETY: all zeroes is a value of this type.
            let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
            action.sa_sigaction = handle as *const () as usize;
            // On the alternate stack where the thread has one, as Rust's own handler runs there.
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            // SAFETY: `action` is a value of this type.
            unsafe { libc::sigemptyset(&raw mut action.sa_mask) };
            // SAFETY: written once, before the handler that reads it is installed.
            unsafe { OURS.0.get().write(action) };
            // SAFETY: the handler does only what a signal handler may do.
            if unsafe { libc::sigaction(libc::SIGBUS, OURS.0.get(), ptr::null_mut()) } != 0 {
                return failed();
            }
            Ok(())
        })
    }

    /// Calls the handler that was there before. One that takes itself away, as Rust's own does, has
    /// the faulting instruction raise the signal again; where there is none, ours is put back, and
    /// what was there before is the default from then on.
    fn chain(signal: libc::c_int, sent: bool, call: impl FnOnce()) {
        call();
        if !sent {
            return;
        }
        // SAFETY: all zeroes is a value of this type.
        let mut now: libc::sigaction = unsafe { std::mem::zeroed() };
        // SAFETY: `sigaction` may be called in a handler (signal-safety(7)).
        unsafe { libc::sigaction(signal, ptr::null(), &raw mut now) };
        if now.sa_sigaction == libc::SIG_DFL {
            TOOK_ITSELF_AWAY.store(true, Ordering::Relaxed);
            // SAFETY: as above, and it was written before this handler was installed.
            unsafe { libc::sigaction(signal, OURS.0.get(), ptr::null_mut()) };
        }
    }

    /// Whether no instruction raised the signal: codes up to 0 are of processes (sigaction(2)).
    const fn is_sent(code: libc::c_int) -> bool {
        code <= 0 || code == BUS_MCEERR_AO
    }

    extern "C" fn handle(
        signal: libc::c_int,
        info: *mut libc::siginfo_t,
        context: *mut libc::c_void,
    ) {
        let registers = context.cast::<libc::ucontext_t>();
        // SAFETY: the kernel passes a context to a handler with SA_SIGINFO.
        let registers = unsafe { &mut (*registers).uc_mcontext.gregs };
        let at = registers[libc::REG_RIP as usize] as usize;
        let routines =
            (&raw const directcxl_guarded).addr()..(&raw const directcxl_guarded_end).addr();
        // SAFETY: the kernel passes an information to a handler with SA_SIGINFO.
        let code = unsafe { (*info).si_code };
        // A signal that another process sent while a copy ran is not the copy's.
        if routines.contains(&at) && !is_sent(code) {
            // SAFETY: as above.
            let info = unsafe { &*info };
            registers[libc::REG_RAX as usize] = i64::from(code);
            // SAFETY: a SIGBUS that an instruction raised has an address.
            registers[libc::REG_RDX as usize] = unsafe { info.si_addr() }.addr() as i64;
            registers[libc::REG_RIP as usize] = (&raw const directcxl_guarded_out).addr() as i64;
            return;
        }
        let sent = is_sent(code);
        // SAFETY: it was written before this handler was installed, and is not written again.
        let previous = unsafe { &*PREVIOUS.0.get() };
        let action = if TOOK_ITSELF_AWAY.load(Ordering::Relaxed) {
            libc::SIG_DFL
        } else {
            previous.sa_sigaction
        };
        match action {
            libc::SIG_IGN if sent => {}
            // To act on it is optional: whoever touches that memory is told then.
            libc::SIG_DFL if code == BUS_MCEERR_AO => {}
            libc::SIG_DFL | libc::SIG_IGN => {
                // The instruction runs again, and the kernel does what it does without a handler.
                // SAFETY: all zeroes is a value of this type, and the default action.
                let default: libc::sigaction = unsafe { std::mem::zeroed() };
                // SAFETY: `sigaction` may be called in a handler (signal-safety(7)).
                unsafe { libc::sigaction(signal, &raw const default, ptr::null_mut()) };
                if sent {
                    // No instruction would raise it again. Blocked here, it comes on return.
                    // SAFETY: `raise` may be called in a handler (signal-safety(7)).
                    unsafe { libc::raise(signal) };
                }
            }
            function if previous.sa_flags & libc::SA_SIGINFO != 0 => {
                type Handler = extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void);
                // SAFETY: SA_SIGINFO says that the handler has this type.
                let function: Handler = unsafe { std::mem::transmute(function) };
                chain(signal, sent, || function(signal, info, context));
            }
            function => {
                // SAFETY: without SA_SIGINFO a handler has this type.
                let function: extern "C" fn(libc::c_int) = unsafe { std::mem::transmute(function) };
                chain(signal, sent, || function(signal));
            }
        }
    }
}

#[cfg(all(test, target_arch = "x86_64", target_os = "linux"))]
mod tests {
    use super::{Fault, LineFlush, copy, flush, install};
    use std::os::fd::AsFd;

    #[test]
    fn every_length_is_copied_exactly() {
        install().unwrap();
        let from: Vec<u8> = (0..700u32).map(|i| (i * 7) as u8).collect();
        for length in 0..600 {
            let mut to = vec![0xee; 700];
            // SAFETY: both are live and at least that long.
            unsafe { copy(to.as_mut_ptr(), from.as_ptr(), length) }.unwrap();
            assert_eq!(to[..length], from[..length]);
            assert!(to[length..].iter().all(|byte| *byte == 0xee));
        }
    }

    #[test]
    fn a_copy_or_flush_of_what_is_gone_is_an_answer_and_no_signal() {
        install().unwrap();
        let flags = nix::sys::memfd::MFdFlags::MFD_CLOEXEC;
        let file: std::fs::File = nix::sys::memfd::memfd_create("fault", flags)
            .unwrap()
            .into();
        file.set_len(8192).unwrap();
        let map = memmap2::MmapOptions::new()
            .len(8192)
            .map_raw(&file.as_fd())
            .unwrap();
        file.set_len(4096).unwrap();
        let gone = map.as_mut_ptr().wrapping_add(4096);
        let mut buffer = [0u8; 512];
        for length in [1, 8, 64, 100, 512] {
            // SAFETY: the range is mapped, though nothing is behind it.
            let read = unsafe { copy(buffer.as_mut_ptr(), gone, length) };
            let address = gone.addr();
            assert_eq!(read, Err(Fault::Gone { address }));
            // SAFETY: as above.
            let written = unsafe { copy(gone, buffer.as_ptr(), length) };
            assert_eq!(written, Err(Fault::Gone { address }));
        }
        for length in [1, 64, 100, 4096] {
            // SAFETY: as above; every x86-64 has the instruction.
            let flushed = unsafe { flush(LineFlush::Clflush, gone, length) };
            let address = gone.addr();
            assert_eq!(flushed, Err(Fault::Gone { address }));
        }
        // SAFETY: this page is still there.
        unsafe { flush(LineFlush::Clflush, map.as_ptr().wrapping_add(7), 4000) }.unwrap();
        // SAFETY: as above.
        unsafe { copy(buffer.as_mut_ptr(), map.as_ptr(), 512) }.unwrap();
    }
}
