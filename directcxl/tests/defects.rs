//! Defects that were reported, each as a test.
#![allow(
    clippy::panic,
    clippy::print_stderr,
    clippy::unwrap_used,
    reason = "a test says what went wrong by failing"
)]

mod common;

use std::fs::{File, OpenOptions};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;

use carlsbad_kit::child::{self, Role as ChildRole};
use carlsbad_types::ByteSize;
use common::{MIB2, file_pool, fill, memory, pool, pool_of, sum};
use directcxl::backend::Backend;
use directcxl::heap::{Heap, HeapOptions};
use directcxl::layout::{
    ARENAS, ENTRY, EXTENT, Entry, Extent, HostState, LEASE_HEAD, LEASE_SLOTS, LeaseHead, Operation,
    RECORDS, Record, Seed,
};
use directcxl::{
    Contents, Epoch, Error, FileHdm, FormatOptions, HostId, MemfdHdm, NamespaceOptions, Pool, Role,
};

fn plain() -> NamespaceOptions {
    NamespaceOptions::default()
}

/// Of one entry of the log, whose places these tests know.
fn kept() -> NamespaceOptions {
    NamespaceOptions {
        contents: Contents::Kept,
        ..NamespaceOptions::default()
    }
}

/// A file of its own for the memory behind a namespace.
fn file_of(pool: &Pool) -> File {
    let namespace = pool.create("for its descriptor", MIB2, plain()).unwrap();
    let fd = namespace.mapping().0.as_fd().try_clone_to_owned().unwrap();
    drop(namespace);
    pool.remove("for its descriptor").unwrap();
    fd.into()
}

/// Both looked, both found nothing, and both made a pool: one over the other.
#[test]
fn of_two_that_format_at_once_one_makes_the_pool() {
    for _ in 0..200 {
        let memory = memory(4);
        let fd = memory.as_fd().try_clone_to_owned().unwrap();
        let made: Vec<_> = std::thread::scope(|scope| {
            let all: Vec<_> = (0..3)
                .map(|i| {
                    let again = MemfdHdm::from_fd(fd.try_clone().unwrap()).unwrap();
                    scope.spawn(move || {
                        let pool = Pool::format(again, FormatOptions::default())?;
                        drop(pool.create(&format!("n{i}"), MIB2, plain())?);
                        Ok(i)
                    })
                })
                .collect();
            all.into_iter().map(|one| one.join().unwrap()).collect()
        });
        let won: Vec<_> = made.iter().flatten().collect();
        assert_eq!(won.len(), 1, "{made:?}");
        let live = |one: &Result<i32, Error>| matches!(one, Ok(_) | Err(Error::Live { .. }));
        assert!(made.iter().all(live), "{made:?}");
        let pool = Pool::open(memory, Role::Reader).unwrap();
        assert_eq!(pool.list().unwrap()[0].name, format!("n{}", won[0]));
    }
}

/// Zeroes were taken for the record of a host that never wrote, whatever the copy said.
#[test]
fn a_first_copy_of_a_record_that_is_zeroes_is_mended_from_the_second() {
    let (pool, again) = pool_of(8, 2);
    drop(pool.create("old", MIB2, plain()).unwrap());
    let file = file_of(&pool);
    let first = |host: u64| (1 + host) * EXTENT;
    file.write_all_at(&[0; 64], first(0)).unwrap();
    assert_eq!(pool.list().unwrap().len(), 1);
    assert!(!pool.check().is_ok());
    assert_eq!(pool.repair().unwrap(), 1);
    assert!(pool.check().is_ok());

    // With two hosts the state of an earlier epoch was taken up again.
    let other = Pool::open(again(1), Role::Writer(Epoch(2))).unwrap();
    let new = other.create("new", MIB2, plain()).unwrap();
    other.remove("old").unwrap();
    file.write_all_at(&[0; 64], first(1)).unwrap();
    let refused = pool.create("mine", MIB2, plain());
    assert!(matches!(refused, Err(Error::Fenced { .. })), "{refused:?}");
    let names: Vec<_> = pool.list().unwrap().into_iter().map(|it| it.name).collect();
    assert_eq!(names, ["new"]);
    drop(new);
    // The control: with the second copy gone as well it is lost, and said to be.
    for (one, two) in [(0, 0xff), (0xff, 0), (0, 0)] {
        file.write_all_at(&[one; 64], first(1)).unwrap();
        file.write_all_at(&[two; 64], first(1) + 4096).unwrap();
        assert!(matches!(pool.list(), Err(Error::Corrupt { .. })));
    }
}

