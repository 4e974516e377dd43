//! What programs do often: connect, post and poll, in each way there is; look up; send.
#![allow(
    clippy::unwrap_used,
    missing_docs,
    reason = "a bench says what went wrong by failing"
)]

mod rig;

use criterion::{BenchmarkId, Criterion};
use krcore::{
    Access, ByteSize, Completion, Config, Mode, Node, NodeId, Op, Service, ShmFabric, VirtualQueue,
    WorkRequest,
};
use rig::{SECOND, Served};

fn run(queue: &mut VirtualQueue, work: &WorkRequest) {
    queue.post(std::slice::from_ref(work)).unwrap();
    let mut one = [Completion::default()];
    while queue.poll(&mut one) == 0 {
        std::hint::spin_loop();
    }
}

fn ways(c: &mut Criterion, name: &str, node: &Node, peer: &Node) {
    let far = peer.register(ByteSize::mib(1), Access::ReadWrite).unwrap();
    let near = node.register(ByteSize::mib(1), Access::Local).unwrap();
    c.bench_with_input(BenchmarkId::new("connect", name), node, |b, node| {
        b.iter(|| node.connect(peer.id(), SECOND).unwrap());
    });
    let mut queue = node.connect(peer.id(), SECOND).unwrap();
    for length in [8, 4096, 65536] {
        let work = WorkRequest::new(1, Op::Read, near.slice(0, length), far.remote(0));
        c.bench_function(&format!("READ of {length} B/{name}"), |b| {
            b.iter(|| run(&mut queue, &work));
        });
    }
    let add = Op::FetchAdd { add: 1 };
    let add = WorkRequest::new(1, add, near.slice(0, 8), far.remote(0));
    c.bench_function(&format!("FETCH_ADD/{name}"), |b| {
        b.iter(|| run(&mut queue, &add));
    });
    let listener = peer.listen(Service(1)).unwrap();
    let send = WorkRequest::send(1, Service(1), near.slice(0, 64));
    c.bench_function(&format!("SEND and receive 64 B/{name}"), |b| {
        b.iter(|| {
            run(&mut queue, &send);
            listener.receive(SECOND).unwrap()
        });
    });
}

fn main() {
    if rig::play() {
        return;
    }
    let mut c = Criterion::default().configure_from_args();
    let fabric = ShmFabric::new();
    let server = Node::embedded(fabric.clone(), NodeId(1), Config::default()).unwrap();
    let client = Node::embedded(fabric, NodeId(2), Config::default()).unwrap();
    ways(&mut c, "embedded", &client, &server);
    let served = Served::start();
    let peer = served.attach();
    ways(&mut c, "isolated", &served.attach(), &peer);
    let trusted = Node::attach_as(served.path(), Mode::Trusted, SECOND).unwrap();
    ways(&mut c, "trusted", &trusted, &peer);
    c.final_summary();
}
