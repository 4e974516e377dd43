//! Control groups made ahead of need, leased once each (RunD, USENIX ATC'22, section 4.3).
//!
//! Making a control group takes a lock that is global to the kernel, so that many sandboxes that
//! start at once wait for each other. A [`CgroupPool`] has groups ready: a lease is a pop from a
//! list and, at most, a few writes of limits below a descriptor that is open already. What comes
//! back is removed and replaced in the background, so that no sandbox sees another's counters.
//!
//! The paper renames a ready group on claim. That is [`Claim::Rename`] here; it costs more than a
//! descriptor, does not exist in version 2, and is measured beside it.

pub(crate) mod hierarchy;
mod lease;
mod limits;
mod pool;
mod slot;

mod sweep;

use std::io;
use std::path::Path;

use crate::error::Error;

pub use hierarchy::{Controller, Hierarchy, Version};
pub use lease::{CgroupLease, Usage};
pub use limits::InForce;
pub use pool::{CgroupPool, Claim, PoolConfig, PoolStats};

pub use sweep::{Swept, sweep};

impl Error {
    /// For `map_err`: what was tried on which group.
    fn cgroup(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self + use<> {
        let path = path.to_owned();
        move |source| Self::Cgroup { what, path, source }
    }
}
