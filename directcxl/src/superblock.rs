//! Making a pool, and finding one.

use std::sync::Arc;

use carlsbad_types::ByteSize;
use uuid::Uuid;

use crate::backend::Backend;
use crate::error::{Error, Result};
use crate::flush::Step;
use crate::host::{Epoch, Role};
use crate::layout::{
    ARENAS, ENTRY, EXTENT, Found, HostState, LEASE_HEAD, LEASE_SLOTS, LEASES, LEAST_ENTRIES,
    LOCK_APPEND, Lease, LeaseHead, MAGIC, MOST_HOSTS, RECORDS, Record, SUPERBLOCKS, Seed,
    Superblock, VERSION,
};
use crate::lease;
use crate::lock::{self, Kind};
use crate::log::Log;
use crate::medium::{Access, Medium};
use crate::pool::{PATIENCE, Pool};

/// Bytes that are read at once of what has to be zero for a device to be called empty.
const PIECE: u64 = 64 << 10;
/// Bytes at the place of a copy that are zeroed before another pool is made.
const PAGE: usize = 4096;

/// How a pool is made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FormatOptions {
    /// Hosts that may have the pool open, numbered from 0: 1 to 64. Each takes 2 MiB or more.
    pub hosts: u16,
    /// Entries of each log arena, at least 8; a pool holds three quarters as many namespaces. Without
    /// it what fits into 2 MiB: 3,968.
    pub entries: u64,
    /// Whether to lose what is there.
    pub overwrite: bool,
}

impl Default for FormatOptions {
    fn default() -> Self {
        Self {
            hosts: 1,
            entries: (EXTENT - ARENAS) / 2 / ENTRY,
            overwrite: false,
        }
    }
}

impl Pool {
    /// Makes a pool of all of a backend, and opens it with [`Epoch::FIRST`].
    ///
    /// The room of the pool's own structures is taken at once, where the backend knows how; that of
    /// namespaces when they are touched.
    ///
    /// # Errors
    /// Where a pool or something else is there and is not to be lost, or there is too little room;
    /// [`Error::InUse`] where somebody on this host is attached to a namespace of what is there.
    pub fn format(backend: impl Backend + 'static, options: FormatOptions) -> Result<Self> {
        Self::format_shared(Arc::new(backend), options)
    }

    /// As [`Pool::format`], for a backend whose kind is not known when the program is built.
    ///
    /// # Errors
    /// As of [`Pool::format`].
    pub fn format_shared(backend: Arc<dyn Backend>, options: FormatOptions) -> Result<Self> {
        let superblock = plan(&*backend, &options)?;
        let place = backend.place();
        if backend.host().0 >= superblock.hosts {
            return Err(Error::BadHost {
                host: backend.host(),
                hosts: superblock.hosts,
            });
        }
        if !backend.geometry().writable {
            return Err(Error::ReadOnly { what: "format it" });
        }
        // Of two that find nothing there at the same time, one makes the pool.
        let alone = lock::acquire(
            backend.as_fd(),
            LOCK_APPEND,
            Kind::Exclusive,
            PATIENCE,
            "the log",
        )?;
        if !options.overwrite {
            refuse_what_is_there(&backend, &superblock)?;
        }
        // Whatever is to be lost, nobody's memory is taken from under them.
        if lease::is_anybody_attached(backend.as_fd())? {
            return Err(Error::InUse { place });
        }
        let everything = 0..superblock.data_start();
        // So that a full file system cannot keep a namespace from being removed.
        backend.reserve(everything.clone())?;
        let medium = Arc::clone(&backend).map(everything, Access::Write, false)?;
        // A crash from here on leaves no pool, until the new superblock is there.
        for (at, step) in copies() {
            let end = at + PAGE as u64;
            // The mark first: without it what is half made would be somebody's data.
            medium.store(at, &Superblock::unfinished())?;
            medium.store(at + Superblock::SIZE as u64, &[0; PAGE - Superblock::SIZE])?;
            medium.write_back(at..end, step)?;
        }
        for host in 0..superblock.hosts {
            let area = superblock.area(host);
            medium.store(area, &new_area(host, superblock.seed()))?;
            medium.write_back(area..area + ARENAS, Step::Arena)?;
        }
        let log = Log::new(medium, superblock, place);
        // An arena that was used before has entries of another incarnation, which are none.
        log.write_record(&Record {
            generation: 1,
            epoch: Epoch::FIRST.0,
            turn: 1,
            state: HostState::Active,
            ..Record::idle(backend.host().0)
        })?;
        write(&*log.medium, &superblock)?;
        drop((log, alone));
        Self::open_shared(backend, Role::Writer(Epoch::CURRENT))
    }
}

