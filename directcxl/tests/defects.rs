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
use directcxl::layout::{ARENAS, ENTRY, EXTENT, HostState, RECORDS, Record, Seed};
use directcxl::{
    Epoch, Error, FileHdm, FormatOptions, HostId, MemfdHdm, NamespaceOptions, Pool, Role,
};

fn plain() -> NamespaceOptions {
    NamespaceOptions::default()
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
    file.write_all_at(&[0; 64], first(1)).unwrap();
    file.write_all_at(&[0xff; 64], first(1) + 4096).unwrap();
    assert!(matches!(pool.list(), Err(Error::Corrupt { .. })));
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
        drop(pool.create(&format!("{i}"), MIB2, plain()).unwrap());
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
