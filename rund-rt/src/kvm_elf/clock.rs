//! The clocks that the shim reads by itself: the host's, as of now, and how fast the counter counts.

use super::calls::time;
use super::memory::GuestMemory;
use super::shim::data;

/// Clocks that run evenly: real, monotonic, raw, both coarse ones, and since boot.
const EVEN: [u64; 6] = [0, 1, 4, 5, 6, 7];

/// The time stamp counter.
fn counter() -> u64 {
    // SAFETY: every x86-64 has the instruction, and no process here is forbidden it.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// Writes the clocks into the shim's page. Without a known frequency the guest asks the host.
pub fn publish(memory: &GuestMemory, khz: Option<u32>) {
    let Some(khz) = khz else {
        memory.set_data(data::CLOCKS, 0);
        return;
    };
    memory.set_data(data::TSC, counter());
    for clock in EVEN {
        let now = time::now(clock);
        let nanoseconds = now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64;
        memory.set_data(data::CLOCK_BASES + clock * 8, nanoseconds);
    }
    memory.set_data(data::SCALE, (1_000_000u64 << 32) / u64::from(khz));
    memory.set_data(data::CLOCKS, EVEN.iter().fold(0, |all, bit| all | 1 << bit));
}
