use std::io;
use std::time::Duration;

use carlsbad_types::ByteSize;
use uuid::Uuid;

use crate::{Epoch, HostId};

/// The result of this crate's functions.
pub type Result<T> = std::result::Result<T, Error>;

/// Why something could not be done: what was tried, on what, and what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// There is no pool there.
    #[error("{place} holds no pool: {why}; make one with `Pool::format` or `directcxl format`")]
    NotAPool {
        /// The device or file.
        place: String,
        /// What is there instead.
        why: &'static str,
    },

    /// Something else is there, and formatting would destroy it.
    #[error(
        "{place} holds data that are not a pool: to lose them, format with `overwrite` (`--force`)"
    )]
    Foreign {
        /// The device or file.
        place: String,
    },

    /// A pool is there already, and formatting would destroy it.
    #[error(
        "{place} holds the pool {pool} already: open it, or format with `overwrite` (`--force`) to lose it"
    )]
    Live {
        /// The device or file.
        place: String,
        /// The pool that is there.
        pool: Uuid,
    },

    /// A pool is there, and somebody is attached to it: formatting would take the memory from under
    /// them.
    #[error(
        "{place} is in use: somebody on this host is attached to a namespace of the pool there; end that first (`fuser` shows who has it open)"
    )]
    InUse {
        /// The device or file.
        place: String,
    },

    /// The pool was opened by the process that this one was forked from. The kernel's locks are
    /// shared with it, and would not keep the two apart.
    #[error(
        "{place} was opened by process {opened_by}, from which this one was forked: open it anew here"
    )]
    Forked {
        /// The device or file.
        place: String,
        /// Who opened it.
        opened_by: u32,
    },

    /// There is no heap in the namespace.
    #[error("namespace {namespace:?} holds no heap: make one with `Heap::format`")]
    NotAHeap {
        /// Its name.
        namespace: String,
    },

    /// What a heap has written down of itself contradicts itself. It has no copy.
    #[error(
        "the heap in namespace {namespace:?} is damaged: {what}; what its roots name can still be read, to be copied out before `Heap::format` makes it anew"
    )]
    CorruptHeap {
        /// The namespace that it is in.
        namespace: String,
        /// What is damaged.
        what: &'static str,
    },

    /// What is on the medium contradicts itself, and no copy of it is left.
    /// [`Pool::salvage`](crate::Pool::salvage) lists what is.
    #[error(
        "{place}: {what} is damaged beyond its copy; `directcxl check` lists what can still be read, to be copied out before it is formatted anew"
    )]
    Corrupt {
        /// The device or file.
        place: String,
        /// What is damaged.
        what: String,
    },

    /// The pool was made by a version of the format that this crate does not know.
    #[error("{place} has format version {version}; this crate knows {known}")]
    Version {
        /// The device or file.
        place: String,
        /// Its version.
        version: u32,
        /// The version that this crate reads and writes.
        known: u32,
    },

    /// The device or file has become smaller than the pool on it.
    #[error("{place} has {have}, the pool on it {want}: give it its size back, and open it again")]
    Shrunk {
        /// The device or file.
        place: String,
        /// The pool's length.
        want: ByteSize,
        /// What is there.
        have: ByteSize,
    },

    /// A device or file cannot carry a pool as it is.
    #[error("{place}: {why}: {fix}")]
    BadGeometry {
        /// The device or file.
        place: String,
        /// What is wrong with it.
        why: String,
        /// What to do.
        fix: String,
    },

    /// A host id that the pool has no place for.
    #[error("{host} is no host of this pool, which has places for {hosts}, numbered from 0")]
    BadHost {
        /// The host.
        host: HostId,
        /// Places that the pool has.
        hosts: u16,
    },

    /// A host may not be declared dead by itself.
    #[error("{host} is this host, and alive: evict it from another one")]
    OwnHost {
        /// The host.
        host: HostId,
    },

    /// A writer with a later epoch has taken over. Whether the last change was taken over as well is
    /// not known: look it up.
    #[error(
        "epoch {ours} is over: {by} writes with epoch {theirs}; open the pool again as a reader, or with a later epoch"
    )]
    Fenced {
        /// The epoch of this handle.
        ours: Epoch,
        /// The epoch that ended it.
        theirs: Epoch,
        /// Who has it.
        by: HostId,
    },

    /// Another host claimed the same epoch. Whoever gives out epochs has given one out twice.
    #[error("epoch {epoch} is {by}'s: take one that nobody else was given")]
    EpochTaken {
        /// The epoch.
        epoch: Epoch,
        /// Who has it.
        by: HostId,
    },

    /// An epoch after which there would be none.
    #[error("epoch {epoch} is out of reach: the last one is {last}")]
    BadEpoch {
        /// The epoch that was asked for.
        epoch: Epoch,
        /// The last one.
        last: Epoch,
    },

    /// Another host is the writer.
    #[error("{by} writes with epoch {epoch}: to take over, open with a later epoch")]
    NotWriter {
        /// The writer's epoch.
        epoch: Epoch,
        /// The writer.
        by: HostId,
    },

    /// This host was declared dead by the writer, and its leases with it.
    #[error("{host} was evicted: open the pool again, and attach anew what is needed")]
    Evicted {
        /// This host.
        host: HostId,
    },

    /// The handle, or the backend, is for reading only.
    #[error(
        "cannot {what}: what there is was opened for reading; open the backend for writing, and the pool with `Role::Writer`"
    )]
    ReadOnly {
        /// What was tried.
        what: &'static str,
    },

    /// The handle names what is no more, or has another place or length now.
    #[error("the handle of generation {generation} is stale: attach by name again")]
    Stale {
        /// The generation it names.
        generation: u64,
    },

    /// No namespace has this name.
    #[error("no namespace is called {name:?}; `directcxl list` shows those there are")]
    UnknownNamespace {
        /// The name.
        name: String,
    },

    /// A namespace of this name is there.
    #[error("a namespace {name:?} is there already: attach to it, or remove it first")]
    NameTaken {
        /// The name.
        name: String,
    },

    /// The name cannot be one.
    #[error("{name:?} cannot be a name: {why}")]
    BadName {
        /// The name, as far as it can be shown.
        name: String,
        /// What is wrong with it.
        why: &'static str,
    },

    /// Nothing has no place.
    #[error("a {what} of no bytes was asked for: ask for at least one")]
    ZeroLength {
        /// What was asked for.
        what: &'static str,
    },

    /// There is no room for it in one piece.
    #[error(
        "no room for {asked}: {free} are free, {largest} in one piece, and {quarantined} wait for leases to end"
    )]
    NoRoom {
        /// What was asked for, rounded up.
        asked: ByteSize,
        /// Free in all.
        free: ByteSize,
        /// The largest free piece.
        largest: ByteSize,
        /// Removed, but still attached by somebody.
        quarantined: ByteSize,
    },

    /// There are as many namespaces as the log can hold.
    #[error(
        "the log is full: {used} of at most {most} are namespaces, or removed ones that are still attached; end or remove some, or format with more `entries`"
    )]
    LogFull {
        /// Namespaces, and removed ones in quarantine.
        used: u64,
        /// As many as there may be.
        most: u64,
    },

    /// This host holds as many leases as its table can hold.
    #[error("{host} is attached to {most} namespaces, which is all its table holds: drop some")]
    TooManyLeases {
        /// This host.
        host: HostId,
        /// As many as there may be.
        most: usize,
    },

    /// A range that does not lie within the namespace, or is not aligned as it has to be.
    #[error("{start}..{end} is no range of the {length} here: {why}")]
    OutOfRange {
        /// The first byte.
        start: u64,
        /// The byte after the last.
        end: u64,
        /// Bytes there are.
        length: ByteSize,
        /// What is wrong with it.
        why: &'static str,
    },

    /// A place that is not one that the allocator gave out.
    #[error("{offset} is not an allocation of this heap: {why}")]
    NotAllocated {
        /// The place.
        offset: u64,
        /// What is there.
        why: &'static str,
    },

    /// The memory is gone: the device was removed, or the file was cut.
    #[error(
        "{place} is gone at {offset:#x}: drop what is attached, and open it again when it is back"
    )]
    Removed {
        /// The device or file.
        place: String,
        /// Where it was noticed.
        offset: u64,
    },

    /// The file system has no room for a page that was never touched. Nothing is lost: what was
    /// written before is there.
    #[error(
        "{place} has no room for its page at {offset:#x}: its file system, or a quota, is full; make room, and try again"
    )]
    NoSpace {
        /// The file.
        place: String,
        /// Where the page would be.
        offset: u64,
    },

    /// The memory reports an uncorrectable error.
    #[error(
        "{place} is poisoned at {offset:#x}: what was there is lost; overwrite all of the page, or remove the namespace"
    )]
    Poisoned {
        /// The device or file.
        place: String,
        /// Where.
        offset: u64,
    },

    /// Somebody else held a lock for too long.
    #[error(
        "{what} was locked for {waited:?} by another process: is it stopped? (`fuser` on the device shows who has it open)"
    )]
    Busy {
        /// What is locked.
        what: &'static str,
        /// How long this waited.
        waited: Duration,
    },

    /// There are not enough huge pages.
    #[error(
        "{place}: not enough free huge pages for {asked}: {pages} have to be free; raise {pool}/nr_hugepages, and the `size` of the mount if it has one"
    )]
    NoHugePages {
        /// The file.
        place: String,
        /// What was asked for.
        asked: ByteSize,
        /// Pages that it takes.
        pages: u64,
        /// Where the kernel counts them.
        pool: String,
    },

    /// A region cannot be planned or made.
    #[error("cannot {step}: {why}: {fix}")]
    Topology {
        /// What was tried.
        step: String,
        /// Why it did not work.
        why: String,
        /// What to do.
        fix: String,
    },

    /// This machine cannot do it.
    #[error("{what} works on x86-64 Linux only")]
    Unsupported {
        /// What was tried.
        what: &'static str,
    },

    /// The operating system refused a step.
    #[error("cannot {what} {place}: {source}")]
    Io {
        /// What was tried, as a verb.
        what: &'static str,
        /// On what.
        place: String,
        /// Why not.
        source: io::Error,
    },
}

impl Error {
    /// For `map_err`.
    pub(crate) fn io<E: Into<io::Error>>(
        what: &'static str,
        place: impl Into<String>,
    ) -> impl FnOnce(E) -> Self {
        let place = place.into();
        move |source| Self::Io {
            what,
            place,
            source: source.into(),
        }
    }

    pub(crate) fn corrupt(place: &str, what: impl Into<String>) -> Self {
        Self::Corrupt {
            place: place.to_owned(),
            what: what.into(),
        }
    }
}
