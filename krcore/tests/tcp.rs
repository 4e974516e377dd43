//! Nodes on different machines: links that are cut, stalled, forged and garbled, peers that die and
//! come back, and two daemons with a process attached to each.
#![cfg(feature = "tcp")]
#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

mod common;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::{SECOND, config, rounds, tcp_options, word};
use krcore::fabric::tcp::{LinkError, LinkState};
use krcore::{
    Access, ByteSize, Completion, Error, Malformed, MemoryRegion, Node, NodeId, Op, PresharedKey,
    Service, Status, TcpFabric, TcpOptions, VirtualQueue, WorkRequest,
};

const LIMIT: Duration = Duration::from_millis(200);

fn options() -> TcpOptions {
    TcpOptions {
        limit: LIMIT,
        ..tcp_options()
    }
}

fn until(what: &str, limit: Duration, mut done: impl FnMut() -> bool) -> Duration {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < limit, "{what} took longer than {limit:?}");
        std::thread::sleep(Duration::from_millis(1));
    }
    start.elapsed()
}

/// Stands between two nodes, and does what a network may do.
struct Proxy {
    at: SocketAddr,
    mode: Arc<AtomicU8>,
    streams: Arc<Mutex<Vec<TcpStream>>>,
}

const PASS: u8 = 0;
/// Takes everything, and passes nothing on.
const STALL: u8 = 1;
/// Changes a bit of what is passed on.
const FORGE: u8 = 2;

impl Proxy {
    fn to(target: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let at = listener.local_addr().unwrap();
        let mode = Arc::new(AtomicU8::new(PASS));
        let streams = Arc::new(Mutex::new(Vec::new()));
        let (shared, all) = (Arc::clone(&mode), Arc::clone(&streams));
        // It ends with the process of the test.
        std::thread::spawn(move || {
            for near in listener.incoming() {
                let (near, Ok(far)) = (near.unwrap(), TcpStream::connect(target)) else {
                    continue;
                };
                for (from, to) in [(&near, &far), (&far, &near)] {
                    let mut from = from.try_clone().unwrap();
                    let mut to = to.try_clone().unwrap();
                    let mode = Arc::clone(&shared);
                    std::thread::spawn(move || {
                        let mut bytes = [0; 8192];
                        while let Ok(read @ 1..) = from.read(&mut bytes) {
                            match mode.load(Ordering::SeqCst) {
                                STALL => continue,
                                FORGE => bytes[read - 1] ^= 1,
                                _ => {}
                            }
                            if to.write_all(&bytes[..read]).is_err() {
                                break;
                            }
                        }
                        let _gone = to.shutdown(std::net::Shutdown::Both);
                    });
                }
                all.lock().unwrap().extend([near, far]);
            }
        });
        Self { at, mode, streams }
    }

    fn set(&self, mode: u8) {
        self.mode.store(mode, Ordering::SeqCst);
    }

    fn cut(&self) {
        for stream in self.streams.lock().unwrap().drain(..) {
            let _gone = stream.shutdown(std::net::Shutdown::Both);
        }
    }
}

/// A client whose way to the server leads through a proxy.
struct Rig {
    proxy: Proxy,
    server: Node,
    client: Node,
    far: Arc<MemoryRegion>,
    near: Arc<MemoryRegion>,
}

const SIZE: u64 = 32 << 20;

fn rig() -> Rig {
    let there = TcpFabric::new(options()).unwrap();
    let proxy = Proxy::to(there.local_addr().unwrap());
    let mut ours = options();
    ours.peers.insert(NodeId(1), proxy.at);
    let fabric = TcpFabric::new(ours).unwrap();
    let server = Node::embedded(there, NodeId(1), config()).unwrap();
    let client = Node::embedded(fabric.clone(), NodeId(2), config()).unwrap();
    let far = server
        .register(ByteSize::new(SIZE), Access::ReadWrite)
        .unwrap();
    let near = client
        .register(ByteSize::new(SIZE), Access::ReadWrite)
        .unwrap();
    Rig {
        proxy,
        server,
        client,
        far,
        near,
    }
}

