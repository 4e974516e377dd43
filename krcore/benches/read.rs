//! Figure 4: READs of 8 bytes through the daemon and by oneself, beside what they stand on; and what
//! sharing and checking cost on the data path.
#![allow(
    clippy::unwrap_used,
    missing_docs,
    reason = "a bench says what went wrong by failing"
)]

mod rig;

use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use carlsbad_kit::figure::{Figure, is_quick};
use carlsbad_kit::sample::interleave;
use krcore::fabric::{Fabric, PairOptions, QueuePair, RawRequest, Wake};
use krcore::{
    Access, ByteSize, Completion, Config, Mode, Node, NodeId, Op, ShmFabric, Status, VirtualQueue,
    WorkRequest,
};
use rig::{SECOND, Served, micros};

/// One entry of 64 bytes there and one of 8 back, through shared memory, by two threads that do
/// nothing else: what any isolated operation has to pay.
struct RawRing {
    memory: Arc<[Line; 8]>,
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
    count: u64,
}

#[repr(align(128))]
#[derive(Default)]
struct Line([AtomicU64; 8]);

const ENTRY: usize = 0;
const TAIL: usize = 1;
const ANSWER: usize = 2;
const ANSWERED: usize = 3;

impl RawRing {
    fn new() -> Self {
        let memory: Arc<[Line; 8]> = Arc::default();
        let stop = Arc::new(AtomicBool::new(false));
        let (theirs, stopped) = (Arc::clone(&memory), Arc::clone(&stop));
        let thread = std::thread::spawn(move || {
            let (mut seen, mut idle) = (0, 0_u32);
            while !stopped.load(Ordering::Relaxed) {
                let tail = theirs[TAIL].0[0].load(Ordering::Acquire);
                if tail == seen {
                    idle += 1;
                    if idle.is_multiple_of(64) {
                        std::thread::yield_now();
                    }
                    std::hint::spin_loop();
                    continue;
                }
                seen = tail;
                let sum = theirs[ENTRY]
                    .0
                    .iter()
                    .map(|word| word.load(Ordering::Relaxed));
                theirs[ANSWER].0[0].store(sum.sum(), Ordering::Relaxed);
                theirs[ANSWERED].0[0].store(tail, Ordering::Release);
            }
        });
        Self {
            memory,
            stop,
            thread: Some(thread),
            count: 0,
        }
    }

    fn round_trip(&mut self) {
        self.count += 1;
        for word in &self.memory[ENTRY].0 {
            word.store(self.count, Ordering::Relaxed);
        }
        self.memory[TAIL].0[0].store(self.count, Ordering::Release);
        let mut idle = 0_u32;
        while self.memory[ANSWERED].0[0].load(Ordering::Acquire) != self.count {
            idle += 1;
            if idle.is_multiple_of(64) {
                std::thread::yield_now();
            }
            std::hint::spin_loop();
        }
        let answer = self.memory[ANSWER].0[0].load(Ordering::Relaxed);
        assert_eq!(answer, 8 * self.count);
    }
}

