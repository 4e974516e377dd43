//! The handshake: a small exchange over TCP, out of band. Whoever wants a connection says how its
//! queue pair is reached, and hears how the other is. The stream stays open as long as the connection:
//! over it the initiator asks for the device's keys, hears what became of its messages, and notices
//! that the other side is gone.
//!
//! Every frame has 64 bytes. What comes may be anything; what is no frame ends the stream.

use std::io::{self, Read, Write};
use std::net::{SocketAddrV4, TcpStream};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrIn, connect, socket};

use super::device::Endpoint;
use crate::fabric::DcAddress;
use crate::node::NodeId;
use crate::region::RKey;

pub(super) const FRAME: usize = 64;
const MAGIC: u32 = 0x4B52_5601;

/// What the two sides say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Frame {
    /// Connect me with the node of this key.
    Hello { key: u32, endpoint: Endpoint },
    /// You are connected.
    Ready { endpoint: Endpoint },
    /// You are not: no such node, or no more connections.
    Refused,
    /// Who are you?
    Ask,
    /// This.
    Here { node: NodeId, address: DcAddress },
    /// By which key does your device know this region?
    Find { region: RKey },
    /// By this, and it begins there; nothing where there is no such region.
    Found { region: RKey, place: Option<Place> },
    /// The message of this number has gone to a listener, or nobody had room.
    Delivered { message: u64, taken: bool },
}

/// A region, as the device of its node knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) key: u32,
    pub(super) address: u64,
}

struct Writer([u8; FRAME], usize);

impl Writer {
    fn put(mut self, bytes: &[u8]) -> Self {
        let end = self.1 + bytes.len();
        if let Some(to) = self.0.get_mut(self.1..end) {
            to.copy_from_slice(bytes);
        }
        self.1 = end;
        self
    }

    fn small(self, value: u32) -> Self {
        self.put(&value.to_le_bytes())
    }

    fn word(self, value: u64) -> Self {
        self.put(&value.to_le_bytes())
    }

    fn endpoint(self, endpoint: &Endpoint) -> Self {
        self.small(endpoint.number)
            .small(endpoint.first_packet)
            .small(u32::from(endpoint.lid))
            .small(u32::from(endpoint.mtu) | u32::from(endpoint.reads) << 8)
            .put(&endpoint.gid)
    }
}

struct Reader<'a>(&'a [u8; FRAME], usize);

impl Reader<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        if let Some(from) = self.0.get(self.1..self.1 + N) {
            bytes.copy_from_slice(from);
        }
        self.1 += N;
        bytes
    }

    fn small(&mut self) -> u32 {
        u32::from_le_bytes(self.take())
    }

    fn word(&mut self) -> u64 {
        u64::from_le_bytes(self.take())
    }

    fn endpoint(&mut self) -> Endpoint {
        let (number, first_packet, lid, more) =
            (self.small(), self.small(), self.small(), self.small());
        Endpoint {
            number,
            first_packet,
            lid: lid as u16,
            mtu: more as u8,
            reads: (more >> 8) as u8,
            gid: self.take(),
        }
    }
}

impl Frame {
    pub(super) fn encode(&self) -> [u8; FRAME] {
        let to = |kind| Writer([0; FRAME], 0).small(MAGIC).small(kind);
        let done = match self {
            Self::Hello { key, endpoint } => to(1).small(*key).endpoint(endpoint),
            Self::Ready { endpoint } => to(2).endpoint(endpoint),
            Self::Refused => to(3),
            Self::Ask => to(4),
            Self::Here { node, address } => to(5)
                .word(node.0)
                .small(address.number)
                .small(address.key)
                .small(u32::from(address.lid) | u32::from(address.gid) << 16),
            Self::Find { region } => to(6).small(region.0),
            Self::Found { region, place } => to(7)
                .small(region.0)
                .small(u32::from(place.is_some()))
                .small(place.map_or(0, |place| place.key))
                .word(place.map_or(0, |place| place.address)),
            Self::Delivered { message, taken } => to(8).word(*message).small(u32::from(*taken)),
        };
        done.0
    }