impl Rig {
    fn connect(&self) -> VirtualQueue {
        self.client.connect(NodeId(1), SECOND).unwrap()
    }

    fn read(&self, id: u64, len: u64) -> WorkRequest {
        WorkRequest::new(id, Op::Read, self.near.slice(0, len), self.far.remote(0))
    }

    fn add(&self, id: u64) -> WorkRequest {
        let add = Op::FetchAdd { add: 1 };
        WorkRequest::new(id, add, self.near.slice(8, 8), self.far.remote(8))
    }

    /// There is a link, or soon will be.
    fn go_on(&self) {
        until("a link", SECOND, || {
            let Ok(mut queue) = self.client.connect(NodeId(1), SECOND) else {
                return false;
            };
            if queue.post(&[self.read(77, 8)]).is_err() {
                return false;
            }
            let done = queue.wait(SECOND).unwrap();
            assert_eq!(done.id, 77);
            done.status == Status::Success
        });
    }
}

/// All of these complete, in order, and say how many succeeded.
fn ends(queue: &mut VirtualQueue, count: u64, limit: Duration) -> (u64, Duration) {
    let start = Instant::now();
    let mut succeeded = 0;
    for id in 0..count {
        let done = queue.wait(limit).unwrap();
        assert_eq!(done.id, id, "each once, in order");
        match done.status {
            Status::Success => {
                assert_eq!(succeeded, id, "nothing succeeds behind a failure");
                succeeded += 1;
            }
            Status::RetryExceeded | Status::Flushed => {}
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(queue.poll(&mut [Completion::default()]), 0, "nothing twice");
    (succeeded, start.elapsed())
}

#[test]
fn a_link_that_is_cut_in_mid_operation_fails_what_is_out_and_comes_back() {
    let rig = rig();
    let mut rng = carlsbad_kit::seed::rng("cut");
    let mut failed = 0;
    for _ in 0..rounds(15, 200) {
        let mut queue = rig.connect();
        let before = word(&rig.far, 8);
        let mut work: Vec<_> = (0..20).map(|id| rig.add(id)).collect();
        work.push(rig.read(20, SIZE));
        work.extend((21..60).map(|id| rig.add(id)));
        queue.post(&work).unwrap();
        std::thread::sleep(Duration::from_micros(rng.u64(0..12_000)));
        rig.proxy.cut();
        let (succeeded, took) = ends(&mut queue, 60, 3 * SECOND);
        failed += u64::from(succeeded < 60);
        assert!(took < SECOND, "{took:?}");
        let done = word(&rig.far, 8) - before;
        let adds = succeeded - u64::from(succeeded > 20);
        assert!(
            (adds..=59).contains(&done),
            "{adds} adds succeeded, {done} were done"
        );
        drop(queue);
        rig.go_on();
    }
    assert!(
        failed > 0,
        "every cut came too late: the test shows nothing"
    );
}

#[test]
fn a_link_that_falls_silent_fails_what_is_out_within_the_limit() {
    let rig = rig();
    rig.go_on();
    let mut queue = rig.connect();
    queue.post(&[rig.add(0)]).unwrap();
    assert_eq!(queue.wait(SECOND).unwrap().status, Status::Success);
    rig.proxy.set(STALL);
    let work: Vec<_> = (0..30).map(|id| rig.add(id)).collect();
    queue.post(&work).unwrap();
    let (succeeded, took) = ends(&mut queue, 30, 3 * SECOND);
    assert_eq!(succeeded, 0);
    assert!(took < 2 * LIMIT, "{took:?}");
    // While it is silent nobody gets in, and everybody is told so in time.
    let start = Instant::now();
    let lost = rig.client.connect(NodeId(1), SECOND);
    if let Ok(mut queue) = lost {
        let refused = queue.post(&[rig.add(0)]);
        assert!(refused.is_err_and(|why| why.why == Malformed::PeerGone));
    }
    assert!(start.elapsed() < 2 * SECOND);
    rig.proxy.set(PASS);
    rig.go_on();
}

#[test]
fn what_is_changed_on_the_way_ends_the_link_and_is_not_executed() {
    let rig = rig();
    rig.go_on();
    let mut queue = rig.connect();
    queue.post(&[rig.add(0)]).unwrap();
    assert_eq!(queue.wait(SECOND).unwrap().status, Status::Success);
    let before = word(&rig.far, 8);
    rig.proxy.set(FORGE);
    let work: Vec<_> = (0..10).map(|id| rig.add(id)).collect();
    queue.post(&work).unwrap();
    assert_eq!(ends(&mut queue, 10, 3 * SECOND).0, 0);
    assert_eq!(word(&rig.far, 8), before, "it was executed");
    rig.proxy.set(PASS);
    rig.go_on();
}

#[test]
fn megabytes_go_both_ways_at_once_and_arrive_whole() {
    let rig = rig();
    let back = rig
        .server
        .register(ByteSize::new(SIZE), Access::Local)
        .unwrap();
    let mut bytes = vec![0; SIZE as usize];
    fastrand::Rng::with_seed(5).fill(&mut bytes);
    let half = SIZE / 2;
    assert!(rig.far.write(0, &bytes[..half as usize]));
    assert!(rig.near.write(half, &bytes[half as usize..]));
    std::thread::scope(|scope| {
        // The server was told nothing of where the client is: it has said so itself.
        scope.spawn(|| {
            rig.go_on();
            let mut queue = rig.server.connect(NodeId(2), SECOND).unwrap();
            let read = WorkRequest::new(1, Op::Read, back.slice(half, half), rig.near.remote(half));
            queue.post(&[read]).unwrap();
            assert_eq!(queue.wait(10 * SECOND).unwrap().status, Status::Success);
        });
        let mut queue = rig.connect();
        let write = WorkRequest::new(
            1,
            Op::Write,
            rig.near.slice(half, half),
            rig.far.remote(half),
        );
        queue.post(&[rig.read(0, half), write]).unwrap();
        for id in 0..2 {
            let done = queue.wait(10 * SECOND).unwrap();
            assert_eq!((done.id, done.status), (id, Status::Success));
        }
    });
    let mut got = vec![0; SIZE as usize];
    assert!(rig.near.read(0, &mut got[..half as usize]));
    assert!(rig.far.read(half, &mut got[half as usize..]));
    assert!(got == bytes, "READ or WRITE");
    assert!(back.read(half, &mut got[half as usize..]));
    assert!(got == bytes, "READ by the server");
}

#[test]
fn requests_of_one_pair_to_many_nodes_are_executed_in_order() {
    let servers: Vec<_> = (10..13)
        .map(|_| TcpFabric::new(options()).unwrap())
        .collect();
    let mut ours = options();
    for (id, fabric) in (10..).zip(&servers) {
        ours.peers.insert(NodeId(id), fabric.local_addr().unwrap());
    }
    let fabric = TcpFabric::new(ours).unwrap();
    let client = Node::embedded(fabric.clone(), NodeId(1), config()).unwrap();
    let mut nodes: Vec<_> = (10..)
        .zip(servers)
        .map(|(id, fabric)| Node::embedded(fabric, NodeId(id), config()).unwrap())
        .collect();
    // And one that is here.
    nodes.push(Node::embedded(fabric, NodeId(20), config()).unwrap());
    let near = client.register(ByteSize::kib(4), Access::Local).unwrap();
    let mut all: Vec<_> = nodes
        .iter()
        .map(|node| {
            let far = node.register(ByteSize::kib(4), Access::ReadWrite).unwrap();
            (far, client.connect(node.id(), SECOND).unwrap(), 0, 0)
        })
        .collect();
    let mut rng = carlsbad_kit::seed::rng("many_nodes");
    for _ in 0..rounds(3000, 100_000) {
        let (far, queue, posted, seen) = &mut all[rng.usize(..4)];
        let swap = Op::CompareSwap {
            expected: *posted,
            new: *posted + 1,
        };
        let work = WorkRequest::new(*posted, swap, near.slice(0, 8), far.remote(0));
        *posted += queue.post(&[work]).unwrap() as u64;
        let mut out = [Completion::default(); 4];
        let taken = queue.poll(&mut out);
        for done in &out[..taken] {
            assert_eq!((done.id, done.status), (*seen, Status::Success));
            *seen += 1;
        }
    }
    for (far, queue, posted, seen) in &mut all {
        while seen < posted {
            let done = queue.wait(SECOND).unwrap();
            assert_eq!((done.id, done.status), (*seen, Status::Success));
            *seen += 1;
        }
        assert_eq!(word(far, 0), *posted, "all in order");
    }
    assert_eq!(client.stats().unwrap().rebuilt, 0);
}

#[test]
fn another_key_another_version_and_nobody_are_told_apart() {
    let there = TcpFabric::new(TcpOptions {
        key: PresharedKey::new([8; 32]),
        ..options()
    })
    .unwrap();
    let _server = Node::embedded(there.clone(), NodeId(1), config()).unwrap();
    let old = TcpListener::bind("127.0.0.1:0").unwrap();
    let mute = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut ours = options();
    ours.peers = [
        (NodeId(1), there.local_addr().unwrap()),
        (NodeId(2), old.local_addr().unwrap()),
        (NodeId(3), mute.local_addr().unwrap()),
        (NodeId(4), "127.0.0.1:1".parse().unwrap()),
    ]
    .into();
    std::thread::spawn(move || {
        for stream in old.incoming() {
            let _gone = stream.unwrap().write_all(b"KRTC\x63\0\0\0");
        }
    });
    let fabric = TcpFabric::new(ours).unwrap();
    let client = Node::embedded(fabric.clone(), NodeId(9), config()).unwrap();
    for (node, why) in [
        (1, LinkError::WrongKey),
        (
            2,
            LinkError::Version {
                ours: 1,
                theirs: 99,
            },
        ),
        (3, LinkError::Late),
        (4, LinkError::Unreachable),
    ] {
        let start = Instant::now();
        let refused = client.connect(NodeId(node), 5 * SECOND);
        assert!(matches!(refused, Err(Error::UnknownNode(_))), "{refused:?}");
        assert!(start.elapsed() < 4 * LIMIT, "{:?}", start.elapsed());
        assert_eq!(fabric.link(NodeId(node)), Some(LinkState::Down(why)));
    }
    assert_eq!(fabric.link(NodeId(5)), None);
}

#[test]
fn garbage_and_silence_from_strangers_disturb_no_link() {
    let rig = rig();
    rig.go_on();
    let at = rig.server_at();
    let mut rng = carlsbad_kit::seed::rng("garbage");
    let mut queue = rig.connect();
    let mut silent = Vec::new();
    for round in 0..rounds(300, 5000) as u64 {
        let mut stream = TcpStream::connect(at).unwrap();
        let mut bytes = vec![0; rng.usize(..2000)];
        rng.fill(&mut bytes);
        if rng.bool() && bytes.len() > 8 {
            bytes[..8].copy_from_slice(b"KRTC\x01\0\0\0");
        }
        let _gone = stream.write_all(&bytes);
        if round % 3 == 0 {
            silent.push(TcpStream::connect(at).unwrap());
        }
        queue.post(&[rig.add(round)]).unwrap();
        let done = queue.wait(SECOND).unwrap();
        assert_eq!((done.id, done.status), (round, Status::Success));
    }
    // Those who say nothing are shown the door.
    for mut stream in silent {
        stream.set_read_timeout(Some(5 * LIMIT)).unwrap();
        let ended = stream.read(&mut [0; 16]);
        assert!(!matches!(ended, Ok(1..)), "{ended:?}");
        if let Err(why) = ended {
            assert_ne!(why.kind(), std::io::ErrorKind::WouldBlock, "it is kept");
        }
    }
    rig.proxy.cut();
    rig.go_on();
}

impl Rig {
    /// Where the server itself listens.
    fn server_at(&self) -> SocketAddr {
        let streams = self.proxy.streams.lock().unwrap();
        streams[1].peer_addr().unwrap()
    }
}

#[test]
fn a_peer_that_comes_back_is_reached_within_100_ms() {
    let fixed = {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listener.local_addr().unwrap()
    };
    let mut ours = options();
    ours.peers.insert(NodeId(1), fixed);
    let fabric = TcpFabric::new(ours).unwrap();
    let client = Node::embedded(fabric.clone(), NodeId(2), config()).unwrap();
    let near = client.register(ByteSize::kib(4), Access::Local).unwrap();
    let mut slowest = Duration::ZERO;
    for _ in 0..rounds(5, 50) {
        let there = TcpFabric::new(TcpOptions {
            listen: Some(fixed),
            ..options()
        })
        .unwrap();
        let server = Node::embedded(there, NodeId(1), config()).unwrap();
        let far = server.register(ByteSize::kib(4), Access::Read).unwrap();
        let back = Instant::now();
        let mut queue = loop {
            match client.connect(NodeId(1), SECOND) {
                Ok(queue) => break queue,
                Err(why) => assert!(matches!(why, Error::UnknownNode(_)), "{why}"),
            }
        };
        let read = WorkRequest::new(1, Op::Read, near.slice(0, 8), far.remote(0));
        queue.post(std::slice::from_ref(&read)).unwrap();
        assert_eq!(queue.wait(SECOND).unwrap().status, Status::Success);
        slowest = slowest.max(back.elapsed());
        drop(server);
        until("its end", SECOND, || {
            fabric.link(NodeId(1)) == Some(LinkState::Down(LinkError::Unreachable))
        });
        // While it is down, nobody waits.
        let start = Instant::now();
        let refused = queue.post(std::slice::from_ref(&read));
        match refused {
            Ok(_) => assert_eq!(queue.wait(SECOND).unwrap().status, Status::RetryExceeded),
            Err(refused) => assert_eq!(refused.why, Malformed::PeerGone),
        }
        assert!(start.elapsed() < Duration::from_millis(100));
        std::thread::sleep(Duration::from_millis(70));
    }
    assert!(slowest < Duration::from_millis(100), "{slowest:?}");
    println!("reached again in at most {slowest:?}");
}

#[test]
fn a_message_that_finds_no_buffer_breaks_no_pair_and_holds_up_nobody() {
    let rig = rig();
    let listener = rig.server.listen(Service(1)).unwrap();
    let mut queue = rig.connect();
    let mut other = rig.connect();
    let mut send = |service| {
        let send = WorkRequest::send(5, service, rig.near.slice(0, 8));
        queue.post(&[send]).unwrap();
        queue.wait(SECOND).unwrap().status
    };
    assert_eq!(send(Service(9)), Status::ReceiverNotReady, "nobody listens");
    let mut sent = 0;
    while send(Service(1)) == Status::Success {
        sent += 1;
        assert!(sent < 10_000, "there is no end to its buffers");
    }
    other.post(&[rig.add(3)]).unwrap();
    assert_eq!(other.wait(SECOND).unwrap().status, Status::Success);
    for _ in 0..sent {
        listener.receive(SECOND).unwrap();
    }
    assert_eq!(send(Service(1)), Status::Success);
    assert_eq!(rig.client.stats().unwrap().rebuilt, 0);
}

#[test]
fn dropping_everything_ends_every_thread_and_descriptor() {
    let threads = || std::fs::read_dir("/proc/self/task").unwrap().count();
    let names = || {
        std::fs::read_dir("/proc/self/task")
            .unwrap()
            .filter_map(|one| std::fs::read_to_string(one.unwrap().path().join("comm")).ok())
            .collect::<Vec<_>>()
    };
    // Others of this process run at the same time: it is enough that many of ours do not stay.
    let before = threads();
    for _ in 0..30 {
        let a = TcpFabric::new(options()).unwrap();
        let mut ours = options();
        ours.peers.insert(NodeId(1), a.local_addr().unwrap());
        let server = Node::embedded(a, NodeId(1), config()).unwrap();
        let client = Node::embedded(TcpFabric::new(ours).unwrap(), NodeId(2), config()).unwrap();
        let far = server.register(ByteSize::kib(4), Access::Read).unwrap();
        let near = client.register(ByteSize::kib(4), Access::Local).unwrap();
        let mut queue = client.connect(NodeId(1), SECOND).unwrap();
        let read = WorkRequest::new(1, Op::Read, near.slice(0, 8), far.remote(0));
        queue.post(&vec![read; 50]).unwrap();
        drop((server, queue, client));
    }
    let after = threads();
    assert!(
        after < before + 30,
        "{before} threads, then {after}: {:?}",
        names()
    );
}

#[cfg(feature = "daemon")]
mod daemons {
    use super::*;
    use std::path::{Path, PathBuf};
    use std::process::{Child, Command};

    struct Daemon {
        child: Child,
        socket: PathBuf,
    }

    impl Drop for Daemon {
        fn drop(&mut self) {
            let _ended = self.child.kill();
            let _reaped = self.child.wait();
        }
    }

    fn port() -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listener.local_addr().unwrap()
    }

    fn start(dir: &Path, node: u64, listen: SocketAddr, peer: (u64, SocketAddr)) -> Daemon {
        let socket = dir.join(format!("{node}.sock"));
        let child = Command::new(env!("CARGO_BIN_EXE_krcored"))
            .arg("--socket")
            .arg(&socket)
            .args(["--node", &node.to_string(), "--silence", "200"])
            .args(["--executors", "1", "--trusted"])
            .args(["--listen", &listen.to_string()])
            .args(["--peer", &format!("{}={}", peer.0, peer.1)])
            .arg("--key-file")
            .arg(dir.join("key"))
            .spawn()
            .unwrap();
        let daemon = Daemon { child, socket };
        until("a daemon", 5 * SECOND, || {
            Node::attach(&daemon.socket, SECOND).is_ok()
        });
        daemon
    }

    fn key(dir: &Path) {
        use std::os::unix::fs::OpenOptionsExt;
        let mut file = std::fs::File::options()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(dir.join("key"))
            .unwrap();
        file.write_all(&[b'a'; 64]).unwrap();
    }

    #[test]
    fn processes_of_two_machines_read_write_swap_and_send() {
        let dir = tempfile::tempdir().unwrap();
        key(dir.path());
        let (at1, at2) = (port(), port());
        let one = start(dir.path(), 1, at1, (2, at2));
        let two = start(dir.path(), 2, at2, (1, at1));
        let server = Node::attach(&two.socket, SECOND).unwrap();
        let far = server
            .register(ByteSize::kib(64), Access::ReadWrite)
            .unwrap();
        let listener = server.listen(Service(7)).unwrap();
        for mode in [krcore::Mode::Isolated, krcore::Mode::Trusted] {
            let client = Node::attach_as(&one.socket, mode, SECOND).unwrap();
            let near = client.register(ByteSize::kib(64), Access::Read).unwrap();
            let replies = client.listen(Service(8)).unwrap();
            let mut queue = client.connect(NodeId(2), SECOND).unwrap();
            let mut run = |op, at: u64, len: u64| {
                let work = WorkRequest::new(9, op, near.slice(at, len), far.remote(at));
                assert_eq!(queue.post(&[work]).unwrap(), 1, "{mode:?}");
                let done = queue.wait(SECOND).unwrap();
                assert_eq!(
                    (done.id, done.status),
                    (9, Status::Success),
                    "{mode:?} {op:?}"
                );
            };
            assert!(near.write(0, b"over the wire"));
            run(Op::Write, 0, 13);
            let mut bytes = [0; 13];
            assert!(far.read(0, &mut bytes));
            assert_eq!(&bytes, b"over the wire");
            assert!(far.write(4096, &[7; 40000]));
            run(Op::Read, 4096, 40000);
            let mut bytes = vec![0; 40000];
            assert!(near.read(4096, &mut bytes));
            assert_eq!(bytes, [7; 40000]);
            assert!(far.write(64, &[0; 8]));
            run(Op::FetchAdd { add: 5 }, 64, 8);
            run(
                Op::CompareSwap {
                    expected: 5,
                    new: 11,
                },
                64,
                8,
            );
            assert_eq!((word(&near, 64), word(&far, 64)), (5, 11));
            // Small, and one that the receiver fetches by a READ.
            for (id, len) in [(1, 13), (2, 40000)] {
                let send = WorkRequest::send(id, Service(7), near.slice(0, len));
                queue.post(&[send]).unwrap();
                let message = listener.receive(SECOND).unwrap();
                assert_eq!((message.from(), message.len() as u64), (NodeId(1), len));
                if len > 4096 {
                    message
                        .fetch(&server, &far.slice(8192, len), SECOND)
                        .unwrap();
                }
                let done = queue.wait(SECOND).unwrap();
                assert_eq!((done.id, done.status), (id, Status::Success));
                let mut back = server.connect_back(&message).unwrap();
                back.post(&[WorkRequest::send(3, Service(8), far.slice(0, 4))])
                    .unwrap();
                assert_eq!(back.wait(SECOND).unwrap().status, Status::Success);
                assert_eq!(replies.receive(SECOND).unwrap().bytes(), Some(&b"over"[..]));
            }
            // What only the peer knows is wrong is refused all the same.
            let wrong = WorkRequest::new(4, Op::Read, near.slice(0, 8), far.remote(1 << 20));
            let why = match queue.post(&[wrong]) {
                Err(refused) => refused.why,
                Ok(_) => match queue.wait(SECOND).unwrap().status {
                    Status::Refused(why) => why,
                    status => panic!("{status:?}"),
                },
            };
            assert_eq!(why, Malformed::RemoteRange);
        }
    }

    #[test]
    fn a_daemon_that_is_killed_fails_the_requests_of_the_other_and_is_found_again() {
        let dir = tempfile::tempdir().unwrap();
        key(dir.path());
        let (at1, at2) = (port(), port());
        let one = start(dir.path(), 1, at1, (2, at2));
        let client = Node::attach(&one.socket, SECOND).unwrap();
        let near = client
            .register(ByteSize::kib(4), Access::ReadWrite)
            .unwrap();
        for _ in 0..rounds(3, 30) {
            let mut two = start(dir.path(), 2, at2, (1, at1));
            let server = Node::attach(&two.socket, SECOND).unwrap();
            let far = server
                .register(ByteSize::kib(4), Access::ReadWrite)
                .unwrap();
            until("the link", SECOND, || {
                client.connect(NodeId(2), SECOND).is_ok()
            });
            let mut queue = client.connect(NodeId(2), SECOND).unwrap();
            let mut own = client.connect(NodeId(1), SECOND).unwrap();
            let add = |id, remote| {
                WorkRequest::new(id, Op::FetchAdd { add: 1 }, near.slice(8, 8), remote)
            };
            queue.post(&[add(0, far.remote(0))]).unwrap();
            assert_eq!(queue.wait(SECOND).unwrap().status, Status::Success);
            two.child.kill().unwrap();
            // Those to the dead fail in time; those to the living do not.
            let start = Instant::now();
            let mut failed = false;
            for id in 0..20 {
                let posted = queue.post(&[add(id, far.remote(0))]);
                if posted.is_ok_and(|taken| taken == 1) {
                    let done = queue.wait(3 * SECOND).unwrap();
                    failed |= done.status != Status::Success;
                    assert!(
                        matches!(
                            done.status,
                            Status::RetryExceeded
                                | Status::Flushed
                                | Status::Refused(Malformed::PeerGone)
                        ),
                        "{:?}",
                        done.status
                    );
                }
                own.post(&[add(id, near.remote(16))]).unwrap();
                assert_eq!(own.wait(3 * SECOND).unwrap().status, Status::Success);
            }
            assert!(failed, "nothing failed");
            assert!(start.elapsed() < 2 * SECOND, "{:?}", start.elapsed());
        }
    }
}
