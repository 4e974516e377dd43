//! The hybrid pool: a few DC queue pairs that reach every node, shared by everybody, and a small
//! LRU of dedicated ones (RC) to the peers that are talked to most (section 4.2 of the paper).

use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::dispatch::Queue;
use crate::error::Result;
use crate::fabric::Fabric;
use crate::node::NodeId;
use crate::notify::Bells;

/// The pool of a node.
#[derive(Debug)]
pub(crate) struct Pool {
    dynamic: Vec<Arc<Queue>>,
    dedicated: Mutex<VecDeque<(NodeId, Arc<Queue>)>>,
    next: AtomicUsize,
    most: usize,
}

impl Pool {
    pub(crate) fn new(
        fabric: &Arc<dyn Fabric>,
        dynamic: usize,
        dedicated: usize,
        depth: usize,
        bells: &Arc<Bells>,
    ) -> Result<Self> {
        Ok(Self {
            dynamic: (0..dynamic)
                .map(|_| Queue::new(fabric, depth, None, bells).map(Arc::new))
                .collect::<Result<_>>()?,
            dedicated: Mutex::default(),
            next: AtomicUsize::new(0),
            most: dedicated,
        })
    }

    /// The DC pair of the calling thread: threads are spread over the pairs as they come.
    pub(crate) fn dynamic(&self) -> &Arc<Queue> {
        thread_local!(static MINE: std::cell::Cell<usize> = const { std::cell::Cell::new(usize::MAX) });
        let mut mine = MINE.get();
        if mine == usize::MAX {
            mine = self.next.fetch_add(1, Ordering::Relaxed);
            MINE.set(mine);
        }
        &self.dynamic[mine % self.dynamic.len()]
    }

    /// Every pair there is.
    pub(crate) fn queues(&self) -> Vec<Arc<Queue>> {
        let dedicated = self
            .dedicated
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let dedicated = dedicated.iter().map(|(_, queue)| Arc::clone(queue));
        self.dynamic.iter().cloned().chain(dedicated).collect()
    }

    /// The dedicated pair to a peer, which becomes the most recently used.
    pub(crate) fn dedicated(&self, peer: NodeId) -> Option<Arc<Queue>> {
        let mut all = self
            .dedicated
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let at = all.iter().position(|(node, _)| *node == peer)?;
        let entry = all.remove(at)?;
        let queue = Arc::clone(&entry.1);
        all.push_front(entry);
        Some(queue)
    }

    pub(crate) fn keeps_dedicated(&self) -> bool {
        self.most > 0
    }

    /// Puts a dedicated pair in the LRU; the least recently used leaves it.
    pub(crate) fn promote(&self, peer: NodeId, queue: Queue) {
        let mut all = self
            .dedicated
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if self.most == 0 || all.iter().any(|(node, _)| *node == peer) {
            return;
        }
        if all.len() == self.most
            && let Some((_, old)) = all.pop_back()
        {
            old.evicted.store(true, Ordering::Relaxed);
        }
        all.push_front((peer, Arc::new(queue)));
    }

    /// Takes the dedicated pair to a peer out, as when the peer is gone.
    pub(crate) fn demote(&self, peer: NodeId) {
        let mut all = self
            .dedicated
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(at) = all.iter().position(|(node, _)| *node == peer)
            && let Some((_, old)) = all.remove(at)
        {
            old.evicted.store(true, Ordering::Relaxed);
        }
    }
}
