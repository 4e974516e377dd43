//! A peer that is dialled: whether there is a link to it, why not, and who waits for one.

use std::net::SocketAddr;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::Shared;
use super::link::Link;
use super::pair::Pair;

/// How long after an attempt that failed the next one is made.
pub(super) const RETRY: Duration = Duration::from_millis(20);
/// A peer that nobody has wanted for so long is dialled when it is wanted again.
const WANTED: Duration = Duration::from_secs(60);

/// Why there is no link to a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LinkError {
    /// Nobody listens at its address, or there is no way there.
    #[error("nobody answers at its address")]
    Unreachable,
    /// It did not finish the handshake in time.
    #[error("it did not finish the handshake in time")]
    Late,
    /// It speaks another version of the protocol.
    #[error("it speaks version {theirs} of the protocol, and this node {ours}")]
    Version {
        /// This side's.
        ours: u16,
        /// The peer's.
        theirs: u16,
    },
    /// It holds another key.
    #[error("it holds another key")]
    WrongKey,
    /// What came from there is not of this protocol, or was changed on the way.
    #[error("what came from there is not of this protocol, or was changed on the way")]
    Garbled,
    /// Nothing was heard of it for the fabric's limit.
    #[error("nothing was heard of it for too long")]
    Silent,
    /// The connection has ended.
    #[error("the connection has ended")]
    Closed,
    /// The cipher cannot be set up.
    #[error("the cipher cannot be set up")]
    Cipher,
}

/// How it stands with a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum LinkState {
    /// Nobody has wanted it yet.
    Idle,
    /// It is being dialled; requests wait.
    Dialing,
    /// There is a link.
    Up,
    /// There is none, and requests fail at once; it is dialled again and again.
    Down(LinkError),
}

#[derive(Debug)]
pub(super) struct Peer {
    pub(super) at: SocketAddr,
    state: Mutex<PeerState>,
    changed: Condvar,
}

#[derive(Debug)]
struct PeerState {
    phase: Phase,
    waiting: Vec<Arc<Pair>>,
    wanted: Instant,
    /// An attempt is being made, or has been asked for.
    dialing: bool,
    retry: Instant,
    /// Attempts that have ended.
    attempts: u64,
}

#[derive(Debug)]
enum Phase {
    Idle,
    Dialing,
    Up(Arc<Link>),
    Down(LinkError),
}

/// Where a request goes.
#[derive(Debug)]
pub(super) enum Way {
    Link(Arc<Link>),
    /// The pair is told when it is known.
    Wait,
    Gone,
}

impl Peer {
    pub(super) fn new(at: SocketAddr) -> Arc<Self> {
        let now = Instant::now();
        Arc::new(Self {
            at,
            state: Mutex::new(PeerState {
                phase: Phase::Idle,
                waiting: Vec::new(),
                wanted: now,
                dialing: false,
                retry: now,
                attempts: 0,
            }),
            changed: Condvar::new(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, PeerState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn state(&self) -> LinkState {
        match &self.lock().phase {
            Phase::Idle => LinkState::Idle,
            Phase::Up(link) if !link.is_lost() => LinkState::Up,
            Phase::Dialing | Phase::Up(_) => LinkState::Dialing,
            Phase::Down(why) => LinkState::Down(*why),
        }
    }

    fn dial(self: &Arc<Self>, state: &mut PeerState, shared: &Shared) {
        if !state.dialing {
            state.dialing = true;
            shared.dial(Arc::clone(self));
        }
    }

    /// The way for a request of `pair`, which is told where it has to wait.
    pub(super) fn way(self: &Arc<Self>, pair: &Arc<Pair>, shared: &Shared) -> Way {
        let mut state = self.lock();
        state.wanted = Instant::now();
        match &state.phase {
            Phase::Up(link) if !link.is_lost() => return Way::Link(Arc::clone(link)),
            Phase::Down(_) => return Way::Gone,
            Phase::Idle | Phase::Dialing | Phase::Up(_) => {}
        }
        state.phase = Phase::Dialing;
        self.dial(&mut state, shared);
        if !state.waiting.iter().any(|one| Arc::ptr_eq(one, pair)) {
            state.waiting.push(Arc::clone(pair));
        }
        Way::Wait
    }

    /// Waits for a link, for what is asked of it: until `limit`, or the next attempt has failed.
    pub(super) fn wait<T>(
        self: &Arc<Self>,
        shared: &Shared,
        limit: Duration,
        mut done: impl FnMut(&Arc<Link>) -> Option<T>,
    ) -> Option<T> {
        /// A wake-up that was missed costs no more than this.
        const NAP: Duration = Duration::from_millis(5);
        let end = Instant::now().checked_add(limit);
        let mut state = self.lock();
        let mut failed = None;
        loop {
            state.wanted = Instant::now();
            match &state.phase {
                Phase::Up(link) if !link.is_lost() => {
                    if let Some(found) = done(link) {
                        return Some(found);
                    }
                }
                Phase::Down(_) => {
                    let before = *failed.get_or_insert(state.attempts);
                    if before != state.attempts {
                        return None;
                    }
                    self.dial(&mut state, shared);
                }
                Phase::Idle | Phase::Dialing | Phase::Up(_) => {
                    state.phase = Phase::Dialing;
                    self.dial(&mut state, shared);
                }
            }
            let left = match end {
                Some(end) => end.checked_duration_since(Instant::now())?,
                None => NAP,
            };
            let woken = self.changed.wait_timeout(state, left.min(NAP));
            state = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    pub(super) fn tell(&self) {
        self.changed.notify_all();
    }

    /// An attempt has ended.
    pub(super) fn ended(&self, how: Result<Arc<Link>, LinkError>) {
        let mut state = self.lock();
        state.attempts += 1;
        state.dialing = false;
        state.retry = Instant::now() + RETRY;
        state.phase = match how {
            Ok(link) => Phase::Up(link),
            Err(why) => {
                if !matches!(state.phase, Phase::Down(before) if before == why) {
                    tracing::warn!(peer = %self.at, %why, "no link");
                }
                Phase::Down(why)
            }
        };
        let waiting = std::mem::take(&mut state.waiting);
        drop(state);
        self.changed.notify_all();
        waiting.iter().for_each(Pair::pump);
    }

    /// The link is lost: another is wanted at once, where any was of late.
    pub(super) fn lost(self: &Arc<Self>, link: &Arc<Link>, shared: &Shared) {
        let mut state = self.lock();
        if !matches!(&state.phase, Phase::Up(one) if Arc::ptr_eq(one, link)) {
            return;
        }
        if state.wanted.elapsed() < WANTED {
            state.phase = Phase::Dialing;
            self.dial(&mut state, shared);
        } else {
            state.phase = Phase::Idle;
        }
        drop(state);
        self.changed.notify_all();
    }

    /// Dials again where it is time. True where it is down, and looked at more often for that.
    pub(super) fn tick(self: &Arc<Self>, shared: &Shared) -> bool {
        let mut state = self.lock();
        if !matches!(state.phase, Phase::Down(_)) {
            return false;
        }
        if state.wanted.elapsed() > WANTED {
            state.phase = Phase::Idle;
            return false;
        }
        if Instant::now() >= state.retry {
            self.dial(&mut state, shared);
        }
        true
    }
}
