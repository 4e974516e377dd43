//! The life of what is stored: absent, filling, published, leased, idle, reclaiming.
//!
//! ```text
//!            FillBegun          Published          LeaseTaken
//!   Absent ───────────► Filling ─────────► Published ─────────► Leased ◄─┐
//!     ▲ ▲                │  ▲ │               │                   │      │ LeaseTaken
//!     │ └── FillFailed ──┘  └─┘ TakenOver     │      LastReleased │      │
//!     │                                       │                   ▼      │
//!     │        Freed                          └─ ReclaimBegun ◄─ Idle ───┘
//!     └───────────────── Reclaiming ◄────────────────┘            ▲
//!                            └───────────── Spared ───────────────┘
//! ```
//!
//! Pure: nothing here reads a clock or a file. The mechanism says what it saw ([`Lifecycle::seen`])
//! or what it is about to do ([`Lifecycle::step`]) and is told where that leads; what is not drawn
//! above is an [`IllegalTransition`].
//!
//! # Idle time without a process that watches
//! Leases are kernel locks, so who holds one is known only by looking. What is remembered between
//! two looks is one stamp a model:
//! - a filler before it publishes, and a holder once it has the lock but before it looks whether
//!   the name still means that file, writes [`Moment::IN_USE`];
//! - whoever can prove that nobody holds a lease any more (it got the lock exclusively) writes the
//!   present moment: the last holder on its way out, or the reclaimer at its first look after
//!   holders were killed.
//!
//! A stamp that lies in the future, as `IN_USE` does, counts as now. So idle time is never counted
//! from before the last use, whoever died in between; it may start late by the time to the next
//! look. (The paper counts a minute from the last sight of a pod's name, and never starts anew on
//! reuse: Tetris, ATC'22.)

use std::fmt;
use std::time::Duration;

#[cfg(test)]
mod protocol_model;

/// A point on a clock that no one can set and that runs during suspend: time since boot
/// (`CLOCK_BOOTTIME`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Moment(Duration);

impl Moment {
    /// The stamp of what somebody uses: later than any machine has been up (127 years), and within
    /// what ext4 and XFS can store as a modification time.
    pub const IN_USE: Self = Self(Duration::from_secs(4_000_000_000));

    /// `since_boot` after the machine was started.
    pub const fn new(since_boot: Duration) -> Self {
        Self(since_boot)
    }

    /// Time from boot to here.
    pub const fn since_boot(self) -> Duration {
        self.0
    }

    /// Time from `earlier` to here; zero where `earlier` is not earlier.
    pub const fn since(self, earlier: Self) -> Duration {
        self.0.saturating_sub(earlier.0)
    }

    /// `wait` later.
    pub const fn after(self, wait: Duration) -> Self {
        Self(self.0.saturating_add(wait))
    }
}

/// Where a model or a stored tensor stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Lifecycle {
    /// Nobody has it, or somebody has and is not done.
    Absent,
    /// It is being written under a name nobody else looks up.
    Filling,
    /// It is whole, and nobody has used it yet.
    Published {
        /// When it became visible.
        since: Moment,
    },
    /// At least one process uses it.
    Leased,
    /// It is whole, and nobody uses it any more.
    Idle {
        /// When it was first certain that nobody does.
        since: Moment,
    },
    /// The reclaimer holds it exclusively and is about to unlink it.
    Reclaiming,
}

/// What happens to a model or a stored tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Event {
    /// A process starts to write it.
    FillBegun,
    /// A waiting process goes on for a filler that died or hangs.
    TakenOver,
    /// The filler gave up (no space, bad source) or died, and nobody waits.
    FillFailed,
    /// The complete file got its name.
    Published,
    /// A process took a lease.
    LeaseTaken,
    /// It is certain that nobody holds a lease any more.
    LastReleased,
    /// The reclaimer got the lock exclusively and wants to free what was idle for `keep_alive`.
    ReclaimBegun {
        /// How long a thing stays after its last use.
        keep_alive: Duration,
    },
    /// The name is gone.
    Freed,
    /// The reclaimer let go without freeing.
    Spared,
}

/// Why an event cannot happen to something in its state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IllegalTransition {
    /// The state machine has no such edge.
    NoSuchEdge {
        /// The state it was in.
        from: Lifecycle,
        /// What cannot happen there.
        event: Event,
    },
    /// It may be reclaimed, but not yet.
    TooEarly {
        /// From when on, if nobody uses it before.
        due: Moment,
    },
}

impl fmt::Display for IllegalTransition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoSuchEdge { from, event } => {
                write!(f, "{event:?} cannot happen to what is {}", from.name())
            }
            Self::TooEarly { due } => {
                write!(f, "not due before {:?} after boot", due.since_boot())
            }
        }
    }
}

impl std::error::Error for IllegalTransition {}

impl Lifecycle {
    /// The state of a visible thing by what can be seen of it: whether somebody holds a lease, and
    /// its stamp. A stamp in the future counts as `now`.
    pub fn seen(leased: bool, stamp: Moment, now: Moment) -> Self {
        if leased {
            Self::Leased
        } else {
            Self::Idle {
                since: stamp.min(now),
            }
        }
    }

    /// The stamp that says this to whoever looks next; `None` while there is nothing to stamp.
    pub const fn stamp(self) -> Option<Moment> {
        match self {
            Self::Published { since } | Self::Idle { since } => Some(since),
            Self::Leased => Some(Moment::IN_USE),
            Self::Absent | Self::Filling | Self::Reclaiming => None,
        }
    }

