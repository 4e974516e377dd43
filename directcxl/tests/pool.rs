//! A pool, as a program uses it.
#![allow(
    clippy::panic,
    clippy::print_stderr,
    clippy::unwrap_used,
    reason = "a test says what went wrong by failing"
)]

mod common;

use std::collections::HashSet;

use carlsbad_kit::child::{self, Role as ChildRole};
use carlsbad_kit::leak::LeakGuard;
use carlsbad_types::ByteSize;
use common::{MIB2, fill, memory, pool, sum};
use directcxl::{
    Contents, Epoch, Error, FileHdm, FormatOptions, Handle, MemfdHdm, NamespaceOptions, Pool, Role,
};

#[test]
fn a_namespace_is_found_by_name_with_what_was_written() {
    let dir = carlsbad_kit::scratch::on_tmpfs().unwrap();
    let guard = LeakGuard::beneath(dir.path());
    let path = dir.path().join("pool");
    {
        let file = FileHdm::create(&path, ByteSize::mib(32)).unwrap();
        let pool = Pool::format(file, FormatOptions::default()).unwrap();
        let a = pool
            .create("a", ByteSize::new(1), NamespaceOptions::default())
            .unwrap();
        assert_eq!(a.length(), MIB2);
        fill(&a, 1);
        a.publish(0..a.length().get()).unwrap();
    }
    let reader = Pool::open(FileHdm::open_read_only(&path).unwrap(), Role::Reader).unwrap();
    let a = reader.attach("a").unwrap();
    assert_eq!(sum(&a), 1);
    assert!(matches!(a.write(0, &[1]), Err(Error::ReadOnly { .. })));
    assert!(matches!(
        reader.create("b", MIB2, NamespaceOptions::default()),
        Err(Error::ReadOnly { .. })
    ));
    assert!(reader.check().is_ok(), "{:?}", reader.check());
    drop((a, reader));
    std::fs::remove_file(&path).unwrap();
    guard.check();
}

#[test]
fn what_is_removed_is_not_reused_while_somebody_is_attached() {
    let (pool, _again) = pool(8);
    let info = pool.info().unwrap();
    let all = info.free;
    let a = pool.create("a", all, NamespaceOptions::default()).unwrap();
    fill(&a, 7);
    let handle = a.handle();
    pool.remove("a").unwrap();
    // The name is free; the memory is not.
    assert!(matches!(
        pool.attach("a"),
        Err(Error::UnknownNamespace { .. })
    ));
    assert!(matches!(pool.resolve(handle), Err(Error::Stale { .. })));
    let refused = pool.create("a", MIB2, NamespaceOptions::default());
    assert!(
        matches!(refused, Err(Error::NoRoom { quarantined, .. }) if quarantined == all),
        "{refused:?}"
    );
    assert_eq!(sum(&a), 7);
    let other = a.clone();
    drop(a);
    assert!(pool.create("a", MIB2, NamespaceOptions::default()).is_err());
    drop(other);
    let b = pool.create("a", all, NamespaceOptions::default()).unwrap();
    // A namespace does not show what another had, and is not what the old handle names.
    assert_eq!(sum(&b), 0);
    assert_ne!(b.handle(), handle);
    assert!(matches!(pool.resolve(handle), Err(Error::Stale { .. })));
}

#[test]
fn a_lease_of_another_process_ends_when_it_is_killed() {
    let (pool, path) = common::file_pool(8);
    let all = pool.info().unwrap().free;
    drop(pool.create("a", all, NamespaceOptions::default()).unwrap());
    let mut child = ChildRole::test("role_attach")
        .start(&path.path().join("pool"))
        .unwrap();
    child.hear("attached").unwrap();
    pool.remove("a").unwrap();
    assert_eq!(pool.info().unwrap().quarantined, all);
    assert_eq!(pool.reclaim().unwrap(), ByteSize::ZERO);
    assert!(child.kill());
    assert_eq!(pool.reclaim().unwrap(), all);
    assert_eq!(pool.info().unwrap().free, all);
}

#[test]
#[ignore = "a role of `a_lease_of_another_process_ends_when_it_is_killed`"]
fn role_attach() {
    let Some(path) = child::arguments::<std::path::PathBuf>("role_attach") else {
        return;
    };
    let pool = Pool::open(FileHdm::open_read_only(path).unwrap(), Role::Reader).unwrap();
    let _attached = pool.attach("a").unwrap();
    child::tell("attached");
    child::wait_for_parent();
}