/// What the area of a host begins with that has never used the pool.
fn new_area(host: u16, seed: Seed) -> Vec<u8> {
    let free = Lease::Free.encode().repeat(LEASES);
    let record = Record::idle(host).encode(seed);
    let head = LeaseHead::FIRST.encode(seed);
    let mut bytes = vec![0; ARENAS as usize];
    let mut put = |at: u64, what: &[u8]| {
        bytes[at as usize..at as usize + what.len()].copy_from_slice(what);
    };
    for at in RECORDS {
        put(at, &record);
    }
    put(LEASE_HEAD, &head);
    put(LEASE_SLOTS, &free);
    bytes
}

/// Where the copies go, and what each is flushed for.
fn copies() -> [(u64, Step); 2] {
    [
        (SUPERBLOCKS[0], Step::SuperblockFirst),
        (SUPERBLOCKS[1], Step::SuperblockSecond),
    ]
}

/// Writes both copies.
fn write(medium: &dyn Medium, superblock: &Superblock) -> Result<()> {
    let bytes = superblock.encode();
    for (at, step) in copies() {
        medium.store(at, &bytes)?;
        medium.write_back(at..at + bytes.len() as u64, step)?;
    }
    Ok(())
}

/// Writes the copies that do not say what the pool is; how many.
pub(crate) fn mend(log: &Log) -> Result<usize> {
    let bytes = log.superblock.encode();
    let mut mended = 0;
    for (at, step) in copies() {
        if copy(&*log.medium, at)? != Found::Valid(log.superblock) {
            log.medium.store(at, &bytes)?;
            log.medium.write_back(at..at + bytes.len() as u64, step)?;
            mended += 1;
        }
    }
    Ok(mended)
}

/// Copies that do not say what the pool is.
pub(crate) fn differing(log: &Log) -> Result<usize> {
    let mut differing = 0;
    for at in SUPERBLOCKS {
        let found = copy(&*log.medium, at)?;
        differing += usize::from(found != Found::Valid(log.superblock));
    }
    Ok(differing)
}

fn copy(medium: &dyn Medium, at: u64) -> Result<Found> {
    let mut bytes = [0; Superblock::SIZE];
    medium.invalidate(at..at + bytes.len() as u64, Step::AcquireSuperblock)?;
    medium.load(at, &mut bytes)?;
    Ok(Superblock::decode(&bytes))
}

/// Lays a pool out.
fn plan(backend: &dyn Backend, options: &FormatOptions) -> Result<Superblock> {
    let bad = |why: String, fix: &str| Error::BadGeometry {
        place: backend.place(),
        why,
        fix: fix.to_owned(),
    };
    if !(1..=MOST_HOSTS).contains(&options.hosts) {
        return Err(bad(
            format!("{} hosts were asked for", options.hosts),
            "a pool has 1 to 64",
        ));
    }
    let geometry = backend.geometry();
    if !EXTENT.is_multiple_of(geometry.alignment.get().max(1)) {
        return Err(bad(
            format!("its alignment is {}", geometry.alignment),
            "extents are multiples of 2 MiB: choose an alignment that divides it",
        ));
    }
    let area_length = options
        .entries
        .checked_mul(2 * ENTRY)
        .and_then(|bytes| bytes.checked_add(ARENAS))
        .and_then(|bytes| bytes.checked_next_multiple_of(EXTENT))
        .filter(|_| options.entries >= LEAST_ENTRIES)
        .ok_or_else(|| {
            bad(
                format!("{} entries were asked for", options.entries),
                "ask for at least 8, and fewer than fit into memory",
            )
        })?;
    let random = Uuid::new_v4();
    let superblock = Superblock {
        hosts: options.hosts,
        uuid: Uuid::new_v4(),
        incarnation: random.as_u64_pair().0 ^ random.as_u64_pair().1,
        generation: 1,
        length: geometry.length.get() / EXTENT * EXTENT,
        area_length,
        entries: options.entries,
    };
    if !superblock.is_possible() {
        let least = area_length
            .saturating_mul(options.hosts.into())
            .saturating_add(2 * EXTENT);
        return Err(bad(
            format!("it has {}", geometry.length),
            &format!(
                "a pool of {} hosts with {} entries needs {} at least",
                options.hosts,
                options.entries,
                ByteSize::new(least)
            ),
        ));
    }
    Ok(superblock)
}

