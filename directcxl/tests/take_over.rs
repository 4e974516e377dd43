//! Two hosts, of which one is stopped at every step of what it does while the other one takes over.
#![allow(
    clippy::panic,
    clippy::print_stderr,
    clippy::unwrap_used,
    reason = "a test says what went wrong by failing"
)]

mod common;

use std::fs::File;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use carlsbad_types::ByteSize;
use common::{MIB2, fill, sum};
use directcxl::backend::{Backend, Geometry, Health, Identity};
use directcxl::flush::Step;
use directcxl::medium::{Access, Medium};
use directcxl::{
    Contents, Epoch, Error, FileHdm, FormatOptions, HostId, Namespace, NamespaceOptions, Pool,
    Result, Role,
};

type Meanwhile = Box<dyn FnOnce() + Send>;

/// What happens when a host comes to a step of its work.
#[derive(Default)]
struct Pause {
    steps: u64,
    /// Comes before the step of this number.
    meanwhile: Option<(u64, Meanwhile)>,
}

/// Shared memory as one host sees it: its own kernel's locks, and steps at which it can be stopped.
#[derive(Clone)]
struct Far {
    memory: Arc<FileHdm>,
    locks: Arc<File>,
    path: PathBuf,
    pause: Arc<Mutex<Pause>>,
    /// Comes before the first store of zeroes.
    zeroing: Arc<Mutex<Option<Meanwhile>>>,
    /// Whether memory can be given back, which fills it with zeroes.
    discards: bool,
}

impl std::fmt::Debug for Far {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Far")
    }
}

impl Far {
    fn new(path: &Path, host: u16) -> Self {
        let locks = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path.with_extension(format!("locks{host}")))
            .unwrap();
        let memory = FileHdm::open(path).unwrap().on_host(HostId(host));
        Self {
            memory: Arc::new(memory),
            locks: Arc::new(locks),
            path: path.to_owned(),
            pause: Arc::default(),
            zeroing: Arc::default(),
            discards: true,
        }
    }

    fn without_discard(self) -> Self {
        Self {
            discards: false,
            ..self
        }
    }

    /// Counts steps from here, and does something before the one of this number.
    fn before_step(&self, step: u64, meanwhile: impl FnOnce() + Send + 'static) {
        *self.pause.lock().unwrap() = Pause {
            steps: 0,
            meanwhile: Some((step, Box::new(meanwhile))),
        };
    }

    /// Does something when a namespace begins to be filled with zeroes.
    fn before_zeroing(&self, meanwhile: impl FnOnce() + Send + 'static) {
        *self.zeroing.lock().unwrap() = Some(Box::new(meanwhile));
    }

    /// Whether that step was come to.
    fn was_paused(&self) -> bool {
        self.pause.lock().unwrap().meanwhile.is_none()
    }

    fn step(&self) {
        let mut pause = self.pause.lock().unwrap();
        let now = pause.steps;
        pause.steps += 1;
        let due = pause.meanwhile.take_if(|(step, _)| *step == now);
        drop(pause);
        if let Some((_, meanwhile)) = due {
            meanwhile();
        }
    }
}

impl Backend for Far {
    fn geometry(&self) -> &Geometry {
        self.memory.geometry()
    }
    fn identity(&self) -> &Identity {
        self.memory.identity()
    }
    fn host(&self) -> HostId {
        self.memory.host()
    }
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.locks.as_fd()
    }
    fn map(
        self: Arc<Self>,
        range: Range<u64>,
        access: Access,
        populate: bool,
    ) -> Result<Box<dyn Medium>> {
        let piece = Arc::clone(&self.memory).map(range, access, populate)?;
        Ok(Box::new(Piece { piece, far: self }))
    }
    fn discard(&self, range: Range<u64>) -> Result<bool> {
        self.step();
        Ok(self.discards && self.memory.discard(range)?)
    }
    fn health(&self) -> Health {
        self.memory.health()
    }
    fn reopen(&self) -> Result<Arc<dyn Backend>> {
        Ok(Arc::new(Self::new(&self.path, self.memory.host().0)))
    }
}

#[derive(Debug)]
struct Piece {
    piece: Box<dyn Medium>,
    far: Arc<Far>,
}

