//! A hostile virtual queue breaks nothing for the others on its pair, where a raw shared pair fails.
#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

mod common;

use std::time::Instant;

use carlsbad_kit::seed;
use common::{Kind, Pair, SECOND, pair, word};
use krcore::fabric::{PairOptions, RawRequest, State, Wake};
use krcore::{Completion, Op, RKey, RemoteSlice, Status, VirtualQueue, WorkRequest};

fn hostile(n: usize, p: &Pair, id: u64) -> WorkRequest {
    let remote = |key, offset| RemoteSlice { key, offset };
    let (far, near) = (p.far.key(), &p.near);
    match n % 8 {
        0 => WorkRequest::new(id, Op::Read, near.slice(0, 8), remote(RKey(999), 0)),
        1 => WorkRequest::new(id, Op::Read, near.slice(0, 8), remote(far, 4096)),
        2 => WorkRequest::new(id, Op::Write, near.slice(0, 8), remote(far, u64::MAX - 3)),
        3 => WorkRequest::new(id, Op::Read, near.slice(4090, 8), remote(far, 0)),
        4 => WorkRequest::new(
            id,
            Op::FetchAdd { add: 1 },
            near.slice(0, 8),
            remote(far, 4),
        ),
        5 => WorkRequest::new(id, Op::Write, near.slice(0, 0), remote(far, 0)),
        6 => WorkRequest::new(id, Op::Read, near.slice(0, 1 << 32), remote(far, 0)),
        _ => WorkRequest::new(id, Op::Read, near.slice(u64::MAX, 2), remote(far, 0)),
    }
}

/// Eight virtual queues of one pair, of which the last posts nothing but what is wrong.
fn load(p: &Pair, operations: usize) {
    let mut rng = seed::rng("isolation");
    let mut queues: Vec<VirtualQueue> = (0..8)
        .map(|_| p.client.connect(p.server.id(), SECOND).unwrap())
        .collect();
    let (mut next, mut seen) = ([0_u64; 8], [0_u64; 8]);
    let mut out = [Completion::default(); 16];
    for n in 0..operations {
        let who = rng.usize(..8);
        if who == 7 {
            assert!(queues[7].post(&[hostile(n, p, 0)]).is_err());
            continue;
        }
        let id = (who as u64) << 32 | next[who];
        let add = Op::FetchAdd { add: 1 };
        let near = p.near.slice(8 * who as u64, 8);
        let work = WorkRequest::new(id, add, near, p.far.remote(8));
        next[who] += queues[who].post(&[work]).unwrap() as u64;
        if rng.u8(..4) == 0 || next[who] - seen[who] > 500 {
            let taken = queues[who].poll(&mut out);
            for done in &out[..taken] {
                let expected = ((who as u64) << 32 | seen[who], Status::Success);
                assert_eq!((done.id, done.status), expected);
                seen[who] += 1;
            }
        }
    }
    for (who, queue) in queues.iter_mut().enumerate() {
        while seen[who] < next[who] {
            let done = queue.wait(SECOND).unwrap();
            assert_eq!(done.id, (who as u64) << 32 | seen[who]);
            seen[who] += 1;
        }
        assert_eq!(queue.poll(&mut out), 0, "nothing doubled");
    }
    assert_eq!(word(&p.far, 8), next.iter().sum::<u64>());
    assert_eq!(p.client.stats().unwrap().rebuilt, 0);
}

on_every_fabric! { lag 20:
    a_hostile_queue_harms_no_other_on_its_pair
    a_raw_shared_pair_is_broken_by_one_hostile_request
    unsignalled_requests_far_beyond_the_depth_neither_hang_nor_get_lost
}

/// A network takes its time.
fn operations(kind: Kind) -> usize {
    match kind {
        Kind::Shm | Kind::Lagging(_) => 1_000_000,
        #[cfg(feature = "tcp")]
        Kind::Tcp => common::rounds(50_000, 1_000_000),
        #[cfg(feature = "verbs")]
        Kind::Verbs => 5_000,
    }
}

fn a_hostile_queue_harms_no_other_on_its_pair(kind: Kind) {
    load(&pair(kind), operations(kind));
}

/// The control: without the checks, any of the same requests ends the pair for all who share it.
fn a_raw_shared_pair_is_broken_by_one_hostile_request(kind: Kind) {
    let p = pair(kind);
    // No bytes are no harm to a raw pair.
    for n in (0..8).filter(|n| *n != 5) {
        let options = PairOptions {
            depth: 128,
            peer: None,
            wake: Wake::nobody(),
        };
        let fabric = p.net.fabric(p.client.id());
        let mut shared = fabric.queue_pair(options).unwrap();
        let raw = |work: WorkRequest| RawRequest {
            wr_id: work.id,
            signalled: true,
            op: work.op,
            local: work.local,
            remote: work.remote,
            to: p.server.address(),
            header: None,
        };
        shared.post(&[raw(hostile(n, &p, 1))]).unwrap();
        let good = WorkRequest::new(2, Op::Read, p.near.slice(0, 8), p.far.remote(0));
        shared.post(&[raw(good)]).unwrap();
        let mut next = || {
            let start = Instant::now();
            loop {
                match shared.poll() {
                    Some(found) => return found,
                    None => assert!(start.elapsed() < SECOND, "nothing completes"),
                }
            }
        };
        let first = next();
        assert_ne!(first.status, Status::Success, "hostile request {n}");
        let second = next();
        let what = format!("of another sharer, after request {n}");
        assert_eq!(second.status, Status::Flushed, "{what}");
        assert_eq!(shared.state(), State::Err);
    }
}

fn unsignalled_requests_far_beyond_the_depth_neither_hang_nor_get_lost(kind: Kind) {
    let p = pair(kind);
    let mut queue = p.client.connect(p.server.id(), SECOND).unwrap();
    let add = Op::FetchAdd { add: 1 };
    let one = WorkRequest::new(0, add, p.near.slice(0, 8), p.far.remote(0)).unsignalled();
    let all = operations(kind);
    let list = vec![one.clone(); 1000];
    for _ in 0..all / list.len() {
        assert_eq!(queue.post(&list).unwrap(), list.len());
    }
    let last = WorkRequest::new(7, Op::Fence, p.near.slice(0, 0), p.far.remote(0));
    queue.post(&[last]).unwrap();
    let mut out = [Completion::default(); 2];
    assert_eq!(queue.wait(SECOND).unwrap().id, 7);
    assert_eq!(queue.poll(&mut out), 0, "none was signalled");
    assert_eq!(word(&p.far, 0), all as u64);
}
