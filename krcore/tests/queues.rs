//! Virtual queues of embedded nodes: order, transfers, broken pairs, metadata, leases, messages.
#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

mod common;

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use common::{Kind, Net, SECOND, config, pair, pair_with, rounds, word};
use krcore::{
    Access, ByteSize, Completion, Config, Error, Malformed, NodeId, Op, Service, Status,
    VirtualQueue, WorkRequest,
};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

on_every_fabric! { lag 30:
    transfers_under_load_neither_reorder_nor_lose_nor_double
    a_hot_peer_gets_a_dedicated_pair_and_the_least_used_one_leaves
    a_peer_that_dies_breaks_the_pair_for_nobody_else_and_it_is_rebuilt_at_once
    completions_of_a_queue_that_is_gone_go_to_nobody
    more_than_a_queue_holds_is_taken_in_parts
    a_wrong_request_in_a_list_leaves_nothing_of_the_list
    metadata_is_found_in_two_reads_at_any_replica_and_at_last_at_the_peer
    a_region_is_reached_for_one_lease_after_its_deregistration_and_breaks_no_pair
    a_region_that_is_revoked_within_a_lease_breaks_the_pair
    messages_small_and_large_and_a_reply_without_a_look_up
    messages_that_were_sent_before_and_after_a_transfer_arrive_in_order
    an_event_loop_over_many_queues_hears_of_all
    connecting_to_many_peers_makes_no_queue_pair
    what_the_fabric_or_the_caller_cannot_do_is_a_typed_error
}

fn done(queue: &mut VirtualQueue) -> (u64, Status) {
    let done = queue.wait(SECOND).unwrap();
    (done.id, done.status)
}

fn transfers_under_load_neither_reorder_nor_lose_nor_double(kind: Kind) {
    let p = pair(kind);
    let mut queue = p.client.connect(p.server.id(), SECOND).unwrap();
    // Others who load the shared pair meanwhile.
    let mut others: Vec<_> = (0..3)
        .map(|_| p.client.connect(p.server.id(), SECOND).unwrap())
        .collect();
    let mut rng = carlsbad_kit::seed::rng("transfers");
    let (mut posted, mut seen) = (0_u64, 0_u64);
    let mut out = [Completion::default(); 32];
    for transfer in 0..1000 {
        for _ in 0..rng.usize(1..20) {
            // Each is executed only where the one before it was.
            let swap = Op::CompareSwap {
                expected: posted,
                new: posted + 1,
            };
            let work = WorkRequest::new(posted, swap, p.near.slice(0, 8), p.far.remote(0));
            posted += queue.post(&[work]).unwrap() as u64;
            let other = &mut others[rng.usize(..3)];
            let add = Op::FetchAdd { add: 1 };
            let add = WorkRequest::new(0, add, p.near.slice(8, 8), p.far.remote(8));
            other.post(&[add]).unwrap();
            other.poll(&mut out);
        }
        if transfer % 2 == 0 {
            queue.transfer_to_dedicated().unwrap();
        } else {
            queue.transfer_to_dynamic().unwrap();
        }
        assert_eq!(queue.is_dedicated(), transfer % 2 == 0);
        let taken = queue.poll(&mut out);
        for done in &out[..taken] {
            assert_eq!((done.id, done.status), (seen, Status::Success));
            seen += 1;
        }
    }
    while seen < posted {
        assert_eq!(done(&mut queue), (seen, Status::Success));
        seen += 1;
    }
    assert_eq!(queue.poll(&mut out), 0);
    assert_eq!(word(&p.far, 0), posted, "all in order");
    assert_eq!(p.client.stats().unwrap().rebuilt, 0);
}