/// Zeroes were a host that is attached to nothing: what it was attached to was given to others. Other
/// damage to a slot was cleared by the first process of the host that came along, whoever else of it
/// was attached.
#[test]
fn leases_that_are_lost_give_nothing_away() {
    let head = 2 * EXTENT + LEASE_HEAD;
    let slot = 2 * EXTENT + LEASE_SLOTS;
    for (at, bytes) in [
        (head, vec![0; 16]),
        (head, vec![0xff; 16]),
        (slot, vec![0; 16]),
        (slot, vec![0xff; 16]),
        (head, vec![0; 64]),
        (head, vec![0; 4096]),
    ] {
        let (pool, again) = pool_of(8, 2);
        let a = pool.create("a", MIB2, plain()).unwrap();
        let at_a = a.handle().offset;
        drop(a);
        let other = Pool::open(again(1), Role::Reader).unwrap();
        let attached = other.attach("a").unwrap();
        let file = file_at(&again);
        let damage = || file.write_all_at(&bytes, at).unwrap();
        damage();
        assert!(!pool.check().is_ok(), "{at} {bytes:?}");
        pool.remove("a").unwrap();
        // Kept in quarantine, also when a further process of that host has mended what it could, and
        // when one of its others has begun and ended to be attached to something else.
        drop(pool.create("b", MIB2, plain()).unwrap());
        assert_eq!(pool.reclaim().unwrap(), ByteSize::ZERO, "{at} {bytes:?}");
        drop(other.attach("b").unwrap());
        assert_eq!(pool.reclaim().unwrap(), ByteSize::ZERO, "{at} {bytes:?}");
        let further = Pool::open(again(1), Role::Reader).unwrap();
        assert!(pool.check().is_ok(), "{:?}", pool.check());
        drop(further.attach("b").unwrap());
        assert_eq!(pool.reclaim().unwrap(), ByteSize::ZERO, "{at} {bytes:?}");
        damage();
        drop((attached, other, further));
        // What nobody uses is given back when a process of that host has looked.
        drop(Pool::open(again(1), Role::Reader).unwrap());
        assert_eq!(pool.reclaim().unwrap(), MIB2, "{at} {bytes:?}");
        assert_eq!(
            pool.create("c", MIB2, plain()).unwrap().handle().offset,
            at_a
        );
    }
}

/// The nonce after the last one overflowed.
#[test]
fn a_lease_head_with_the_last_nonce_is_an_ordinary_one() {
    let (pool, again) = pool_of(8, 2);
    let a = pool.create("a", MIB2, plain()).unwrap();
    let seed = Seed::of(a.handle().incarnation);
    drop(a);
    let wild = LeaseHead {
        nonce: u64::MAX,
        used: u32::MAX,
    };
    file_at(&again)
        .write_all_at(&wild.encode(seed), 2 * EXTENT + LEASE_HEAD)
        .unwrap();
    pool.evict(HostId(1)).unwrap();
    let other = Pool::open(again(1), Role::Writer(Epoch(2))).unwrap();
    let attached = other.attach("a").unwrap();
    let pool = Pool::open(again(0), Role::Writer(Epoch(3))).unwrap();
    pool.remove("a").unwrap();
    assert_eq!(pool.reclaim().unwrap(), ByteSize::ZERO);
    drop(attached);
    assert_eq!(pool.reclaim().unwrap(), MIB2);
}

/// The writer's own leases are its to mend.
#[test]
fn a_writer_mends_its_leases() {
    let (pool, again) = pool_of(8, 2);
    let a = pool.create("a", MIB2, plain()).unwrap();
    let file = file_at(&again);
    file.write_all_at(&[0; 4096], EXTENT + LEASE_HEAD).unwrap();
    assert!(!pool.check().is_ok());
    assert!(pool.repair().unwrap() > 0);
    assert!(pool.check().is_ok(), "{:?}", pool.check());
    let taker = Pool::open(again(1), Role::Writer(Epoch(2))).unwrap();
    taker.remove("a").unwrap();
    assert_eq!(taker.reclaim().unwrap(), ByteSize::ZERO);
    drop(a);
    assert_eq!(taker.reclaim().unwrap(), MIB2);
}

