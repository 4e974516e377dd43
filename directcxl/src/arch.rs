//! The instructions that move cache lines: x86-64 has them, and nothing else does here.

/// Bytes in a cache line of every x86-64 and every CXL.mem transfer (CXL 3.1, 3.1: 64 bytes).
pub(crate) const LINE: usize = 64;

#[cfg(target_arch = "x86_64")]
mod x86_64 {
    use std::arch::asm;
    use std::arch::x86_64::{__cpuid_count, _mm_clflush, _mm_mfence, _mm_sfence};
    use std::sync::OnceLock;

    use super::LINE;

    /// How a line is written back, from the best to what every x86-64 has.
    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    enum WriteBack {
        /// The line stays in the cache.
        Clwb,
        /// The line goes; ordered by `sfence` only.
        Clflushopt,
        /// The line goes; each one waits for the one before.
        Clflush,
    }

    fn best() -> WriteBack {
        static BEST: OnceLock<WriteBack> = OnceLock::new();
        *BEST.get_or_init(|| {
            // Leaf 7 is there on everything that has any of the two (Intel SDM, CPUID).
            let ebx = if __cpuid_count(0, 0).eax >= 7 {
                __cpuid_count(7, 0).ebx
            } else {
                0
            };
            if ebx & 1 << 24 != 0 {
                WriteBack::Clwb
            } else if ebx & 1 << 23 != 0 {
                WriteBack::Clflushopt
            } else {
                WriteBack::Clflush
            }
        })
    }

    fn each_line(start: *const u8, length: usize, mut with: impl FnMut(*const u8)) {
        let lead = start.addr() % LINE;
        let mut line = start.wrapping_sub(lead);
        let end = start.wrapping_add(length);
        while line < end {
            with(line);
            line = line.wrapping_add(LINE);
        }
    }

    /// Writes every line of the range back, and waits until that is done.
    ///
    /// # Safety
    /// The range is mapped.
    pub(crate) unsafe fn write_back(start: *const u8, length: usize) {
        match best() {
            WriteBack::Clwb => each_line(start, length, |line| {
                // SAFETY: the line holds a byte of the range, which the caller says is mapped.
                unsafe { asm!("clwb [{}]", in(reg) line, options(nostack, preserves_flags)) }
            }),
            WriteBack::Clflushopt => each_line(start, length, |line| {
                // SAFETY: as above.
                unsafe { asm!("clflushopt [{}]", in(reg) line, options(nostack, preserves_flags)) }
            }),
            WriteBack::Clflush => each_line(start, length, |line| {
                // SAFETY: as above.
                unsafe { _mm_clflush(line) }
            }),
        }
        // SAFETY: every x86-64 has it.
        unsafe { _mm_sfence() }
    }

    /// Drops every line of the range from this host's caches, so that the next load sees memory.
    ///
    /// # Safety
    /// The range is mapped.
    pub(crate) unsafe fn invalidate(start: *const u8, length: usize) {
        // Stores of this host before are not to be reordered behind the loads after.
        // SAFETY: every x86-64 has it.
        unsafe { _mm_mfence() }
        each_line(start, length, |line| {
            // SAFETY: the line holds a byte of the range, which the caller says is mapped.
            unsafe { _mm_clflush(line) }
        });
        // SAFETY: every x86-64 has it.
        unsafe { _mm_mfence() }
    }
}

#[cfg(target_arch = "x86_64")]
pub(crate) use x86_64::{invalidate, write_back};

#[cfg(not(target_arch = "x86_64"))]
pub(crate) unsafe fn write_back(_: *const u8, _: usize) {}
#[cfg(not(target_arch = "x86_64"))]
pub(crate) unsafe fn invalidate(_: *const u8, _: usize) {}