#[test]
fn an_old_epoch_is_fenced_off_and_the_same_one_is_shared() {
    let (first, again) = pool(8);
    let second = Pool::open(again(0), Role::Writer(Epoch::CURRENT)).unwrap();
    drop(
        first
            .create("a", MIB2, NamespaceOptions::default())
            .unwrap(),
    );
    drop(
        second
            .create("b", MIB2, NamespaceOptions::default())
            .unwrap(),
    );
    assert_eq!(first.list().unwrap().len(), 2);

    let third = Pool::open(again(0), Role::Writer(Epoch(5))).unwrap();
    for old in [&first, &second] {
        let refused = old.create("c", MIB2, NamespaceOptions::default());
        assert!(
            matches!(
                refused,
                Err(Error::Fenced {
                    theirs: Epoch(5),
                    ..
                })
            ),
            "{refused:?}"
        );
        // Looking is not writing.
        assert_eq!(old.list().unwrap().len(), 2);
    }
    assert!(matches!(
        Pool::open(again(0), Role::Writer(Epoch(4))),
        Err(Error::Fenced { .. })
    ));
    drop(
        third
            .create("c", MIB2, NamespaceOptions::default())
            .unwrap(),
    );
    assert_eq!(first.list().unwrap().len(), 3);
}

#[test]
fn a_host_takes_over_and_keeps_what_was_there() {
    let (_, again) = common::pool_of(16, 3);
    let zero = Pool::open(again(0), Role::Writer(Epoch::CURRENT)).unwrap();
    let a = zero.create("a", MIB2, NamespaceOptions::default()).unwrap();
    fill(&a, 3);
    assert!(matches!(
        Pool::open(again(1), Role::Writer(Epoch::CURRENT)),
        Err(Error::NotWriter { .. })
    ));
    assert!(matches!(
        Pool::open(again(1), Role::Writer(Epoch(1))),
        Err(Error::EpochTaken { .. })
    ));
    let one = Pool::open(again(1), Role::Writer(Epoch(2))).unwrap();
    assert_eq!(sum(&one.attach("a").unwrap()), 3);
    assert!(matches!(zero.remove("a"), Err(Error::Fenced { .. })));
    one.remove("a").unwrap();
    // Host 0 is attached: its lease is in its area, where host 1 sees it.
    drop(zero.list());
    assert_eq!(one.info().unwrap().quarantined, MIB2);
    assert!(matches!(
        one.evict(directcxl::HostId(1)),
        Err(Error::OwnHost { .. })
    ));
    one.evict(directcxl::HostId(0)).unwrap();
    // On one machine the kernel still knows that the process is attached.
    drop(a);
    assert_eq!(one.reclaim().unwrap(), MIB2);
    let refused = zero.create("x", MIB2, NamespaceOptions::default());
    assert!(matches!(refused, Err(Error::Fenced { .. })), "{refused:?}");
    let back = Pool::open(again(0), Role::Writer(Epoch(3))).unwrap();
    drop(back.create("b", MIB2, NamespaceOptions::default()).unwrap());
    assert!(back.check().is_ok(), "{:?}", back.check());
}

#[test]
fn resize_grows_in_place_and_a_cut_tail_waits_for_leases() {
    let (pool, _) = pool(16);
    let a = pool
        .create("a", ByteSize::mib(4), NamespaceOptions::default())
        .unwrap();
    fill(&a, 9);
    pool.resize("a", ByteSize::mib(8)).unwrap();
    let larger = pool.attach("a").unwrap();
    assert_eq!(
        (a.length(), larger.length()),
        (ByteSize::mib(4), ByteSize::mib(8))
    );
    assert_eq!(a.handle().offset, larger.handle().offset);
    assert!(matches!(pool.resolve(a.handle()), Err(Error::Stale { .. })));
    let mut bytes = vec![1; 4 << 20];
    larger.read(4 << 20, &mut bytes).unwrap();
    assert!(bytes.iter().all(|byte| *byte == 0));
    pool.resize("a", MIB2).unwrap();
    assert_eq!(pool.info().unwrap().quarantined, ByteSize::mib(6));
    assert_eq!(sum(&a), 9);
    drop((a, larger));
    assert_eq!(pool.reclaim().unwrap(), ByteSize::mib(6));
    drop(
        pool.create("wall", MIB2, NamespaceOptions::default())
            .unwrap(),
    );
    let refused = pool.resize("a", ByteSize::gib(1));
    assert!(matches!(refused, Err(Error::NoRoom { .. })), "{refused:?}");
}

