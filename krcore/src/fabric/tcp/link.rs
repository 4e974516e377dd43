//! A link to a peer that was dialled: requests go out, replies come back. Whoever polls takes what
//! has come, so that a reply need not wait for another thread; the fabric's own thread takes what
//! nobody polls for.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use super::Shared;
use super::frame::Frame;
use super::pair::Pair;
use super::peer::{LinkError, Peer};
use super::record::{Receiver, Sender};
use crate::fabric::DcAddress;
use crate::node::NodeId;

/// Records that are taken before others have their turn.
pub(super) const BUDGET: usize = 16;
/// The most nodes that one peer may name.
pub(super) const MAX_NODES: usize = 4096;

/// Where a node is, if it is there.
type Answer = Option<DcAddress>;

/// A question, and the link on which it was asked.
#[derive(Debug, Default)]
pub(super) struct Question(Option<(Arc<Link>, u64)>);

impl Drop for Question {
    fn drop(&mut self) {
        if let Some((link, number)) = self.0.take() {
            lock(&link.answers).remove(&number);
        }
    }
}

pub(super) struct Link {
    stream: TcpStream,
    pub(super) peer: Arc<Peer>,
    shared: Arc<Shared>,
    sender: Mutex<Sender>,
    receiver: Mutex<Receiver>,
    /// Those whose requests are out.
    pairs: Mutex<HashMap<u64, Arc<Pair>>>,
    /// Those that wait until there is room to send.
    starving: Mutex<VecDeque<Arc<Pair>>>,
    /// What was asked, and the answers that have come.
    answers: Mutex<HashMap<u64, Option<Answer>>>,
    next_question: AtomicU64,
    lost: AtomicBool,
    why: OnceLock<LinkError>,
    /// When something was heard last, and when it was asked for, in the fabric's milliseconds.
    heard: AtomicU64,
    asked: AtomicU64,
    /// After so many milliseconds it is asked again.
    every: AtomicU64,
}

