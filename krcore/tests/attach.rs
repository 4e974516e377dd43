//! Processes that are attached to a node daemon.
#![cfg(feature = "daemon")]
#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

mod common;
#[path = "common/machine.rs"]
mod machine;

use std::os::fd::AsFd;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use carlsbad_kit::child::{self, Role};
use common::{SECOND, config, rounds, word};
use krcore::{
    Access, ByteSize, Completion, Config, Daemon, DaemonOptions, Error, Malformed, Mode, Node,
    NodeId, Op, RKey, RemoteSlice, Service, ShmFabric, Status, WorkRequest,
};
use machine::{machine, machine_with, start, until};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

#[test]
fn every_operation_works_in_both_modes() {
    let machine = machine();
    for mode in [Mode::Isolated, Mode::Trusted] {
        let server = machine.attach();
        let far = server
            .register(ByteSize::kib(64), Access::ReadWrite)
            .unwrap();
        let client = Node::attach_as(&machine.path, mode, SECOND).unwrap();
        let near = client.register(ByteSize::kib(64), Access::Local).unwrap();
        let mut queue = client.connect(NodeId(1), SECOND).unwrap();
        let mut run = |op, at: u64, len: u64| {
            let work = WorkRequest::new(9, op, near.slice(at, len), far.remote(at));
            assert_eq!(queue.post(&[work]).unwrap(), 1);
            let done = queue.wait(SECOND).unwrap();
            assert_eq!(
                (done.id, done.status),
                (9, Status::Success),
                "{mode:?} {op:?}"
            );
        };
        assert!(near.write(0, b"over the ring"));
        run(Op::Write, 0, 13);
        let mut bytes = [0; 13];
        assert!(far.read(0, &mut bytes));
        assert_eq!(&bytes, b"over the ring");
        assert!(far.write(4096, &[7; 40000]));
        run(Op::Read, 4096, 40000);
        let mut bytes = vec![0; 40000];
        assert!(near.read(4096, &mut bytes));
        assert_eq!(bytes, [7; 40000]);
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
        run(Op::Fence, 0, 0);
    }
}

#[test]
fn what_is_wrong_is_refused_and_harms_nobody() {
    let machine = machine();
    let server = machine.attach();
    let far = server
        .register(ByteSize::kib(4), Access::ReadWrite)
        .unwrap();
    let closed = server.register(ByteSize::kib(4), Access::Read).unwrap();
    for mode in [Mode::Isolated, Mode::Trusted] {
        let client = Node::attach_as(&machine.path, mode, SECOND).unwrap();
        let near = client.register(ByteSize::kib(8), Access::Local).unwrap();
        let mut queue = client.connect(NodeId(1), SECOND).unwrap();
        let mut why = |work: WorkRequest| match queue.post(&[work]) {
            Err(refused) => refused.why,
            Ok(_) => match queue.wait(SECOND).unwrap().status {
                Status::Refused(why) => why,
                status => panic!("{status:?}"),
            },
        };
        let remote = |key, offset| RemoteSlice { key, offset };
        let read = |near, remote| WorkRequest::new(1, Op::Read, near, remote);
        let cases = [
            (read(near.slice(0, 0), far.remote(0)), Malformed::ZeroLength),
            (
                read(near.slice(0, 1 << 32), far.remote(0)),
                Malformed::TooLong,
            ),
            (
                read(near.slice(8190, 8), far.remote(0)),
                Malformed::LocalRange,
            ),
            (
                read(near.slice(u64::MAX, 8), far.remote(0)),
                Malformed::LocalRange,
            ),
            (
                read(near.slice(0, 8), far.remote(u64::MAX)),
                Malformed::RemoteRange,
            ),
            (
                read(near.slice(0, 8), far.remote(4090)),
                Malformed::RemoteRange,
            ),
            (
                read(near.slice(0, 8), remote(RKey(4000), 0)),
                Malformed::StaleKey,
            ),
            (
                read(near.slice(0, 8), remote(RKey(0), 0)),
                Malformed::StaleKey,
            ),
            (
                read(near.slice(0, 8), remote(RKey(1), 0)),
                Malformed::StaleKey,
            ),
            (
                WorkRequest::new(1, Op::Write, near.slice(0, 8), closed.remote(0)),
                Malformed::Denied,
            ),
            (
                WorkRequest::new(1, Op::FetchAdd { add: 1 }, near.slice(0, 8), far.remote(4)),
                Malformed::Unaligned,
            ),
            (
                read(far.slice(0, 8), far.remote(0)),
                Malformed::ForeignRegion,
            ),
            (
                WorkRequest::send(1, Service(9), near.slice(0, 8)),
                Malformed::ReceiverNotReady,
            ),
        ];
        for (work, expected) in cases {
            let what = format!("{work:?}");
            assert_eq!(why(work), expected, "{mode:?}: {what}");
        }
        // And the queue goes on.
        queue
            .post(&[read(near.slice(0, 8), far.remote(0))])
            .unwrap();
        assert_eq!(queue.wait(SECOND).unwrap().status, Status::Success);
    }
    assert_eq!(machine.daemon().stats().rebuilt, 0);
}

