//! Ends a guest whose time is over: a timer's signal leaves the machine, or whatever call of the
//! host's the guest waits in.

use std::sync::atomic::{AtomicBool, AtomicPtr, Ordering};
use std::time::Duration;

use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

/// Whether the time is over.
static OVER: AtomicBool = AtomicBool::new(false);
/// The byte that keeps the machine from being entered.
static IMMEDIATE_EXIT: AtomicPtr<u8> = AtomicPtr::new(std::ptr::null_mut());

extern "C" fn on_alarm(_signal: libc::c_int) {
    OVER.store(true, Ordering::Release);
    let byte = IMMEDIATE_EXIT.load(Ordering::Acquire);
    if !byte.is_null() {
        // SAFETY: `watch` was given it by a machine, and `forget` is called before that machine
        // goes. The signal comes to the only thread.
        unsafe { byte.write_volatile(1) };
    }
}

/// Takes the timer's signal. Without it a signal would end the process.
///
/// # Errors
/// What the kernel says.
pub fn install() -> nix::Result<()> {
    // Without SA_RESTART: a call of the host's that a guest waits in is to be left.
    let action = SigAction::new(
        SigHandler::Handler(on_alarm),
        SaFlags::empty(),
        SigSet::empty(),
    );
    // SAFETY: the handler stores to atomics and to one byte, nothing else.
    unsafe { sigaction(Signal::SIGALRM, &action) }.map(drop)
}

/// The byte of the machine that runs.
pub fn watch(immediate_exit: *mut u8) {
    IMMEDIATE_EXIT.store(immediate_exit, Ordering::Release);
}

/// Before that machine goes.
pub fn forget() {
    IMMEDIATE_EXIT.store(std::ptr::null_mut(), Ordering::Release);
}

/// Sets the time, or none.
pub fn set(time: Option<Duration>) {
    OVER.store(false, Ordering::Release);
    let byte = IMMEDIATE_EXIT.load(Ordering::Acquire);
    if !byte.is_null() {
        // SAFETY: as in the handler, which does not run: no timer is set.
        unsafe { byte.write_volatile(0) };
    }
    arm(time);
}

/// Stops the timer.
pub fn stop() {
    arm(None);
}

fn arm(time: Option<Duration>) {
    let time = time.map(|time| time.max(Duration::from_micros(1)));
    let value = libc::timeval {
        tv_sec: time.map_or(0, |t| i64::try_from(t.as_secs()).unwrap_or(i64::MAX)),
        tv_usec: time.map_or(0, |t| i64::from(t.subsec_micros())),
    };
    // Again every 10 ms, for a signal that came just before the guest began to wait.
    let again = libc::timeval {
        tv_sec: 0,
        tv_usec: if time.is_some() { 10_000 } else { 0 },
    };
    let timer = libc::itimerval {
        it_interval: again,
        it_value: value,
    };
    // SAFETY: a structure that the call reads.
    let _valid =
        unsafe { libc::setitimer(libc::ITIMER_REAL, &raw const timer, std::ptr::null_mut()) };
}

/// Whether the time is over.
pub fn is_over() -> bool {
    OVER.load(Ordering::Acquire)
}
