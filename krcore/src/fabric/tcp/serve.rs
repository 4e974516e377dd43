//! A link that was accepted: requests come, the target looks at each and executes it, replies go
//! back. Where the replies cannot be sent, no more requests are taken, so that a peer makes nobody
//! keep more than a fixed amount for it.

use std::collections::HashSet;
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use super::Shared;
use super::frame::{Bytes, CHUNK, Frame, Place, Tag};
use super::link::{BUDGET, MAX_NODES};
use super::peer::LinkError;
use super::port::{self, Target};
use super::record::{Receiver, Sender};
use crate::fabric::{DcAddress, Op, Status, atomic, permit};
use crate::node::{NodeId, Service};
use crate::region::{MemoryRegion, RKey};

/// The most broken pairs of one peer that are remembered. It says when one can be forgotten.
const MAX_BROKEN: usize = 1 << 16;

/// A READ whose data are being sent.
struct Reading {
    tag: Tag,
    at: Place,
    len: u64,
    from: u64,
}

/// Who dialled, and what is known of it.
pub(super) struct Guest {
    pub(super) stream: TcpStream,
    from: SocketAddr,
    sender: Sender,
    receiver: Receiver,
    /// Frames that were received, and not looked at for want of room for the replies.
    rest: Vec<u8>,
    reading: Option<Reading>,
    /// Pairs of which a request has failed: what they sent after it is not executed.
    broken: HashSet<u64>,
    /// What is done and was not yet said.
    done: Option<Tag>,
    target: Option<Arc<Target>>,
    /// Where the nodes of the other side can be dialled.
    listens: Option<SocketAddr>,
    nodes: HashSet<NodeId>,
    heard: u64,
}

impl Guest {
    pub(super) fn new(
        stream: TcpStream,
        from: SocketAddr,
        sender: Sender,
        receiver: Receiver,
        now: u64,
    ) -> Self {
        Self {
            stream,
            from,
            sender,
            receiver,
            rest: Vec::new(),
            reading: None,
            broken: HashSet::new(),
            done: None,
            target: None,
            listens: None,
            nodes: HashSet::new(),
            heard: now,
        }
    }