impl Medium for Piece {
    fn base(&self) -> NonNull<u8> {
        self.piece.base()
    }
    fn length(&self) -> u64 {
        self.piece.length()
    }
    fn load(&self, offset: u64, into: &mut [u8]) -> Result<()> {
        self.far.step();
        self.piece.load(offset, into)
    }
    fn store(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        self.far.step();
        // Nothing else is stored in so large pieces.
        if bytes.len() as u64 == MIB2.get() {
            let due = self.far.zeroing.lock().unwrap().take();
            if let Some(meanwhile) = due {
                meanwhile();
            }
        }
        self.piece.store(offset, bytes)
    }
    fn write_back(&self, range: Range<u64>, step: Step) -> Result<()> {
        self.far.step();
        self.piece.write_back(range, step)
    }
    fn invalidate(&self, range: Range<u64>, step: Step) -> Result<()> {
        self.piece.invalidate(range, step)
    }
}

const KEPT: NamespaceOptions = NamespaceOptions {
    contents: Contents::Kept,
    populate: false,
};

fn plain() -> NamespaceOptions {
    NamespaceOptions::default()
}

/// A pool of two hosts on shared memory.
fn shared() -> (tempfile::TempDir, PathBuf) {
    let dir = carlsbad_kit::scratch::on_tmpfs().unwrap();
    let path = dir.path().join("pool");
    let options = FormatOptions {
        hosts: 2,
        entries: 16,
        ..FormatOptions::default()
    };
    let memory = FileHdm::create(&path, ByteSize::mib(32)).unwrap();
    drop(Pool::format(memory, options).unwrap());
    (dir, path)
}

/// Host 1 takes epoch 2, makes a namespace, and stays attached to it, if it can.
fn takes_over(path: &Path) -> Option<(Pool, Namespace)> {
    let other = match Pool::open(Far::new(path, 1), Role::Writer(Epoch(2))) {
        Ok(other) => other,
        Err(Error::Fenced { .. }) => return None,
        Err(why) => panic!("{why}"),
    };
    match other.create("precious", MIB2, plain()) {
        Ok(precious) => {
            fill(&precious, 0x5a);
            Some((other, precious))
        }
        Err(Error::Fenced { .. }) => None,
        Err(why) => panic!("{why}"),
    }
}

/// The host that writes takes a later epoch; at any step of that another one takes one in between.
/// What that one said it has made is there afterwards.
#[test]
fn a_writer_that_takes_a_later_epoch_keeps_what_was_made_in_between() {
    let (mut made, mut refused) = (0, 0);
    for step in 0.. {
        let (_dir, path) = shared();
        let first = Pool::open(Far::new(&path, 0), Role::Writer(Epoch::CURRENT)).unwrap();
        drop(first.create("old", MIB2, plain()).unwrap());
        let far = Far::new(&path, 0);
        let other = Arc::new(Mutex::new(None));
        let (to, at) = (Arc::clone(&other), path.clone());
        far.before_step(step, move || *to.lock().unwrap() = takes_over(&at));
        let opened = Pool::open(far.clone(), Role::Writer(Epoch(3)));
        if !far.was_paused() {
            break;
        }
        let pool = opened.unwrap();
        assert!(pool.attach("old").is_ok(), "step {step}");
        assert!(
            matches!(first.remove("old"), Err(Error::Fenced { .. })),
            "step {step}"
        );
        if other.lock().unwrap().is_some() {
            made += 1;
            let precious = pool.attach("precious");
            assert!(precious.is_ok(), "step {step}: lost");
            assert_eq!(sum(&precious.unwrap()), 0x5a, "step {step}");
        } else {
            refused += 1;
        }
        assert!(pool.check().is_ok(), "step {step}");
    }
    // Both happen, or this has shown nothing.
    assert!(made > 3 && refused > 10, "{made} {refused}");
}

/// What a host does while another one takes over.
type Change = fn(&Pool) -> Result<()>;

