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