    /// Says something that belongs to no request.
    pub(super) fn say(&mut self, frames: &[Frame<'_>]) -> Result<(), LinkError> {
        frames.iter().for_each(|frame| self.sender.put(frame));
        self.sender.flush(&self.stream).map(drop)
    }

    /// Takes what has come, as long as the replies find room. True where there may be more.
    pub(super) fn turn(&mut self, shared: &Shared) -> Result<bool, LinkError> {
        if self.sender.waiting() > 0 && self.sender.flush(&self.stream)? {
            self.heard = shared.now();
        }
        let mut more = true;
        for _ in 0..BUDGET {
            if !self.work(shared)? {
                more = false;
                break;
            }
            match self.receiver.next(&self.stream)? {
                Some(record) => {
                    self.rest.clear();
                    self.rest.extend_from_slice(record);
                    self.heard = shared.now();
                }
                None => {
                    more = false;
                    break;
                }
            }
        }
        if more && !self.work(shared)? {
            more = false;
        }
        self.say_done();
        self.sender.flush(&self.stream)?;
        Ok(more)
    }

    /// Goes on with what was received. False where there is no room for the replies; then the socket
    /// does not take more, and says when it does.
    fn work(&mut self, shared: &Shared) -> Result<bool, LinkError> {
        let rest = std::mem::take(&mut self.rest);
        let mut left = &rest[..];
        loop {
            if !self.sender.has_room() {
                self.sender.flush(&self.stream)?;
                if !self.sender.has_room() {
                    self.rest = left.to_vec();
                    return Ok(false);
                }
            }
            if let Some(reading) = self.reading.take() {
                self.read_on(shared, reading);
                continue;
            }
            if left.is_empty() {
                self.rest = rest;
                self.rest.clear();
                return Ok(true);
            }
            let (frame, after) = Frame::decode(left).map_err(|_| LinkError::Garbled)?;
            left = after;
            self.hear(shared, frame)?;
        }
    }

    fn hear(&mut self, shared: &Shared, frame: Frame<'_>) -> Result<(), LinkError> {
        let (tag, at, op, len) = match frame {
            Frame::Read { tag, at, len } => (tag, at, Op::Read, len),
            Frame::Write { tag, at, len, .. } => (tag, at, Op::Write, len),
            Frame::CompareSwap {
                tag,
                at,
                expected,
                new,
            } => (tag, at, Op::CompareSwap { expected, new }, 8),
            Frame::FetchAdd { tag, at, add } => (tag, at, Op::FetchAdd { add }, 8),
            Frame::Send {
                tag,
                to,
                service,
                header,
                body,
            } => {
                if self.broken.contains(&tag.pair) {
                    return Ok(());
                }
                let status = match (self.target(shared, to), header.0.try_into()) {
                    (Some(target), Ok(header)) => {
                        let service = Service(service);
                        if target.sink.reserve(service) {
                            target.deliver(service, header, body.0.to_vec());
                            Status::Success
                        } else {
                            Status::ReceiverNotReady
                        }
                    }
                    (None, _) => Status::RetryExceeded,
                    (_, Err(_)) => Status::RemoteInvalid,
                };
                return self.end(tag, status);
            }
            other => return self.hear_of_itself(shared, &other),
        };
        if self.broken.contains(&tag.pair) {
            return Ok(());
        }
        let region = match self.region(shared, at, op, len) {
            Ok(region) => region,
            Err(status) => return self.end(tag, status),
        };
        match frame {
            Frame::Read { .. } => {
                self.read_on(
                    shared,
                    Reading {
                        tag,
                        at,
                        len,
                        from: 0,
                    },
                );
                Ok(())
            }
            Frame::Write { from, bytes, .. } => {
                // The whole range was looked at.
                if !region.write(at.offset + from, bytes.0) {
                    return self.end(tag, Status::RemoteAccess);
                }
                if from + bytes.0.len() as u64 == len {
                    return self.end(tag, Status::Success);
                }
                Ok(())
            }
            _ => {
                let Some(was) = atomic(&region, op, at.offset) else {
                    return self.end(tag, Status::RemoteInvalid);
                };
                self.sender.put(&Frame::Data {
                    tag,
                    from: 0,
                    bytes: Bytes(&was.to_le_bytes()),
                });
                self.end(tag, Status::Success)
            }
        }
    }

    fn hear_of_itself(&mut self, shared: &Shared, frame: &Frame<'_>) -> Result<(), LinkError> {
        match *frame {
            Frame::Hello { port, .. } => {
                self.listens = (port != 0).then(|| SocketAddr::new(self.from.ip(), port));
            }
            Frame::Node(address) => {
                if let Some(listens) = self.listens
                    && self.nodes.insert(port::node(address))
                {
                    shared.learn(port::node(address), listens);
                }
                if self.nodes.len() > MAX_NODES {
                    return Err(LinkError::Garbled);
                }
            }
            Frame::Left(address) => {
                self.nodes.remove(&port::node(address));
            }
            Frame::Ask { question, node } => {
                let address = shared.here(NodeId(node)).map(|target| target.address);
                self.sender.put(&Frame::Told { question, address });
            }
            Frame::Ping => self.sender.put(&Frame::Pong),
            Frame::Close { pair } => {
                self.broken.remove(&pair);
            }
            // Replies to what was never asked.
            _ => return Err(LinkError::Garbled),
        }
        Ok(())
    }

    fn target(&mut self, shared: &Shared, to: DcAddress) -> Option<Arc<Target>> {
        if self.target.as_ref().is_none_or(|one| one.address != to) {
            self.target = shared.target(to);
        }
        self.target.clone().filter(|target| target.is_alive())
    }

    /// The region that a request names, where it may do what it says there.
    fn region(
        &mut self,
        shared: &Shared,
        at: Place,
        op: Op,
        len: u64,
    ) -> Result<Arc<MemoryRegion>, Status> {
        let target = self.target(shared, at.to).ok_or(Status::RetryExceeded)?;
        let region = target.region(RKey(at.key)).ok_or(Status::RemoteAccess)?;
        permit(&region, op, at.offset, len)?;
        Ok(region)
    }

    /// Sends what there is room for of a READ. Its key is looked up for each part.
    fn read_on(&mut self, shared: &Shared, mut reading: Reading) {
        let Reading { tag, at, len, .. } = reading;
        let mut buffer = std::mem::take(&mut self.sender.buffer);
        while reading.from < len && self.sender.has_room() {
            let take = (len - reading.from).min(CHUNK as u64) as usize;
            let region = self.region(shared, at, Op::Read, len);
            let bytes = &mut buffer[..take];
            let read = region.is_ok_and(|one| one.read(at.offset + reading.from, bytes));
            if !read {
                self.sender.buffer = buffer;
                self.broke(tag, Status::RemoteAccess);
                return;
            }
            self.sender.put(&Frame::Data {
                tag,
                from: reading.from,
                bytes: Bytes(bytes),
            });
            reading.from += take as u64;
        }
        self.sender.buffer = buffer;
        if reading.from < len {
            self.reading = Some(reading);
        } else {
            self.succeeded(tag);
        }
    }

    fn succeeded(&mut self, tag: Tag) {
        if self.done.is_some_and(|done| done.pair != tag.pair) {
            self.say_done();
        }
        self.done = Some(tag);
    }

    fn say_done(&mut self) {
        if let Some(done) = self.done.take() {
            self.sender.put(&Frame::Done(done));
        }
    }

    fn broke(&mut self, tag: Tag, status: Status) {
        self.say_done();
        self.sender.put(&Frame::Failed {
            tag,
            status: status.to_code() as u8,
        });
        if status != Status::ReceiverNotReady {
            self.broken.insert(tag.pair);
        }
    }

    fn end(&mut self, tag: Tag, status: Status) -> Result<(), LinkError> {
        if status == Status::Success {
            self.succeeded(tag);
            return Ok(());
        }
        self.broke(tag, status);
        (self.broken.len() <= MAX_BROKEN)
            .then_some(())
            .ok_or(LinkError::Garbled)
    }

    /// Nothing was heard of it, nor could anything be sent to it, for the fabric's limit.
    pub(super) fn is_silent(&self, now: u64, limit: Duration) -> bool {
        u128::from(now.saturating_sub(self.heard)) > limit.as_millis()
    }
}
