//! The fabric's thread: it accepts and dials, shakes hands, executes what peers ask for, takes the
//! replies that nobody polls for, and watches over the links.

use std::collections::HashMap;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrStorage, connect, socket};

use super::Shared;
use super::frame::Frame;
use super::handshake::{Handshake, Progress};
use super::link::Link;
use super::peer::{LinkError, Peer};
use super::record::{Receiver, Sender};
use super::serve::Guest;
use crate::error::{Error, Result};

const EVENT: u64 = 0;
const LISTENER: u64 = 1;
/// Strangers who have not finished the handshake.
const MAX_STRANGERS: usize = 64;
/// Peers that have dialled.
const MAX_GUESTS: usize = 4096;
/// How often links are looked after, at most and at least.
const TICK: (Duration, Duration) = (Duration::from_millis(5), Duration::from_millis(50));
/// While a peer is down.
const TICK_DOWN: Duration = Duration::from_millis(10);
/// How long the thread looks for more before it sleeps.
const SPIN: Duration = Duration::from_micros(50);

struct Dial {
    peer: Arc<Peer>,
    stream: TcpStream,
    hands: Option<Handshake>,
    until: Instant,
}

struct Stranger {
    stream: TcpStream,
    from: SocketAddr,
    hands: Handshake,
    until: Instant,
}

enum Connection {
    Dial(Dial),
    Stranger(Stranger),
    Link(Arc<Link>),
    Guest(Box<Guest>),
}

pub(super) struct Reactor {
    shared: Arc<Shared>,
    epoll: Epoll,
    listener: Option<TcpListener>,
    connections: HashMap<u64, Connection>,
    next: u64,
    /// Those that have more than they were given time for.
    busy: Vec<u64>,
    ticked: Instant,
    tick: Duration,
}

fn io(what: &'static str) -> impl Fn(nix::Error) -> Error {
    move |source| Error::Io {
        what,
        source: source.into(),
    }
}

/// Begins to connect; the socket becomes writable when it is decided.
fn begin(at: SocketAddr) -> Result<TcpStream, Errno> {
    let family = match at {
        SocketAddr::V4(_) => AddressFamily::Inet,
        SocketAddr::V6(_) => AddressFamily::Inet6,
    };
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd: OwnedFd = socket(family, SockType::Stream, flags, None)?;
    match connect(fd.as_raw_fd(), &SockaddrStorage::from(at)) {
        Ok(()) | Err(Errno::EINPROGRESS) => Ok(TcpStream::from(fd)),
        Err(why) => Err(why),
    }
}

