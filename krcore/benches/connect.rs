//! Figures 1, 2, 5 and 7: connecting, warm and cold, attached and embedded.
#![allow(
    clippy::unwrap_used,
    missing_docs,
    reason = "a bench says what went wrong by failing"
)]

mod rig;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use carlsbad_kit::figure::{Figure, is_quick};
use carlsbad_kit::sample::interleave;
use krcore::{
    Access, ByteSize, Config, MemoryRegion, MetaServer, Node, NodeId, Op, Service, ShmFabric,
    Status, WorkRequest,
};
use rig::{SECOND, Served, micros};

fn read(near: &Arc<MemoryRegion>, far: &MemoryRegion) -> WorkRequest {
    WorkRequest::new(1, Op::Read, near.slice(0, 8), far.remote(8))
}

/// Microseconds of a connect, each of which is used for a READ that is not counted; and of both.
fn connects(node: &Node, peer: NodeId, read: &WorkRequest, rounds: u32) -> (f64, f64) {
    let mut connecting = Duration::ZERO;
    let begun = Instant::now();
    for _ in 0..rounds {
        let start = Instant::now();
        let mut queue = node.connect(peer, SECOND).unwrap();
        connecting += start.elapsed();
        queue.post(std::slice::from_ref(read)).unwrap();
        assert_eq!(queue.wait(SECOND).unwrap().status, Status::Success);
    }
    let each = |time: Duration| time.as_secs_f64() * 1e6 / f64::from(rounds);
    (each(connecting), each(begun.elapsed()))
}

/// A TCP server that answers 8 bytes with 8 bytes, on each connection once.
fn tcp_server() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    // Lives as long as the bench.
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let (mut stream, mut bytes) = (stream.unwrap(), [0; 8]);
            if stream.read_exact(&mut bytes).is_ok() {
                let _gone = stream.write_all(&bytes);
            }
        }
    });
    address
}

fn warm(samples: usize) {
    let served = Served::start();
    let node = served.attach();
    let far = node.register(ByteSize::kib(4), Access::Read).unwrap();
    let near = node.register(ByteSize::kib(4), Access::Local).unwrap();
    let attached_read = read(&near, &far);

    let fabric = ShmFabric::new();
    let server = Node::embedded(fabric.clone(), NodeId(1), Config::default()).unwrap();
    let client = Node::embedded(fabric, NodeId(2), Config::default()).unwrap();
    let far = server.register(ByteSize::kib(4), Access::Read).unwrap();
    let near = client.register(ByteSize::kib(4), Access::Local).unwrap();
    let embedded_read = read(&near, &far);

    let address = tcp_server();
    let tcp = || {
        micros(50, || {
            let (mut stream, mut bytes) = (TcpStream::connect(address).unwrap(), [7; 8]);
            stream.set_nodelay(true).unwrap();
            stream.write_all(&bytes).unwrap();
            stream.read_exact(&mut bytes).unwrap();
        })
    };
    let rounds = if is_quick() { 10 } else { 2000 };
    let attached = || connects(&node, node.id(), &attached_read, rounds);
    let embedded = || connects(&client, NodeId(1), &embedded_read, rounds);
    let mut alone = Vec::new();
    let both = interleave(
        1,
        samples,
        || {
            let (connect, both) = attached();
            alone.push(connect);
            both
        },
        tcp,
    );
    let note =
        "metadata cached; each connection is then used for a READ of 8 bytes, which succeeds";
    let what = "warm connect of an attached process";
    let figure = Figure::new("krcore/1", what, "us").samples(alone);
    figure.note(note).emit().unwrap();
    let what = "warm connect + first READ, attached, isolated";
    let figure = Figure::new("krcore/1c", what, "us");
    let rival = "TCP loopback connect + request";
    figure.against(rival, both).emit().unwrap();
    let mut alone = Vec::new();
    let both = interleave(
        1,
        samples,
        || {
            let (connect, both) = embedded();
            alone.push(connect);
            both
        },
        tcp,
    );
    let what = "warm connect of an embedded node";
    let figure = Figure::new("krcore/1b", what, "us").samples(alone);
    figure.note(note).emit().unwrap();
    let what = "warm connect + first READ, embedded";
    let figure = Figure::new("krcore/1d", what, "us");
    figure.against(rival, both).emit().unwrap();

    let rate = |node: &Node, peer: NodeId| {
        let each = if is_quick() { 100 } else { 200_000 };
        let start = Instant::now();
        std::thread::scope(|scope| {
            for _ in 0..2 {
                let connect = || drop(node.connect(peer, SECOND).unwrap());
                scope.spawn(move || (0..each).for_each(|_| connect()));
            }
        });
        f64::from(2 * each) / start.elapsed().as_secs_f64() / 1e6
    };
    let rates: Vec<f64> = (0..samples).map(|_| rate(&client, NodeId(1))).collect();
    let figure = Figure::new("krcore/5", "connect rate, 2 threads, embedded", "M/s");
    figure.samples(rates).emit().unwrap();
    let rates: Vec<f64> = (0..samples).map(|_| rate(&node, node.id())).collect();
    let figure = Figure::new("krcore/5b", "connect rate, 2 threads, attached", "M/s");
    figure.samples(rates).emit().unwrap();
}

