use std::fmt;

/// One of the hosts that share a pool. Whoever connects hosts to the memory numbers them, from 0;
/// two that use the same number write to the same lines, and nothing can notice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct HostId(pub u16);

impl fmt::Display for HostId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "host {}", self.0)
    }
}

/// A term of writing. A writer with a later epoch ends every earlier one.
///
/// Whoever decides which host writes gives them out: an operator, a cluster manager, a consensus
/// service. It gives each out once. Processes of one host may share one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Epoch(pub u64);

impl Epoch {
    /// Of a pool that was just formatted.
    pub const FIRST: Self = Self(1);
    /// Whatever this host writes with already: joins its other processes, and takes nothing over.
    pub const CURRENT: Self = Self(0);

    /// The last one that a pool is opened with. It is far away on purpose: a slip of the finger that
    /// took the last number there is would leave none for anybody else.
    pub const LAST: Self = Self(1 << 62);

    /// The one after.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// What a pool is opened for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Role {
    /// Looking up and reading. Mappings are read-only.
    Reader,
    /// Everything, until a later epoch writes.
    Writer(Epoch),
}
