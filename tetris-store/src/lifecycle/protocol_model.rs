//! The protocol behind the state machine, explored exhaustively.
//!
//! Two loaders and a reclaimer act on one name, one system call at a time, in every possible
//! order, and every loader may be killed between any two of its calls. The model keeps only what
//! the kernel keeps: which inode the name points at, how much of it is written, who holds which
//! lock, and the stamp. In every state the invariants hold, and every change of state is an edge of
//! [`Lifecycle`]. Leave one step out of the protocol, and the exploration finds the way to harm.

use std::collections::{HashSet, VecDeque};
use std::time::Duration;

use super::{Event, Lifecycle, Moment};

/// A step left out of the protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Flaw {
    None,
    /// The paper's way: the file is created under its final name and filled there.
    FillsInPlace,
    /// After the lease, nobody looks whether the name still means the same file.
    AttachesWithoutRecheck,
    /// The reclaimer looks, and then unlinks without holding the lock.
    ReclaimsWithoutLock,
    /// A holder stamps once it uses the file, rather than before.
    StampsAfterRecheck,
    /// Each holder stamps on its way out, whether or not it is the last one.
    EveryoneStampsOnLeaving,
    /// Holders do not stamp, and the reclaimer does not start idle time anew.
    StampsOnlyAtPublication,
}