/// A page holds sixteen entries, and eight were looked behind: the rest of the log was not there, and
/// the next writer wrote over what it named.
#[test]
fn a_lost_page_of_the_log_is_noticed() {
    for (lost, byte) in [(4096, 0), (9 * 256, 0xff), (40 * 256, 0)] {
        let (pool, dir) = file_pool(70);
        for i in 0..60 {
            drop(pool.create(&format!("n{i}"), MIB2, plain()).unwrap());
        }
        drop(pool);
        let path = dir.path().join("pool");
        let file = OpenOptions::new().write(true).open(&path).unwrap();
        let arena = EXTENT + ARENAS + FormatOptions::default().entries * ENTRY;
        file.write_all_at(&vec![byte; lost], arena + 16 * ENTRY)
            .unwrap();
        for role in [Role::Reader, Role::Writer(Epoch::CURRENT)] {
            let refused = Pool::open(FileHdm::open(&path).unwrap(), role);
            assert!(matches!(refused, Err(Error::Corrupt { .. })), "{refused:?}");
        }
    }
}

/// What is in quarantine, and attached no more, was counted, and never given back.
#[test]
fn a_log_that_is_full_of_what_nobody_uses_any_more_is_not_full() {
    let (pool, again) = full_of_leases(1);
    let other = Pool::open(again(0), Role::Reader).unwrap();
    let attached: Vec<_> = (0..6)
        .map(|i| other.attach(&format!("{i}")).unwrap())
        .collect();
    (0..6).for_each(|i| pool.remove(&format!("{i}")).unwrap());
    let full = pool.create("x", MIB2, plain());
    assert!(matches!(full, Err(Error::LogFull { .. })), "{full:?}");
    drop(attached);
    drop(pool.create("x", MIB2, plain()).unwrap());
}

/// The log was full of what a dead host held, and full for saying that the host is dead.
#[test]
fn a_dead_host_is_evicted_from_a_full_log() {
    let (pool, again) = full_of_leases(2);
    let dead = Pool::open(again(1), Role::Reader).unwrap();
    let attached: Vec<_> = (0..6)
        .map(|i| dead.attach(&format!("{i}")).unwrap())
        .collect();
    (0..6).for_each(|i| pool.remove(&format!("{i}")).unwrap());
    // What a host that dies leaves behind: its leases. Its locks are of another machine's kernel.
    let slots = {
        let file = file_at(&again);
        let mut slots = vec![0; 64 + 2048 * 16];
        file.read_exact_at(&mut slots, 2 * EXTENT + 8192).unwrap();
        slots
    };
    drop((attached, dead));
    file_at(&again)
        .write_all_at(&slots, 2 * EXTENT + 8192)
        .unwrap();
    let full = pool.create("x", MIB2, plain());
    assert!(matches!(full, Err(Error::LogFull { .. })), "{full:?}");
    for _ in 0..20 {
        pool.evict(HostId(1)).unwrap();
    }
    drop(pool.create("x", MIB2, plain()).unwrap());
    assert_eq!(pool.list().unwrap().len(), 1);
    assert!(pool.check().is_ok());
}

fn full_of_leases(hosts: u16) -> (Pool, impl Fn(u16) -> MemfdHdm) {
    let memory = MemfdHdm::new(ByteSize::mib(64)).unwrap();
    let fd = memory.as_fd().try_clone_to_owned().unwrap();
    let options = FormatOptions {
        entries: 8,
        hosts,
        ..FormatOptions::default()
    };
    let pool = Pool::format(memory, options).unwrap();
    for i in 0..6 {
        drop(pool.create(&format!("{i}"), MIB2, kept()).unwrap());
    }
    let again = move |host| {
        MemfdHdm::from_fd(fd.try_clone().unwrap())
            .unwrap()
            .on_host(HostId(host))
    };
    (pool, again)
}