/// A host makes, resizes and removes; at any step of that another one takes over and makes a
/// namespace of its own. Nothing but that one writes to it, and what either said it has done is done.
#[test]
fn a_writer_that_is_fenced_off_touches_nothing_of_the_next_one() {
    let create: Change = |pool| pool.create("late", MIB2, plain()).map(drop);
    let populate: Change = |pool| {
        let options = NamespaceOptions {
            populate: true,
            ..plain()
        };
        pool.create("late", MIB2, options).map(drop)
    };
    let grow: Change = |pool| pool.resize("old", ByteSize::mib(4));
    let shrink: Change = |pool| pool.resize("long", MIB2);
    let remove: Change = |pool| pool.remove("old");
    let all = [create, populate, grow, shrink, remove];
    for (which, change) in all.into_iter().enumerate() {
        for discards in [true, false] {
            let (mut done, mut fenced) = (0, 0);
            for step in 0.. {
                let at = format!("change {which}, {discards}, step {step}");
                let (_dir, path) = shared();
                let mut far = Far::new(&path, 0);
                if !discards {
                    far = far.without_discard();
                }
                let pool = Pool::open(far.clone(), Role::Writer(Epoch::CURRENT)).unwrap();
                drop(pool.create("long", ByteSize::mib(4), plain()).unwrap());
                drop(pool.create("old", MIB2, plain()).unwrap());
                let other = Arc::new(Mutex::new(None));
                let (to, there) = (Arc::clone(&other), path.clone());
                far.before_step(step, move || *to.lock().unwrap() = takes_over(&there));
                let changed = change(&pool);
                if !far.was_paused() {
                    changed.unwrap();
                    break;
                }
                let Some((next, precious)) = other.lock().unwrap().take() else {
                    panic!("{at}: the later epoch was refused");
                };
                assert_eq!(sum(&precious), 0x5a, "{at}: written over");
                assert_eq!(sum(&next.attach("precious").unwrap()), 0x5a, "{at}");
                match changed {
                    Ok(()) => {
                        done += 1;
                        let found = match which {
                            0 | 1 => next.attach("late").is_ok(),
                            2 => next.attach("old").unwrap().length() == ByteSize::mib(4),
                            3 => next.attach("long").unwrap().length() == MIB2,
                            _ => next.attach("old").is_err(),
                        };
                        assert!(found, "{at}: lost");
                    }
                    Err(Error::Fenced { .. }) => fenced += 1,
                    Err(why) => panic!("{at}: {why}"),
                }
                // What the first host had reserved is to be had again.
                drop((pool, far));
                next.reclaim().unwrap();
                assert_eq!(next.info().unwrap().quarantined, ByteSize::ZERO, "{at}");
                assert!(next.check().is_ok(), "{at}");
            }
            assert!(fenced > 10, "change {which}: {done} {fenced}");
        }
    }
}

/// Zeroing takes seconds where memory cannot be given back. Nobody waits for it: no other process of
/// the host, no other thread of the pool; and what is being made is nobody else's meanwhile.
#[test]
fn while_a_namespace_is_zeroed_others_work() {
    for grows in [false, true] {
        let (_dir, path) = shared();
        let far = Far::new(&path, 0).without_discard();
        let pool = Pool::open(far.clone(), Role::Writer(Epoch::CURRENT)).unwrap();
        drop(pool.create("mine", MIB2, plain()).unwrap());
        let (ask, asked) = mpsc::channel::<()>();
        let (answer, answered) = mpsc::channel();
        far.before_zeroing(move || {
            ask.send(()).unwrap();
            let patience = Duration::from_secs(5);
            let everybody: Vec<_> = (0..2)
                .map_while(|_| answered.recv_timeout(patience).ok())
                .collect();
            assert_eq!(everybody.len(), 2, "only {everybody:?}");
        });
        std::thread::scope(|scope| {
            let zeroes = scope.spawn(|| {
                if grows {
                    pool.resize("mine", ByteSize::mib(8))
                } else {
                    pool.create("large", ByteSize::mib(6), plain()).map(drop)
                }
            });
            asked.recv().unwrap();
            let (here, there) = (answer.clone(), answer);
            let thread = pool.clone();
            scope.spawn(move || {
                thread.list().unwrap();
                thread.reclaim().unwrap();
                drop(thread.create("thread's", MIB2, KEPT).unwrap());
                let _late = here.send("thread");
            });
            scope.spawn(move || {
                let process = Pool::open(Far::new(&path, 0), Role::Writer(Epoch::CURRENT)).unwrap();
                process.reclaim().unwrap();
                drop(process.create("process's", MIB2, plain()).unwrap());
                process.attach("mine").unwrap();
                let _late = there.send("process");
            });
            zeroes.join().unwrap().unwrap();
        });
        let name = if grows { "mine" } else { "large" };
        assert_eq!(sum(&pool.attach(name).unwrap()), 0, "{name}");
        // No two overlap, and nothing is left over.
        assert!(pool.check().is_ok());
        assert_eq!(pool.list().unwrap().len(), if grows { 3 } else { 4 });
        pool.reclaim().unwrap();
        assert_eq!(pool.info().unwrap().quarantined, ByteSize::ZERO);
    }
}