/// The first pages, as they are in memory.
fn head(backend: &Arc<dyn Backend>) -> Result<Box<dyn Medium>> {
    let geometry = backend.geometry();
    if geometry.length.get() < EXTENT {
        return Err(Error::NotAPool {
            place: backend.place(),
            why: "it is shorter than 2 MiB",
        });
    }
    Arc::clone(backend).map(0..EXTENT, Access::Read, false)
}

/// Refuses a pool, and anything else in what a pool's own structures take: file systems, partition
/// tables and volume managers have their marks in the first 2 MiB.
fn refuse_what_is_there(backend: &Arc<dyn Backend>, planned: &Superblock) -> Result<()> {
    let head = head(backend)?;
    let place = backend.place();
    let mut is_unfinished = false;
    for at in SUPERBLOCKS {
        match copy(&*head, at)? {
            Found::Valid(superblock) => {
                let pool = superblock.uuid;
                return Err(Error::Live { place, pool });
            }
            Found::OtherVersion(_) => return Err(Error::Foreign { place }),
            Found::Unfinished => is_unfinished = true,
            Found::Nothing | Found::Damaged => {}
        }
    }
    drop(head);
    // Whatever was there was to be lost.
    if is_unfinished {
        return Ok(());
    }
    let everything = 0..planned.data_start();
    let medium = Arc::clone(backend).map(everything.clone(), Access::Read, false)?;
    let mut bytes = vec![0; PIECE as usize];
    for from in everything.step_by(PIECE as usize) {
        medium.invalidate(from..from + PIECE, Step::AcquireSuperblock)?;
        medium.load(from, &mut bytes)?;
        if bytes.iter().any(|byte| *byte != 0) {
            return Err(Error::Foreign { place });
        }
    }
    Ok(())
}

/// The superblock of the pool on a backend.
pub(crate) fn read(backend: &Arc<dyn Backend>) -> Result<Superblock> {
    let head = head(backend)?;
    let place = backend.place();
    let found = [copy(&*head, SUPERBLOCKS[0])?, copy(&*head, SUPERBLOCKS[1])?];
    let valid = found.iter().filter_map(|found| match found {
        Found::Valid(superblock) => Some(*superblock),
        _ => None,
    });
    if let Some(superblock) = valid.max_by_key(|superblock| superblock.generation) {
        return Ok(superblock);
    }
    if let Some(Found::OtherVersion(version)) = found
        .iter()
        .find(|found| matches!(found, Found::OtherVersion(_)))
    {
        return Err(Error::Version {
            place,
            version: *version,
            known: VERSION,
        });
    }
    if found.contains(&Found::Unfinished) {
        let why = "its formatting was not finished";
        return Err(Error::NotAPool { place, why });
    }
    if found == [Found::Nothing; 2] {
        let why = "there is no superblock";
        return Err(Error::NotAPool { place, why });
    }
    let mut begins = [[0; 8]; 2];
    for (at, begin) in SUPERBLOCKS.into_iter().zip(&mut begins) {
        head.load(at, begin)?;
    }
    if begins.contains(&MAGIC) {
        return Err(Error::corrupt(&place, "the superblock"));
    }
    let why = "something else is there";
    Err(Error::NotAPool { place, why })
}