#[test]
fn a_key_is_stale_after_deregistration_in_both_modes() {
    let short = Config {
        lease: Duration::from_millis(50),
        ..config()
    };
    let machine = machine_with(short);
    let server = machine.attach();
    for mode in [Mode::Isolated, Mode::Trusted] {
        let far = server.register(ByteSize::kib(4), Access::Read).unwrap();
        let client = Node::attach_as(&machine.path, mode, SECOND).unwrap();
        let near = client.register(ByteSize::kib(4), Access::Local).unwrap();
        let mut queue = client.connect(NodeId(1), SECOND).unwrap();
        let read = WorkRequest::new(1, Op::Read, near.slice(0, 8), far.remote(0));
        queue.post(std::slice::from_ref(&read)).unwrap();
        assert_eq!(queue.wait(SECOND).unwrap().status, Status::Success);
        server.deregister(&far).unwrap();
        assert!(matches!(server.deregister(&far), Err(Error::NotRegistered)));
        until("the lease", SECOND, || {
            match queue.post(std::slice::from_ref(&read)) {
                Err(refused) => refused.why == Malformed::StaleKey,
                Ok(_) => {
                    let status = queue.wait(SECOND).unwrap().status;
                    assert!(matches!(
                        status,
                        Status::Success | Status::Refused(Malformed::StaleKey)
                    ));
                    status != Status::Success
                }
            }
        });
    }
    assert_eq!(
        machine.daemon().stats().rebuilt,
        0,
        "no pair was broken by it"
    );
}

#[test]
fn messages_small_and_large_go_between_processes_and_back() {
    let machine = machine();
    let (a, b) = (machine.attach(), machine.attach());
    let listener = b.listen(Service(7)).unwrap();
    assert!(matches!(a.listen(Service(7)), Err(Error::ServiceTaken(_))));
    let replies = a.listen(Service(8)).unwrap();
    let from = a.register(ByteSize::mib(1), Access::Read).unwrap();
    let into = b.register(ByteSize::mib(1), Access::Local).unwrap();
    let mut queue = a.connect(b.id(), SECOND).unwrap();
    assert!(from.write(0, b"small"));
    queue
        .post(&[WorkRequest::send(1, Service(7), from.slice(0, 5))])
        .unwrap();
    let message = listener.receive(SECOND).unwrap();
    assert_eq!(message.bytes(), Some(&b"small"[..]));
    assert_eq!(queue.wait(SECOND).unwrap().id, 1);

    assert!(from.write(0, &[3; 500_000]));
    queue
        .post(&[WorkRequest::send(2, Service(7), from.slice(0, 500_000))])
        .unwrap();
    let message = listener.receive(SECOND).unwrap();
    assert_eq!((message.len(), message.bytes()), (500_000, None));
    assert!(
        queue.wait(Duration::from_millis(20)).is_err(),
        "nobody has fetched it"
    );
    message.fetch(&b, &into.slice(0, 1 << 20), SECOND).unwrap();
    let mut bytes = vec![0; 500_000];
    assert!(into.read(0, &mut bytes));
    assert_eq!(bytes, vec![3; 500_000]);
    let done = queue.wait(SECOND).unwrap();
    assert_eq!((done.id, done.status), (2, Status::Success));

    let mut back = b.connect_back(&message).unwrap();
    back.post(&[WorkRequest::send(3, Service(8), into.slice(0, 4))])
        .unwrap();
    assert_eq!(replies.receive(SECOND).unwrap().bytes(), Some(&[3; 4][..]));
}

