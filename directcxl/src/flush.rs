//! Which lines are moved between caches and memory, when, and why.
//!
//! A host's stores stay in its caches until it writes them back, and its loads may see lines that it
//! has had since before another host wrote. CXL 2.0 leaves both to software. So a writer *publishes*
//! (writes back, then fences) and a reader *acquires* (drops its lines, then fences), and memory
//! that hardware keeps coherent needs neither. What is to survive a power failure has to be written
//! back too, coherent or not.
//!
//! Every such place in this crate is a [`Step`]. The tests take each one out, one at a time, and
//! look whether something breaks that should.

/// What a write-back or an invalidation is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Step {
    /// The first copy of the superblock is in memory before the second is touched.
    SuperblockFirst,
    /// The second copy is in memory before the pool is said to be there.
    SuperblockSecond,
    /// The first copy of a host's record is in memory before the second is touched.
    RecordFirst,
    /// The second copy is in memory before the record is said to be in force.
    RecordSecond,
    /// An entry is in memory before its operation is said to be done.
    Entry,
    /// All entries of a new arena are in memory before the record that names it.
    Arena,
    /// A lease is in memory before this host looks whether its namespace is still there.
    Lease,
    /// A user's bytes are in memory before `publish` returns.
    Publish,
    /// A heap's redo record is in memory before anything it describes is changed.
    RedoRecord,
    /// What a redo record describes is in memory before the record is retired.
    RedoApplied,
    /// A redo record is retired before the next one is written over it.
    RedoRetired,
    /// A superblock is seen as it is in memory.
    AcquireSuperblock,
    /// The records of all hosts are seen as they are in memory.
    AcquireRecord,
    /// An entry is seen as it is in memory.
    AcquireEntry,
    /// The leases of all hosts are seen as they are in memory.
    AcquireLease,
    /// A user's bytes are seen as they are in memory when `acquire` returns.
    Acquire,
    /// A heap's state is seen as another host left it.
    AcquireHeap,
}

impl Step {
    /// All of them.
    pub const ALL: [Self; 17] = [
        Self::SuperblockFirst,
        Self::SuperblockSecond,
        Self::RecordFirst,
        Self::RecordSecond,
        Self::Entry,
        Self::Arena,
        Self::Lease,
        Self::Publish,
        Self::RedoRecord,
        Self::RedoApplied,
        Self::RedoRetired,
        Self::AcquireSuperblock,
        Self::AcquireRecord,
        Self::AcquireEntry,
        Self::AcquireLease,
        Self::Acquire,
        Self::AcquireHeap,
    ];
}
