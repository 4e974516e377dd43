//! The stored files that an ingest is to make, and how far each is.

use std::fs::File;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use super::{Ingest, lock};
use crate::content::{ContentHasher, pieces};
use crate::hint::Fingerprint;
use crate::id::{ObjectId, TensorId};
use crate::object::{PACK_LIMIT, PACKED_BELOW, pack_order};
use crate::publish::Claim;

/// One stored file to be: a large tensor, or a pack of small ones.
pub(super) struct Work {
    /// Positions in the source, in the order of the file.
    pub(super) tensors: Vec<usize>,
    pub(super) packed: bool,
    /// Bytes of data.
    pub(super) len: u64,
    pub(super) pieces: usize,
    /// The next piece to be read.
    pub(super) next: AtomicUsize,
    /// Pieces that are not done.
    pub(super) left: AtomicUsize,
    pub(super) state: Mutex<State>,
}

pub(super) struct State {
    pub(super) fill: Fill,
    pub(super) fingerprint: Option<Fingerprint>,
    pub(super) content: ContentHasher,
    pub(super) placed: Option<Placed>,
}

/// What happens to the bytes that are read, besides being hashed.
pub(super) enum Fill {
    /// To be decided when the first piece is read.
    Undecided,
    /// Nothing.
    HashOnly,
    /// They are written. The claim keeps others from filling the same; there is none after waiting
    /// for it in vain.
    Write(Arc<File>, Option<Claim>),
}

/// Where a work's tensors are, or should be.
#[derive(Debug, Clone)]
pub(super) struct Placed {
    pub(super) object: ObjectId,
    /// Where its data begins.
    pub(super) data: u64,
    pub(super) ids: Vec<TensorId>,
    /// The store does not have it; somebody else may be filling it.
    pub(super) missing: bool,
}

impl Work {
    fn new(tensors: Vec<usize>, packed: bool, len: u64) -> Self {
        let pieces = if packed { 1 } else { pieces(len) };
        Self {
            tensors,
            packed,
            len,
            pieces,
            next: AtomicUsize::new(0),
            left: AtomicUsize::new(pieces),
            state: Mutex::new(State {
                fill: Fill::Undecided,
                fingerprint: None,
                content: ContentHasher::new(len),
                placed: None,
            }),
        }
    }

    /// To be done again, and written this time.
    pub(super) fn again(&self, fill: Fill) {
        self.next.store(0, Ordering::Relaxed);
        self.left.store(self.pieces, Ordering::Relaxed);
        let mut state = lock(&self.state);
        state.fill = fill;
        state.content = ContentHasher::new(self.len);
        state.placed = None;
    }
}

impl Ingest<'_> {
    /// The stored files to be, packs first, large tensors in the source's order.
    pub(super) fn plan(&self) -> Vec<Work> {
        let tensors = self.source.tensors();
        let (mut small, large): (Vec<usize>, Vec<usize>) =
            (0..tensors.len()).partition(|&i| tensors[i].len < PACKED_BELOW);
        small.sort_by(|&a, &b| {
            let key = |i: usize| (tensors[i].element, tensors[i].name.as_str());
            pack_order(key(a), key(b))
        });
        let mut works = Vec::with_capacity(large.len() + 1);
        let mut pack = Vec::new();
        let mut len = 0;
        for i in small {
            if len + tensors[i].len > PACK_LIMIT {
                works.push(Work::new(std::mem::take(&mut pack), true, len));
                len = 0;
            }
            len += tensors[i].len;
            pack.push(i);
        }
        if !pack.is_empty() {
            works.push(Work::new(pack, true, len));
        }
        works.extend(
            large
                .into_iter()
                .map(|i| Work::new(vec![i], false, tensors[i].len)),
        );
        works
    }
}