fn file_at(again: &impl Fn(u16) -> MemfdHdm) -> File {
    again(0).as_fd().try_clone_to_owned().unwrap().into()
}

/// Only the first two pages were looked at; some file systems have their mark behind those.
#[test]
fn what_does_not_begin_in_the_first_pages_is_not_formatted_over() {
    for at in [
        8192,
        32 << 10,
        64 << 10,
        128 << 10,
        2 << 20,
        (2 << 20) + 9000,
    ] {
        let memory = memory(4);
        let file: File = memory.as_fd().try_clone_to_owned().unwrap().into();
        file.write_all_at(&[0xab; 4096], at).unwrap();
        let refused = Pool::format(memory, FormatOptions::default());
        assert!(
            matches!(refused, Err(Error::Foreign { .. })),
            "{at}: {refused:?}"
        );
        let mut there = [0; 4096];
        file.read_exact_at(&mut there, at).unwrap();
        assert_eq!(there, [0xab; 4096]);
    }
}

/// After it there was none for anybody else.
#[test]
fn an_epoch_after_which_there_is_none_is_refused() {
    let (pool, again) = pool_of(4, 2);
    for epoch in [Epoch(u64::MAX), Epoch(Epoch::LAST.0 + 1)] {
        let refused = Pool::open(again(1), Role::Writer(epoch));
        assert!(
            matches!(refused, Err(Error::BadEpoch { .. })),
            "{refused:?}"
        );
    }
    drop(pool.create("a", MIB2, plain()).unwrap());
    drop(Pool::open(again(1), Role::Writer(Epoch(1 << 61))).unwrap());
}

/// The old mapping and the new one had a lock of their own for threads, and the kernel's is for
/// processes.
#[test]
fn a_heap_in_a_resized_namespace_is_one_heap_to_all_threads() {
    let (pool, _again) = pool(8);
    let old = pool.create("a", ByteSize::mib(4), plain()).unwrap();
    Heap::format(&old, HeapOptions::default()).unwrap();
    pool.resize("a", ByteSize::mib(8)).unwrap();
    let new = pool.attach("a").unwrap();
    assert_ne!(old.length(), new.length());
    std::thread::scope(|scope| {
        for namespace in [&old, &new] {
            scope.spawn(move || {
                let heap = Heap::open(namespace).unwrap();
                for i in 0..20_000 {
                    let place = heap.allocate(ByteSize::new(64 << (i % 5))).unwrap();
                    heap.free(place).unwrap();
                }
            });
        }
    });
    let stats = Heap::open(&new).unwrap().check().unwrap();
    assert_eq!(stats.blocks, 0);
}

/// Locks of one descriptor do not exclude each other: what one pool was attached to, the other gave
/// away.
#[test]
fn one_backend_that_is_opened_twice_is_two_pools_that_see_each_other() {
    let backend: Arc<dyn Backend> = Arc::new(memory(4));
    let first = Pool::format_shared(Arc::clone(&backend), FormatOptions::default()).unwrap();
    let second = Pool::open_shared(backend, Role::Writer(Epoch::CURRENT)).unwrap();
    let a = first.create("a", MIB2, plain()).unwrap();
    fill(&a, 1);
    second.remove("a").unwrap();
    let b = second.create("b", MIB2, plain()).unwrap();
    fill(&b, 2);
    assert_eq!(sum(&a), 1);
    assert_ne!(a.handle().offset, b.handle().offset);
}

