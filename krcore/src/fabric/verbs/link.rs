//! The reliable connection to a peer (RC), with what is under way on it: of every pair of this
//! fabric that talks to that peer.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Instant;

use carlsbad_types::ByteSize;

use super::device::{Connection, Device, Done, Outcome, Registration, Verb, Work};
use super::handshake::{Frame, Place, Stream};
use super::port::{MESSAGE, PREFIX, WINDOW};
use crate::error::Result;
use crate::fabric::{DcAddress, Op, RawRequest, SEND_HEADER, Status};
use crate::region::{Access, MemoryRegion, RKey};

/// Requests that are under way on one connection.
pub(super) const DEPTH: usize = 128;

/// A request of a pair: which pair, and which of its requests.
pub(super) type Whose = (usize, u64);

/// What is under way on the device, oldest first.
#[derive(Debug)]
struct Sent {
    id: u64,
    whose: Whose,
    is_message: bool,
    /// Its bytes, until the device is done with them.
    _local: Option<Arc<MemoryRegion>>,
}

/// A message whose fate the peer has not told yet.
#[derive(Debug)]
struct Message {
    number: u64,
    whose: Whose,
    /// It lies in a buffer of the peer's.
    landed: bool,
}

/// How far a connection is.
#[derive(Debug)]
pub(super) enum Phase {
    /// The stream is being connected, or the other side has not answered yet.
    Connecting(Connection),
    Ready(Connection),
    /// The device's part is over; what became of some messages is still to be told.
    Draining,
}

/// What became of requests.
#[derive(Debug, Default)]
pub(super) struct Fates {
    pub(super) done: Vec<(Whose, Status)>,
    /// Not executed, and of pairs that are not to blame.
    pub(super) back: Vec<Whose>,
    pub(super) broken: bool,
}

/// The connection to one peer.
#[derive(Debug)]
pub(super) struct Link {
    pub(super) id: u64,
    pub(super) phase: Phase,
    pub(super) stream: Stream,
    /// The Hello has been sent.
    pub(super) greeted: bool,
    /// When it was begun, or the peer was last waited for: what it is to do is due by then.
    pub(super) since: Instant,
    /// When it was used last, in posts.
    pub(super) used: u64,
    /// Pairs that wait for it.
    pub(super) waiting: Vec<usize>,
    /// When the device was given something while it had nothing, or has completed something.
    pub(super) moved: Instant,
    /// It will report its next completion.
    pub(super) armed: bool,
    places: HashMap<RKey, Option<Place>>,
    asked: Vec<RKey>,
    sent: VecDeque<Sent>,
    next: u64,
    messages: VecDeque<Message>,
    next_message: u64,
    /// What goes before the bytes of messages, for each that is under way.
    headers: Registration,
    prefixes: Arc<MemoryRegion>,
}

impl Link {
    pub(super) fn new(device: &Arc<Device>, id: u64, to: DcAddress) -> Result<Self> {
        let connection = Connection::new(device, id, DEPTH as u32, 1)?;
        let size = ByteSize::new((WINDOW * PREFIX) as u64);
        let prefixes = MemoryRegion::create(size, Access::Local, RKey(0), 0)?;
        let stream = Stream::connect(super::port::socket_address(to)).map_err(|source| {
            crate::Error::Io {
                what: "connect to a peer's RDMA handshake",
                source,
            }
        })?;
        Ok(Self {
            id,
            phase: Phase::Connecting(connection),
            stream,
            greeted: false,
            since: Instant::now(),
            used: 0,
            waiting: Vec::new(),
            moved: Instant::now(),
            armed: false,
            places: HashMap::new(),
            asked: Vec::new(),
            sent: VecDeque::new(),
            next: 0,
            messages: VecDeque::new(),
            next_message: 0,
            headers: Registration::new(device, &prefixes, Access::Local)?,
            prefixes,
        })
    }

    /// Nothing is under way, and nobody waits: it may go.
    pub(super) fn is_idle(&self) -> bool {
        matches!(self.phase, Phase::Ready(_))
            && self.sent.is_empty()
            && self.messages.is_empty()
            && self.asked.is_empty()
            && self.waiting.is_empty()
    }

    /// The peer's process owes an answer.
    pub(super) fn is_owed(&self) -> bool {
        !matches!(self.phase, Phase::Ready(_))
            || !self.asked.is_empty()
            || !self.messages.is_empty()
    }

