//! What interrupts a guest: the watchdog's timer, and signals of the other processes of its sandbox.
//! They leave the machine, or whatever call of the host's the guest waits in.

use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, Ordering};
use std::time::Duration;

use crate::backend::Status;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

/// Whether the time is over.
static OVER: AtomicBool = AtomicBool::new(false);
/// Whether that is because the owner wants it so.
static KILLED: AtomicBool = AtomicBool::new(false);
/// The byte that keeps the machine from being entered.
static IMMEDIATE_EXIT: AtomicPtr<u8> = AtomicPtr::new(std::ptr::null_mut());

/// Signals that came for the guest, one bit each.
static CAME: AtomicU64 = AtomicU64::new(0);

/// Signals that the processes of a sandbox send each other, and that end a process or run a
/// handler. The others do to this process what they would do to the guest.
const FORWARDED: [Signal; 8] = [
    Signal::SIGHUP,
    Signal::SIGINT,
    Signal::SIGQUIT,
    Signal::SIGTERM,
    Signal::SIGUSR1,
    Signal::SIGUSR2,
    Signal::SIGCHLD,
    Signal::SIGWINCH,
];

/// The signal by which the owner ends a guest, with [`libc::SI_QUEUE`], which no guest can give it.
pub const KILL: Signal = Signal::SIGVTALRM;

extern "C" fn on_signal(
    signal: libc::c_int,
    info: *mut libc::siginfo_t,
    _context: *mut libc::c_void,
) {
    // SAFETY: the kernel gives a handler with SA_SIGINFO a valid structure.
    let code = unsafe { (*info).si_code };
    if signal == KILL as i32 && code == libc::SI_QUEUE {
        KILLED.store(true, Ordering::Release);
        OVER.store(true, Ordering::Release);
    } else if signal == libc::SIGALRM && code == libc::SI_KERNEL {
        OVER.store(true, Ordering::Release);
    } else if (1..=64).contains(&signal) {
        CAME.fetch_or(1 << (signal - 1), Ordering::AcqRel);
    }
    let byte = IMMEDIATE_EXIT.load(Ordering::Acquire);
    if !byte.is_null() {
        // SAFETY: `watch` was given it by a machine, and `forget` is called before that machine
        // goes. The signal comes to the only thread.
        unsafe { byte.write_volatile(1) };
    }
}

/// Takes those signals.
///
/// # Errors
/// What the kernel says.
pub fn install() -> nix::Result<()> {
    // Without SA_RESTART: a call of the host's that a guest waits in is to be left.
    let action = SigAction::new(
        SigHandler::SigAction(on_signal),
        SaFlags::SA_SIGINFO,
        SigSet::empty(),
    );
    for signal in FORWARDED.into_iter().chain([Signal::SIGALRM, KILL]) {
        // SAFETY: the handler stores to atomics and to one byte, nothing else.
        unsafe { sigaction(signal, &action) }?;
    }
    Ok(())
}

/// The signals that came since it was asked last, one bit each.
pub fn take() -> u64 {
    let came = CAME.swap(0, Ordering::AcqRel);
    if came != 0 && !is_over() {
        let byte = IMMEDIATE_EXIT.load(Ordering::Acquire);
        if !byte.is_null() {
            // SAFETY: as in the handler. A signal that comes just now is seen before the guest
            // waits the next time, by the caller's next look.
            unsafe { byte.write_volatile(0) };
        }
    }
    came
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
    KILLED.store(false, Ordering::Release);
    CAME.store(0, Ordering::Release);
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

/// Whether the owner wanted its end.
pub fn was_killed() -> bool {
    KILLED.load(Ordering::Acquire)
}

/// How a guest ends whose time is over.
pub fn end() -> Status {
    if was_killed() {
        Status::Signal(libc::SIGKILL)
    } else {
        Status::TimedOut
    }
}

/// Whether the time is over.
pub fn is_over() -> bool {
    OVER.load(Ordering::Acquire)
}
