//! Models of caches: hosts with a private one each, over a memory that sees only what is written
//! back. A crash keeps of a cache's dirty lines what it likes.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex};

use carlsbad_kit::seed::Rng;
use carlsbad_types::ByteSize;
use directcxl::backend::{Backend, Coherence, Geometry, Health, Identity, Persistence};
use directcxl::flush::Step;
use directcxl::medium::{Access, Medium};
use directcxl::{Error, HostId, Result};

const LINE: u64 = 64;
type Line = [u8; LINE as usize];

#[derive(Clone, Copy)]
struct Cached {
    line: Line,
    dirty: bool,
}

/// Memory and the hosts' caches.
pub(crate) struct World {
    state: Mutex<State>,
    length: u64,
}

struct State {
    /// Lines that are not zero.
    memory: HashMap<u64, Line>,
    caches: Vec<BTreeMap<u64, Cached>>,
    /// A step whose flushes are taken out.
    without: Option<Step>,
    /// Stores and flushes until the host stops in the middle of one.
    fuse: Option<u64>,
    stopped: bool,
    /// Evicts lines at random, as caches do.
    rng: Rng,
    /// How often each step happened.
    seen: HashMap<Step, u64>,
}

impl std::fmt::Debug for World {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("World")
    }
}

impl World {
    pub(crate) fn new(length: ByteSize, hosts: usize, seed: u64) -> Arc<Self> {
        Arc::new(Self {
            length: length.get(),
            state: Mutex::new(State {
                memory: HashMap::new(),
                caches: vec![BTreeMap::new(); hosts],
                without: None,
                fuse: None,
                stopped: false,
                rng: Rng::with_seed(seed),
                seen: HashMap::new(),
            }),
        })
    }

    fn with<T>(&self, f: impl FnOnce(&mut State) -> T) -> T {
        f(&mut self.state.lock().unwrap())
    }

    pub(crate) fn take_out(&self, step: Option<Step>) {
        self.with(|state| state.without = step);
    }

    /// The host stops in the middle of the store or flush after so many more.
    pub(crate) fn light(&self, fuse: u64) {
        self.with(|state| state.fuse = Some(fuse));
    }

    pub(crate) fn has_stopped(&self) -> bool {
        self.with(|state| state.stopped)
    }

    pub(crate) fn seen(&self, step: Step) -> u64 {
        self.with(|state| state.seen.get(&step).copied().unwrap_or(0))
    }

    /// The world after everybody stopped. Of the dirty lines each is there with probability `keep`,
    /// and of those half are cut after a number of words.
    pub(crate) fn after_crash(&self, keep: f64, seed: u64) -> Arc<Self> {
        let mut rng = Rng::with_seed(seed);
        let (mut memory, caches) = self.with(|state| (state.memory.clone(), state.caches.clone()));
        for cache in &caches {
            let mut dirty: Vec<_> = cache.iter().filter(|(_, line)| line.dirty).collect();
            dirty.sort_by_key(|(at, _)| **at);
            for (at, cached) in dirty {
                if rng.f64() >= keep {
                    continue;
                }
                let words = if rng.bool() { 8 } else { rng.usize(0..8) };
                let line = memory.entry(*at).or_insert([0; LINE as usize]);
                line[..words * 8].copy_from_slice(&cached.line[..words * 8]);
            }
        }
        let hosts = caches.len();
        Arc::new(Self {
            length: self.length,
            state: Mutex::new(State {
                memory,
                caches: vec![BTreeMap::new(); hosts],
                without: self.with(|state| state.without),
                fuse: None,
                stopped: false,
                rng,
                seen: HashMap::new(),
            }),
        })
    }

    pub(crate) fn host(self: &Arc<Self>, host: u16, coherence: Coherence) -> Modelled {
        let flags = nix::sys::memfd::MFdFlags::MFD_CLOEXEC;
        let locks = nix::sys::memfd::memfd_create("locks", flags).unwrap();
        Modelled::new(Arc::clone(self), HostId(host), coherence, locks)
    }
}