    /// Something is under way on the device.
    pub(super) fn is_busy(&self) -> bool {
        !self.sent.is_empty()
    }

    pub(super) fn room(&self) -> usize {
        DEPTH - self.sent.len().min(DEPTH)
    }

    pub(super) fn has_window(&self) -> bool {
        self.messages.len() < WINDOW
    }

    /// Where the peer's region is; asks, where that is not known: `None` until it answers.
    pub(super) fn place(&mut self, region: RKey) -> Option<Option<Place>> {
        if let Some(known) = self.places.get(&region) {
            return Some(*known);
        }
        if !self.asked.contains(&region) {
            self.owes();
            self.asked.push(region);
            // A stream that does not take it has ended, which is noticed where it is read.
            let _ended = self.stream.send(&Frame::Find { region });
        }
        None
    }

    fn owes(&mut self) {
        if !self.is_owed() {
            self.since = Instant::now();
        }
    }

    pub(super) fn learn(&mut self, region: RKey, place: Option<Place>) {
        self.asked.retain(|asked| *asked != region);
        self.since = Instant::now();
        self.places.insert(region, place);
    }

    /// A region that the peer did not know is asked for again.
    pub(super) fn forget_missing(&mut self, region: RKey) {
        if self.places.get(&region) == Some(&None) {
            self.places.remove(&region);
        }
    }

    /// The device's form of a request. It is as if it were posted already: post it.
    pub(super) fn prepare(
        &mut self,
        whose: Whose,
        request: &RawRequest,
        local: Option<Arc<Registration>>,
        place: Option<Place>,
        fenced: bool,
    ) -> Work {
        let id = self.next;
        self.next += 1;
        let len = match request.op {
            Op::CompareSwap { .. } | Op::FetchAdd { .. } => 8,
            _ => request.local.len as u32,
        };
        let own = local
            .as_ref()
            .map(|local| local.part(request.local.offset, len));
        let (key, address) = place.map_or((0, 0), |place| {
            (place.key, place.address.wrapping_add(request.remote.offset))
        });
        let verb = match request.op {
            Op::Read => Verb::Read { address, key },
            Op::Write => Verb::Write { address, key },
            Op::CompareSwap { expected, new } => Verb::CompareSwap {
                address,
                key,
                expected,
                new,
            },
            Op::FetchAdd { add } => Verb::FetchAdd { address, key, add },
            Op::Send(_) | Op::Fence => Verb::Send,
        };
        let is_message = matches!(request.op, Op::Send(_));
        let mut parts = [Default::default(); 2];
        let mut count = 0;
        if let Op::Send(service) = request.op {
            let number = self.next_message;
            self.owes();
            self.next_message += 1;
            let at = number % WINDOW as u64 * PREFIX as u64;
            let mut prefix = [0; PREFIX];
            prefix[..8].copy_from_slice(&number.to_le_bytes());
            prefix[8..10].copy_from_slice(&service.0.to_le_bytes());
            if let Some(header) = &request.header {
                prefix[PREFIX - SEND_HEADER..].copy_from_slice(&header[..]);
            }
            let _inside = self.prefixes.write(at, &prefix);
            self.messages.push_back(Message {
                number,
                whose,
                landed: false,
            });
            parts[0] = self.headers.part(at, PREFIX as u32);
            count = 1;
        }
        if let Some(own) = own
            && len > 0
        {
            parts[count] = own;
            count += 1;
        }
        self.sent.push_back(Sent {
            id,
            whose,
            is_message,
            _local: local.map(|_| Arc::clone(&request.local.region)),
        });
        Work {
            id,
            verb,
            parts,
            count,
            signalled: request.signalled || is_message,
            fenced,
        }
    }

    /// Posts what was prepared; false where the device did not take all: the connection is of no use
    /// then.
    #[must_use]
    pub(super) fn post(&mut self, work: &mut [Work]) -> bool {
        let Some(last) = work.last_mut() else {
            return true;
        };
        // So that there is an end to what was not signalled.
        last.signalled = true;
        let Phase::Ready(connection) = &mut self.phase else {
            return false;
        };
        if self.sent.len() == work.len() {
            self.moved = Instant::now();
        }
        // Before, so that none is missed.
        if !self.armed {
            connection.arm();
            self.armed = true;
        }
        connection.post(work) == work.len()
    }