fn a_hot_peer_gets_a_dedicated_pair_and_the_least_used_one_leaves(kind: Kind) {
    let net = Net::new(kind);
    let config = Config {
        promote_after: 16,
        dedicated_pairs: 2,
        ..config()
    };
    let client = net.node(0, config.clone());
    let near = client.register(ByteSize::kib(4), Access::Local).unwrap();
    let peers: Vec<_> = (1..=3)
        .map(|id| {
            let node = net.node(id, config.clone());
            let far = node.register(ByteSize::kib(4), Access::Read).unwrap();
            let queue = client.connect(NodeId(id), SECOND).unwrap();
            (node, far, queue)
        })
        .collect();
    let mut dedicated = Vec::new();
    for (_node, far, mut queue) in peers {
        let start = Instant::now();
        while !queue.is_dedicated() {
            let read = WorkRequest::new(1, Op::Read, near.slice(0, 8), far.remote(0));
            queue.post(&[read]).unwrap();
            assert_eq!(done(&mut queue), (1, Status::Success));
            assert!(start.elapsed() < 5 * SECOND, "never promoted");
        }
        dedicated.push((_node, far, queue));
    }
    // The first one's pair has left the LRU for the third's: it goes back with its next request.
    let (_, far, first) = &mut dedicated[0];
    let read = WorkRequest::new(2, Op::Read, near.slice(0, 8), far.remote(0));
    first.post(&[read]).unwrap();
    assert_eq!(done(first), (2, Status::Success));
    assert!(!first.is_dedicated());
}

fn a_peer_that_dies_breaks_the_pair_for_nobody_else_and_it_is_rebuilt_at_once(kind: Kind) {
    let p = pair(kind);
    let mut slowest = Duration::ZERO;
    for round in 0..50 {
        let dying = p.net.node(9, config());
        let doomed = dying.register(ByteSize::kib(4), Access::ReadWrite).unwrap();
        let mut to_dying = p.client.connect(NodeId(9), SECOND).unwrap();
        let mut to_living = p.client.connect(p.server.id(), SECOND).unwrap();
        let write = |id, remote| WorkRequest::new(id, Op::Write, p.near.slice(0, 8), remote);
        // It knows the peer's regions, so that the checks let the last ones through.
        to_dying.post(&[write(0, doomed.remote(0))]).unwrap();
        assert_eq!(done(&mut to_dying), (0, Status::Success));
        let before = word(&p.far, 64);
        drop(dying);
        let start = Instant::now();
        let add = Op::FetchAdd { add: 1 };
        for id in 0..20 {
            let _refused = to_dying.post(&[write(id, doomed.remote(0))]);
            let add = WorkRequest::new(id, add, p.near.slice(8, 8), p.far.remote(64));
            to_living.post(&[add]).unwrap();
        }
        for id in 0..20 {
            assert_eq!(done(&mut to_living), (id, Status::Success), "round {round}");
        }
        slowest = slowest.max(start.elapsed());
        assert_eq!(word(&p.far, 64) - before, 20, "none lost, none doubled");
        let mut out = [Completion::default(); 64];
        let failed = to_dying.poll(&mut out);
        assert!(failed > 0);
        for (nth, one) in out[..failed].iter().enumerate() {
            assert_eq!(one.id, nth as u64, "each once, in order");
            assert_ne!(one.status, Status::Success);
        }
        assert_eq!(to_living.poll(&mut out), 0, "nothing completes twice");
    }
    assert!(
        p.client.stats().unwrap().rebuilt >= 50,
        "the pair never broke"
    );
    assert!(slowest < Duration::from_millis(100), "{slowest:?}");
}

fn completions_of_a_queue_that_is_gone_go_to_nobody(kind: Kind) {
    let p = pair(kind);
    let read = |id| WorkRequest::new(id, Op::Read, p.near.slice(0, 8), p.far.remote(0));
    for round in 0..1000 {
        let mut gone = p.client.connect(p.server.id(), SECOND).unwrap();
        gone.post(&vec![read(7); 10]).unwrap();
        drop(gone);
        let mut next = p.client.connect(p.server.id(), SECOND).unwrap();
        next.post(&[read(1000 + round)]).unwrap();
        assert_eq!(done(&mut next), (1000 + round, Status::Success));
    }
}

fn more_than_a_queue_holds_is_taken_in_parts(kind: Kind) {
    let p = pair(kind);
    let mut queue = p.client.connect(p.server.id(), SECOND).unwrap();
    let read = WorkRequest::new(5, Op::Read, p.near.slice(0, 8), p.far.remote(0));
    let list = vec![read; 3000];
    let taken = queue.post(&list).unwrap();
    assert_eq!(taken, 1024);
    assert_eq!(queue.post(&list).unwrap(), 0, "poll first");
    let mut out = [Completion::default(); 2000];
    let mut polled = 0;
    let start = Instant::now();
    while polled < 1024 {
        polled += queue.poll(&mut out);
        assert!(start.elapsed() < 5 * SECOND, "{polled} have completed");
    }
    assert_eq!(queue.post(&list).unwrap(), 1024);
}

