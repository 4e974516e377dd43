//! The fabric of RDMA adapters. Without a device, it says so; the rest runs where there is one, as in
//! the machine of `cargo xtask vm krcore`, whose kernel emulates an adapter.
#![cfg(feature = "verbs")]
#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

mod common;

use std::collections::HashMap;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::sync::Arc;
use std::time::{Duration, Instant};

use carlsbad_kit::capability::Capability;
use carlsbad_kit::child::{self, Role};
use common::{SECOND, config, word};
use krcore::fabric::{Fabric, PairOptions, QueuePair, RawCompletion, RawRequest, State, Wake};
use krcore::{
    Access, ByteSize, Completion, Config, Error, MemoryRegion, Node, NodeId, Op, RKey, RemoteSlice,
    Service, ShmFabric, Status, VerbsConfig, VerbsFabric, VirtualQueue, WorkRequest,
};

/// An emulated machine on a busy one is slow; what is waited for has its own limits.
const PATIENCE: Duration = Duration::from_secs(20);
const SERVER: NodeId = NodeId(1);
const CLIENT: NodeId = NodeId(2);

fn at(port: u16) -> SocketAddrV4 {
    SocketAddrV4::new(Ipv4Addr::LOCALHOST, port)
}

/// Where the server of a test is; each has its own, since tests may run beside each other.
fn peers(port: u16) -> VerbsConfig {
    VerbsConfig {
        peers: HashMap::from([(SERVER, at(port))]),
        answer: Duration::from_secs(3),
        ..VerbsConfig::default()
    }
}

fn open(config: VerbsConfig) -> VerbsFabric {
    VerbsFabric::open(config).unwrap()
}

/// Two nodes, each on an opening of the device of its own, as two processes have it.
struct Two {
    server: Node,
    client: Node,
    fabric: VerbsFabric,
    far: Arc<MemoryRegion>,
    near: Arc<MemoryRegion>,
}

fn two_with(port: u16, config: Config) -> Two {
    let server = Node::embedded(open(peers(port)), SERVER, config.clone()).unwrap();
    let fabric = open(peers(port));
    let client = Node::embedded(fabric.clone(), CLIENT, config).unwrap();
    let far = server
        .register(ByteSize::kib(64), Access::ReadWrite)
        .unwrap();
    let near = client.register(ByteSize::kib(64), Access::Local).unwrap();
    Two {
        server,
        client,
        fabric,
        far,
        near,
    }
}

fn two(port: u16) -> Two {
    two_with(port, config())
}

fn done(queue: &mut VirtualQueue) -> (u64, Status) {
    let done = queue.wait(PATIENCE).unwrap();
    (done.id, done.status)
}

#[test]
fn without_a_device_there_is_a_typed_error_and_no_panic() {
    let wrong = VerbsConfig {
        device: Some("none_is_called_so".to_owned()),
        ..VerbsConfig::default()
    };
    let refused = VerbsFabric::open(wrong);
    assert!(matches!(refused, Err(Error::NoDevice(_))), "{refused:?}");
    println!("{}", refused.unwrap_err());
    if !Capability::Rdma.is_present() {
        let refused = VerbsFabric::open(VerbsConfig::default());
        assert!(matches!(refused, Err(Error::NoDevice(_))), "{refused:?}");
    }
}