impl Reactor {
    pub(super) fn new(shared: &Arc<Shared>, listener: Option<TcpListener>) -> Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(io("make an epoll"))?;
        let readable = |data| EpollEvent::new(EpollFlags::EPOLLIN, data);
        epoll
            .add(shared.event.as_fd(), readable(EVENT))
            .map_err(io("watch a fabric's event"))?;
        if let Some(listener) = &listener {
            epoll
                .add(listener, readable(LISTENER))
                .map_err(io("watch a listening socket"))?;
        }
        Ok(Self {
            tick: (shared.limit / 8).clamp(TICK.0, TICK.1),
            shared: Arc::clone(shared),
            epoll,
            listener,
            connections: HashMap::new(),
            next: LISTENER + 1,
            busy: Vec::new(),
            ticked: Instant::now(),
        })
    }

    pub(super) fn run(mut self) {
        let mut events = [EpollEvent::empty(); 64];
        let mut quiet: Option<Instant> = None;
        while !self.shared.stop.load(Ordering::Acquire) {
            let spins = quiet.is_some_and(|since| since.elapsed() < SPIN);
            let timeout = if spins || !self.busy.is_empty() {
                EpollTimeout::ZERO
            } else if self.connections.is_empty() && !self.shared.has_peers() {
                EpollTimeout::NONE
            } else {
                let left = self.tick.saturating_sub(self.ticked.elapsed());
                EpollTimeout::try_from(left + Duration::from_millis(1))
                    .unwrap_or(EpollTimeout::ZERO)
            };
            let ready = match self.epoll.wait(&mut events, timeout) {
                Ok(ready) => ready,
                Err(Errno::EINTR) => 0,
                Err(why) => {
                    tracing::error!(%why, "a fabric cannot wait for its links");
                    break;
                }
            };
            let mut worked = !self.busy.is_empty();
            for event in &events[..ready] {
                match event.data() {
                    EVENT => self.shared.event.clear(),
                    LISTENER => self.accept(),
                    token => {
                        worked = true;
                        self.serve(token);
                    }
                }
            }
            for token in std::mem::take(&mut self.busy) {
                self.serve(token);
            }
            self.obey();
            if self.ticked.elapsed() >= self.tick {
                self.ticked = Instant::now();
                self.look_after();
            }
            if worked {
                quiet = Some(Instant::now());
            } else if spins {
                std::thread::yield_now();
            }
        }
        for (_, connection) in self.connections.drain() {
            match connection {
                Connection::Link(link) => link.lose(LinkError::Closed),
                Connection::Dial(dial) => dial.peer.ended(Err(LinkError::Closed)),
                Connection::Stranger(_) | Connection::Guest(_) => {}
            }
        }
    }

    /// What other threads ask of this one.
    fn obey(&mut self) {
        for peer in self.shared.take_dials() {
            self.dial(&peer);
        }
        let news = self.shared.take_news();
        if !news.is_empty() {
            let frames: Vec<_> = news
                .iter()
                .map(|(joined, address)| {
                    if *joined {
                        Frame::Node(*address)
                    } else {
                        Frame::Left(*address)
                    }
                })
                .collect();
            for connection in self.connections.values() {
                if let Connection::Link(link) = connection
                    && let Err(why) = link.say(&frames)
                {
                    link.lose(why);
                }
            }
        }
        self.connections.retain(
            |_, connection| !matches!(connection, Connection::Link(link) if link.is_lost()),
        );
    }

    /// By edges: what is there when a socket is added is seen as well.
    fn watch(&mut self, stream: &TcpStream) -> Option<u64> {
        let token = self.next;
        self.next += 1;
        let flags = EpollFlags::EPOLLIN
            | EpollFlags::EPOLLOUT
            | EpollFlags::EPOLLRDHUP
            | EpollFlags::EPOLLET;
        let added = self.epoll.add(stream, EpollEvent::new(flags, token));
        added.is_ok().then_some(token)
    }

    fn dial(&mut self, peer: &Arc<Peer>) {
        let Ok(stream) = begin(peer.at) else {
            return peer.ended(Err(LinkError::Unreachable));
        };
        let Some(token) = self.watch(&stream) else {
            return peer.ended(Err(LinkError::Unreachable));
        };
        let dial = Dial {
            peer: Arc::clone(peer),
            stream,
            hands: None,
            until: Instant::now() + self.shared.limit,
        };
        self.connections.insert(token, Connection::Dial(dial));
    }

    fn accept(&mut self) {
        // Level-triggered: what is left is seen again.
        for _ in 0..16 {
            let Some(listener) = &self.listener else {
                return;
            };
            let (stream, from) = match listener.accept() {
                Ok(accepted) => accepted,
                Err(why) => {
                    if matches!(
                        why.raw_os_error().map(Errno::from_raw),
                        Some(Errno::EMFILE | Errno::ENFILE | Errno::ENOMEM | Errno::ENOBUFS)
                    ) {
                        tracing::warn!("too many descriptors are open: peers wait");
                        std::thread::sleep(Duration::from_millis(5));
                    }
                    return;
                }
            };
            let count = |what: fn(&Connection) -> bool| {
                self.connections.values().filter(|one| what(one)).count()
            };
            if count(|one| matches!(one, Connection::Stranger(_))) >= MAX_STRANGERS
                || count(|one| matches!(one, Connection::Guest(_))) >= MAX_GUESTS
            {
                // The listening socket's queue is no place to wait for who may be a peer: he tries
                // again.
                continue;
            }
            let set = stream
                .set_nonblocking(true)
                .and_then(|()| stream.set_nodelay(true));
            let Ok(hands) = Handshake::accept(&self.shared.key) else {
                continue;
            };
            if set.is_err() {
                continue;
            }
            if let Some(token) = self.watch(&stream) {
                let stranger = Stranger {
                    stream,
                    from,
                    hands,
                    until: Instant::now() + self.shared.limit,
                };
                self.connections
                    .insert(token, Connection::Stranger(stranger));
            }
        }
    }

    /// Something has happened to a connection.
    fn serve(&mut self, token: u64) {
        let Some(connection) = self.connections.remove(&token) else {
            return;
        };
        let stays = match connection {
            Connection::Dial(dial) => self.shake(token, dial),
            Connection::Stranger(stranger) => self.greet(token, stranger),
            Connection::Link(link) => {
                if let Err(why) = link.writable() {
                    link.lose(why);
                }
                if link.progress() {
                    self.busy.push(token);
                }
                (!link.is_lost()).then_some(Connection::Link(link))
            }
            Connection::Guest(guest) => self.host(token, guest),
        };
        if let Some(stays) = stays {
            self.connections.insert(token, stays);
        }
    }

    fn host(&mut self, token: u64, mut guest: Box<Guest>) -> Option<Connection> {
        match guest.turn(&self.shared) {
            Ok(more) => {
                if more {
                    self.busy.push(token);
                }
                Some(Connection::Guest(guest))
            }
            Err(LinkError::Closed) => None,
            Err(why) => {
                tracing::warn!(%why, "a peer's link is given up");
                None
            }
        }
    }

    fn shake(&mut self, token: u64, mut dial: Dial) -> Option<Connection> {
        match self.shake_on(&mut dial) {
            Ok(None) => Some(Connection::Dial(dial)),
            Ok(Some((sender, receiver))) => {
                let link = Link::new(dial.stream, &dial.peer, &self.shared, sender, receiver);
                if let Err(why) = link.say(&self.shared.introduction()) {
                    dial.peer.ended(Err(why));
                    return None;
                }
                dial.peer.ended(Ok(Arc::clone(&link)));
                // What came behind the handshake has had its edge.
                self.busy.push(token);
                Some(Connection::Link(link))
            }
            Err(why) => {
                dial.peer.ended(Err(why));
                None
            }
        }
    }

    fn shake_on(&self, dial: &mut Dial) -> Result<Option<(Sender, Receiver)>, LinkError> {
        if dial.hands.is_none() {
            match dial.stream.take_error() {
                Ok(None) => {}
                Ok(Some(_)) | Err(_) => return Err(LinkError::Unreachable),
            }
            if dial.stream.peer_addr().is_err() {
                // Not decided yet.
                return Ok(None);
            }
            // A port of this machine from which it dials may be the one it dials.
            let (own, other) = (dial.stream.local_addr(), dial.stream.peer_addr());
            if own.is_ok_and(|own| other.is_ok_and(|other| own == other)) {
                return Err(LinkError::Unreachable);
            }
            dial.stream
                .set_nodelay(true)
                .map_err(|_| LinkError::Closed)?;
            dial.hands = Some(Handshake::dial(&self.shared.key, &dial.stream)?);
        }
        match &mut dial.hands {
            Some(hands) => ready(hands.go_on(&dial.stream)?),
            None => Ok(None),
        }
    }

    fn greet(&mut self, token: u64, mut stranger: Stranger) -> Option<Connection> {
        let from = stranger.from;
        match stranger.hands.go_on(&stranger.stream).and_then(ready) {
            Ok(None) => Some(Connection::Stranger(stranger)),
            Ok(Some((sender, receiver))) => {
                let now = self.shared.now();
                let guest = Guest::new(stranger.stream, from, sender, receiver, now);
                let mut guest = Box::new(guest);
                guest.say(&[self.shared.hello()]).ok()?;
                self.busy.push(token);
                Some(Connection::Guest(guest))
            }
            Err(why) => {
                tracing::warn!(%from, %why, "somebody was not let in");
                None
            }
        }
    }

    /// Ends what takes too long, and asks for signs of life.
    fn look_after(&mut self) {
        let now = Instant::now();
        let (millis, limit) = (self.shared.now(), self.shared.limit);
        self.connections.retain(|_, connection| match connection {
            Connection::Dial(dial) => {
                let goes_on = now < dial.until;
                if !goes_on {
                    let connected = dial.hands.is_some();
                    let why = if connected {
                        LinkError::Late
                    } else {
                        LinkError::Unreachable
                    };
                    dial.peer.ended(Err(why));
                }
                goes_on
            }
            Connection::Stranger(stranger) => now < stranger.until,
            Connection::Link(link) => {
                link.tick();
                !link.is_lost()
            }
            Connection::Guest(guest) => !guest.is_silent(millis, limit),
        });
        let mut down = false;
        for peer in self.shared.peers() {
            down |= peer.tick(&self.shared);
        }
        self.tick = if down {
            TICK_DOWN
        } else {
            (limit / 8).clamp(TICK.0, TICK.1)
        };
        self.obey();
    }
}

fn ready(progress: Progress) -> Result<Option<(Sender, Receiver)>, LinkError> {
    match progress {
        Progress::Wait => Ok(None),
        Progress::Done(cipher) => Ok(Some((
            Sender::new(Arc::clone(&cipher)),
            Receiver::new(cipher),
        ))),
    }
}