impl State {
    fn burn(&mut self) -> Result<bool> {
        if self.stopped {
            return Err(gone());
        }
        if let Some(fuse) = &mut self.fuse {
            if *fuse == 0 {
                self.stopped = true;
                return Ok(true);
            }
            *fuse -= 1;
        }
        Ok(false)
    }

    fn fetch(&mut self, host: usize, at: u64) -> Line {
        if let Some(cached) = self.caches[host].get(&at) {
            return cached.line;
        }
        let line = self.memory.get(&at).copied().unwrap_or([0; LINE as usize]);
        self.caches[host].insert(at, Cached { line, dirty: false });
        line
    }

    /// A cache drops a line now and then, and writes it back if it is dirty.
    fn evict(&mut self, host: usize) {
        if self.rng.u32(0..16) != 0 || self.caches[host].is_empty() {
            return;
        }
        let n = self.rng.usize(..self.caches[host].len().min(8));
        let Some(at) = self.caches[host].keys().nth(n).copied() else {
            return;
        };
        // Only dirty ones: who is to see stale lines has to keep them.
        if self.caches[host][&at].dirty {
            self.put(host, at);
        }
    }

    fn put(&mut self, host: usize, at: u64) {
        if let Some(cached) = self.caches[host].get_mut(&at)
            && cached.dirty
        {
            cached.dirty = false;
            let line = cached.line;
            self.memory.insert(at, line);
        }
    }
}

fn gone() -> Error {
    Error::Removed {
        place: "a host that stopped".to_owned(),
        offset: 0,
    }
}

/// One host's view of the world.
#[derive(Debug)]
pub(crate) struct Modelled {
    world: Arc<World>,
    host: HostId,
    geometry: Geometry,
    identity: Identity,
    /// Locks are per host: this file stands for the host's kernel.
    locks: OwnedFd,
}

impl Modelled {
    fn new(world: Arc<World>, host: HostId, coherence: Coherence, locks: OwnedFd) -> Self {
        Self {
            geometry: Geometry {
                length: ByteSize::new(world.length),
                alignment: ByteSize::kib(4),
                persistence: Persistence::Power,
                coherence,
                numa_node: None,
                writable: true,
            },
            identity: Identity {
                place: "a model of caches".to_owned(),
                serial: String::new(),
                incarnation: 0,
            },
            world,
            host,
            locks,
        }
    }

    /// Another process of the same host.
    pub(crate) fn again(&self) -> Self {
        use std::os::fd::AsRawFd;
        let path = format!("/proc/self/fd/{}", self.locks.as_raw_fd());
        let locks = std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open(path)
            .unwrap();
        Self::new(
            Arc::clone(&self.world),
            self.host,
            self.geometry.coherence,
            locks.into(),
        )
    }
}

impl Backend for Modelled {
    fn geometry(&self) -> &Geometry {
        &self.geometry
    }
    fn identity(&self) -> &Identity {
        &self.identity
    }
    fn host(&self) -> HostId {
        self.host
    }
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.locks.as_fd()
    }
    fn map(self: Arc<Self>, range: Range<u64>, access: Access, _: bool) -> Result<Box<dyn Medium>> {
        assert!(range.end <= self.world.length && range.start.is_multiple_of(4096));
        Ok(Box::new(Piece {
            backend: self,
            range,
            access,
        }))
    }
    fn discard(&self, range: Range<u64>) -> Result<bool> {
        self.world.with(|state| {
            let lines = range.start / LINE..range.end / LINE;
            state.memory.retain(|at, _| !lines.contains(at));
            for cache in &mut state.caches {
                cache.retain(|at, _| !lines.contains(at));
            }
        });
        Ok(true)
    }
    fn health(&self) -> Health {
        Health::Ok
    }
    fn reopen(&self) -> Result<Arc<dyn Backend>> {
        Ok(Arc::new(self.again()))
    }
}