/// Forks in a process of its own, in which no other thread holds anything.
#[test]
#[ignore = "a role of `what_a_forked_child_drops_its_parent_keeps` and the next one"]
fn role_fork() {
    let Some((path, drops)) = child::arguments::<(PathBuf, bool)>("role_fork") else {
        return;
    };
    let open = || Pool::open(FileHdm::open(&path).unwrap(), Role::Writer(Epoch::CURRENT)).unwrap();
    let pool = open();
    let a = pool.create("a", MIB2, plain()).unwrap();
    let heap = Heap::format(&a, HeapOptions::default()).unwrap();
    let refused = |done: Result<(), Error>| matches!(done, Err(Error::Forked { .. }));
    // SAFETY: there is one thread that does anything; the child asks and leaves.
    match unsafe { nix::unistd::fork() }.unwrap() {
        nix::unistd::ForkResult::Child => {
            let right = if drops {
                drop((heap, a));
                true
            } else {
                refused(pool.create("b", MIB2, plain()).map(drop))
                    && refused(pool.remove("a"))
                    && refused(pool.attach("a").map(drop))
                    && refused(heap.allocate(ByteSize::new(64)).map(drop))
                    && pool.list().is_ok()
                    && a.read(0, &mut [0; 8]).is_ok()
            };
            // SAFETY: it ends the child without its destructors.
            unsafe { libc::_exit(i32::from(!right)) }
        }
        nix::unistd::ForkResult::Parent { child } => {
            let ended = nix::sys::wait::waitpid(child, None).unwrap();
            let fine = nix::sys::wait::WaitStatus::Exited(child, 0);
            assert_eq!(ended, fine);
        }
    }
    fill(&a, 1);
    let other = open();
    other.remove("a").unwrap();
    fill(&other.create("b", MIB2, plain()).unwrap(), 2);
    assert_eq!(sum(&a), 1);
    drop((heap, a));
    assert_eq!(other.reclaim().unwrap(), MIB2);
}

fn fork(drops: bool) {
    let (pool, dir) = file_pool(8);
    drop(pool);
    let mut role = ChildRole::test("role_fork")
        .start(&(dir.path().join("pool"), drops))
        .unwrap();
    assert!(role.wait().unwrap().success());
}

/// A child that forgot what it had been given ended its parent's lease.
#[test]
fn what_a_forked_child_drops_its_parent_keeps() {
    fork(true);
}

/// The locks of a forked process are those of its parent: the two wrote to the log at once, and to the
/// heap.
#[test]
fn a_forked_child_opens_the_pool_anew() {
    fork(false);
}

/// `overwrite` gave what somebody had attached to others.
#[test]
fn a_pool_that_somebody_is_attached_to_is_not_formatted_over() {
    let (pool, again) = pool(8);
    let a = pool.create("a", MIB2, plain()).unwrap();
    fill(&a, 1);
    let overwrite = FormatOptions {
        overwrite: true,
        ..FormatOptions::default()
    };
    let refused = Pool::format(again(0), overwrite.clone());
    assert!(matches!(refused, Err(Error::InUse { .. })), "{refused:?}");
    assert_eq!(sum(&a), 1);
    assert!(pool.check().is_ok());
    drop(a);
    let new = Pool::format(again(0), overwrite).unwrap();
    assert!(new.list().unwrap().is_empty());
}

/// Numbers that nobody reaches, with a right crc: an addition overflowed.
#[test]
fn numbers_at_their_end_are_an_error_and_no_panic() {
    let wild = |change: fn(&mut Record)| {
        let (pool, again) = pool(4);
        let incarnation = pool
            .create("a", MIB2, plain())
            .unwrap()
            .handle()
            .incarnation;
        let file = file_at(&again);
        let seed = Seed::of(incarnation);
        let mut bytes = [0; Record::SIZE];
        file.read_exact_at(&mut bytes, EXTENT).unwrap();
        let mut record = Record::decode(&bytes, seed).unwrap();
        assert_eq!(record.state, HostState::Active);
        change(&mut record);
        for at in RECORDS {
            file.write_all_at(&record.encode(seed), EXTENT + at)
                .unwrap();
        }
        drop(pool);
        let pool = Pool::open(again(0), Role::Writer(Epoch::CURRENT)).and_then(|pool| {
            for _ in 0..5000 {
                drop(pool.create("b", MIB2, plain())?);
                pool.remove("b")?;
            }
            Ok(())
        });
        let taken = Pool::open(again(0), Role::Writer(Epoch(7))).map(drop);
        (pool, taken)
    };
    for change in [
        (|record| record.generation = u64::MAX) as fn(&mut Record),
        |record| record.turn = u64::MAX,
        |record| record.first_sequence = u64::MAX,
        |record| record.next_generation = u64::MAX,
        |record| record.epoch = u64::MAX,
        |record| record.checkpoint = u32::MAX,
    ] {
        let (used, taken) = wild(change);
        for done in [used, taken] {
            assert!(
                matches!(
                    done,
                    Ok(()) | Err(Error::Corrupt { .. } | Error::Fenced { .. })
                ),
                "{done:?}"
            );
        }
    }
}

