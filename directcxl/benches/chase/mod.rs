//! A pointer chase: every line of memory names the next, in one random cycle through all of them.
#![allow(dead_code, reason = "each bench uses its own part")]

use directcxl::Namespace;

/// Bytes of a cache line.
pub(crate) const LINE: usize = 64;

/// The cycle, as the index that each line holds.
pub(crate) fn cycle(lines: usize, seed: u64) -> Vec<u32> {
    let mut rng = carlsbad_kit::seed::Rng::with_seed(seed);
    let mut next: Vec<u32> = (0..lines as u32).collect();
    // Sattolo: one cycle, each as likely as any other.
    for i in (1..lines).rev() {
        next.swap(i, rng.usize(..i));
    }
    next
}

/// Writes the cycle into memory.
pub(crate) fn write(namespace: &Namespace, cycle: &[u32]) {
    let mut bytes = vec![0u8; 1 << 20];
    let mut at = 0;
    for part in cycle.chunks(bytes.len() / LINE) {
        for (line, next) in bytes.chunks_mut(LINE).zip(part) {
            for (word, salt) in line.chunks_mut(8).zip(0u64..) {
                word.copy_from_slice(&(u64::from(*next) + (salt << 32)).to_le_bytes());
            }
        }
        let length = part.len() * LINE;
        namespace.write(at, &bytes[..length]).unwrap();
        at += length as u64;
    }
    namespace.publish(0..at).unwrap();
}

/// A line's eight words, by a load each.
///
/// # Safety
/// `base` has that line.
#[allow(
    clippy::cast_ptr_alignment,
    reason = "a line of a mapping is aligned to 64 bytes"
)]
#[inline(always)]
pub(crate) unsafe fn load(base: *const u8, index: usize) -> [u64; 8] {
    let line = base.wrapping_add(index * LINE).cast::<u64>();
    std::array::from_fn(|i| {
        // SAFETY: the caller's; others may write to it, hence volatile.
        unsafe { line.wrapping_add(i).read_volatile() }
    })
}

/// Follows the chain for so many steps; gives where it is then, and nanoseconds a step.
///
/// # Safety
/// `base` has the cycle that [`write`] wrote.
#[inline(never)]
pub(crate) unsafe fn chase(base: *const u8, from: usize, steps: usize) -> (usize, f64) {
    let start = std::time::Instant::now();
    let (mut at, mut sum) = (from, 0u64);
    for _ in 0..steps {
        // SAFETY: the caller's.
        let words = unsafe { load(base, at) };
        at = words[0] as u32 as usize;
        sum = words.iter().fold(sum, |sum, word| sum.wrapping_add(*word));
    }
    std::hint::black_box(sum);
    let elapsed = start.elapsed().as_secs_f64();
    (at, elapsed * 1e9 / steps as f64)
}