impl fmt::Debug for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Link")
            .field("peer", &self.peer.at)
            .field("lost", &self.is_lost())
            .finish_non_exhaustive()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Link {
    pub(super) fn new(
        stream: TcpStream,
        peer: &Arc<Peer>,
        shared: &Arc<Shared>,
        sender: Sender,
        receiver: Receiver,
    ) -> Arc<Self> {
        let now = shared.now();
        Arc::new(Self {
            stream,
            peer: Arc::clone(peer),
            shared: Arc::clone(shared),
            sender: Mutex::new(sender),
            receiver: Mutex::new(receiver),
            pairs: Mutex::default(),
            starving: Mutex::default(),
            answers: Mutex::default(),
            next_question: AtomicU64::new(1),
            lost: AtomicBool::new(false),
            why: OnceLock::new(),
            heard: AtomicU64::new(now),
            asked: AtomicU64::new(now),
            every: AtomicU64::new(shared.every(u64::MAX)),
        })
    }

    pub(super) fn is_lost(&self) -> bool {
        self.lost.load(Ordering::Acquire)
    }

    pub(super) fn sender(&self) -> MutexGuard<'_, Sender> {
        lock(&self.sender)
    }

    pub(super) fn flush(&self, sender: &mut Sender) -> Result<(), LinkError> {
        sender.flush(&self.stream).map(drop)
    }

    /// Says something that belongs to no request.
    pub(super) fn say(&self, frames: &[Frame<'_>]) -> Result<(), LinkError> {
        let mut sender = self.sender();
        frames.iter().for_each(|frame| sender.put(frame));
        self.flush(&mut sender)
    }

    pub(super) fn bind(&self, pair: &Arc<Pair>) {
        lock(&self.pairs).insert(pair.number, Arc::clone(pair));
    }

    pub(super) fn unbind(&self, number: u64) {
        lock(&self.pairs).remove(&number);
    }

    pub(super) fn starve(&self, pair: &Arc<Pair>) {
        let mut starving = lock(&self.starving);
        if !starving.iter().any(|one| Arc::ptr_eq(one, pair)) {
            starving.push_back(Arc::clone(pair));
        }
    }

    /// Asks where a node is, unless that was asked on this link, and gives the answer when it is
    /// there.
    pub(super) fn ask(self: &Arc<Self>, node: NodeId, question: &mut Question) -> Option<Answer> {
        if let Some((link, number)) = &question.0
            && Arc::ptr_eq(link, self)
        {
            return lock(&self.answers).get(number).copied().flatten();
        }
        let number = self.next_question.fetch_add(1, Ordering::Relaxed);
        *question = Question(Some((Arc::clone(self), number)));
        lock(&self.answers).insert(number, None);
        // Where it cannot be sent the fabric's thread sees that as well, and gives the link up.
        let _lost = self.say(&[Frame::Ask {
            question: number,
            node: node.0,
        }]);
        None
    }

    /// The socket takes more.
    pub(super) fn writable(&self) -> Result<(), LinkError> {
        loop {
            let mut sender = self.sender();
            self.flush(&mut sender)?;
            let room = sender.has_room();
            drop(sender);
            if !room {
                return Ok(());
            }
            let Some(pair) = lock(&self.starving).pop_front() else {
                return Ok(());
            };
            Pair::pump(&pair);
        }
    }

    /// Takes replies, unless somebody else is about it. True where there may be more.
    pub(super) fn progress(self: &Arc<Self>) -> bool {
        let Ok(mut receiver) = self.receiver.try_lock() else {
            return false;
        };
        let mut touched = Vec::new();
        let taken = self.take(&mut receiver, &mut touched);
        drop(receiver);
        touched.iter().for_each(Pair::pump);
        match taken {
            Ok(more) => more,
            Err(why) => {
                self.lose(why);
                false
            }
        }
    }

    fn take(
        self: &Arc<Self>,
        receiver: &mut Receiver,
        touched: &mut Vec<Arc<Pair>>,
    ) -> Result<bool, LinkError> {
        for _ in 0..BUDGET {
            if self.is_lost() {
                return Ok(false);
            }
            let Some(mut record) = receiver.next(&self.stream)? else {
                return Ok(false);
            };
            self.heard.store(self.shared.now(), Ordering::Relaxed);
            while !record.is_empty() {
                let (frame, rest) = Frame::decode(record).map_err(|_| LinkError::Garbled)?;
                self.hear(&frame, touched)?;
                record = rest;
            }
        }
        Ok(true)
    }

    fn hear(
        self: &Arc<Self>,
        frame: &Frame<'_>,
        touched: &mut Vec<Arc<Pair>>,
    ) -> Result<(), LinkError> {
        let tag = match *frame {
            Frame::Data { tag, .. } | Frame::Done(tag) | Frame::Failed { tag, .. } => tag,
            Frame::Pong => return Ok(()),
            Frame::Hello { limit, .. } => {
                let every = self.shared.every(u64::from(limit));
                self.every.store(every, Ordering::Relaxed);
                return Ok(());
            }
            Frame::Told { question, address } => {
                if let Some(answer) = lock(&self.answers).get_mut(&question) {
                    *answer = Some(address);
                }
                self.peer.tell();
                return Ok(());
            }
            _ => return Err(LinkError::Garbled),
        };
        let pair = match touched.last() {
            Some(last) if last.number == tag.pair => Arc::clone(last),
            _ => {
                let Some(pair) = lock(&self.pairs).get(&tag.pair).cloned() else {
                    // It was dropped.
                    return Ok(());
                };
                touched.push(Arc::clone(&pair));
                pair
            }
        };
        pair.hear(self, frame)
    }

    /// Gives the link up: what is out on it fails, and another link is sought.
    pub(super) fn lose(self: &Arc<Self>, why: LinkError) {
        if self.lost.swap(true, Ordering::AcqRel) {
            return;
        }
        let _first = self.why.set(why);
        tracing::warn!(peer = %self.peer.at, %why, "a link is lost");
        // Who is sending holds this until he has seen that it is closed.
        self.sender().closed = true;
        let _gone = self.stream.shutdown(Shutdown::Both);
        self.peer.lost(self, &self.shared);
        let pairs = std::mem::take(&mut *lock(&self.pairs));
        let starving = std::mem::take(&mut *lock(&self.starving));
        pairs.values().for_each(|pair| pair.lost(self));
        starving.iter().for_each(Pair::pump);
        self.shared.event.set();
    }

    /// Asks for a sign of life where it is time, and gives the link up where none came.
    pub(super) fn tick(self: &Arc<Self>) {
        let now = self.shared.now();
        let heard = self.heard.load(Ordering::Relaxed);
        if now.saturating_sub(heard) > self.shared.limit_millis() {
            // It may have come, and nobody has taken it.
            self.progress();
            if self.heard.load(Ordering::Relaxed) == heard {
                return self.lose(LinkError::Silent);
            }
        }
        let every = self.every.load(Ordering::Relaxed);
        if now.saturating_sub(self.asked.load(Ordering::Relaxed)) >= every {
            self.asked.store(now, Ordering::Relaxed);
            if let Err(why) = self.say(&[Frame::Ping]) {
                self.lose(why);
            }
        }
    }
}
