//! What a request has to be before it may reach a queue pair that others share (section 4.4 of the
//! paper). Pure: the remote region's entry is given.

use crate::error::Malformed;
use crate::fabric::Op;
use crate::mr::{ACKS_KEY, RESERVED_KEYS, RegionEntry};
use crate::region::Access;
use crate::vq::WorkRequest;

/// The most bytes one request moves: 1 GiB, as on most adapters.
pub const MAX_TRANSFER: u64 = 1 << 30;
/// The most bytes that a SEND carries itself; more than that the receiver READs.
pub const MAX_INLINE: u64 = 4096;

/// The checks that need no knowledge of the peer.
pub(crate) fn local(work: &WorkRequest) -> Result<(), Malformed> {
    if work.op == Op::Fence {
        return Ok(());
    }
    let slice = &work.local;
    if slice.len == 0 {
        return Err(Malformed::ZeroLength);
    }
    if slice.len > MAX_TRANSFER {
        return Err(Malformed::TooLong);
    }
    if !slice.region.contains(slice.offset, slice.len) {
        return Err(Malformed::LocalRange);
    }
    match work.op {
        // The receiver READs it, and may only what the region allows.
        Op::Send(_) if slice.len > MAX_INLINE && slice.region.access() == Access::Local => {
            return Err(Malformed::Denied);
        }
        Op::CompareSwap { .. } | Op::FetchAdd { .. }
            if slice.len != 8
                || !slice.offset.is_multiple_of(8)
                || !work.remote.offset.is_multiple_of(8) =>
        {
            return Err(Malformed::Unaligned);
        }
        _ => {}
    }
    if work.remote.offset.checked_add(slice.len).is_none() {
        return Err(Malformed::RemoteRange);
    }
    if work.remote.key.0 < RESERVED_KEYS && !matches!(work.op, Op::Send(_)) {
        // What a node keeps for itself. One thing may be done to it: to say that a large message
        // has been fetched, which only who knows its number can.
        let acknowledges = matches!(work.op, Op::CompareSwap { expected, new: 0 } if expected != 0)
            && work.remote.key == ACKS_KEY;
        if !acknowledges {
            return Err(Malformed::StaleKey);
        }
    }
    Ok(())
}

/// The checks against what the peer publishes.
pub(crate) fn remote(work: &WorkRequest, entry: RegionEntry) -> Result<(), Malformed> {
    let end = work
        .remote
        .offset
        .checked_add(work.local.len)
        .ok_or(Malformed::RemoteRange)?;
    if end > entry.len {
        return Err(Malformed::RemoteRange);
    }
    let allowed = match work.op {
        Op::Read => entry.access != Access::Local,
        Op::Write | Op::CompareSwap { .. } | Op::FetchAdd { .. } => {
            entry.access == Access::ReadWrite
        }
        Op::Send(_) | Op::Fence => true,
    };
    if allowed {
        Ok(())
    } else {
        Err(Malformed::Denied)
    }
}