#[test]
fn a_listener_that_does_not_receive_makes_its_senders_wait_and_nobody_else() {
    let machine = machine();
    let node = machine.attach();
    let slow = node.listen(Service(1)).unwrap();
    let quick = node.listen(Service(2)).unwrap();
    let memory = node.register(ByteSize::kib(4), Access::Local).unwrap();
    let mut queue = node.connect(node.id(), SECOND).unwrap();
    let mut send = |service| {
        queue
            .post(&[WorkRequest::send(0, service, memory.slice(0, 8))])
            .unwrap();
        queue.wait(SECOND).unwrap().status
    };
    let mut sent = 0;
    while send(Service(1)) == Status::Success {
        sent += 1;
        assert!(sent < 10_000, "there is no end to its buffers");
    }
    assert_eq!(
        send(Service(1)),
        Status::Refused(Malformed::ReceiverNotReady)
    );
    assert_eq!(send(Service(2)), Status::Success);
    quick.receive(SECOND).unwrap();
    for _ in 0..sent {
        slow.receive(SECOND).unwrap();
    }
    assert_eq!(send(Service(1)), Status::Success);
    assert_eq!(machine.daemon().stats().rebuilt, 0);
}

#[test]
fn an_event_loop_hears_of_completions_and_of_the_end_of_the_daemon() {
    let mut machine = machine();
    let node = machine.attach();
    let memory = node.register(ByteSize::kib(4), Access::ReadWrite).unwrap();
    let mut queue = node.connect(node.id(), SECOND).unwrap();
    let readable = |queue: &krcore::VirtualQueue, limit: u16| {
        let mut fds = [PollFd::new(queue.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::from(limit)).unwrap() == 1
    };
    let mut out = [Completion::default(); 4];
    for round in 0..100 {
        let read = WorkRequest::new(round, Op::Read, memory.slice(0, 8), memory.remote(8));
        queue.post(&[read]).unwrap();
        let mut seen = 0;
        while seen == 0 {
            assert!(readable(&queue, 1000), "round {round}");
            seen = queue.poll(&mut out);
        }
        assert_eq!((seen, out[0].id), (1, round));
    }
    while readable(&queue, 0) {
        assert_eq!(queue.poll(&mut out), 0);
    }
    machine.daemon = None;
    assert!(readable(&queue, 1000), "the end of the daemon");
    assert!(matches!(queue.wait(SECOND), Err(Error::Disconnected)));
}

#[test]
fn more_queues_than_a_channel_has_lanes() {
    let machine = machine();
    let node = machine.attach();
    let memory = node.register(ByteSize::kib(4), Access::ReadWrite).unwrap();
    let mut queues: Vec<_> = (0..200)
        .map(|_| node.connect(node.id(), SECOND).unwrap())
        .collect();
    for (id, queue) in queues.iter_mut().enumerate() {
        let add = Op::FetchAdd { add: 1 };
        let add = WorkRequest::new(id as u64, add, memory.slice(8, 8), memory.remote(0));
        queue.post(&[add]).unwrap();
    }
    for (id, queue) in queues.iter_mut().enumerate() {
        assert_eq!(queue.wait(SECOND).unwrap().id, id as u64);
    }
    assert_eq!(word(&memory, 0), 200);
    drop(queues);
    let refused = (0..)
        .map(|_| node.connect(node.id(), SECOND))
        .collect::<Result<Vec<_>, _>>();
    assert!(matches!(refused, Err(Error::TooManyQueues(1024))));
}

#[test]
fn a_lane_that_is_used_again_gives_nothing_of_its_former_life() {
    let machine = machine();
    let node = machine.attach();
    let memory = node.register(ByteSize::kib(4), Access::ReadWrite).unwrap();
    for round in 0..rounds(20_000, 500_000) as u64 {
        let mut queue = node.connect(node.id(), SECOND).unwrap();
        let read = WorkRequest::new(round, Op::Read, memory.slice(0, 8), memory.remote(8));
        assert_eq!(
            queue.post(&vec![read; 1 + round as usize % 9]).unwrap(),
            1 + round as usize % 9
        );
        if round % 3 == 0 {
            let done = queue.wait(SECOND).unwrap();
            assert_eq!((done.id, done.status), (round, Status::Success));
        }
    }
}

#[test]
fn unknown_nodes_and_absent_daemons_are_typed_errors() {
    let machine = machine();
    let node = machine.attach();
    assert!(matches!(
        node.connect(NodeId(99), SECOND),
        Err(Error::UnknownNode(NodeId(99)))
    ));
    let nowhere = machine.path.with_file_name("nowhere");
    assert!(matches!(
        Node::attach(&nowhere, SECOND),
        Err(Error::NoDaemon { .. })
    ));
    let second = Node::embedded(machine.fabric.clone(), NodeId(5), config()).unwrap();
    let taken = Daemon::start(&machine.path, second, DaemonOptions::default());
    assert!(
        matches!(taken, Err(Error::Io { .. })),
        "somebody listens there"
    );
    let plain = machine.path.with_file_name("plain");
    let untrusting = Node::embedded(machine.fabric.clone(), NodeId(5), config()).unwrap();
    let _daemon = Daemon::start(&plain, untrusting, DaemonOptions::default()).unwrap();
    let refused = Node::attach_as(&plain, Mode::Trusted, SECOND);
    assert!(matches!(refused, Err(Error::Refused(_))));
}

#[test]
fn a_peer_that_dies_and_comes_back_is_reached_again() {
    let machine = machine();
    let far_node = Node::embedded(machine.fabric.clone(), NodeId(5), config()).unwrap();
    let far = far_node.register(ByteSize::kib(4), Access::Read).unwrap();
    let node = machine.attach();
    let near = node.register(ByteSize::kib(4), Access::Local).unwrap();
    let mut queue = node.connect(NodeId(5), SECOND).unwrap();
    let read = |remote| WorkRequest::new(1, Op::Read, near.slice(0, 8), remote);
    queue.post(&[read(far.remote(0))]).unwrap();
    assert_eq!(queue.wait(SECOND).unwrap().status, Status::Success);
    drop(far_node);
    queue.post(&[read(far.remote(0))]).unwrap();
    let status = queue.wait(SECOND).unwrap().status;
    assert!(matches!(
        status,
        Status::RetryExceeded | Status::Refused(Malformed::PeerGone)
    ));
    assert!(matches!(
        node.connect(NodeId(5), SECOND),
        Err(Error::UnknownNode(_))
    ));
    let far_node = Node::embedded(machine.fabric.clone(), NodeId(5), config()).unwrap();
    let far = far_node.register(ByteSize::kib(4), Access::Read).unwrap();
    let mut queue = node.connect(NodeId(5), SECOND).unwrap();
    queue.post(&[read(far.remote(0))]).unwrap();
    assert_eq!(queue.wait(SECOND).unwrap().status, Status::Success);
}

#[test]
#[ignore = "a role of the tests of killing"]
fn role_daemon() {
    let Some(path) = child::arguments::<PathBuf>("role_daemon") else {
        return;
    };
    let _daemon = start(&path, &ShmFabric::new(), config());
    child::tell("ready");
    child::wait_for_parent();
}

#[test]
fn a_killed_daemon_is_noticed_by_whoever_waits_and_its_successor_is_found() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("krcored.sock");
    for _ in 0..rounds(3, 30) {
        let mut daemon = Role::test("role_daemon").start(&path).unwrap();
        daemon.hear("ready").unwrap();
        let node = Node::attach(&path, SECOND).unwrap();
        let memory = node.register(ByteSize::kib(4), Access::ReadWrite).unwrap();
        let trusted = Node::attach_as(&path, Mode::Trusted, SECOND).unwrap();
        let own = trusted.register(ByteSize::kib(4), Access::Local).unwrap();
        let listener = node.listen(Service(3)).unwrap();
        let mut queue = node.connect(node.id(), SECOND).unwrap();
        let mut direct = trusted.connect(node.id(), SECOND).unwrap();
        let read = WorkRequest::new(1, Op::Read, memory.slice(0, 8), memory.remote(8));
        let direct_read = WorkRequest::new(1, Op::Read, own.slice(0, 8), memory.remote(8));
        queue.post(std::slice::from_ref(&read)).unwrap();
        queue.wait(SECOND).unwrap();
        direct.post(std::slice::from_ref(&direct_read)).unwrap();
        direct.wait(SECOND).unwrap();
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| {
                let start = Instant::now();
                let gone = queue.wait(10 * SECOND);
                assert!(matches!(gone, Err(Error::Disconnected)), "{gone:?}");
                start.elapsed()
            });
            let receives = scope.spawn(|| listener.receive(10 * SECOND));
            std::thread::sleep(Duration::from_millis(50));
            daemon.kill();
            assert!(waits.join().unwrap() < SECOND);
            let received = receives.join().unwrap();
            assert!(matches!(received, Err(Error::Disconnected)), "{received:?}");
        });
        until("a trusted process notices", SECOND, || {
            match direct.post(std::slice::from_ref(&direct_read)) {
                Ok(_) => {
                    direct.poll(&mut [Completion::default()]);
                    false
                }
                Err(refused) => refused.why == Malformed::Disconnected,
            }
        });
        assert!(matches!(
            node.connect(node.id(), SECOND),
            Err(Error::Disconnected)
        ));
        let again = node.register(ByteSize::kib(4), Access::Local);
        assert!(matches!(again, Err(Error::Disconnected)));
    }
    let _daemon = start(&path, &ShmFabric::new(), config());
    let node = Node::attach(&path, SECOND).unwrap();
    assert_eq!(node.id(), NodeId(1));
}