fn a_wrong_request_in_a_list_leaves_nothing_of_the_list(kind: Kind) {
    let p = pair(kind);
    let mut queue = p.client.connect(p.server.id(), SECOND).unwrap();
    let write = |len, far| {
        let remote = p.far.remote(far);
        WorkRequest::new(1, Op::Write, p.near.slice(0, len), remote)
    };
    assert!(p.near.write(0, &[1; 8]));
    let refused = queue.post(&[write(8, 0), write(8, 4095), write(8, 16)]);
    let refused = refused.unwrap_err();
    assert_eq!((refused.index, refused.why), (1, Malformed::RemoteRange));
    assert_eq!(word(&p.far, 0), 0);
    let huge = queue.post(&[write(4 << 30, 0)]).unwrap_err();
    assert_eq!(huge.why, Malformed::TooLong);
}

fn metadata_is_found_in_two_reads_at_any_replica_and_at_last_at_the_peer(kind: Kind) {
    let net = Net::new(kind);
    let replicas: Vec<_> = (100..103).map(|id| net.meta(id, 1000)).collect();
    let server = net.node(1, net.with_meta(&replicas));
    let client = net.node(2, net.with_meta(&replicas));
    for replica in &replicas {
        for id in 1000..1990 {
            replica.insert(NodeId(id), server.address()).unwrap();
        }
    }
    for id in 1000..1990 {
        let before = client.stats().unwrap().meta_reads;
        client.connect(NodeId(id), SECOND).unwrap();
        let reads = client.stats().unwrap().meta_reads - before;
        assert!((1..=2).contains(&reads), "{reads} READs");
        let before = client.stats().unwrap().meta_reads;
        client.connect(NodeId(id), SECOND).unwrap();
        assert_eq!(client.stats().unwrap().meta_reads, before, "it was cached");
    }
    assert_eq!(client.stats().unwrap().peers_asked, 0);
    for (dead, replica) in replicas.iter().enumerate() {
        replica.stop();
        client.forget(NodeId(1));
        client.connect(NodeId(1), SECOND).unwrap();
        let asked = client.stats().unwrap().peers_asked;
        assert_eq!(asked, u64::from(dead == 2), "the last resort only");
    }
    client.forget(NodeId(55));
    assert!(matches!(
        client.connect(NodeId(55), SECOND),
        Err(Error::UnknownNode(_))
    ));
}

fn a_region_is_reached_for_one_lease_after_its_deregistration_and_breaks_no_pair(kind: Kind) {
    let p = pair_with(
        kind,
        Config {
            lease: Duration::from_millis(60),
            ..config()
        },
    );
    let mut queue = p.client.connect(p.server.id(), SECOND).unwrap();
    let read = WorkRequest::new(1, Op::Read, p.near.slice(0, 8), p.far.remote(0));
    queue.post(std::slice::from_ref(&read)).unwrap();
    assert_eq!(done(&mut queue), (1, Status::Success));
    p.server.deregister(&p.far).unwrap();
    let start = Instant::now();
    while let Ok(1) = queue.post(std::slice::from_ref(&read)) {
        assert_eq!(done(&mut queue), (1, Status::Success), "within the lease");
        assert!(start.elapsed() < SECOND);
    }
    let refused = queue.post(std::slice::from_ref(&read)).unwrap_err();
    assert_eq!(refused.why, Malformed::StaleKey);
    std::thread::sleep(Duration::from_millis(150));
    assert_eq!(p.client.stats().unwrap().rebuilt, 0);
}