#[test]
fn a_handle_goes_over_the_wire_and_names_one_namespace_for_ever() {
    let (pool, _) = pool(8);
    let a = pool.create("a", MIB2, NamespaceOptions::default()).unwrap();
    let sent = Handle::from_bytes(&a.handle().to_bytes());
    assert_eq!(sent, a.handle());
    assert_eq!(pool.resolve(sent).unwrap().handle(), sent);
    let elsewhere = Handle {
        incarnation: sent.incarnation ^ 1,
        ..sent
    };
    assert!(matches!(pool.resolve(elsewhere), Err(Error::Stale { .. })));
}

#[test]
fn create_and_remove_churn_at_95_percent_full_leaks_nothing() {
    let rounds = if std::env::var_os("CARLSBAD_SOAK").is_some() {
        1_000_000
    } else {
        20_000
    };
    let mut rng = carlsbad_kit::seed::rng("churn");
    let (pool, _) = pool(256);
    let before = pool.info().unwrap();
    let units = before.free.get() / MIB2.get();
    let options = NamespaceOptions {
        contents: Contents::Kept,
        ..NamespaceOptions::default()
    };
    let mut names = Vec::new();
    for i in 0..units * 95 / 100 {
        let name = format!("n{i}");
        drop(pool.create(&name, MIB2, options).unwrap());
        names.push(name);
    }
    for round in 0..rounds {
        let victim = rng.usize(..names.len());
        pool.remove(&names[victim]).unwrap();
        names[victim] = format!("r{round}");
        drop(pool.create(&names[victim], MIB2, options).unwrap());
    }
    let found: HashSet<_> = pool
        .list()
        .unwrap()
        .into_iter()
        .map(|info| info.name)
        .collect();
    assert_eq!(found, names.iter().cloned().collect());
    for name in names {
        pool.remove(&name).unwrap();
    }
    assert!(pool.check().is_ok());
    let after = pool.info().unwrap();
    assert_eq!(
        (after.free, after.quarantined),
        (before.free, ByteSize::ZERO)
    );
}

#[test]
fn threads_and_handles_see_one_pool() {
    let (first, again) = pool(64);
    let pools: Vec<_> = (0..4)
        .map(|i| {
            if i % 2 == 0 {
                first.clone()
            } else {
                Pool::open(again(0), Role::Writer(Epoch::CURRENT)).unwrap()
            }
        })
        .collect();
    std::thread::scope(|scope| {
        for (i, pool) in pools.iter().enumerate() {
            scope.spawn(move || {
                for round in 0..200 {
                    let name = format!("{i}");
                    let namespace = pool
                        .create(&name, MIB2, NamespaceOptions::default())
                        .unwrap();
                    namespace.write(0, &[round as u8]).unwrap();
                    let seen = pool.attach(&name).unwrap();
                    let mut byte = [0];
                    seen.read(0, &mut byte).unwrap();
                    assert_eq!(byte[0], round as u8);
                    pool.remove(&name).unwrap();
                }
            });
        }
    });
    // What was still attached when it was removed was left for later.
    first.reclaim().unwrap();
    let info = first.info().unwrap();
    assert_eq!((info.namespaces, info.quarantined), (0, ByteSize::ZERO));
}

#[test]
fn the_embedded_default_needs_no_file_and_no_privilege() {
    let pool = Pool::format(
        MemfdHdm::new(ByteSize::mib(16)).unwrap(),
        FormatOptions::default(),
    )
    .unwrap();
    let a = pool
        .create("counter", MIB2, NamespaceOptions::default())
        .unwrap();
    a.atomic(8)
        .unwrap()
        .fetch_add(5, std::sync::atomic::Ordering::Relaxed);
    assert_eq!(
        a.atomic(8)
            .unwrap()
            .load(std::sync::atomic::Ordering::Relaxed),
        5
    );
    assert!(a.atomic(4).is_err());
    assert!(a.atomic(MIB2.get()).is_err());
    let _ = memory(1);
}