const LOADERS: usize = 2;
const RECLAIMER: usize = LOADERS;
/// Enough for each loader to fill once.
const INODES: usize = LOADERS;
const WRITES: u8 = 2;
const KEEP_ALIVE: u8 = 2;
const END_OF_TIME: u8 = 5;
const IN_USE: u8 = u8::MAX;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
struct Inode {
    written: u8,
    shared: [bool; LOADERS],
    exclusive: Option<usize>,
    stamp: u8,
    /// Ghost: the last moment at which somebody used it or it was published.
    used: u8,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Loader {
    Looking,
    Writing(usize),
    Linking(usize),
    Locking(usize),
    Stamping(usize),
    Rechecking(usize),
    Using(usize),
    /// Its lease is closed; it may now prove itself the last one out.
    Leaving(usize),
    StampingOut(usize),
    Gone,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Reclaimer {
    Asleep,
    Opened(usize),
    Locked(usize),
    Unlinking(usize),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct World {
    now: u8,
    name: Option<usize>,
    inodes: [Inode; INODES],
    created: usize,
    loaders: [Loader; LOADERS],
    reclaimer: Reclaimer,
}

impl World {
    fn start() -> Self {
        Self {
            now: 0,
            name: None,
            inodes: [Inode::default(); INODES],
            created: 0,
            loaders: [Loader::Looking; LOADERS],
            reclaimer: Reclaimer::Asleep,
        }
    }

    fn leased(&self, inode: usize) -> bool {
        self.inodes[inode].shared.contains(&true)
    }

    fn using(&self, inode: usize) -> bool {
        self.loaders.contains(&Loader::Using(inode))
    }

    /// Takes the lock exclusively if nobody else holds it in any way.
    fn lock_exclusively(&mut self, inode: usize, who: usize) -> bool {
        let free = !self.leased(inode) && self.inodes[inode].exclusive.is_none();
        if free {
            self.inodes[inode].exclusive = Some(who);
        }
        free
    }

    /// Every world that one system call, one kill or one tick away.
    fn successors(&self, flaw: Flaw) -> Vec<Self> {
        let mut next = Vec::new();
        for who in 0..LOADERS {
            self.loader_step(who, flaw, &mut next);
            if self.loaders[who] != Loader::Gone {
                next.push(self.killed(who));
            }
        }
        self.reclaimer_step(flaw, &mut next);
        if self.now < END_OF_TIME {
            let mut later = *self;
            later.now += 1;
            for inode in 0..INODES {
                if later.using(inode) {
                    later.inodes[inode].used = later.now;
                }
            }
            next.push(later);
        }
        next
    }

    fn killed(&self, who: usize) -> Self {
        let mut next = *self;
        next.loaders[who] = Loader::Gone;
        for inode in &mut next.inodes {
            inode.shared[who] = false;
            if inode.exclusive == Some(who) {
                inode.exclusive = None;
            }
        }
        next
    }

    fn loader_step(&self, who: usize, flaw: Flaw, next: &mut Vec<Self>) {
        let mut w = *self;
        let now = w.now;
        w.loaders[who] = match self.loaders[who] {
            Loader::Looking => match w.name {
                Some(inode) => Loader::Locking(inode),
                None if w.created == INODES => return,
                None => {
                    let inode = w.created;
                    w.created += 1;
                    if flaw == Flaw::FillsInPlace {
                        w.name = Some(inode);
                    }
                    Loader::Writing(inode)
                }
            },
            Loader::Writing(inode) => {
                w.inodes[inode].written += 1;
                if w.inodes[inode].written == WRITES {
                    w.inodes[inode].stamp = IN_USE;
                    Loader::Linking(inode)
                } else {
                    Loader::Writing(inode)
                }
            }
            Loader::Linking(inode) => {
                if w.name.is_none() {
                    w.name = Some(inode);
                    w.inodes[inode].used = now;
                }
                // Linked now, or somebody else was first (EEXIST): attach to what the name means.
                Loader::Looking
            }
            Loader::Locking(inode) => {
                if w.inodes[inode].exclusive.is_some() {
                    return; // blocks in flock(LOCK_SH)
                }
                w.inodes[inode].shared[who] = true;
                if flaw == Flaw::StampsAfterRecheck {
                    Loader::Rechecking(inode)
                } else {
                    Loader::Stamping(inode)
                }
            }
            Loader::Stamping(inode) => {
                if flaw != Flaw::StampsOnlyAtPublication {
                    w.inodes[inode].stamp = IN_USE;
                }
                if flaw == Flaw::StampsAfterRecheck {
                    Loader::Using(inode)
                } else {
                    Loader::Rechecking(inode)
                }
            }
            Loader::Rechecking(inode) => {
                if w.name != Some(inode) && flaw != Flaw::AttachesWithoutRecheck {
                    w.inodes[inode].shared[who] = false;
                    Loader::Looking
                } else if flaw == Flaw::StampsAfterRecheck {
                    w.inodes[inode].used = now;
                    Loader::Stamping(inode)
                } else {
                    w.inodes[inode].used = now;
                    Loader::Using(inode)
                }
            }
            Loader::Using(inode) => {
                w.inodes[inode].shared[who] = false;
                w.inodes[inode].used = now;
                match flaw {
                    Flaw::EveryoneStampsOnLeaving => Loader::StampingOut(inode),
                    Flaw::StampsOnlyAtPublication => Loader::Gone,
                    _ => Loader::Leaving(inode),
                }
            }
            Loader::Leaving(inode) => {
                if w.lock_exclusively(inode, who) {
                    Loader::StampingOut(inode)
                } else {
                    Loader::Gone
                }
            }
            Loader::StampingOut(inode) => {
                w.inodes[inode].stamp = now;
                return next.push(w.killed(who));
            }
            Loader::Gone => return,
        };
        next.push(w);
    }

    fn reclaimer_step(&self, flaw: Flaw, next: &mut Vec<Self>) {
        let mut w = *self;
        w.reclaimer = match self.reclaimer {
            Reclaimer::Asleep => match w.name {
                Some(inode) => Reclaimer::Opened(inode),
                None => return,
            },
            Reclaimer::Opened(inode) => {
                let unlocked = flaw == Flaw::ReclaimsWithoutLock && !w.leased(inode);
                if unlocked || w.lock_exclusively(inode, RECLAIMER) {
                    Reclaimer::Locked(inode)
                } else {
                    if flaw != Flaw::StampsOnlyAtPublication && w.leased(inode) {
                        w.inodes[inode].stamp = IN_USE;
                    }
                    Reclaimer::Asleep
                }
            }
            Reclaimer::Locked(inode) => {
                let state = Lifecycle::seen(false, at(w.inodes[inode].stamp), at(w.now));
                let keep_alive = Duration::from_secs(KEEP_ALIVE.into());
                if state
                    .step(Event::ReclaimBegun { keep_alive }, at(w.now))
                    .is_ok()
                {
                    Reclaimer::Unlinking(inode)
                } else {
                    w.inodes[inode].stamp = w.inodes[inode].stamp.min(w.now);
                    w.inodes[inode].exclusive = None;
                    Reclaimer::Asleep
                }
            }
            Reclaimer::Unlinking(inode) => {
                w.name = None;
                if w.inodes[inode].exclusive == Some(RECLAIMER) {
                    w.inodes[inode].exclusive = None;
                }
                Reclaimer::Asleep
            }
        };
        next.push(w);
    }

    /// What the name means to the world, as a state of the machine.
    fn abstracted(&self) -> Lifecycle {
        let Some(inode) = self.name else {
            let filling = self
                .loaders
                .iter()
                .any(|l| matches!(l, Loader::Writing(_) | Loader::Linking(_)));
            return if filling {
                Lifecycle::Filling
            } else {
                Lifecycle::Absent
            };
        };
        if self.reclaimer == Reclaimer::Unlinking(inode) {
            Lifecycle::Reclaiming
        } else if self.using(inode) {
            Lifecycle::Leased
        } else {
            Lifecycle::Idle {
                since: at(self.inodes[inode].used),
            }
        }
    }

    fn harm(&self) -> Option<&'static str> {
        if self.name.is_some_and(|i| self.inodes[i].written < WRITES) {
            return Some("visible before it was whole");
        }
        for inode in 0..self.created {
            if self.using(inode) && self.name != Some(inode) {
                return Some("freed while leased");
            }
        }
        if let Reclaimer::Unlinking(inode) = self.reclaimer
            && self.name == Some(inode)
            && self.now - self.inodes[inode].used < KEEP_ALIVE
        {
            return Some("reclaimed early");
        }
        None
    }
}

fn at(tick: u8) -> Moment {
    if tick == IN_USE {
        Moment::IN_USE
    } else {
        Moment::new(Duration::from_secs(tick.into()))
    }
}

/// Whether the machine has a way from the state of `before` to that of `after`.
fn is_an_edge(before: &World, after: &World) -> bool {
    let (from, to) = (before.abstracted(), after.abstracted());
    let kind = std::mem::discriminant::<Lifecycle>;
    if kind(&from) == kind(&to) {
        return true;
    }
    let keep_alive = Duration::from_secs(KEEP_ALIVE.into());
    [
        Event::FillBegun,
        Event::FillFailed,
        Event::Published,
        Event::LeaseTaken,
        Event::LastReleased,
        Event::ReclaimBegun { keep_alive },
        Event::Freed,
    ]
    .into_iter()
    .filter_map(|event| from.step(event, at(before.now)).ok())
    // The model does not tell apart what was never used from what is not used any more, nor, once
    // the name is gone, whether another loader is already filling anew.
    .flat_map(|state| match state {
        Lifecycle::Published { since } => vec![Lifecycle::Idle { since }],
        Lifecycle::Absent => vec![Lifecycle::Absent, Lifecycle::Filling],
        other => vec![other],
    })
    .any(|state| kind(&state) == kind(&to))
}

/// Explores every world; the first harm found, and the number of worlds seen.
fn explore(flaw: Flaw) -> (Option<&'static str>, usize) {
    let mut seen = HashSet::from([World::start()]);
    let mut queue = VecDeque::from([World::start()]);
    while let Some(world) = queue.pop_front() {
        for next in world.successors(flaw) {
            if let Some(harm) = next.harm() {
                return (Some(harm), seen.len());
            }
            if !is_an_edge(&world, &next) {
                return (Some("not an edge of the state machine"), seen.len());
            }
            if seen.insert(next) {
                queue.push_back(next);
            }
        }
    }
    (None, seen.len())
}

#[test]
fn in_every_interleaving_with_kills_nothing_is_torn_lost_or_reclaimed_early() {
    let (harm, worlds) = explore(Flaw::None);
    assert_eq!(harm, None);
    assert!(worlds > 10_000, "only {worlds} worlds: the model is stuck");
}

#[test]
fn without_any_one_step_of_the_protocol_harm_is_found() {
    for (flaw, harm) in [
        (Flaw::FillsInPlace, "visible before it was whole"),
        (Flaw::AttachesWithoutRecheck, "freed while leased"),
        (Flaw::ReclaimsWithoutLock, "reclaimed early"),
        (Flaw::StampsAfterRecheck, "reclaimed early"),
        (Flaw::EveryoneStampsOnLeaving, "reclaimed early"),
        (Flaw::StampsOnlyAtPublication, "reclaimed early"),
    ] {
        let (found, worlds) = explore(flaw);
        assert!(found.is_some(), "{flaw:?} did no harm in {worlds} worlds");
        assert_eq!(found, Some(harm), "{flaw:?}");
    }
}