#[test]
fn a_daemon_drains() {
    let machine = machine();
    let node = machine.attach();
    assert!(!machine.daemon().drain(Duration::from_millis(20)));
    assert!(Node::attach(&machine.path, Duration::from_millis(200)).is_err());
    let memory = node.register(ByteSize::kib(4), Access::ReadWrite).unwrap();
    let mut queue = node.connect(node.id(), SECOND).unwrap();
    let read = WorkRequest::new(1, Op::Read, memory.slice(0, 8), memory.remote(8));
    queue.post(&[read]).unwrap();
    assert_eq!(queue.wait(SECOND).unwrap().status, Status::Success);
    drop((queue, node));
    assert!(machine.daemon().drain(SECOND));
}

#[test]
#[ignore = "a role of the test of exhaustion"]
fn role_poor_daemon() {
    let Some(path) = child::arguments::<PathBuf>("role_poor_daemon") else {
        return;
    };
    let limit = nix::sys::resource::Resource::RLIMIT_NOFILE;
    nix::sys::resource::setrlimit(limit, 64, 64).unwrap();
    let _daemon = start(&path, &ShmFabric::new(), config());
    child::tell("ready");
    child::wait_for_parent();
}

#[test]
fn a_daemon_without_descriptors_left_refuses_or_lets_wait_and_recovers() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("krcored.sock");
    let daemon = Role::test("role_poor_daemon").start(&path).unwrap();
    daemon.hear("ready").unwrap();
    let limit = Duration::from_millis(300);
    let mut clients = Vec::new();
    let why = loop {
        match Node::attach(&path, limit) {
            Ok(node) => clients.push(node),
            Err(why) => break why,
        }
        assert!(clients.len() < 64, "it never ran out");
    };
    assert!(
        matches!(
            why,
            Error::TimedOut { .. } | Error::Refused(_) | Error::Disconnected
        ),
        "{why}"
    );
    // Those who have got in go on.
    let first = &clients[0];
    let mut queue = first.connect(first.id(), SECOND).unwrap();
    let memory = first.register(ByteSize::kib(4), Access::Local);
    match memory {
        Ok(memory) => {
            let fence = WorkRequest::new(1, Op::Fence, memory.slice(0, 0), memory.remote(0));
            queue.post(&[fence]).unwrap();
            assert_eq!(queue.wait(SECOND).unwrap().status, Status::Success);
        }
        Err(why) => assert!(matches!(why, Error::Refused(_)), "{why}"),
    }
    drop(queue);
    clients.clear();
    until("recovery", 5 * SECOND, || {
        Node::attach(&path, limit).is_ok()
    });
}