/// The control: where the region goes away under a caller whose entry is still good, the request
/// passes the checks and breaks the shared pair.
fn a_region_that_is_revoked_within_a_lease_breaks_the_pair(kind: Kind) {
    let net = Net::new(kind);
    let hasty = Config {
        lease: Duration::ZERO,
        ..config()
    };
    let server = net.node(1, hasty);
    let client = net.node(2, config());
    let far = server.register(ByteSize::kib(4), Access::Read).unwrap();
    let near = client.register(ByteSize::kib(4), Access::Local).unwrap();
    let mut queue = client.connect(server.id(), SECOND).unwrap();
    let read = WorkRequest::new(1, Op::Read, near.slice(0, 8), far.remote(0));
    queue.post(std::slice::from_ref(&read)).unwrap();
    assert_eq!(done(&mut queue), (1, Status::Success));
    server.deregister(&far).unwrap();
    std::thread::sleep(Duration::from_millis(200));
    queue.post(std::slice::from_ref(&read)).unwrap();
    assert_eq!(done(&mut queue), (1, Status::RemoteAccess));
    assert_eq!(client.stats().unwrap().rebuilt, 1);
}

fn messages_small_and_large_and_a_reply_without_a_look_up(kind: Kind) {
    let p = pair(kind);
    let listener = p.server.listen(Service(1)).unwrap();
    let replies = p.client.listen(Service(2)).unwrap();
    let mut queue = p.client.connect(p.server.id(), SECOND).unwrap();
    assert!(p.near.write(0, b"hello"));
    queue
        .post(&[WorkRequest::send(1, Service(1), p.near.slice(0, 5))])
        .unwrap();
    assert_eq!(done(&mut queue), (1, Status::Success));
    let message = listener.receive(SECOND).unwrap();
    assert_eq!(
        (message.from(), message.bytes()),
        (NodeId(2), Some(&b"hello"[..]))
    );
    let before = p.server.stats().unwrap();
    let mut back = p.server.connect_back(&message).unwrap();
    back.post(&[WorkRequest::send(2, Service(2), p.far.slice(0, 9))])
        .unwrap();
    assert_eq!(done(&mut back), (2, Status::Success));
    assert_eq!(replies.receive(SECOND).unwrap().len(), 9);
    let after = p.server.stats().unwrap();
    assert_eq!(
        after.peers_asked + after.meta_reads,
        before.peers_asked + before.meta_reads
    );

    let large = p.client.register(ByteSize::mib(4), Access::Read).unwrap();
    let into = p.server.register(ByteSize::mib(4), Access::Local).unwrap();
    assert!(large.write(4096, &[9; 3 << 20]));
    let length = 3 << 20;
    queue
        .post(&[WorkRequest::send(3, Service(1), large.slice(4096, length))])
        .unwrap();
    assert!(
        queue.wait(Duration::from_millis(10)).is_err(),
        "it was not fetched yet"
    );
    let message = listener.receive(SECOND).unwrap();
    let short = message.fetch(&p.server, &into.slice(0, 100), SECOND);
    assert!(matches!(short, Err(Error::OutOfRange { .. })));
    message
        .fetch(&p.server, &into.slice(0, 4 << 20), SECOND)
        .unwrap();
    assert_eq!(done(&mut queue), (3, Status::Success));
    let mut bytes = vec![0; length as usize];
    assert!(into.read(0, &mut bytes));
    assert!(bytes.iter().all(|byte| *byte == 9));
    let closed = WorkRequest::send(4, Service(1), p.near.slice(0, 4097));
    assert_eq!(
        queue.post(&[closed]).map_err(|e| e.why),
        Err(Malformed::LocalRange)
    );
    let private = p.client.register(ByteSize::kib(8), Access::Local).unwrap();
    let private = WorkRequest::send(4, Service(1), private.slice(0, 8192));
    assert_eq!(
        queue.post(&[private]).map_err(|e| e.why),
        Err(Malformed::Denied)
    );
}

fn messages_that_were_sent_before_and_after_a_transfer_arrive_in_order(kind: Kind) {
    let p = pair(kind);
    let listener = p.server.listen(Service(1)).unwrap();
    let mut queue = p.client.connect(p.server.id(), SECOND).unwrap();
    let mut out = [Completion::default(); 8];
    for n in 0..rounds(2000, 100_000) as u64 {
        assert!(p.near.write(0, &n.to_le_bytes()));
        queue
            .post(&[WorkRequest::send(n, Service(1), p.near.slice(0, 8))])
            .unwrap();
        if n % 7 == 0 {
            queue.transfer_to_dedicated().unwrap();
        } else if n % 7 == 3 {
            queue.transfer_to_dynamic().unwrap();
        }
        queue.poll(&mut out);
        let message = listener.receive(SECOND).unwrap();
        assert_eq!(message.bytes(), Some(&n.to_le_bytes()[..]));
    }
}