fn cold(samples: usize) {
    const NODES: u64 = 10_000;
    let fabric = ShmFabric::new();
    let meta = MetaServer::new(&fabric, NodeId(0), NODES as usize).unwrap();
    let config = Config {
        meta: vec![Arc::clone(&meta)],
        ..Config::default()
    };
    let server = Node::embedded(fabric.clone(), NodeId(1), config.clone()).unwrap();
    let client = Node::embedded(fabric.clone(), NodeId(2), config).unwrap();
    for node in 3..NODES {
        meta.insert(NodeId(node), server.address()).unwrap();
    }
    let mut most = 0;
    for node in 3..NODES {
        let before = client.stats().unwrap().meta_reads;
        drop(client.connect(NodeId(node), SECOND).unwrap());
        most = most.max(client.stats().unwrap().meta_reads - before);
        client.forget(NodeId(node));
    }
    assert!(most <= 2);

    // A rival that looks up by messages: the request goes to a server, which answers.
    let listener = server.listen(Service(1)).unwrap();
    let replies = client.listen(Service(2)).unwrap();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let table: std::collections::HashMap<u64, [u8; 12]> =
                (0..NODES).map(|node| (node, [7; 12])).collect();
            let memory = server.register(ByteSize::kib(4), Access::Local).unwrap();
            let mut back = None;
            while !stop.load(Ordering::Relaxed) {
                let Ok(message) = listener.receive(Duration::from_millis(20)) else {
                    continue;
                };
                let asked = message.bytes().and_then(|bytes| bytes.try_into().ok());
                let found = &table[&u64::from_le_bytes(asked.unwrap())];
                assert!(memory.write(0, found));
                let back = back.get_or_insert_with(|| server.connect_back(&message).unwrap());
                let reply = WorkRequest::send(0, Service(2), memory.slice(0, 12));
                back.post(&[reply.unsignalled()]).unwrap();
            }
        });
        let memory = client.register(ByteSize::kib(4), Access::Local).unwrap();
        let mut queue = client.connect(NodeId(1), SECOND).unwrap();
        let mut next = 3;
        let mut step = || {
            next = if next + 1 < NODES { next + 1 } else { 3 };
            next
        };
        let rounds = if is_quick() { 10 } else { 2000 };
        let one_sided = |step: &mut dyn FnMut() -> u64| {
            micros(rounds, || {
                let node = NodeId(step());
                drop(client.connect(node, SECOND).unwrap());
                client.forget(node);
            })
        };
        let rpc = |step: &mut dyn FnMut() -> u64, queue: &mut krcore::VirtualQueue| {
            micros(rounds, || {
                assert!(memory.write(0, &step().to_le_bytes()));
                let ask = WorkRequest::send(0, Service(1), memory.slice(0, 8));
                queue.post(&[ask.unsignalled()]).unwrap();
                assert_eq!(replies.receive(SECOND).unwrap().len(), 12);
            })
        };
        let mut other = 3;
        let mut other_step = || {
            other = if other + 1 < NODES { other + 1 } else { 3 };
            other
        };
        let both = interleave(
            1,
            samples,
            || one_sided(&mut step),
            || rpc(&mut other_step, &mut queue),
        );
        stop.store(true, Ordering::Relaxed);
        let what = "cold-metadata connect at 10,000 nodes, load factor 0.75";
        let figure = Figure::new("krcore/2", what, "us").samples(both.ours.clone());
        let note = format!("with forgetting the peer again; at most {most} READs each");
        figure.note(note).emit().unwrap();
        let rates = carlsbad_kit::sample::Interleaved {
            ours: both.ours.iter().map(|us| 1.0 / us).collect(),
            rival: both.rival.iter().map(|us| 1.0 / us).collect(),
        };
        let what = "metadata look-ups by one-sided READ";
        let figure = Figure::new("krcore/7c", what, "M/s").against("look-ups by RPC", rates);
        let note = "each with connecting and forgetting; the RPC is two messages, both sides spin";
        figure.note(note).emit().unwrap();
    });

    let pairs = client.stats().unwrap().queue_pairs;
    let queues: Vec<_> = (3..NODES)
        .map(|node| client.connect(NodeId(node), SECOND).unwrap())
        .collect();
    let grown = (client.stats().unwrap().queue_pairs - pairs) as f64;
    let what = "queue pairs created by connecting to 10,000 peers";
    let figure = Figure::new("krcore/7", what, "pairs").samples([grown]);
    figure.emit().unwrap();
    let each = client.metadata_size().get() as f64 / queues.len() as f64;
    let what = "metadata that is cached for each of 10,000 peers";
    let figure = Figure::new("krcore/7b", what, "B").samples([each]);
    let table = meta.size().get() as f64 / NODES as f64;
    let note = format!("the metadata server's table takes {table:.1} B each");
    figure.note(note).emit().unwrap();
}

fn main() {
    if rig::play() {
        return;
    }
    let samples = if is_quick() { 1 } else { 31 };
    warm(samples);
    cold(samples);
}