impl Drop for RawRing {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

fn reads(queue: &mut VirtualQueue, read: &WorkRequest, rounds: u32) -> f64 {
    let mut one = [Completion::default()];
    1e3 * micros(rounds, || {
        queue.post(std::slice::from_ref(read)).unwrap();
        while queue.poll(&mut one) == 0 {
            std::hint::spin_loop();
        }
        assert_eq!(one[0].status, Status::Success);
    })
}

/// The median one-way latency in nanoseconds that UCX's own test measures.
fn ucx(port: u16) -> Option<f64> {
    let count = if is_quick() { "1000" } else { "500000" };
    let port = port.to_string();
    let arguments = [
        "-d", "memory", "-x", "posix", "-t", "put_lat", "-s", "8", "-n", count,
    ];
    let run = |host: Option<&str>| {
        let mut command = Command::new("ucx_perftest");
        command.args(host).args(arguments).args(["-p", &port, "-f"]);
        command.stdout(Stdio::piped()).stderr(Stdio::null());
        command.spawn().ok()
    };
    let mut server = run(None)?;
    std::thread::sleep(std::time::Duration::from_millis(500));
    let answer = run(Some("127.0.0.1")).and_then(|client| client.wait_with_output().ok());
    let _ended = server.kill();
    let _waited = server.wait();
    // Iterations, then the median in microseconds.
    let text = String::from_utf8(answer?.stdout).ok()?;
    let line = text.lines().rev().find(|line| line.contains(count))?;
    let mut numbers = line
        .split_whitespace()
        .filter_map(|word| word.parse::<f64>().ok());
    numbers.find(|number| *number == count.parse::<f64>().unwrap_or(0.0))?;
    numbers.next().map(|median| median * 1e3)
}

fn main() {
    if rig::play() {
        return;
    }
    let samples = if is_quick() { 1 } else { 31 };
    let rounds = if is_quick() { 100 } else { 20_000 };
    let served = Served::start();
    {
        let node = served.attach();
        let far = node.register(ByteSize::kib(4), Access::Read).unwrap();
        let near = node.register(ByteSize::kib(4), Access::Local).unwrap();
        let read = WorkRequest::new(1, Op::Read, near.slice(0, 8), far.remote(8));
        let mut queue = node.connect(node.id(), SECOND).unwrap();
        let both = interleave(
            1,
            samples,
            || reads(&mut queue, &read, rounds),
            || {
                // Made anew, so that its thread does not spin beside the daemon's.
                let mut ring = RawRing::new();
                micros(1000, || ring.round_trip());
                1e3 * micros(rounds, || ring.round_trip())
            },
        );
        let what = "isolated READ of 8 bytes: through the daemon, checked, on a shared pair";
        let figure = Figure::new("krcore/4", what, "ns");
        figure.against("raw ring round trip", both).emit().unwrap();

        let node = Node::attach_as(served.path(), Mode::Trusted, SECOND).unwrap();
        let near = node.register(ByteSize::kib(4), Access::Local).unwrap();
        let read = WorkRequest::new(1, Op::Read, near.slice(0, 8), far.remote(8));
        let mut queue = node.connect(node.id(), SECOND).unwrap();
        let mut theirs = Vec::new();
        let mut ours = Vec::new();
        for round in 0..if is_quick() { 1 } else { 9 } {
            ours.push(reads(&mut queue, &read, 20 * rounds));
            theirs.extend(ucx(17_700 + round));
        }
        let what = "trusted READ of 8 bytes: checked, executed by the caller";
        let figure = Figure::new("krcore/4b", what, "ns");
        if theirs.is_empty() {
            let figure = figure.samples(ours);
            figure
                .note("ucx_perftest is not there: apt ucx-utils")
                .emit()
                .unwrap();
        } else {
            let both = carlsbad_kit::sample::Interleaved {
                ours,
                rival: theirs,
            };
            let note = "ours: until the completion was polled; UCX: one way, its own measurement";
            let figure = figure.against("UCX posix put latency", both);
            figure.note(note).emit().unwrap();
        }
    }
    drop(served);

    let fabric = ShmFabric::new();
    let server = Node::embedded(fabric.clone(), NodeId(1), Config::default()).unwrap();
    let client = Node::embedded(fabric.clone(), NodeId(2), Config::default()).unwrap();
    let far = server.register(ByteSize::kib(4), Access::Read).unwrap();
    let near = client.register(ByteSize::kib(4), Access::Local).unwrap();
    let mut queue = client.connect(NodeId(1), SECOND).unwrap();
    let mut batch = |size: usize, direct: &mut dyn QueuePair| {
        let read = WorkRequest::new(1, Op::Read, near.slice(0, 8), far.remote(8));
        let mut list = vec![read.clone().unsignalled(); size - 1];
        list.push(read);
        let raw: Vec<_> = list
            .iter()
            .map(|work| RawRequest {
                wr_id: 1,
                signalled: work.signalled,
                op: work.op,
                local: work.local.clone(),
                remote: work.remote,
                to: server.address(),
                header: None,
            })
            .collect();
        let rounds = rounds / size as u32 + 1;
        let each = |us: f64| us * 1e3 / size as f64;
        interleave(
            1,
            samples,
            || {
                let mut one = [Completion::default()];
                each(micros(rounds, || {
                    queue.post(&list).unwrap();
                    assert_eq!(queue.poll(&mut one), 1);
                }))
            },
            || {
                each(micros(rounds, || {
                    direct.post(&raw).unwrap();
                    assert!(direct.poll().is_some());
                }))
            },
        )
    };
    let options = PairOptions {
        depth: 128,
        peer: None,
        wake: Wake::nobody(),
    };
    let mut direct = fabric.queue_pair(options).unwrap();
    for (id, size, what) in [
        ("krcore/4c", 1, "pooled READ of 8 bytes, synchronous"),
        (
            "krcore/4d",
            64,
            "pooled READ of 8 bytes, 64 in a list, one signalled",
        ),
    ] {
        let both = batch(size, &mut *direct);
        let figure = Figure::new(id, what, "ns");
        let rival = "the same on a queue pair of one's own, unchecked";
        figure.against(rival, both).emit().unwrap();
    }
}