    /// Takes what the device has completed.
    pub(super) fn poll(&mut self, fates: &mut Fates) {
        let Phase::Ready(connection) = &mut self.phase else {
            return;
        };
        loop {
            let mut any = false;
            for done in connection.poll() {
                any = true;
                self.moved = Instant::now();
                match settle(&mut self.sent, &mut self.messages, done, fates) {
                    Outcome::Success => {}
                    // What comes after it is of no interest: all of it is flushed.
                    Outcome::Refused(status) => {
                        return self.break_off(Some((done.id, status)), fates);
                    }
                    Outcome::Failed(status) => {
                        // Those that were sent before it have completed; it has its own status.
                        if let Some(first) = self.sent.pop_front() {
                            fates.done.push((first.whose, status));
                            forget(&mut self.messages, &first);
                        }
                        return self.break_off(None, fates);
                    }
                }
            }
            if !any {
                return;
            }
        }
    }

    /// The event of its completion queue has come.
    pub(super) fn on_event(&mut self, fates: &mut Fates) {
        self.armed = false;
        self.poll(fates);
        if let Phase::Ready(connection) = &mut self.phase
            && !self.sent.is_empty()
        {
            connection.arm();
            self.armed = true;
            // What came before it was armed makes no event.
            self.poll(fates);
        }
    }

    /// Ends the device's part. With a request that the peer has refused, those behind it were not
    /// executed; otherwise nobody knows.
    pub(super) fn break_off(&mut self, refused: Option<(u64, Status)>, fates: &mut Fates) {
        fates.broken = true;
        // The device touches nothing for it from here on.
        self.phase = Phase::Draining;
        let mut guilty = None;
        for sent in std::mem::take(&mut self.sent) {
            let fate = match refused {
                Some((id, status)) if sent.id == id => {
                    guilty = Some(sent.whose.0);
                    Some(status)
                }
                Some(_) if guilty == Some(sent.whose.0) => Some(Status::Flushed),
                Some(_) if guilty.is_some() => None,
                // Before the refused one: it has been executed, or there would be none.
                Some(_) if sent.is_message => continue,
                Some(_) => Some(Status::Success),
                None => Some(Status::RetryExceeded),
            };
            forget(&mut self.messages, &sent);
            match fate {
                Some(status) => fates.done.push((sent.whose, status)),
                None => fates.back.push(sent.whose),
            }
        }
        if refused.is_none() {
            let lost = std::mem::take(&mut self.messages);
            fates
                .done
                .extend(lost.iter().map(|lost| (lost.whose, Status::RetryExceeded)));
        }
        self.since = Instant::now();
    }

    /// Whether the peer has told all that it will.
    pub(super) fn is_drained(&self) -> bool {
        matches!(self.phase, Phase::Draining) && self.messages.is_empty()
    }

    /// The peer says what became of a message.
    pub(super) fn delivered(&mut self, number: u64, taken: bool, fates: &mut Fates) {
        self.since = Instant::now();
        if let Some(at) = self.messages.iter().position(|one| one.number == number)
            && let Some(message) = self.messages.remove(at)
        {
            let status = if taken {
                Status::Success
            } else {
                Status::ReceiverNotReady
            };
            fates.done.push((message.whose, status));
        }
    }
}

/// A message that did not land has no fate of its own.
fn forget(messages: &mut VecDeque<Message>, sent: &Sent) {
    if sent.is_message {
        messages.retain(|one| one.landed || one.whose != sent.whose);
    }
}

/// Whom a completion of the device is for: the oldest, up to the one it names.
fn settle(
    sent: &mut VecDeque<Sent>,
    messages: &mut VecDeque<Message>,
    done: Done,
    fates: &mut Fates,
) -> Outcome {
    while let Some(first) = sent.front() {
        let is_it = first.id == done.id;
        if is_it && done.outcome != Outcome::Success || first.id > done.id {
            break;
        }
        let Some(first) = sent.pop_front() else {
            break;
        };
        if first.is_message {
            let mut landed = messages.iter_mut().filter(|one| one.whose == first.whose);
            if let Some(message) = landed.next() {
                message.landed = true;
            }
        } else {
            fates.done.push((first.whose, Status::Success));
        }
    }
    done.outcome
}

/// The most bytes that a message carries beside its header.
pub(super) const LONGEST_MESSAGE: u64 = (MESSAGE - PREFIX) as u64;
