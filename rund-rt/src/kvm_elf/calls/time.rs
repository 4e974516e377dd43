//! Clocks and sleeping. The time is the host's.

use nix::errno::Errno;

use super::super::memory::GuestMemory;
use super::{Answer, bytes_of};

/// Clocks that a guest may read, by their numbers on Linux: real, monotonic, of the process, of the
/// thread, raw, the coarse ones, and the one that runs while the machine sleeps.
pub const CLOCKS: std::ops::RangeInclusive<u64> = 0..=7;

/// What the host's clock says.
pub fn now(clock: u64) -> libc::timespec {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    let clock = libc::clockid_t::try_from(clock).unwrap_or(libc::CLOCK_REALTIME);
    // SAFETY: a structure that the call fills.
    let _known_clock = unsafe { libc::clock_gettime(clock, &raw mut time) };
    time
}

/// `clock_gettime`
pub fn clock_gettime(memory: &GuestMemory, clock: u64, into: u64) -> Answer {
    if !CLOCKS.contains(&clock) {
        return Err(Errno::EINVAL);
    }
    memory.write(into, bytes_of(&now(clock)))?;
    Ok(0)
}

/// `clock_getres`
pub fn clock_getres(memory: &GuestMemory, clock: u64, into: u64) -> Answer {
    if !CLOCKS.contains(&clock) {
        return Err(Errno::EINVAL);
    }
    if into != 0 {
        let resolution = libc::timespec {
            tv_sec: 0,
            tv_nsec: 1,
        };
        memory.write(into, bytes_of(&resolution))?;
    }
    Ok(0)
}

/// `gettimeofday`
pub fn gettimeofday(memory: &GuestMemory, into: u64) -> Answer {
    if into != 0 {
        let time = now(libc::CLOCK_REALTIME as u64);
        let value = libc::timeval {
            tv_sec: time.tv_sec,
            tv_usec: time.tv_nsec / 1000,
        };
        memory.write(into, bytes_of(&value))?;
    }
    Ok(0)
}

/// `time`
pub fn time(memory: &GuestMemory, into: u64) -> Answer {
    let seconds = now(libc::CLOCK_REALTIME as u64).tv_sec;
    if into != 0 {
        memory.write(into, &seconds.to_le_bytes())?;
    }
    Ok(seconds)
}

/// `times`: the ticks since some moment; what was used is not told.
pub fn times(memory: &GuestMemory, into: u64) -> Answer {
    if into != 0 {
        memory.write(into, &[0; 32])?;
    }
    let time = now(libc::CLOCK_MONOTONIC as u64);
    Ok(time.tv_sec * 100 + time.tv_nsec / 10_000_000)
}

/// A `timespec` of the guest's.
pub fn timespec(memory: &GuestMemory, at: u64) -> Result<libc::timespec, Errno> {
    let time = libc::timespec {
        tv_sec: memory.read_u64(at)? as i64,
        tv_nsec: memory.read_u64(at.wrapping_add(8))? as i64,
    };
    if time.tv_sec < 0 || !(0..1_000_000_000).contains(&time.tv_nsec) {
        return Err(Errno::EINVAL);
    }
    Ok(time)
}

/// `nanosleep` and `clock_nanosleep`
pub fn sleep(memory: &GuestMemory, clock: u64, flags: u64, request: u64) -> Answer {
    if ![0, 1, 7].contains(&clock) {
        return Err(Errno::EINVAL);
    }
    let time = timespec(memory, request)?;
    let flags = (flags as i32) & libc::TIMER_ABSTIME;
    // SAFETY: a structure that the call reads; none is to be written.
    let error = unsafe {
        libc::clock_nanosleep(
            clock as libc::clockid_t,
            flags,
            &raw const time,
            std::ptr::null_mut(),
        )
    };
    match error {
        0 => Ok(0),
        error => Err(Errno::from_raw(error)),
    }
}