#[test]
#[ignore = "a role of the test of exhaustion"]
fn role_poor_client() {
    let Some(path) = child::arguments::<PathBuf>("role_poor_client") else {
        return;
    };
    let node = Node::attach(&path, SECOND).unwrap();
    let limit = nix::sys::resource::Resource::RLIMIT_NOFILE;
    nix::sys::resource::setrlimit(limit, 64, 64).unwrap();
    let mut held = Vec::new();
    while let Ok(file) = std::fs::File::open("/dev/null") {
        held.push(file);
    }
    let register = node.register(ByteSize::kib(4), Access::Local);
    assert!(matches!(register, Err(Error::Io { .. })), "{register:?}");
    // The answer's descriptor does not fit, and that is said.
    let listen = node.listen(Service(1));
    assert!(matches!(listen, Err(Error::Protocol(_))), "{listen:?}");
    // A connection needs no descriptor; its event does, and without one is always readable.
    let mut queue = node.connect(node.id(), SECOND).unwrap();
    let mut fds = [PollFd::new(queue.as_fd(), PollFlags::POLLIN)];
    assert_eq!(poll(&mut fds, PollTimeout::ZERO).unwrap(), 1);
    held.clear();
    let memory = node.register(ByteSize::kib(4), Access::ReadWrite).unwrap();
    let read = WorkRequest::new(1, Op::Read, memory.slice(0, 8), memory.remote(8));
    queue.post(&[read]).unwrap();
    assert_eq!(queue.wait(SECOND).unwrap().status, Status::Success);
    child::tell("well");
}

#[test]
fn a_client_without_descriptors_left_gets_typed_errors_and_loses_nothing() {
    let machine = machine();
    let client = Role::test("role_poor_client").start(&machine.path).unwrap();
    client.hear("well").unwrap();
}
