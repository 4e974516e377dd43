//! The instructions that move cache lines: x86-64 has them, and nothing else does here.

/// Bytes in a cache line of every x86-64 and every CXL.mem transfer (CXL 3.1, 3.1: 64 bytes).
pub(crate) const LINE: usize = 64;

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod x86_64 {
    use std::arch::x86_64::{__cpuid_count, _mm_mfence, _mm_sfence};
    use std::sync::OnceLock;

    use crate::fault::{Fault, LineFlush, flush};

    /// How a line is written back, from the best to what every x86-64 has.
    fn best() -> LineFlush {
        static BEST: OnceLock<LineFlush> = OnceLock::new();
        *BEST.get_or_init(|| {
            // Leaf 7 is there on everything that has any of the two (Intel SDM, CPUID).
            let ebx = if __cpuid_count(0, 0).eax >= 7 {
                __cpuid_count(7, 0).ebx
            } else {
                0
            };
            if ebx & 1 << 24 != 0 {
                LineFlush::Clwb
            } else if ebx & 1 << 23 != 0 {
                LineFlush::Clflushopt
            } else {
                LineFlush::Clflush
            }
        })
    }

    /// Writes every line of the range back, and waits until that is done.
    ///
    /// # Safety
    /// The range is mapped, and the handler of `fault` is installed.
    pub(crate) unsafe fn write_back(start: *const u8, length: usize) -> Result<(), Fault> {
        // SAFETY: the caller's, and the processor has the instruction.
        let flushed = unsafe { flush(best(), start, length) };
        // SAFETY: every x86-64 has it.
        unsafe { _mm_sfence() }
        flushed
    }

    /// Drops every line of the range from this host's caches, so that the next load sees memory.
    ///
    /// # Safety
    /// As of [`write_back`].
    pub(crate) unsafe fn invalidate(start: *const u8, length: usize) -> Result<(), Fault> {
        // Stores of this host before are not to be reordered behind the loads after.
        // SAFETY: every x86-64 has it.
        unsafe { _mm_mfence() }
        // SAFETY: the caller's; every x86-64 has the instruction.
        let dropped = unsafe { flush(LineFlush::Clflush, start, length) };
        // SAFETY: every x86-64 has it.
        unsafe { _mm_mfence() }
        dropped
    }
}

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
pub(crate) use x86_64::{invalidate, write_back};

#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
pub(crate) unsafe fn write_back(_: *const u8, _: usize) -> Result<(), crate::fault::Fault> {
    Ok(())
}
#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
pub(crate) unsafe fn invalidate(_: *const u8, _: usize) -> Result<(), crate::fault::Fault> {
    Ok(())
}
