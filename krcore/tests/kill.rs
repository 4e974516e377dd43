//! Clients that are killed at any moment. In a process of its own, since it counts descriptors.
#![cfg(feature = "daemon")]
#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

mod common;
#[path = "common/machine.rs"]
mod machine;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use carlsbad_kit::child::{self, Role};
use common::{SECOND, config, rounds, word};
use krcore::{Access, ByteSize, Config, Node, Op, Service, Status, WorkRequest};
use machine::{machine_with, until};

#[test]
#[ignore = "a role of the tests of killing"]
fn role_client() {
    let Some(path) = child::arguments::<PathBuf>("role_client") else {
        return;
    };
    let node = Node::attach(&path, SECOND).unwrap();
    let listener = node.listen(Service(std::process::id() as u16 | 1 << 15));
    let memory = node.register(ByteSize::kib(64), Access::Local).unwrap();
    let shared = node.register(ByteSize::kib(64), Access::ReadWrite).unwrap();
    child::tell("ready");
    for round in 0.. {
        let mut queues: Vec<_> = (0..4)
            .map(|_| node.connect(node.id(), SECOND).unwrap())
            .collect();
        for queue in &mut queues {
            let write = WorkRequest::new(round, Op::Write, memory.slice(0, 64), shared.remote(0));
            queue.post(&vec![write; 30]).unwrap();
        }
        if round % 2 == 0 {
            for queue in &mut queues {
                queue.wait(SECOND).unwrap();
            }
        }
    }
    drop(listener);
}

#[test]
fn killed_clients_leave_nothing_behind_and_disturb_nobody() {
    let short = Config {
        lease: Duration::from_millis(100),
        ..config()
    };
    let machine = machine_with(short);
    let count = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let witness = machine.attach();
    let memory = witness
        .register(ByteSize::kib(4), Access::ReadWrite)
        .unwrap();
    let mut queue = witness.connect(witness.id(), SECOND).unwrap();
    let add = Op::FetchAdd { add: 1 };
    let add = WorkRequest::new(0, add, memory.slice(8, 8), memory.remote(0));
    let mut rng = carlsbad_kit::seed::rng("killed_clients");
    queue.post(std::slice::from_ref(&add)).unwrap();
    queue.wait(SECOND).unwrap();
    let before = (machine.daemon().stats(), count());
    let (mut killed, mut added, mut slowest) = (0, 1, Duration::ZERO);
    for _ in 0..rounds(20, 200) {
        let mut client = Role::test("role_client").start(&machine.path).unwrap();
        client.hear("ready").unwrap();
        let end = Instant::now() + Duration::from_micros(rng.u64(0..20_000));
        while Instant::now() < end {
            queue.post(std::slice::from_ref(&add)).unwrap();
            assert_eq!(queue.wait(SECOND).unwrap().status, Status::Success);
            added += 1;
        }
        killed += usize::from(client.kill());
        drop(client);
        let took = until("reclamation", Duration::from_millis(500), || {
            let now = machine.daemon().stats();
            now.clients == before.0.clients
                && now.regions == before.0.regions
                && now.virtual_queues == before.0.virtual_queues
                && count() <= before.1
        });
        slowest = slowest.max(took);
    }
    assert_eq!(
        killed,
        rounds(20, 200),
        "the roles did not run until they were killed"
    );
    assert_eq!(word(&memory, 0), added);
    assert_eq!(machine.daemon().stats().rebuilt, 0);
    println!("{killed} killed, reclaimed in at most {slowest:?}");
}
