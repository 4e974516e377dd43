//! How a thread that waits for completions hears of them: it spins for a few microseconds, since
//! most are there by then, and sleeps after that.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::clock::Deadline;
use crate::error::{Error, Result};

/// How long to spin before sleeping: a little more than an operation through the daemon takes.
pub(crate) const SPIN: Duration = Duration::from_micros(20);

/// So many looks, each with a pause of some 40 ns, before the processor is offered to others: where
/// the other side has been put on the same processor, it cannot go on before.
pub(crate) const YIELD_EVERY: u32 = 24;

/// Spins until `done` gives something or [`SPIN`] is over. Yields now and then: with one processor
/// the other side needs it.
pub(crate) fn spin<T>(mut done: impl FnMut() -> Option<T>) -> Option<T> {
    let mut begun = None;
    let mut round = 0_u32;
    loop {
        if let Some(found) = done() {
            return Some(found);
        }
        round += 1;
        if round.is_multiple_of(YIELD_EVERY) {
            std::thread::yield_now();
            if begun.get_or_insert_with(Instant::now).elapsed() > SPIN {
                return None;
            }
        } else {
            std::hint::spin_loop();
        }
    }
}

/// An event counter, for event loops.
#[derive(Debug)]
pub(crate) struct Event(EventFd);

impl Event {
    pub(crate) fn new() -> Result<Self> {
        Self::with(0)
    }

    fn with(count: u32) -> Result<Self> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        EventFd::from_value_and_flags(count, flags)
            .map(Self)
            .map_err(|e| Error::Io {
                what: "create an eventfd",
                source: e.into(),
            })
    }

    /// What another process sent. It may be anything; a descriptor that is no event counter harms
    /// who sent it only.
    pub(crate) fn adopt(fd: OwnedFd) -> Self {
        // SAFETY: `EventFd` owns a descriptor and only reads and writes 8 bytes through it; what it
        // refers to is of no matter for memory safety.
        Self(unsafe { EventFd::from_owned_fd(fd) })
    }

    pub(crate) fn set(&self) {
        // Full is as good as set.
        let _full = self.0.write(1);
    }

    pub(crate) fn clear(&self) {
        let _not_set = self.0.read();
    }
}

impl AsFd for Event {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// How a daemon wakes the event loop of a client: a packet on a socket, since nothing that the
/// client can do to a socket makes sending without waiting wait.
#[cfg(feature = "daemon")]
#[derive(Debug)]
pub(crate) struct Nudge(OwnedFd);

#[cfg(feature = "daemon")]
impl Nudge {
    pub(crate) fn adopt(fd: OwnedFd) -> Self {
        Self(fd)
    }

    pub(crate) fn set(&self) {
        use nix::sys::socket::{MsgFlags, send};
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        // Full is as good as set, and what is no socket wakes nobody.
        let _full = send(std::os::fd::AsRawFd::as_raw_fd(&self.0), b"!", flags);
    }
}

/// Wakes those who wait for a queue pair.
#[derive(Debug, Default)]
pub(crate) struct Signal {
    sleepers: AtomicUsize,
    count: Mutex<u64>,
    woken: Condvar,
    events: Mutex<Vec<(u32, Arc<Event>)>>,
    registered: AtomicUsize,
}

impl Signal {
    /// There is something to poll, for whoever it may be.
    pub(crate) fn wake(&self) {
        if self.sleepers.load(Ordering::SeqCst) > 0 {
            *self.count.lock().unwrap_or_else(PoisonError::into_inner) += 1;
            self.woken.notify_all();
        }
        if self.registered.load(Ordering::SeqCst) > 0 {
            let events = self.events.lock().unwrap_or_else(PoisonError::into_inner);
            events.iter().for_each(|(_, event)| event.set());
        }
    }

    /// Whether anybody sleeps or has an event.
    pub(crate) fn is_watched(&self) -> bool {
        self.sleepers.load(Ordering::SeqCst) > 0 || self.registered.load(Ordering::SeqCst) > 0
    }

    /// There is something for these.
    pub(crate) fn wake_some(&self, whom: impl Iterator<Item = u32> + Clone) {
        if whom.clone().next().is_none() {
            return;
        }
        if self.sleepers.load(Ordering::SeqCst) > 0 {
            *self.count.lock().unwrap_or_else(PoisonError::into_inner) += 1;
            self.woken.notify_all();
        }
        if self.registered.load(Ordering::SeqCst) > 0 {
            let events = self.events.lock().unwrap_or_else(PoisonError::into_inner);
            for (_, event) in events
                .iter()
                .filter(|(one, _)| whom.clone().any(|slot| slot == *one))
            {
                event.set();
            }
        }
    }