    /// The state after `event` at `now`.
    ///
    /// # Errors
    /// [`IllegalTransition`] for an edge that does not exist, and for a reclaim before its time.
    pub fn step(self, event: Event, now: Moment) -> Result<Self, IllegalTransition> {
        match (self, event) {
            (Self::Absent, Event::FillBegun) | (Self::Filling, Event::TakenOver) => {
                Ok(Self::Filling)
            }
            (Self::Filling, Event::FillFailed) | (Self::Reclaiming, Event::Freed) => {
                Ok(Self::Absent)
            }
            (Self::Filling, Event::Published) => Ok(Self::Published { since: now }),
            (Self::Published { .. } | Self::Leased | Self::Idle { .. }, Event::LeaseTaken) => {
                Ok(Self::Leased)
            }
            (Self::Leased, Event::LastReleased) | (Self::Reclaiming, Event::Spared) => {
                Ok(Self::Idle { since: now })
            }
            (
                Self::Published { since } | Self::Idle { since },
                Event::ReclaimBegun { keep_alive },
            ) => {
                if now.since(since) >= keep_alive {
                    Ok(Self::Reclaiming)
                } else {
                    Err(IllegalTransition::TooEarly {
                        due: since.after(keep_alive),
                    })
                }
            }
            (from, event) => Err(IllegalTransition::NoSuchEdge { from, event }),
        }
    }

    /// Whether others find it by its name.
    pub const fn is_visible(self) -> bool {
        match self {
            Self::Absent | Self::Filling => false,
            Self::Published { .. } | Self::Leased | Self::Idle { .. } | Self::Reclaiming => true,
        }
    }

    /// The state's name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Absent => "absent",
            Self::Filling => "filling",
            Self::Published { .. } => "published",
            Self::Leased => "leased",
            Self::Idle { .. } => "idle",
            Self::Reclaiming => "reclaiming",
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const KEEP_ALIVE: Duration = Duration::from_secs(10);

    fn at(seconds: u64) -> Moment {
        Moment::new(Duration::from_secs(seconds))
    }

    fn any_event() -> impl Strategy<Value = Event> {
        prop::sample::select(vec![
            Event::FillBegun,
            Event::TakenOver,
            Event::FillFailed,
            Event::Published,
            Event::LeaseTaken,
            Event::LastReleased,
            Event::ReclaimBegun {
                keep_alive: KEEP_ALIVE,
            },
            Event::Freed,
            Event::Spared,
        ])
    }

    proptest! {
        /// Any history of events, legal ones applied and illegal ones refused, against a record of
        /// what really happened.
        #[test]
        fn never_reclaimed_while_leased_nor_visible_while_filling(
            history in prop::collection::vec((any_event(), 0u64..8), 0..200)
        ) {
            let (mut state, mut now) = (Lifecycle::Absent, 0);
            let (mut whole, mut in_use, mut last_use) = (false, false, 0);
            for (event, pause) in history {
                now += pause;
                let Ok(next) = state.step(event, at(now)) else { continue };
                match event {
                    Event::Published => (whole, last_use) = (true, now),
                    Event::LeaseTaken => {
                        prop_assert!(whole, "a lease on what is not whole");
                        in_use = true;
                    }
                    Event::LastReleased => (in_use, last_use) = (false, now),
                    Event::ReclaimBegun { keep_alive } => {
                        prop_assert!(!in_use, "reclaimed while leased");
                        prop_assert!(at(now).since(at(last_use)) >= keep_alive, "reclaimed early");
                    }
                    Event::Freed => whole = false,
                    Event::Spared => last_use = now,
                    Event::FillBegun | Event::TakenOver | Event::FillFailed => {}
                }
                state = next;
                prop_assert_eq!(state.is_visible(), whole);
                prop_assert_eq!(state == Lifecycle::Leased, in_use);
            }
        }

        /// What one look writes down, the next one reads back; idle time never shrinks below the
        /// time since the last use.
        #[test]
        fn a_stamp_survives_a_look(leased: bool, stamp in 0u64..100, now in 0u64..100) {
            let state = Lifecycle::seen(leased, at(stamp), at(now));
            let written = state.stamp().unwrap();
            prop_assert_eq!(Lifecycle::seen(leased, written, at(now)), state);
            if leased {
                let later = Lifecycle::seen(false, written, at(now + 50));
                prop_assert_eq!(later, Lifecycle::Idle { since: at(now + 50) });
            }
        }
    }

    #[test]
    fn idle_time_starts_anew_on_reuse() {
        let reclaim = Event::ReclaimBegun {
            keep_alive: KEEP_ALIVE,
        };
        let idle = Lifecycle::seen(false, at(0), at(9));
        let reused = idle.step(Event::LeaseTaken, at(9)).unwrap();
        let idle = reused.step(Event::LastReleased, at(12)).unwrap();
        assert_eq!(
            idle.step(reclaim, at(21)),
            Err(IllegalTransition::TooEarly { due: at(22) })
        );
        assert_eq!(idle.step(reclaim, at(22)), Ok(Lifecycle::Reclaiming));
    }

    #[test]
    fn a_clock_that_was_behind_at_stamping_makes_nothing_early() {
        // A stamp of an earlier boot may lie in the future of this one.
        let state = Lifecycle::seen(false, at(5_000), at(3));
        assert_eq!(state, Lifecycle::Idle { since: at(3) });
    }

    #[test]
    fn refusals_say_what_and_why() {
        let refused = Lifecycle::Leased
            .step(
                Event::ReclaimBegun {
                    keep_alive: Duration::ZERO,
                },
                at(1),
            )
            .unwrap_err();
        assert!(refused.to_string().contains("leased"), "{refused}");
    }
}
