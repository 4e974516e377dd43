//! Hosts whose caches nothing keeps coherent: everything works with the flushes, and something is
//! wrong with any one of them taken out.
#![allow(
    clippy::panic,
    clippy::print_stderr,
    clippy::unwrap_used,
    reason = "a test says what went wrong by failing"
)]

mod common;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use carlsbad_types::ByteSize;
use common::MIB2;
use common::caches::World;
use directcxl::backend::Coherence;
use directcxl::flush::Step;
use directcxl::heap::{Heap, HeapOptions};
use directcxl::{Contents, Epoch, Error, FormatOptions, HostId, NamespaceOptions, Pool, Role};

/// Steps whose absence shows only in a crash at the right moment, since the same host looks at the
/// lines again soon, which writes them back: `tests/crash.rs` has controls for them.
const SHOWN_BY_CRASHES: [Step; 5] = [
    Step::SuperblockFirst,
    Step::SuperblockSecond,
    Step::RecordFirst,
    Step::RedoRecord,
    Step::RedoApplied,
];

const KEPT: NamespaceOptions = {
    let mut options = NamespaceOptions {
        contents: Contents::Kept,
        populate: false,
    };
    options.contents = Contents::Kept;
    options
};

fn open(world: &Arc<World>, host: u16, role: Role) -> Pool {
    Pool::open(world.host(host, Coherence::Software), role).unwrap()
}

/// What a host that has never looked sees, when every other one has stopped and lost its caches.
fn survives(world: &World, look: impl Fn(&Pool)) {
    let left = world.after_crash(0.0, 1);
    let pool = open(&left, 2, Role::Reader);
    let report = pool.check();
    assert!(report.is_ok(), "{report:?}");
    look(&pool);
}

fn suite(without: Option<Step>) {
    let world = World::new(ByteSize::mib(32), 3, 7);
    // Host 1 looks before there is a pool, and has the superblock's lines from then on.
    let nothing = Pool::open(world.host(1, Coherence::Software), Role::Reader);
    assert!(
        matches!(nothing, Err(Error::NotAPool { .. })),
        "{nothing:?}"
    );
    world.take_out(without);
    let options = FormatOptions {
        hosts: 3,
        entries: 16,
        // There is nothing: to look for it in the model takes longer than all the rest.
        overwrite: true,
    };
    let zero = Pool::format(world.host(0, Coherence::Software), options).unwrap();
    survives(&world, |pool| assert!(pool.list().unwrap().is_empty()));
    let one = open(&world, 1, Role::Reader);
    assert!(one.list().unwrap().is_empty());

    // Data go from host to host, again and again in the same lines.
    let a0 = zero.create("a", MIB2, NamespaceOptions::default()).unwrap();
    survives(&world, |pool| assert_eq!(pool.list().unwrap().len(), 1));
    let a1 = one.attach("a").unwrap();
    for round in 1..4u8 {
        a0.write(100, &[round; 64]).unwrap();
        a0.publish(100..164).unwrap();
        survives(&world, |pool| {
            let mut bytes = [0; 64];
            pool.attach("a").unwrap().read(100, &mut bytes).unwrap();
            assert_eq!(bytes, [round; 64]);
        });
        a1.acquire(100..164).unwrap();
        let mut bytes = [0; 64];
        a1.read(100, &mut bytes).unwrap();
        assert_eq!(bytes, [round; 64]);
    }

    // Host 0 looks at host 1's leases while there is none but on `a`.
    drop(zero.create("b", MIB2, KEPT).unwrap());
    zero.remove("b").unwrap();
    assert_eq!(zero.info().unwrap().quarantined, ByteSize::ZERO);
    // A lease of host 1 holds what host 0 removes.
    drop(zero.create("c", MIB2, KEPT).unwrap());
    let c1 = one.attach("c").unwrap();
    survives(&world, |pool| assert_eq!(pool.check().leases[1], 2));
    zero.remove("c").unwrap();
    assert_eq!(zero.info().unwrap().quarantined, MIB2);
    assert!(one.attach("c").is_err());
    drop(c1);
    assert_eq!(zero.reclaim().unwrap(), MIB2);

    // New arenas are begun, and host 1 follows.
    for round in 0..20 {
        let name = format!("r{round}");
        drop(zero.create(&name, MIB2, KEPT).unwrap());
        let seen: Vec<_> = one
            .list()
            .unwrap()
            .into_iter()
            .map(|info| info.name)
            .collect();
        assert_eq!(seen, ["a".to_owned(), name.clone()]);
        survives(&world, |pool| assert_eq!(pool.list().unwrap().len(), 2));
        zero.remove(&name).unwrap();
        assert_eq!(one.list().unwrap().len(), 1);
    }

    // Another host takes over, twice, and the old one notices.
    let heap_at = zero
        .create("heap", MIB2, NamespaceOptions::default())
        .unwrap();
    let heap = Heap::format(
        &heap_at,
        HeapOptions {
            smallest: ByteSize::kib(4),
        },
    )
    .unwrap();
    let first = heap
        .allocate_into(ByteSize::kib(8), heap.root(0).unwrap())
        .unwrap();
    heap_at.publish(0..MIB2.get()).unwrap();
    let one = open(&world, 1, Role::Writer(Epoch(2)));
    survives(&world, |pool| {
        assert_eq!(pool.info().unwrap().writer, HostId(1));
    });
    assert!(matches!(zero.remove("a"), Err(Error::Fenced { .. })));
    assert_eq!(zero.list().unwrap().len(), 2);

    // The heap goes on where the other host left it, there and back.
    let heap1 = Heap::open(&one.attach("heap").unwrap()).unwrap();
    let second = heap1.allocate(ByteSize::kib(8)).unwrap();
    assert_ne!(first, second);
    let again = open(&world, 0, Role::Writer(Epoch(3)));
    let heap0 = Heap::open(&again.attach("heap").unwrap()).unwrap();
    let third = heap0.allocate(ByteSize::kib(8)).unwrap();
    assert!(![first, second].contains(&third));
    assert_eq!(heap0.check().unwrap().blocks, 3);
    drop(again.create("last", MIB2, KEPT).unwrap());
    let last = open(&world, 1, Role::Reader);
    assert!(last.attach("last").is_ok());

    // A record that was done is not done again, over what a program wrote since.
    let root = heap0.root(5).unwrap();
    let place = heap0.allocate_into(ByteSize::kib(4), root).unwrap();
    assert_ne!(place.0, 0);
    let namespace = heap0.namespace().clone();
    namespace.write(root.0, &[0; 8]).unwrap();
    namespace.publish(root.0..root.0 + 8).unwrap();
    let left = world.after_crash(0.0, 1);
    let pool = open(&left, 0, Role::Writer(Epoch::CURRENT));
    let heap = Heap::open(&pool.attach("heap").unwrap()).unwrap();
    heap.check().unwrap();
    let mut bytes = [1; 8];
    heap.namespace().read(root.0, &mut bytes).unwrap();
    assert_eq!(bytes, [0; 8]);

    // Every step happened, or taking it out would show nothing.
    for step in Step::ALL {
        assert!(world.seen(step) > 0, "{step:?} did not happen");
    }
}