    pub(crate) fn register(&self, who: u32, event: Arc<Event>) {
        event.set();
        let mut events = self.events.lock().unwrap_or_else(PoisonError::into_inner);
        events.push((who, event));
        self.registered.fetch_add(1, Ordering::SeqCst);
    }

    pub(crate) fn unregister(&self, who: u32) {
        if self.registered.load(Ordering::SeqCst) == 0 {
            return;
        }
        let mut events = self.events.lock().unwrap_or_else(PoisonError::into_inner);
        events.retain(|(one, _)| *one != who);
        self.registered.store(events.len(), Ordering::SeqCst);
    }

    /// Waits until `done` gives something.
    pub(crate) fn wait<T>(
        &self,
        limit: Deadline,
        mut done: impl FnMut() -> Option<T>,
    ) -> Option<T> {
        /// A wake-up that was missed costs no more than this.
        const NAP: Duration = Duration::from_millis(5);
        if let Some(found) = spin(&mut done) {
            return Some(found);
        }
        self.sleepers.fetch_add(1, Ordering::SeqCst);
        let found = loop {
            let seen = *self.count.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(found) = done() {
                break Some(found);
            }
            let Some(left) = limit.left() else {
                break None;
            };
            let count = self.count.lock().unwrap_or_else(PoisonError::into_inner);
            if *count == seen {
                let _timed = self.woken.wait_timeout(count, left.min(NAP));
            }
        };
        self.sleepers.fetch_sub(1, Ordering::SeqCst);
        found
    }
}

/// Wakes the executors of a daemon that sleep while something of theirs is out on the fabric.
#[derive(Debug, Default)]
pub(crate) struct Bells {
    asleep: AtomicUsize,
    events: Mutex<Vec<Arc<Event>>>,
}

impl Bells {
    #[cfg(feature = "daemon")]
    pub(crate) fn add(&self, event: &Arc<Event>) {
        let mut events = self.events.lock().unwrap_or_else(PoisonError::into_inner);
        events.push(Arc::clone(event));
    }

    /// Whatever comes from here on sets the event, until [`awake`](Self::awake).
    #[cfg(feature = "daemon")]
    pub(crate) fn asleep(&self) {
        self.asleep.fetch_add(1, Ordering::SeqCst);
    }

    #[cfg(feature = "daemon")]
    pub(crate) fn awake(&self) {
        self.asleep.fetch_sub(1, Ordering::SeqCst);
    }

    pub(crate) fn ring(&self) {
        if self.asleep.load(Ordering::SeqCst) > 0 {
            let events = self.events.lock().unwrap_or_else(PoisonError::into_inner);
            events.iter().for_each(|event| event.set());
        }
    }
}

/// Sleeps until `word` is no longer `expected`, somebody wakes it, or `limit` is over. The word may
/// lie in memory that is shared with another process.
pub(crate) fn futex_wait(word: &AtomicU32, expected: u32, limit: Duration) {
    let timeout = libc::timespec {
        tv_sec: limit.as_secs().min(3600).cast_signed(),
        tv_nsec: i64::from(limit.subsec_nanos()),
    };
    // SAFETY: the word is a living, aligned 32-bit atomic, and the timeout a valid one. Whatever the
    // result, the caller looks again.
    unsafe {
        libc::syscall(
            libc::SYS_futex,
            word.as_ptr(),
            libc::FUTEX_WAIT,
            expected,
            &raw const timeout,
        );
    }
}

/// Wakes whoever sleeps on `word`.
#[cfg(feature = "daemon")]
pub(crate) fn futex_wake(word: &AtomicU32) {
    // SAFETY: the word is a living, aligned 32-bit atomic; FUTEX_WAKE reads nothing through it.
    unsafe {
        libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE, i32::MAX);
    }
}

/// A descriptor that is always readable, for event loops whose own could not be made: they look more
/// often than they would have to, and miss nothing.
pub(crate) fn always_ready() -> Result<Event> {
    Event::with(1)
}

/// Polls until there is something or `limit` is over; yields between.
pub(crate) fn poll_until<T>(limit: Duration, mut poll: impl FnMut() -> Option<T>) -> Option<T> {
    let end = Deadline::after(limit);
    loop {
        if let Some(found) = poll() {
            return Some(found);
        }
        end.left()?;
        std::thread::yield_now();
    }
}