#[derive(Debug)]
struct Piece {
    backend: Arc<Modelled>,
    range: Range<u64>,
    access: Access,
}

impl Piece {
    fn lines(&self, range: &Range<u64>) -> Range<u64> {
        assert!(range.end <= self.length(), "outside");
        let start = self.range.start + range.start;
        let end = self.range.start + range.end;
        start / LINE..end.div_ceil(LINE)
    }

    fn with<T>(&self, f: impl FnOnce(&mut State, usize) -> T) -> T {
        let host = usize::from(self.backend.host.0);
        self.backend.world.with(|state| f(state, host))
    }
}

impl Medium for Piece {
    fn base(&self) -> NonNull<u8> {
        NonNull::dangling()
    }

    fn length(&self) -> u64 {
        self.range.end - self.range.start
    }

    fn load(&self, offset: u64, into: &mut [u8]) -> Result<()> {
        let lines = self.lines(&(offset..offset + into.len() as u64));
        let mut all = Vec::with_capacity(into.len() + 128);
        self.with(|state, host| {
            if state.stopped {
                return Err(gone());
            }
            for at in lines.clone() {
                all.extend_from_slice(&state.fetch(host, at));
            }
            Ok(())
        })?;
        let from = (self.range.start + offset - lines.start * LINE) as usize;
        into.copy_from_slice(&all[from..from + into.len()]);
        Ok(())
    }

    fn store(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        assert_eq!(
            self.access,
            Access::Write,
            "a store through a mapping for reading"
        );
        let _checked = self.lines(&(offset..offset + bytes.len() as u64));
        let start = self.range.start + offset;
        self.with(|state, host| {
            let stops = state.burn()?;
            // Who stops has stored some of it.
            let words = bytes.len() / 8;
            let length = if stops {
                8 * state.rng.usize(0..=words)
            } else {
                bytes.len()
            };
            let mut rest = &bytes[..length.min(bytes.len())];
            let mut place = start;
            while !rest.is_empty() {
                let (at, from) = (place / LINE, (place % LINE) as usize);
                let part = rest.len().min(LINE as usize - from);
                let mut line = state.fetch(host, at);
                line[from..from + part].copy_from_slice(&rest[..part]);
                state.caches[host].insert(at, Cached { line, dirty: true });
                rest = &rest[part..];
                place += part as u64;
            }
            state.evict(host);
            if stops { Err(gone()) } else { Ok(()) }
        })
    }

    fn write_back(&self, range: Range<u64>, step: Step) -> Result<()> {
        let lines = self.lines(&range);
        self.with(|state, host| {
            *state.seen.entry(step).or_default() += 1;
            let stops = state.burn()?;
            if state.without == Some(step) {
                return if stops { Err(gone()) } else { Ok(()) };
            }
            for at in lines {
                // Who stops has written some of them back, in any order.
                if !stops || state.rng.bool() {
                    state.put(host, at);
                }
            }
            if stops { Err(gone()) } else { Ok(()) }
        })
    }

    fn invalidate(&self, range: Range<u64>, step: Step) -> Result<()> {
        let lines = self.lines(&range);
        self.with(|state, host| {
            if state.stopped {
                return Err(gone());
            }
            *state.seen.entry(step).or_default() += 1;
            // As a real mapping: where hardware keeps caches coherent nothing is dropped.
            let software = self.backend.geometry.coherence == Coherence::Software;
            if software && state.without != Some(step) {
                let many = lines.end - lines.start > state.caches[host].len() as u64;
                let held: Vec<u64> = if many {
                    let cached = state.caches[host].keys().copied();
                    cached.filter(|at| lines.contains(at)).collect()
                } else {
                    lines.collect()
                };
                for at in held {
                    // The instruction writes a dirty line back, over what others wrote.
                    state.put(host, at);
                    state.caches[host].remove(&at);
                }
            }
            Ok(())
        })
    }
}