#[test]
fn hosts_without_coherent_caches_see_one_pool() {
    suite(None);
}

#[test]
fn without_any_one_flush_something_is_wrong() {
    let unnoticed: Vec<_> = Step::ALL
        .into_iter()
        .filter(|step| !SHOWN_BY_CRASHES.contains(step))
        .filter(|step| catch_unwind(AssertUnwindSafe(|| suite(Some(*step)))).is_ok())
        .collect();
    assert_eq!(unnoticed, [], "nothing was wrong without these");
}

/// Two hosts claim at once, in every order: at most one of them may say that its entry holds, and
/// what was said to hold is there.
#[test]
fn of_two_writers_no_change_is_lost_that_was_said_to_hold() {
    for seed in 0..200 {
        let world = World::new(ByteSize::mib(32), 3, seed);
        let options = FormatOptions {
            hosts: 3,
            entries: 16,
            overwrite: true,
        };
        let zero = Pool::format(world.host(0, Coherence::Software), options).unwrap();
        let mut held = Vec::new();
        std::thread::scope(|scope| {
            let old = scope.spawn(|| {
                let mut done = Vec::new();
                for i in 0..50 {
                    let name = format!("zero{i}");
                    match zero.create(&name, MIB2, KEPT) {
                        Ok(_) => done.push(name.clone()),
                        Err(Error::Fenced { .. }) => break,
                        Err(Error::NoRoom { .. } | Error::LogFull { .. }) => break,
                        Err(why) => panic!("{why}"),
                    }
                }
                done
            });
            let new = scope.spawn(|| {
                for _ in 0..seed % 20 {
                    std::thread::yield_now();
                }
                let one = open(&world, 1, Role::Writer(Epoch(2)));
                drop(one.create("one", MIB2, KEPT));
            });
            held = old.join().unwrap();
            new.join().unwrap();
        });
        let two = open(&world, 2, Role::Reader);
        for name in held {
            assert!(two.attach(&name).is_ok(), "seed {seed}: {name} is lost");
        }
        assert_eq!(two.info().unwrap().writer, HostId(1));
    }
}