#[test]
fn reads_writes_and_atomics_do_at_a_peer_what_they_say() {
    carlsbad_kit::require!(Capability::Rdma);
    let t = two(18_601);
    let mut queue = t.client.connect(SERVER, SECOND).unwrap();
    assert!(t.far.write(512, b"one-sided"));
    let read = WorkRequest::new(1, Op::Read, t.near.slice(8, 9), t.far.remote(512));
    queue.post(&[read]).unwrap();
    assert_eq!(done(&mut queue), (1, Status::Success));
    let mut bytes = [0; 9];
    assert!(t.near.read(8, &mut bytes));
    assert_eq!(&bytes, b"one-sided");

    // Longer than a packet, and not aligned to anything.
    let long: Vec<u8> = (0..40_000_u32).map(|n| n as u8 ^ (n >> 8) as u8).collect();
    assert!(t.near.write(101, &long));
    let write = WorkRequest::new(2, Op::Write, t.near.slice(101, 40_000), t.far.remote(1003));
    queue.post(&[write]).unwrap();
    assert_eq!(done(&mut queue), (2, Status::Success));
    let mut there = vec![0; long.len()];
    assert!(t.far.read(1003, &mut there));
    assert_eq!(there, long);

    let word_at = |op| WorkRequest::new(3, op, t.near.slice(0, 8), t.far.remote(0));
    queue.post(&[word_at(Op::FetchAdd { add: 5 })]).unwrap();
    assert_eq!(done(&mut queue), (3, Status::Success));
    for (expected, new, now) in [(5, 9, 9), (5, 7, 9)] {
        let swap = Op::CompareSwap { expected, new };
        queue.post(&[word_at(swap)]).unwrap();
        assert_eq!(done(&mut queue), (3, Status::Success));
        assert_eq!(word(&t.far, 0), now);
    }
    assert_eq!(word(&t.near, 0), 9, "what was there");

    // Many, of which only the last completes; each is executed only where the one before was.
    let swaps: Vec<_> = (0..500_u64)
        .map(|n| {
            let swap = Op::CompareSwap {
                expected: 9 + n,
                new: 10 + n,
            };
            word_at(swap).unsignalled()
        })
        .collect();
    assert_eq!(queue.post(&swaps).unwrap(), 500);
    let fence = WorkRequest::new(4, Op::Fence, t.near.slice(0, 0), t.far.remote(0));
    queue.post(&[fence]).unwrap();
    assert_eq!(done(&mut queue), (4, Status::Success));
    assert_eq!(word(&t.far, 0), 509, "in order");
    assert_eq!(t.fabric.connections(), 1, "one to each peer");
    assert_eq!(t.client.stats().unwrap().rebuilt, 0);
}

#[test]
fn a_write_behind_a_read_of_the_same_bytes_does_not_overtake_it() {
    carlsbad_kit::require!(Capability::Rdma);
    let t = two(18_602);
    let mut queue = t.client.connect(SERVER, SECOND).unwrap();
    for n in 0..200_u64 {
        assert!(t.near.write(8, &(n + 1).to_le_bytes()));
        let read = WorkRequest::new(0, Op::Read, t.near.slice(0, 8), t.far.remote(0));
        let write = WorkRequest::new(1, Op::Write, t.near.slice(8, 8), t.far.remote(0));
        queue.post(&[read.unsignalled(), write]).unwrap();
        assert_eq!(done(&mut queue), (1, Status::Success));
        assert_eq!((word(&t.near, 0), word(&t.far, 0)), (n, n + 1));
    }
}