/// `check` could not open what it was to list, and said to run `check`.
#[test]
fn what_is_left_of_a_damaged_pool_is_listed() {
    let made = || {
        let (pool, again) = pool_of(8, 2);
        for name in ["a", "b", "c", "d"] {
            drop(pool.create(name, MIB2, kept()).unwrap());
        }
        pool.remove("b").unwrap();
        (
            pool,
            file_at(&again),
            Arc::new(again(0)) as Arc<dyn Backend>,
        )
    };
    let names = |left: &directcxl::Salvage| -> Vec<_> {
        let each = left.namespaces.iter();
        each.map(|one| (one.info.name.clone(), one.certain))
            .collect()
    };
    let all = |certain: [bool; 3]| -> Vec<_> {
        let names = ["a", "c", "d"].map(String::from);
        names.into_iter().zip(certain).collect()
    };
    let (pool, _, backend) = made();
    let whole = Pool::salvage(backend).unwrap();
    assert_eq!(whole.problems, []);
    assert_eq!(names(&whole), all([true; 3]));
    let listed = pool.list().unwrap();
    assert!(whole.namespaces.iter().map(|one| &one.info).eq(&listed));
    let arena = EXTENT + ARENAS + FormatOptions::default().entries * ENTRY;
    let entry = |index: u64| (arena + index * ENTRY, 256);
    for (lost, expected) in [
        // "c": "d" lies behind what may have been removed.
        (vec![entry(2)], vec![("a", false), ("d", true)]),
        // The removal of "b", of which freeing it is left.
        (
            vec![entry(4)],
            vec![("a", false), ("b", false), ("c", false), ("d", false)],
        ),
        // Both copies of the record.
        (
            vec![(EXTENT, 64), (EXTENT + 4096, 64)],
            vec![("a", true), ("c", true), ("d", true)],
        ),
        // Of the other host, which never wrote.
        (
            vec![(2 * EXTENT, 64), (2 * EXTENT + 4096, 64)],
            vec![("a", true), ("c", true), ("d", true)],
        ),
    ] {
        for byte in [0, 0xff] {
            let (pool, file, backend) = made();
            for (at, length) in &lost {
                file.write_all_at(&vec![byte; *length], *at).unwrap();
            }
            let refused = Pool::open_shared(backend.reopen().unwrap(), Role::Reader);
            assert!(matches!(refused, Err(Error::Corrupt { .. })), "{refused:?}");
            let left = Pool::salvage(backend).unwrap();
            assert!(!left.problems.is_empty());
            let expected: Vec<_> = expected
                .iter()
                .map(|(name, it)| ((*name).to_owned(), *it))
                .collect();
            assert_eq!(names(&left), expected, "{lost:?} {:?}", left.problems);
            drop(pool);
        }
    }
    // The record of a host that had taken over, and begun many arenas.
    let memory = MemfdHdm::new(ByteSize::mib(32)).unwrap();
    let fd = memory.as_fd().try_clone_to_owned().unwrap();
    let options = FormatOptions {
        hosts: 2,
        entries: 8,
        ..FormatOptions::default()
    };
    drop(Pool::format(memory, options).unwrap());
    let again = |host| {
        let memory = MemfdHdm::from_fd(fd.try_clone().unwrap()).unwrap();
        memory.on_host(HostId(host))
    };
    let pool = Pool::open(again(1), Role::Writer(Epoch(2))).unwrap();
    for i in 0..50 {
        drop(pool.create(&format!("n{i}"), MIB2, kept()).unwrap());
        if i >= 3 {
            pool.remove(&format!("n{}", i - 3)).unwrap();
        }
    }
    let file: File = fd.try_clone().unwrap().into();
    for at in RECORDS {
        file.write_all_at(&[0; 64], 2 * EXTENT + at).unwrap();
    }
    let left = Pool::salvage(Arc::new(again(0))).unwrap();
    let mut found: Vec<_> = names(&left).into_iter().map(|(name, _)| name).collect();
    found.sort();
    assert_eq!(found, ["n47", "n48", "n49"]);
}

