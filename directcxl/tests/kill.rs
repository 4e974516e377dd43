//! SIGKILL: a process is killed at every step of every change, for real.
#![allow(
    clippy::panic,
    clippy::print_stderr,
    clippy::unwrap_used,
    reason = "a test says what went wrong by failing"
)]

mod common;

use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::path::PathBuf;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use carlsbad_kit::child::{self, Role as ChildRole};
use carlsbad_types::ByteSize;
use common::{MIB2, fill, sum};
use directcxl::backend::{Backend, Geometry, Health, Identity};
use directcxl::flush::Step;
use directcxl::heap::{Heap, HeapOptions};
use directcxl::medium::{Access, Medium};
use directcxl::{Epoch, FileHdm, FormatOptions, HostId, NamespaceOptions, Pool, Result, Role};

/// A file whose process is killed at the step after so many.
#[derive(Debug)]
struct Deadly {
    file: Arc<FileHdm>,
    fuse: Arc<AtomicU64>,
    /// Whether memory can be given back; else it is filled with zeroes, which has steps of its own.
    discards: bool,
}

impl Deadly {
    fn burn(fuse: &AtomicU64) {
        if fuse.fetch_sub(1, Ordering::Relaxed) == 0 {
            nix::sys::signal::raise(nix::sys::signal::Signal::SIGKILL).unwrap();
        }
    }
}

impl Backend for Deadly {
    fn geometry(&self) -> &Geometry {
        self.file.geometry()
    }
    fn identity(&self) -> &Identity {
        self.file.identity()
    }
    fn host(&self) -> HostId {
        self.file.host()
    }
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
    fn map(
        self: Arc<Self>,
        range: Range<u64>,
        access: Access,
        populate: bool,
    ) -> Result<Box<dyn Medium>> {
        let inner = Arc::clone(&self.file).map(range, access, populate)?;
        let fuse = Arc::clone(&self.fuse);
        Ok(Box::new(DeadlyPiece { inner, fuse }))
    }
    fn discard(&self, range: Range<u64>) -> Result<bool> {
        Self::burn(&self.fuse);
        Ok(self.discards && self.file.discard(range)?)
    }
    fn health(&self) -> Health {
        self.file.health()
    }
    fn reopen(&self) -> Result<Arc<dyn Backend>> {
        self.file.reopen()
    }
}

#[derive(Debug)]
struct DeadlyPiece {
    inner: Box<dyn Medium>,
    fuse: Arc<AtomicU64>,
}

impl Medium for DeadlyPiece {
    fn base(&self) -> NonNull<u8> {
        self.inner.base()
    }
    fn length(&self) -> u64 {
        self.inner.length()
    }
    fn load(&self, offset: u64, into: &mut [u8]) -> Result<()> {
        self.inner.load(offset, into)
    }
    fn store(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        // In the middle of a store as well.
        let middle = bytes.len() / 2 / 8 * 8;
        self.inner.store(offset, &bytes[..middle])?;
        Deadly::burn(&self.fuse);
        self.inner.store(offset + middle as u64, &bytes[middle..])
    }
    fn write_back(&self, range: Range<u64>, step: Step) -> Result<()> {
        Deadly::burn(&self.fuse);
        self.inner.write_back(range, step)
    }
    fn invalidate(&self, range: Range<u64>, step: Step) -> Result<()> {
        self.inner.invalidate(range, step)
    }
}

/// The changes, one after the other; it tells when each is done.
fn work(pool: &Pool) -> Result<()> {
    let told = |what: &str| child::tell(what);
    let a = pool.create("a", MIB2, NamespaceOptions::default())?;
    told("created a");
    let heap = Heap::format(
        &a,
        HeapOptions {
            smallest: ByteSize::kib(64),
        },
    )?;
    told("formatted a");
    heap.allocate_into(ByteSize::kib(64), heap.root(0)?)?;
    told("allocated");
    heap.free_from(heap.root(0)?)?;
    told("freed");
    pool.resize("a", ByteSize::mib(6))?;
    told("resized a");
    drop(pool.create("b", ByteSize::mib(4), NamespaceOptions::default())?);
    told("created b");
    pool.remove("b")?;
    told("removed b");
    for round in 0..8 {
        drop(pool.create("c", MIB2, NamespaceOptions::default())?);
        told(&format!("round {round}"));
        pool.remove("c")?;
    }
    told("all");
    Ok(())
}