#[test]
fn messages_small_and_large_arrive_and_none_is_lost_for_want_of_a_buffer() {
    carlsbad_kit::require!(Capability::Rdma);
    let t = two(18_603);
    let mut queue = t.client.connect(SERVER, SECOND).unwrap();
    let send = |id, len| WorkRequest::send(id, Service(1), t.near.slice(0, len));
    queue.post(&[send(1, 5)]).unwrap();
    assert_eq!(done(&mut queue), (1, Status::ReceiverNotReady));
    let listener = t.server.listen(Service(1)).unwrap();
    let replies = t.client.listen(Service(2)).unwrap();
    assert!(t.near.write(0, b"hello"));
    queue.post(&[send(2, 5)]).unwrap();
    assert_eq!(done(&mut queue), (2, Status::Success));
    let message = listener.receive(PATIENCE).unwrap();
    assert_eq!(
        (message.from(), message.bytes()),
        (CLIENT, Some(&b"hello"[..]))
    );
    let mut back = t.server.connect_back(&message).unwrap();
    back.post(&[WorkRequest::send(3, Service(2), t.far.slice(0, 9))])
        .unwrap();
    assert_eq!(replies.receive(PATIENCE).unwrap().len(), 9);
    assert_eq!(done(&mut back), (3, Status::Success));

    // More than the listener has buffers: each is taken, or completes as refused; none in doubt.
    let mut taken = 0;
    for n in 0..100_u64 {
        assert!(t.near.write(0, &n.to_le_bytes()));
        queue.post(&[send(n, 8)]).unwrap();
        match done(&mut queue) {
            (id, Status::Success) if id == n => taken += 1,
            (id, Status::ReceiverNotReady) if id == n => {}
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(taken, 64);
    for n in 0..taken as u64 {
        let message = listener.receive(PATIENCE).unwrap();
        assert_eq!(message.bytes(), Some(&n.to_le_bytes()[..]));
    }
    assert_eq!(t.client.stats().unwrap().rebuilt, 0, "no pair broke by it");

    let large = t.client.register(ByteSize::mib(2), Access::Read).unwrap();
    let into = t.server.register(ByteSize::mib(2), Access::Local).unwrap();
    assert!(large.write(4096, &[9; 1 << 20]));
    let request = WorkRequest::send(7, Service(1), large.slice(4096, 1 << 20));
    queue.post(&[request]).unwrap();
    let message = listener.receive(PATIENCE).unwrap();
    message
        .fetch(&t.server, &into.slice(0, 2 << 20), PATIENCE)
        .unwrap();
    assert_eq!(done(&mut queue), (7, Status::Success));
    let mut bytes = vec![0; 1 << 20];
    assert!(into.read(0, &mut bytes));
    assert!(bytes.iter().all(|byte| *byte == 9));
}

/// A raw pair of a fabric, with a node on it that has a region.
struct Raw {
    pair: Box<dyn QueuePair>,
    _server: Node,
    _client: Node,
    far: Arc<MemoryRegion>,
    read_only: Arc<MemoryRegion>,
    near: Arc<MemoryRegion>,
    server: krcore::DcAddress,
}

fn raw(server: impl Fabric, fabric: impl Fabric + Clone) -> Raw {
    let server = Node::embedded(server, SERVER, config()).unwrap();
    let client = Node::embedded(fabric.clone(), CLIENT, config()).unwrap();
    let options = PairOptions {
        depth: 32,
        peer: None,
        wake: Wake::nobody(),
    };
    Raw {
        pair: fabric.queue_pair(options).unwrap(),
        far: server
            .register(ByteSize::kib(4), Access::ReadWrite)
            .unwrap(),
        read_only: server.register(ByteSize::kib(4), Access::Read).unwrap(),
        near: client.register(ByteSize::kib(4), Access::Local).unwrap(),
        server: server.address(),
        _server: server,
        _client: client,
    }
}

impl Raw {
    fn request(&self, wr_id: u64, op: Op, local: (u64, u64), remote: RemoteSlice) -> RawRequest {
        RawRequest {
            wr_id,
            signalled: true,
            op,
            local: self.near.slice(local.0, local.1),
            remote,
            to: self.server,
            header: None,
        }
    }

    /// Bad requests, each with what is wrong with it.
    fn bad(&self, nth: usize) -> Option<(&'static str, RawRequest)> {
        let remote = |key, offset| RemoteSlice { key, offset };
        let (far, fixed) = (self.far.key(), self.read_only.key());
        let add = Op::FetchAdd { add: 1 };
        let all = [
            ("no such key", Op::Read, (0, 8), remote(RKey(999), 0)),
            ("behind the end", Op::Read, (0, 8), remote(far, 4096)),
            ("over the end", Op::Write, (0, 8), remote(far, 4092)),
            ("it wraps", Op::Write, (0, 8), remote(far, u64::MAX - 3)),
            ("not writable", Op::Write, (0, 8), remote(fixed, 0)),
            ("no atomics there", add, (0, 8), remote(fixed, 0)),
            ("an atomic behind the end", add, (0, 8), remote(far, 4096)),
            ("an unaligned atomic", add, (0, 8), remote(far, 4)),
            ("local over the end", Op::Read, (4090, 8), remote(far, 0)),
            ("4 GiB", Op::Read, (0, 1 << 32), remote(far, 0)),
            ("local wraps", Op::Read, (u64::MAX, 2), remote(far, 0)),
            ("no header", Op::Send(Service(1)), (0, 8), remote(far, 0)),
        ];
        let (what, op, local, remote) = *all.get(nth)?;
        Some((what, self.request(1, op, local, remote)))
    }

    fn next(&mut self) -> RawCompletion {
        let end = Instant::now() + PATIENCE;
        loop {
            if let Some(done) = self.pair.poll() {
                return done;
            }
            assert!(Instant::now() < end, "nothing completes");
            std::thread::yield_now();
        }
    }
}

#[test]
fn the_same_wrong_requests_end_as_on_shared_memory_and_break_a_raw_pair_for_all_who_share_it() {
    carlsbad_kit::require!(Capability::Rdma);
    for nth in 0.. {
        let shm = ShmFabric::new();
        let mut model = raw(shm.clone(), shm);
        let Some((what, request)) = model.bad(nth) else {
            break;
        };
        model.pair.post(&[request]).unwrap();
        let expected = model.next().status;
        assert_ne!(expected, Status::Success, "{what}");

        let mut real = raw(open(peers(18_604)), open(peers(18_604)));
        let good = |real: &Raw, id| real.request(id, Op::Read, (0, 8), real.far.remote(0));
        let (_, bad) = real.bad(nth).unwrap();
        let work = [good(&real, 0), bad, good(&real, 2)];
        real.pair.post(&work).unwrap();
        let ended: Vec<_> = (0..3)
            .map(|_| real.next())
            .map(|done| (done.wr_id, done.status))
            .collect();
        let all = [(0, Status::Success), (1, expected), (2, Status::Flushed)];
        assert_eq!(ended, all, "{what}");
        assert_eq!(real.pair.state(), State::Err, "{what}");
        // It stays so for whoever shares it, until it is made anew.
        let later = good(&real, 3);
        real.pair.post(&[later]).unwrap();
        assert_eq!(real.next().status, Status::Flushed, "{what}");
    }
}

#[test]
fn another_pair_to_the_same_peer_does_not_notice_that_one_has_broken() {
    carlsbad_kit::require!(Capability::Rdma);
    let fabric = open(peers(18_605));
    let mut one = raw(open(peers(18_605)), fabric.clone());
    let options = PairOptions {
        depth: 32,
        peer: None,
        wake: Wake::nobody(),
    };
    let mut other = fabric.queue_pair(options).unwrap();
    for round in 0..30_u64 {
        let add = Op::FetchAdd { add: 1 };
        let adds: Vec<_> = (0..8)
            .map(|id| one.request(id, add, (8, 8), one.far.remote(64)))
            .collect();
        let (_, bad) = one.bad(1 + round as usize % 3).unwrap();
        other.post(&adds[..4]).unwrap();
        one.pair.post(&[bad]).unwrap();
        other.post(&adds[4..]).unwrap();
        let end = Instant::now() + PATIENCE;
        let mut seen = 0;
        while seen < 8 {
            assert!(Instant::now() < end, "round {round}: {seen} of 8");
            match other.poll() {
                Some(done) => {
                    assert_eq!((done.wr_id, done.status), (seen, Status::Success));
                    seen += 1;
                }
                None => std::thread::yield_now(),
            }
        }
        assert_eq!(one.next().status, Status::RemoteAccess);
        let options = PairOptions {
            depth: 32,
            peer: None,
            wake: Wake::nobody(),
        };
        one.pair = fabric.queue_pair(options).unwrap();
    }
    assert_eq!(word(&one.far, 64), 8 * 30, "none lost, none doubled");
    assert!(fabric.queue_pairs() >= 30, "the connection never broke");
}

#[test]
fn a_pair_in_err_is_rebuilt_and_its_virtual_queues_go_on() {
    carlsbad_kit::require!(Capability::Rdma);
    let hasty = Config {
        lease: Duration::ZERO,
        ..config()
    };
    let server = Node::embedded(open(peers(18_606)), SERVER, hasty).unwrap();
    let client = Node::embedded(open(peers(18_606)), CLIENT, config()).unwrap();
    let doomed = server.register(ByteSize::kib(4), Access::Read).unwrap();
    let far = server.register(ByteSize::kib(4), Access::Read).unwrap();
    let near = client.register(ByteSize::kib(4), Access::Local).unwrap();
    let mut queue = client.connect(SERVER, SECOND).unwrap();
    let mut other = client.connect(SERVER, SECOND).unwrap();
    let read = |id, far: &MemoryRegion| {
        let remote = RemoteSlice {
            key: far.key(),
            offset: 0,
        };
        WorkRequest::new(id, Op::Read, near.slice(0, 8), remote)
    };
    for far in [&doomed, &far] {
        queue.post(&[read(1, far)]).unwrap();
        assert_eq!(done(&mut queue), (1, Status::Success));
        other.post(&[read(1, far)]).unwrap();
        assert_eq!(done(&mut other), (1, Status::Success));
    }
    server.deregister(&doomed).unwrap();
    std::thread::sleep(Duration::from_millis(300));
    // The cached entry lets it through, and the adapter at the peer refuses it.
    queue.post(&[read(2, &doomed)]).unwrap();
    other.post(&[read(3, &far)]).unwrap();
    let start = Instant::now();
    assert_eq!(done(&mut queue), (2, Status::RemoteAccess));
    assert_eq!(done(&mut other), (3, Status::Success), "posted again");
    println!("rebuilt within {:?}", start.elapsed());
    queue.post(&[read(4, &far)]).unwrap();
    assert_eq!(done(&mut queue), (4, Status::Success));
    assert_eq!(client.stats().unwrap().rebuilt, 1);
}

#[test]
fn the_connection_that_was_used_least_recently_makes_room() {
    carlsbad_kit::require!(Capability::Rdma);
    // Nodes and connections of all sides in one process have many descriptors.
    let most = 4096;
    nix::sys::resource::setrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE, most, most).unwrap();
    let most = 128;
    let fabric = open(VerbsConfig {
        answer: Duration::from_secs(10),
        ..VerbsConfig::default()
    });
    let peers = open(VerbsConfig::default());
    let client = Node::embedded(fabric.clone(), CLIENT, config()).unwrap();
    let near = client.register(ByteSize::kib(4), Access::Local).unwrap();
    let nodes: Vec<_> = (0..most as u64 + 12)
        .map(|n| {
            let node = Node::embedded(peers.clone(), NodeId(100 + n), config()).unwrap();
            let far = node.register(ByteSize::kib(4), Access::ReadWrite).unwrap();
            (node, far)
        })
        .collect();
    let options = PairOptions {
        depth: 32,
        peer: None,
        wake: Wake::nobody(),
    };
    let mut pair = fabric.queue_pair(options).unwrap();
    let mut add = |nth: usize| {
        let (node, far) = &nodes[nth];
        let request = RawRequest {
            wr_id: nth as u64,
            signalled: true,
            op: Op::FetchAdd { add: 1 },
            local: near.slice(0, 8),
            remote: far.remote(0),
            to: node.address(),
            header: None,
        };
        pair.post(&[request]).unwrap();
        let end = Instant::now() + PATIENCE;
        loop {
            match pair.poll() {
                Some(done) => {
                    assert_eq!((done.wr_id, done.status), (nth as u64, Status::Success));
                    return;
                }
                None => std::thread::yield_now(),
            }
            assert!(Instant::now() < end, "node {nth}");
        }
    };
    for nth in 0..nodes.len() {
        add(nth);
        assert_eq!(fabric.connections(), (nth + 1).min(most));
    }
    let made = fabric.queue_pairs();
    // The last ones are still connected; the first is not, and comes back for the oldest.
    add(nodes.len() - 1);
    assert_eq!(fabric.queue_pairs(), made);
    add(0);
    assert_eq!(fabric.queue_pairs(), made + 1);
    assert_eq!(fabric.connections(), most);
    assert_eq!(word(&nodes[0].1, 0), 2);
}

#[test]
#[ignore = "a role of the test of a peer's death"]
fn role_peer() {
    let Some(port) = child::arguments::<u16>("role_peer") else {
        return;
    };
    let node = Node::embedded(open(peers(port)), SERVER, config()).unwrap();
    let far = node.register(ByteSize::kib(4), Access::ReadWrite).unwrap();
    child::tell(format!("key {}", far.key().0));
    std::thread::sleep(Duration::from_secs(60));
}

#[test]
fn the_death_of_a_peers_process_ends_what_is_outstanding_and_harms_nobody_else() {
    carlsbad_kit::require!(Capability::Rdma);
    let port = 18_607;
    let mut peer = Role::test("role_peer").start(&port).unwrap();
    let key = peer.hear("key ").unwrap().parse().unwrap();
    let fabric = open(peers(port));
    let client = Node::embedded(fabric.clone(), CLIENT, config()).unwrap();
    let living = Node::embedded(open(VerbsConfig::default()), NodeId(3), config()).unwrap();
    let alive = living
        .register(ByteSize::kib(4), Access::ReadWrite)
        .unwrap();
    let near = client.register(ByteSize::kib(4), Access::Local).unwrap();
    let remote = RemoteSlice {
        key: RKey(key),
        offset: 0,
    };
    let mut queue = client.connect(SERVER, SECOND).unwrap();
    let write = |id| WorkRequest::new(id, Op::Write, near.slice(0, 8), remote);
    queue.post(&[write(0)]).unwrap();
    assert_eq!(done(&mut queue), (0, Status::Success));
    peer.kill();
    let start = Instant::now();
    let mut posted = 0;
    while posted < 20 && queue.post(&[write(posted)]).is_ok() {
        posted += 1;
    }
    assert!(posted > 0);
    let mut failed = 0;
    for id in 0..posted {
        let (it, status) = done(&mut queue);
        assert_eq!(it, id, "each once, in order");
        failed += u64::from(status != Status::Success);
    }
    println!(
        "{failed} of {posted} failed, all within {:?}",
        start.elapsed()
    );
    assert!(failed > 0, "it was not dead yet");
    assert!(start.elapsed() < Duration::from_secs(5));
    let mut out = [Completion::default(); 4];
    assert_eq!(queue.poll(&mut out), 0, "nothing completes twice");
    let add = Op::FetchAdd { add: 1 };
    let message = near.slice(8, 8);
    let other = fabric.queue_pair(PairOptions {
        depth: 8,
        peer: None,
        wake: Wake::nobody(),
    });
    let mut other = other.unwrap();
    let request = RawRequest {
        wr_id: 5,
        signalled: true,
        op: add,
        local: message,
        remote: alive.remote(0),
        to: living.address(),
        header: None,
    };
    other.post(&[request]).unwrap();
    let end = Instant::now() + PATIENCE;
    let completion = loop {
        if let Some(completion) = other.poll() {
            break completion;
        }
        assert!(Instant::now() < end);
        std::thread::yield_now();
    };
    assert_eq!(completion.status, Status::Success);
    assert_eq!(word(&alive, 0), 1);
    let gone = client.connect(SERVER, SECOND);
    assert!(matches!(gone, Err(Error::UnknownNode(_))), "{gone:?}");
}

#[cfg(feature = "daemon")]
#[test]
fn an_attached_process_reaches_a_peer_through_the_daemon_without_a_copy() {
    use krcore::{Daemon, DaemonOptions};

    carlsbad_kit::require!(Capability::Rdma);
    let t = two(18_608);
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("krcored.sock");
    let node = Node::embedded(open(peers(18_608)), NodeId(3), config()).unwrap();
    let daemon = Daemon::start(&path, node, DaemonOptions::default()).unwrap();
    let process = Node::attach(&path, SECOND).unwrap();
    let memory = process
        .register(ByteSize::kib(64), Access::ReadWrite)
        .unwrap();
    let mut queue = process.connect(SERVER, SECOND).unwrap();
    assert!(t.far.write(0, &[7; 4096]));
    let read = WorkRequest::new(1, Op::Read, memory.slice(100, 4096), t.far.remote(0));
    queue.post(&[read]).unwrap();
    assert_eq!(done(&mut queue), (1, Status::Success));
    let mut bytes = [0; 4096];
    assert!(memory.read(100, &mut bytes));
    assert_eq!(bytes, [7; 4096]);
    let add = Op::FetchAdd { add: 1 };
    let add = WorkRequest::new(2, add, memory.slice(0, 8), t.far.remote(8192)).unsignalled();
    queue.post(&vec![add; 100]).unwrap();
    let beyond = RemoteSlice {
        key: t.far.key(),
        offset: 64 << 10,
    };
    let wrong = WorkRequest::new(3, Op::Read, memory.slice(0, 8), beyond);
    queue.post(&[wrong]).unwrap();
    let (id, status) = done(&mut queue);
    assert!(id == 3 && matches!(status, Status::Refused(_)), "{status}");
    // What the daemon refuses does not wait for what is under way.
    let fence = WorkRequest::new(4, Op::Fence, memory.slice(0, 0), t.far.remote(0));
    queue.post(&[fence]).unwrap();
    assert_eq!(done(&mut queue), (4, Status::Success));
    assert_eq!(word(&t.far, 8192), 100);

    // The other way: a peer WRITEs into the process's memory, which the daemon's node publishes.
    let remote = RemoteSlice {
        key: memory.key(),
        offset: 16_384,
    };
    let address = process.address();
    let fence = RawRequest {
        wr_id: 9,
        signalled: true,
        op: Op::Write,
        local: t.near.slice(0, 8),
        remote,
        to: address,
        header: None,
    };
    assert!(t.near.write(0, &77_u64.to_le_bytes()));
    let mut back = t
        .fabric
        .queue_pair(PairOptions {
            depth: 8,
            peer: None,
            wake: Wake::nobody(),
        })
        .unwrap();
    back.post(&[fence]).unwrap();
    let end = Instant::now() + PATIENCE;
    while back.poll().is_none() {
        assert!(Instant::now() < end);
        std::thread::yield_now();
    }
    assert_eq!(word(&memory, 16_384), 77);
    drop(queue);
    drop(process);
    assert!(daemon.drain(PATIENCE));
}