fn an_event_loop_over_many_queues_hears_of_all(kind: Kind) {
    let p = pair(kind);
    let mut queues: Vec<_> = (0..4)
        .map(|_| p.client.connect(p.server.id(), SECOND).unwrap())
        .collect();
    let mut seen = [0_u64; 4];
    let mut out = [Completion::default(); 8];
    let readable = |queue: &VirtualQueue| {
        let mut fds = [PollFd::new(queue.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::ZERO).unwrap() == 1
    };
    // Polled once until empty, each is quiet.
    for queue in &mut queues {
        assert!(readable(queue), "at first there may be something");
        assert_eq!(queue.poll(&mut out), 0);
        assert!(!readable(queue));
    }
    for round in 0..500_u64 {
        let who = (round % 4) as usize;
        let read = WorkRequest::new(round, Op::Read, p.near.slice(0, 8), p.far.remote(0));
        queues[who].post(&[read]).unwrap();
        // Whoever polls moves the pair on; those whose completions come by that are readable.
        let other = (who + 1) % 4;
        seen[other] += queues[other].poll(&mut out) as u64;
        if readable(&queues[who]) {
            seen[who] += queues[who].poll(&mut out) as u64;
        }
    }
    for (who, queue) in queues.iter_mut().enumerate() {
        while seen[who] < 125 {
            queue.wait(SECOND).unwrap();
            seen[who] += 1;
        }
        assert_eq!(queue.poll(&mut out), 0);
    }
}

fn connecting_to_many_peers_makes_no_queue_pair(kind: Kind) {
    let net = Net::new(kind);
    let meta = net.meta(0, 10_000);
    let with_meta = net.with_meta(std::slice::from_ref(&meta));
    let server = net.node(1, with_meta.clone());
    let client = net.node(2, with_meta);
    for id in 3..10_000 {
        meta.insert(NodeId(id), server.address()).unwrap();
    }
    let before = client.stats().unwrap().queue_pairs;
    let queues: Vec<_> = (3..10_000)
        .map(|id| client.connect(NodeId(id), SECOND).unwrap())
        .collect();
    assert_eq!(client.stats().unwrap().queue_pairs, before);
    assert!(client.metadata_size().get() <= 64 * queues.len() as u64);
    assert!(meta.size().get() <= 64 * queues.len() as u64);
}

fn what_the_fabric_or_the_caller_cannot_do_is_a_typed_error(kind: Kind) {
    let p = pair(kind);
    let again = p.net.join(1, config());
    assert!(matches!(again, Err(Error::NodeExists(NodeId(1)))));
    for len in [0, u64::MAX] {
        let refused = p.client.register(ByteSize::new(len), Access::Local);
        assert!(matches!(refused, Err(Error::OutOfRange { .. })), "{len}");
    }
    let wrong = Config {
        depth: 0,
        ..config()
    };
    let refused = p.net.join(7, wrong);
    assert!(matches!(refused, Err(Error::OutOfRange { .. })));
    let none = Config {
        dedicated_pairs: 0,
        ..config()
    };
    let node = p.net.node(8, none);
    let mut queue = node.connect(p.server.id(), SECOND).unwrap();
    assert!(queue.transfer_to_dedicated().is_err());
    assert!(matches!(
        queue.wait(Duration::from_millis(1)),
        Err(Error::TimedOut { .. })
    ));
    assert!(matches!(
        p.client.deregister(&p.far),
        Err(Error::NotRegistered)
    ));
    let foreign = WorkRequest::new(1, Op::Read, p.far.slice(0, 8), p.far.remote(0));
    assert_eq!(
        queue.post(&[foreign]).map_err(|e| e.why),
        Err(Malformed::ForeignRegion)
    );
    while node.register(ByteSize::kib(4), Access::Local).is_ok() {}
    let full = node.register(ByteSize::kib(4), Access::Local);
    assert!(
        matches!(full, Err(Error::TooManyRegions(_) | Error::Io { .. })),
        "{full:?}"
    );
}