/// Two make the same name, two grow the same namespace: one does, the other is told, and gives back
/// what it had reserved.
#[test]
fn of_two_that_make_the_same_name_one_does() {
    let (_dir, path) = shared();
    let far = Far::new(&path, 0).without_discard();
    let pool = Pool::open(far.clone(), Role::Writer(Epoch::CURRENT)).unwrap();
    let other = Pool::open(Far::new(&path, 0), Role::Writer(Epoch::CURRENT)).unwrap();
    let free = pool.info().unwrap().free;
    let without = |length: ByteSize| ByteSize::new(free.get() - length.get());
    let quicker = other.clone();
    far.before_zeroing(move || drop(quicker.create("same", MIB2, plain()).unwrap()));
    let why = pool.create("same", ByteSize::mib(4), plain()).unwrap_err();
    assert!(matches!(why, Error::NameTaken { .. }), "{why}");
    let info = pool.info().unwrap();
    assert_eq!(
        (info.free, info.quarantined),
        (without(MIB2), ByteSize::ZERO)
    );

    // Grown, while somebody else takes it away.
    let quicker = other.clone();
    far.before_zeroing(move || quicker.remove("same").unwrap());
    let why = pool.resize("same", ByteSize::mib(4)).unwrap_err();
    assert!(matches!(why, Error::UnknownNamespace { .. }), "{why}");
    let info = pool.info().unwrap();
    assert_eq!((info.free, info.quarantined), (free, ByteSize::ZERO));

    // Grown, while somebody else cuts it.
    drop(pool.create("same", ByteSize::mib(6), plain()).unwrap());
    far.before_zeroing(move || other.resize("same", MIB2).unwrap());
    pool.resize("same", ByteSize::mib(8)).unwrap();
    assert_eq!(pool.list().unwrap()[0].length, ByteSize::mib(8));
    let info = pool.info().unwrap();
    assert_eq!(
        (info.free, info.quarantined),
        (without(ByteSize::mib(8)), ByteSize::ZERO)
    );
}

/// Whether somebody of host 0 has the log locked, as [`directcxl::layout`] says.
fn is_log_locked(path: &Path) -> bool {
    let locks = File::open(path.with_extension("locks0")).unwrap();
    let mut asked = libc::flock {
        l_type: libc::F_WRLCK as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 1 << 62,
        l_len: 1,
        l_pid: 0,
    };
    let ask = nix::fcntl::FcntlArg::F_OFD_GETLK(&mut asked);
    nix::fcntl::fcntl(&locks, ask).unwrap();
    i32::from(asked.l_type) != libc::F_UNLCK
}

/// Whoever makes a namespace has it, also where another one takes it away at once.
#[test]
fn to_create_beside_one_that_removes_the_same_name_is_no_error() {
    for options in [plain(), KEPT] {
        let mut steps = 0;
        for step in 0.. {
            let (_dir, path) = shared();
            let far = Far::new(&path, 0);
            let pool = Pool::open(far.clone(), Role::Writer(Epoch::CURRENT)).unwrap();
            let remover = Pool::open(Far::new(&path, 0), Role::Writer(Epoch::CURRENT)).unwrap();
            far.before_step(step, move || {
                if !is_log_locked(&path) {
                    let _none = remover.remove("late");
                }
            });
            let made = pool.create("late", MIB2, options);
            assert!(made.is_ok(), "step {step}: {made:?}");
            if !far.was_paused() {
                break;
            }
            steps += 1;
        }
        assert!(steps > 10, "{steps}");
    }
}
