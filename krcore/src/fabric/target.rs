//! What a target does with a one-sided operation, after it has looked at the key, the range and the
//! right itself: the same on every fabric that executes in software.

use std::sync::atomic::Ordering;

use super::{Op, Status};
use crate::region::{Access, MemoryRegion, RegionSlice};

/// Whether `op` may be done to `len` bytes of a region; what it fails with where not.
pub(crate) fn permit(remote: &MemoryRegion, op: Op, far: u64, len: u64) -> Result<(), Status> {
    if !remote.contains(far, len) {
        return Err(Status::RemoteAccess);
    }
    match (op, remote.access()) {
        (Op::Read, Access::Read | Access::ReadWrite) | (Op::Write, Access::ReadWrite) => Ok(()),
        (Op::CompareSwap { .. } | Op::FetchAdd { .. }, Access::ReadWrite) => {
            let aligned = remote.atomic(far).is_some();
            aligned.then_some(()).ok_or(Status::RemoteInvalid)
        }
        _ => Err(Status::RemoteAccess),
    }
}

/// Does an atomic; `None` where `op` is none, or the word is not there.
pub(crate) fn atomic(remote: &MemoryRegion, op: Op, far: u64) -> Option<u64> {
    let word = remote.atomic(far)?;
    match op {
        Op::FetchAdd { add } => Some(word.fetch_add(add, Ordering::AcqRel)),
        Op::CompareSwap { expected, new } => Some(
            word.compare_exchange(expected, new, Ordering::AcqRel, Ordering::Acquire)
                .unwrap_or_else(|was| was),
        ),
        _ => None,
    }
}

/// Executes a one-sided operation on a peer's mapped region.
pub(crate) fn execute(remote: &MemoryRegion, op: Op, local: &RegionSlice, far: u64) -> Status {
    let at = local.offset;
    if !local.region.contains(at, local.len) {
        return Status::LocalProtection;
    }
    if let Err(why) = permit(remote, op, far, local.len) {
        return why;
    }
    let done = match op {
        Op::Read => MemoryRegion::copy(remote, far, &local.region, at, local.len),
        Op::Write => MemoryRegion::copy(&local.region, at, remote, far, local.len),
        _ => {
            let Some(old) = local.region.atomic(at) else {
                return Status::RemoteInvalid;
            };
            let Some(was) = atomic(remote, op, far) else {
                return Status::RemoteInvalid;
            };
            old.store(was, Ordering::Release);
            true
        }
    };
    if done {
        Status::Success
    } else {
        Status::RemoteAccess
    }
}