    pub(super) fn decode(bytes: &[u8; FRAME]) -> Option<Self> {
        let mut from = Reader(bytes, 0);
        if from.small() != MAGIC {
            return None;
        }
        Some(match from.small() {
            1 => Self::Hello {
                key: from.small(),
                endpoint: from.endpoint(),
            },
            2 => Self::Ready {
                endpoint: from.endpoint(),
            },
            3 => Self::Refused,
            4 => Self::Ask,
            5 => {
                let node = NodeId(from.word());
                let (number, key, more) = (from.small(), from.small(), from.small());
                let address = DcAddress {
                    number,
                    key,
                    lid: more as u16,
                    gid: (more >> 16) as u16,
                };
                Self::Here { node, address }
            }
            6 => Self::Find {
                region: RKey(from.small()),
            },
            7 => {
                let (region, there) = (RKey(from.small()), from.small());
                let (key, address) = (from.small(), from.word());
                let place = (there == 1).then_some(Place { key, address });
                Self::Found { region, place }
            }
            8 => Self::Delivered {
                message: from.word(),
                taken: from.small() == 1,
            },
            _ => return None,
        })
    }
}

/// A stream of frames that never waits.
#[derive(Debug)]
pub(super) struct Stream {
    stream: TcpStream,
    /// What has come of the next frame.
    part: Vec<u8>,
}

impl Stream {
    pub(super) fn over(stream: TcpStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        let _only_slower = stream.set_nodelay(true);
        Ok(Self {
            stream,
            part: Vec::with_capacity(FRAME),
        })
    }

    /// Begins to connect: when the stream can be written to, it is or it has failed.
    pub(super) fn connect(to: SocketAddrV4) -> io::Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let fd: OwnedFd = socket(AddressFamily::Inet, SockType::Stream, flags, None)?;
        match connect(fd.as_raw_fd(), &SockaddrIn::from(to)) {
            Ok(()) | Err(Errno::EINPROGRESS) => Self::over(TcpStream::from(fd)),
            Err(why) => Err(why.into()),
        }
    }

    /// Whether a connect that was begun has come to its end.
    pub(super) fn is_connected(&self) -> io::Result<bool> {
        if let Some(why) = self.stream.take_error()? {
            return Err(why);
        }
        match self.stream.peer_addr() {
            Ok(_) => Ok(true),
            Err(why) if why.kind() == io::ErrorKind::NotConnected => Ok(false),
            Err(why) => Err(why),
        }
    }

    /// False where the other side does not read: no side ever has so much under way that a socket's
    /// buffer would be full.
    #[must_use]
    pub(super) fn send(&mut self, frame: &Frame) -> bool {
        matches!(self.stream.write(&frame.encode()), Ok(FRAME))
    }

    /// Gives every frame that has come to `take`; false where the stream has ended, or what came is
    /// no frame.
    #[must_use]
    pub(super) fn receive(&mut self, mut take: impl FnMut(Frame)) -> bool {
        let mut bytes = [0; FRAME];
        loop {
            let missing = FRAME - self.part.len();
            match self.stream.read(&mut bytes[..missing]) {
                Ok(0) => return false,
                Ok(some) => self.part.extend_from_slice(&bytes[..some]),
                Err(why) if why.kind() == io::ErrorKind::WouldBlock => return true,
                Err(why) if why.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return false,
            }
            if let Ok(whole) = <&[u8; FRAME]>::try_from(self.part.as_slice()) {
                let frame = Frame::decode(whole);
                self.part.clear();
                match frame {
                    Some(frame) => take(frame),
                    None => return false,
                }
            }
        }
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_says_what_it_was_made_of_and_nothing_else_is_one() {
        let endpoint = Endpoint {
            number: 0xAB_CDEF,
            first_packet: 0x12_3456,
            lid: 7,
            mtu: 3,
            reads: 16,
            gid: [9; 16],
        };
        let address = DcAddress {
            number: u32::MAX,
            key: 3,
            lid: u16::MAX,
            gid: 5,
        };
        let place = Place {
            key: 5,
            address: u64::MAX,
        };
        let region = RKey(u32::MAX);
        for frame in [
            Frame::Hello { key: 77, endpoint },
            Frame::Ready { endpoint },
            Frame::Refused,
            Frame::Ask,
            Frame::Here {
                node: NodeId(u64::MAX),
                address,
            },
            Frame::Find { region },
            Frame::Found {
                region,
                place: Some(place),
            },
            Frame::Found {
                region,
                place: None,
            },
            Frame::Delivered {
                message: 1 << 40,
                taken: true,
            },
        ] {
            let mut bytes = frame.encode();
            assert_eq!(Frame::decode(&bytes), Some(frame));
            bytes[0] ^= 1;
            assert_eq!(Frame::decode(&bytes), None);
        }
        let mut rng = fastrand::Rng::with_seed(7);
        for _ in 0..10_000 {
            let mut bytes = [0; FRAME];
            rng.fill(&mut bytes);
            bytes[..4].copy_from_slice(&MAGIC.to_le_bytes());
            bytes[4..8].copy_from_slice(&rng.u32(0..12).to_le_bytes());
            let _any = Frame::decode(&bytes);
        }
    }
}