#[test]
#[ignore = "a role of `killed_at_every_step`"]
fn role_worker() {
    let Some((path, fuse, discards)) = child::arguments::<(PathBuf, u64, bool)>("role_worker")
    else {
        return;
    };
    let file = Arc::new(FileHdm::open(path).unwrap());
    let fuse = Arc::new(AtomicU64::new(fuse));
    let deadly = Deadly {
        file,
        fuse,
        discards,
    };
    let pool = Pool::open(deadly, Role::Writer(Epoch::CURRENT)).unwrap();
    work(&pool).unwrap();
}

#[test]
fn killed_at_every_step_nothing_committed_is_lost() {
    killed_at_every_step(true);
}

#[test]
fn killed_while_zeroing_nothing_is_lost_or_left() {
    killed_at_every_step(false);
}

fn killed_at_every_step(discards: bool) {
    let stride = if std::env::var_os("CARLSBAD_SOAK").is_some() {
        1
    } else {
        3
    };
    let first = carlsbad_kit::seed::rng("kill").u64(0..stride);
    let dir = carlsbad_kit::scratch::on_tmpfs().unwrap();
    let path = dir.path().join("pool");
    let (mut fuse, mut killed) = (first, 0);
    loop {
        let _first = std::fs::remove_file(&path);
        let options = FormatOptions {
            entries: 16,
            ..FormatOptions::default()
        };
        let pool =
            Pool::format(FileHdm::create(&path, ByteSize::mib(24)).unwrap(), options).unwrap();
        let all = pool.info().unwrap().free.get();
        let kept = pool
            .create("kept", MIB2, NamespaceOptions::default())
            .unwrap();
        fill(&kept, 0x5a);
        drop((kept, pool));
        let mut child = ChildRole::test("role_worker")
            .start(&(path.clone(), fuse, discards))
            .unwrap();
        let mut told = Vec::new();
        while let Ok(words) = child.hear_any() {
            told.push(words);
        }
        let _ended = child.wait();
        drop(child);
        let done = |what: &str| told.iter().any(|words| words == what);

        let pool = Pool::open(FileHdm::open(&path).unwrap(), Role::Writer(Epoch::CURRENT)).unwrap();
        let at = format!("fuse {fuse}: {told:?}");
        assert!(pool.check().is_ok(), "{at}: {:?}", pool.check());
        assert_eq!(sum(&pool.attach("kept").unwrap()), 0x5a, "{at}");
        assert_eq!(
            pool.attach("a").is_ok(),
            done("created a") || pool.attach("a").is_ok(),
            "{at}"
        );
        if done("created a") {
            let a = pool.attach("a").unwrap();
            if done("formatted a") {
                let heap = Heap::open(&a).unwrap();
                let stats = heap.check().unwrap_or_else(|why| panic!("{at}: {why}"));
                assert_eq!(stats.blocks == 1, stats.used != ByteSize::ZERO, "{at}");
                if done("allocated") && !done("freed") {
                    let mut root = [0; 8];
                    a.read(heap.root(0).unwrap().0, &mut root).unwrap();
                    // The free that comes next may have happened before the kill.
                    assert_eq!(u64::from_le_bytes(root) != 0, stats.blocks == 1, "{at}");
                }
            }
            assert!(!done("resized a") || a.length() == ByteSize::mib(6), "{at}");
        }
        assert!(!done("removed b") || pool.attach("b").is_err(), "{at}");
        assert!(
            !done("created b") || done("removed b") || pool.list().is_ok(),
            "{at}"
        );
        // Nothing is held by the dead: all but what is there can be had again.
        pool.reclaim().unwrap();
        let info = pool.info().unwrap();
        assert_eq!(info.quarantined, ByteSize::ZERO, "{at}");
        let held = pool.list().unwrap();
        let held: u64 = held.iter().map(|one| one.length.get()).sum();
        assert_eq!(held + info.free.get(), all, "{at}");
        drop(
            pool.create("next", MIB2, NamespaceOptions::default())
                .unwrap(),
        );
        if done("all") {
            break;
        }
        killed += 1;
        fuse += stride;
    }
    assert!(killed > 30, "only {killed} steps");
}
