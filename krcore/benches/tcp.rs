//! Figure 4e: READs of 8 bytes by the TCP fabric, beside a request and its reply on a TCP connection
//! of one's own.
#![allow(
    clippy::unwrap_used,
    missing_docs,
    reason = "a bench says what went wrong by failing"
)]

mod rig;

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};

use carlsbad_kit::child::{self, Role};
use carlsbad_kit::figure::{Figure, is_quick};
use carlsbad_kit::sample::interleave;
use krcore::{
    Access, ByteSize, Config, Node, NodeId, Op, PresharedKey, RKey, RemoteSlice, Status, TcpFabric,
    TcpOptions, WorkRequest,
};
use rig::{SECOND, micros};

const ROLE: &str = "tcp-peer";
/// A request names a key, an offset and a length, and whose it is; the reply has 8 bytes.
const REQUEST: usize = 32;
const REPLY: usize = 8;

fn loopback(port: u16) -> SocketAddr {
    (Ipv4Addr::LOCALHOST, port).into()
}

fn options() -> TcpOptions {
    TcpOptions {
        listen: Some(loopback(0)),
        ..TcpOptions::new(PresharedKey::new([3; 32]))
    }
}

/// Answers requests, each when it has come, as a server with a thread for each connection does.
fn answer(listener: &TcpListener) {
    let (mut stream, _) = listener.accept().unwrap();
    stream.set_nodelay(true).unwrap();
    let mut request = [0; REQUEST];
    while stream.read_exact(&mut request).is_ok() {
        stream.write_all(&request[..REPLY]).unwrap();
    }
}

/// Plays the peer, if this process was started as one.
fn play() -> bool {
    if child::arguments::<u32>(ROLE).is_none() {
        return false;
    }
    let fabric = TcpFabric::new(options()).unwrap();
    let at = fabric.local_addr().unwrap();
    let node = Node::embedded(fabric, NodeId(1), Config::default()).unwrap();
    let region = node.register(ByteSize::kib(4), Access::Read).unwrap();
    let listener = TcpListener::bind(loopback(0)).unwrap();
    let raw = listener.local_addr().unwrap();
    std::thread::spawn(move || answer(&listener));
    child::tell(format!(
        "peer {} {} {}",
        at.port(),
        raw.port(),
        region.key().0
    ));
    child::wait_for_parent();
    true
}

fn main() {
    if play() {
        return;
    }
    let samples = if is_quick() { 1 } else { 31 };
    let rounds = if is_quick() { 100 } else { 5000 };
    let peer = Role::main(ROLE).start(&0_u32).unwrap();
    let said = peer.hear("peer").unwrap();
    let said: Vec<u32> = said
        .split_whitespace()
        .filter_map(|word| word.parse().ok())
        .collect();
    assert_eq!(said.len(), 3, "the peer said {said:?}");
    let (at, raw, key) = (said[0], said[1], said[2]);
    let mut ours = options();
    ours.peers.insert(NodeId(1), loopback(at as u16));
    let fabric = TcpFabric::new(ours).unwrap();
    let node = Node::embedded(fabric, NodeId(2), Config::default()).unwrap();
    let near = node.register(ByteSize::kib(4), Access::Local).unwrap();
    let remote = RemoteSlice {
        key: RKey(key),
        offset: 8,
    };
    let read = WorkRequest::new(1, Op::Read, near.slice(0, 8), remote);
    let mut queue = node.connect(NodeId(1), SECOND).unwrap();
    let mut stream = TcpStream::connect(loopback(raw as u16)).unwrap();
    stream.set_nodelay(true).unwrap();
    let both = interleave(
        1,
        samples,
        || {
            micros(rounds, || {
                queue.post(std::slice::from_ref(&read)).unwrap();
                assert_eq!(queue.wait(SECOND).unwrap().status, Status::Success);
            })
        },
        || {
            let mut bytes = [0; REQUEST];
            micros(rounds, || {
                stream.write_all(&bytes).unwrap();
                stream.read_exact(&mut bytes[..REPLY]).unwrap();
            })
        },
    );
    let what = "READ of 8 bytes over TCP (loopback): checked, encrypted, on a shared pair";
    let figure = Figure::new("krcore/4e", what, "us");
    let rival = "TCP request + reply, blocking, in clear";
    let note = "ours looks for the reply 20 us, and the peer for requests 50 us, before sleeping";
    figure.against(rival, both).note(note).emit().unwrap();
}
