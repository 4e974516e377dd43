//! Figure 6: connections and READs on an RDMA device, which an emulated machine emulates: the times
//! mean nothing by themselves. `cargo xtask figures krcore --only verbs` runs it in that machine.
#![allow(
    clippy::unwrap_used,
    clippy::multiple_unsafe_ops_per_block,
    missing_docs,
    reason = "a bench says what went wrong by failing"
)]

mod rdma_cm;

use std::collections::HashMap;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use carlsbad_kit::capability::Capability;
use carlsbad_kit::child::{self, Role};
use carlsbad_kit::figure::{Figure, is_quick};
use carlsbad_kit::sample::{Interleaved, interleave, median};
use krcore::{
    Access, ByteSize, Completion, Config, Daemon, DaemonOptions, Node, NodeId, Op, RKey,
    RemoteSlice, Status, VerbsConfig, VerbsFabric, VirtualQueue, WorkRequest,
};
use rdma_cm::{End, Memory, read};

/// The device's address in the machine.
const HERE: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);
const SERVER: NodeId = NodeId(1);
const DAEMON: NodeId = NodeId(2);
const LIMIT: Duration = Duration::from_secs(10);
const PEER: &str = "peer";

fn config() -> VerbsConfig {
    VerbsConfig {
        listen: HERE,
        peers: HashMap::from([(SERVER, SocketAddrV4::new(HERE, 18_701))]),
        answer: LIMIT,
        ..VerbsConfig::default()
    }
}

/// The process that is connected to, of both kinds.
fn peer() {
    let node = Node::embedded(
        VerbsFabric::open(config()).unwrap(),
        SERVER,
        Config::default(),
    );
    let node = node.unwrap();
    let far = node.register(ByteSize::kib(4), Access::ReadWrite).unwrap();
    let listener = End::listen(SocketAddrV4::new(HERE, 18_702));
    let (sender, memories) = channel();
    std::thread::spawn(move || {
        let mut kept = Vec::new();
        loop {
            let end = listener.accept();
            if kept.is_empty() {
                let memory = Memory::new(&end);
                sender.send(memory.remote()).unwrap();
                kept.push((end, Some(memory)));
            } else {
                kept.push((end, None));
            }
        }
    });
    child::tell(format!("key {}", far.key().0));
    let (address, key) = memories.recv().unwrap();
    child::tell(format!("memory {address} {key}"));
    child::wait_for_parent();
}

/// Posts, and polls until it is there, yielding as the rival does.
fn pooled(queue: &mut VirtualQueue, request: &WorkRequest) {
    queue.post(std::slice::from_ref(request)).unwrap();
    let begun = Instant::now();
    let mut out = [Completion::default()];
    while queue.poll(&mut out) == 0 {
        assert!(begun.elapsed() < LIMIT, "no answer");
        std::thread::yield_now();
    }
    assert_eq!(out[0].status, Status::Success);
}

fn least(samples: &[f64]) -> f64 {
    samples.iter().copied().fold(f64::INFINITY, f64::min)
}

fn micros(rounds: u32, mut work: impl FnMut()) -> f64 {
    let begun = Instant::now();
    (0..rounds).for_each(|_| work());
    begun.elapsed().as_secs_f64() * 1e6 / f64::from(rounds)
}

fn main() {
    if child::arguments::<()>(PEER).is_some() {
        return peer();
    }
    let connecting = Figure::new(
        "krcore/6",
        "soft RoCE, emulated: connect of an attached process",
        "us",
    );
    let reading = |id, what| Figure::new(id, format!("soft RoCE, emulated: {what}"), "us");
    let by_least = reading("krcore/6b", "proxied READ of 8 bytes, least");
    let by_median = reading("krcore/6c", "proxied READ of 8 bytes, median");
    if !Capability::Rdma.is_present() {
        for figure in [connecting, by_least, by_median] {
            figure.without(Capability::Rdma).emit().unwrap();
        }
        return;
    }
    let process = Role::main(PEER).start(&()).unwrap();
    let key: u32 = process.hear("key").unwrap().parse().unwrap();
    let rival = SocketAddrV4::new(HERE, 18_702);
    let direct = End::connect(rival);
    let memory = Memory::new(&direct);
    let there = process.hear("memory").unwrap();
    let (address, its_key) = there.split_once(' ').unwrap();
    let there = (address.parse().unwrap(), its_key.parse().unwrap());

    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("krcored.sock");
    let node = Node::embedded(
        VerbsFabric::open(config()).unwrap(),
        DAEMON,
        Config::default(),
    );
    let options = DaemonOptions {
        executors: 1,
        ..DaemonOptions::default()
    };
    let _daemon = Daemon::start(&socket, node.unwrap(), options).unwrap();
    let attached = Node::attach(&socket, LIMIT).unwrap();
    let near = attached.register(ByteSize::kib(4), Access::Local).unwrap();
    let remote = RemoteSlice {
        key: RKey(key),
        offset: 0,
    };
    let request = WorkRequest::new(1, Op::Read, near.slice(0, 8), remote);
    let mut queue = attached.connect(SERVER, LIMIT).unwrap();
    pooled(&mut queue, &request);

    let rounds = if is_quick() { 2 } else { 31 };
    let (warm, connects) = (2, 20);
    let samples = interleave(
        warm,
        rounds,
        || {
            let mut queues = Vec::with_capacity(connects as usize);
            let taken = micros(connects, || {
                queues.push(attached.connect(SERVER, LIMIT).unwrap());
            });
            // A connection counts only when it can be used.
            queues.iter_mut().for_each(|queue| pooled(queue, &request));
            taken
        },
        || {
            let mut end = None;
            let taken = micros(1, || end = Some(End::connect(rival)));
            drop(end);
            taken
        },
    );
    connecting
        .against("rdma_cm connect", samples)
        .emit()
        .unwrap();

    let reads = 50;
    let mut all = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        let samples = interleave(
            0,
            reads,
            || micros(1, || pooled(&mut queue, &request)),
            || micros(1, || read(&direct, &memory, there)),
        );
        all.0.push(samples.ours);
        all.1.push(samples.rival);
    }
    for (figure, of) in [(by_least, least as fn(&[f64]) -> f64), (by_median, median)] {
        let samples = Interleaved {
            ours: all.0.iter().map(|round| of(round)).collect(),
            rival: all.1.iter().map(|round| of(round)).collect(),
        };
        figure
            .against("READ on a queue pair of one's own", samples)
            .note(format!("of {reads} READs in each of {rounds} rounds"))
            .emit()
            .unwrap();
    }
}