/// A writer that had the pool open went on over what was lost meanwhile.
#[test]
fn a_page_of_the_log_that_is_lost_meanwhile_is_not_written_over() {
    for (lost, byte) in [(256, 0xff), (4096, 0), (4096, 0xff)] {
        let (pool, dir) = file_pool(70);
        for i in 0..16 {
            drop(pool.create(&format!("n{i}"), MIB2, kept()).unwrap());
        }
        let path = dir.path().join("pool");
        let again = || FileHdm::open(&path).unwrap();
        let other = Pool::open(again(), Role::Writer(Epoch::CURRENT)).unwrap();
        for i in 16..40 {
            drop(other.create(&format!("n{i}"), MIB2, kept()).unwrap());
        }
        let file = OpenOptions::new().write(true).open(&path).unwrap();
        let arena = EXTENT + ARENAS + FormatOptions::default().entries * ENTRY;
        file.write_all_at(&vec![byte; lost], arena + 16 * ENTRY)
            .unwrap();
        let refused = pool.create("x", MIB2, kept());
        assert!(matches!(refused, Err(Error::Corrupt { .. })), "{refused:?}");
    }
}

/// What another program wrote left no room for an entry behind the checkpoint: it was written behind
/// the arena.
#[test]
fn a_log_that_leaves_no_room_for_a_removal_is_damaged() {
    let (pool, again) = full_of_leases(1);
    let incarnation = pool.attach("0").unwrap().handle().incarnation;
    let file = file_at(&again);
    let seed = Seed::of(incarnation);
    let mut record = [0; Record::SIZE];
    file.read_exact_at(&mut record, EXTENT).unwrap();
    let record = Record::decode(&record, seed).unwrap();
    assert_eq!((record.turn % 2, record.checkpoint), (1, 0));
    for i in 6..8 {
        let entry = Entry {
            sequence: record.first_sequence + i,
            epoch: record.epoch,
            turn: record.turn,
            operation: Operation::Create {
                generation: 100 + i,
                extent: Extent {
                    offset: (20 + i) * EXTENT,
                    length: EXTENT,
                },
                name: i.to_string().into(),
            },
        };
        let half = entry.encode(seed);
        let at = EXTENT + ARENAS + (8 + i) * ENTRY;
        file.write_all_at(&[half, half].concat(), at).unwrap();
    }
    let mut behind = [1; 4096];
    let after = EXTENT + ARENAS + 16 * ENTRY;
    file.write_all_at(&behind, after).unwrap();
    assert_eq!(pool.list().unwrap().len(), 8);
    for _ in 0..3 {
        let refused = pool.remove("0");
        assert!(matches!(refused, Err(Error::Corrupt { .. })), "{refused:?}");
    }
    file.read_exact_at(&mut behind, after).unwrap();
    assert_eq!(behind, [1; 4096]);
    assert_eq!(pool.list().unwrap().len(), 8);
}

/// It was damaged beyond a copy that it never had.
#[test]
fn a_damaged_heap_is_said_to_be_one() {
    let (pool, _again) = pool(4);
    let a = pool.create("a", MIB2, plain()).unwrap();
    let none = Heap::open(&a);
    assert!(matches!(none, Err(Error::NotAHeap { .. })), "{none:?}");
    let large = HeapOptions {
        smallest: ByteSize::mib(1),
    };
    let refused = Heap::format(&a, large).unwrap_err().to_string();
    assert!(refused.contains("a quarter of the namespace"), "{refused}");
    let heap = Heap::format(&a, HeapOptions::default()).unwrap();
    a.write(24, &[0xff; 8]).unwrap();
    let damaged = Heap::open(&a);
    assert!(
        matches!(damaged, Err(Error::CorruptHeap { .. })),
        "{damaged:?}"
    );
    a.write(8192, &[0; 8]).unwrap();
    let damaged = heap.check().unwrap_err().to_string();
    assert!(
        damaged.contains("roots") && !damaged.contains("copy of it"),
        "{damaged}"
    );
}
