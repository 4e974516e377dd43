//! Memory that goes away under a live mapping: an error, and no dead process.
#![allow(
    clippy::panic,
    clippy::print_stderr,
    clippy::unwrap_used,
    reason = "a test says what went wrong by failing"
)]

mod common;

use std::fs::OpenOptions;
use std::os::unix::process::ExitStatusExt;

use carlsbad_kit::child::{self, Role as ChildRole};
use carlsbad_types::ByteSize;
use common::{MIB2, file_pool, fill};
use directcxl::backend::Health;
use directcxl::{Error, FileHdm, NamespaceOptions, Pool, Role};

#[test]
fn a_cut_file_is_removed_memory_and_the_process_lives() {
    let (pool, dir) = file_pool(8);
    let a = pool.create("a", MIB2, NamespaceOptions::default()).unwrap();
    let b = pool.create("b", MIB2, NamespaceOptions::default()).unwrap();
    fill(&a, 1);
    fill(&b, 2);
    let cut = b.handle().offset;
    let file = OpenOptions::new()
        .write(true)
        .open(dir.path().join("pool"))
        .unwrap();
    file.set_len(cut).unwrap();
    let mut bytes = [0; 64];
    for _ in 0..100 {
        let gone = b.read(4096, &mut bytes);
        assert!(
            matches!(gone, Err(Error::Removed { offset, .. }) if offset == cut + 4096),
            "{gone:?}"
        );
        assert!(matches!(b.write(8192, &bytes), Err(Error::Removed { .. })));
    }
    a.read(0, &mut bytes).unwrap();
    assert_eq!(bytes, [1; 64]);
    assert_eq!(pool.health(), Health::Removed);
    // The log is gone as well: every change says so.
    file.set_len(4096).unwrap();
    assert!(matches!(pool.list(), Err(Error::Removed { .. })));
    assert!(matches!(pool.remove("a"), Err(Error::Removed { .. })));
    assert!(!pool.check().is_ok());
}

#[test]
#[ignore = "a role of `any_other_bus_error_is_what_it_was`"]
fn role_bus_error() {
    let Some(path) = child::arguments::<std::path::PathBuf>("role_bus_error") else {
        return;
    };
    let pool = Pool::open(FileHdm::open(&path).unwrap(), Role::Reader).unwrap();
    let a = pool.attach("a").unwrap();
    OpenOptions::new()
        .write(true)
        .open(&path)
        .unwrap()
        .set_len(4096)
        .unwrap();
    assert!(matches!(a.read(0, &mut [0]), Err(Error::Removed { .. })));
    child::tell("answered");
    // SAFETY: nothing: this is the access that kills.
    let _dead = unsafe { a.as_ptr().as_ptr().read_volatile() };
    child::tell("survived");
}

#[test]
fn any_other_bus_error_is_what_it_was() {
    let (pool, dir) = file_pool(4);
    drop(pool.create("a", MIB2, NamespaceOptions::default()).unwrap());
    drop(pool);
    let mut role = ChildRole::test("role_bus_error")
        .start(&dir.path().join("pool"))
        .unwrap();
    role.hear("answered").unwrap();
    assert!(role.hear("survived").is_err());
    let status = role.wait().unwrap();
    assert_eq!(status.signal(), Some(libc::SIGBUS), "{status}");
}

#[test]
#[ignore = "a role of `a_bus_error_that_a_process_sent_is_no_fault_of_a_copy`"]
fn role_sent() {
    let Some((path, ignored)) = child::arguments::<(std::path::PathBuf, bool)>("role_sent") else {
        return;
    };
    // What was there before is not Rust's own handler, which forgets the first such signal.
    let before = if ignored {
        nix::sys::signal::SigHandler::SigIgn
    } else {
        nix::sys::signal::SigHandler::SigDfl
    };
    // SAFETY: neither is a function.
    unsafe { nix::sys::signal::signal(nix::sys::signal::SIGBUS, before) }.unwrap();
    let pool = Pool::open(FileHdm::open(&path).unwrap(), Role::Reader).unwrap();
    let a = pool.attach("a").unwrap();
    nix::sys::signal::raise(nix::sys::signal::SIGBUS).unwrap();
    child::tell("survived");
    OpenOptions::new()
        .write(true)
        .open(&path)
        .unwrap()
        .set_len(4096)
        .unwrap();
    assert!(matches!(a.read(0, &mut [0]), Err(Error::Removed { .. })));
    child::tell("answered");
}

/// The handler took itself away, and the signal was lost.
#[test]
fn a_bus_error_that_a_process_sent_is_no_fault_of_a_copy() {
    for ignored in [false, true] {
        let (pool, dir) = file_pool(4);
        drop(pool.create("a", MIB2, NamespaceOptions::default()).unwrap());
        drop(pool);
        let mut role = ChildRole::test("role_sent")
            .start(&(dir.path().join("pool"), ignored))
            .unwrap();
        assert_eq!(role.hear("survived").is_ok(), ignored);
        assert_eq!(role.hear("answered").is_ok(), ignored);
        let signal = role.wait().unwrap().signal();
        assert_eq!(signal, (!ignored).then_some(libc::SIGBUS));
    }
}

#[test]
#[ignore = "a role of `beside_rusts_own_handler_a_sent_bus_error_leaves_the_guard_in_place`"]
fn role_sent_beside_rust() {
    let Some(path) = child::arguments::<std::path::PathBuf>("role_sent_beside_rust") else {
        return;
    };
    let pool = Pool::open(FileHdm::open(&path).unwrap(), Role::Reader).unwrap();
    let a = pool.attach("a").unwrap();
    // Rust's handler forgets the first one, and puts the default in its place.
    nix::sys::signal::raise(nix::sys::signal::SIGBUS).unwrap();
    let file = OpenOptions::new().write(true).open(&path).unwrap();
    file.set_len(4096).unwrap();
    assert!(matches!(a.read(0, &mut [0]), Err(Error::Removed { .. })));
    child::tell("answered");
    nix::sys::signal::raise(nix::sys::signal::SIGBUS).unwrap();
    child::tell("survived");
}

/// Rust's handler took ours away with itself.
#[test]
fn beside_rusts_own_handler_a_sent_bus_error_leaves_the_guard_in_place() {
    let (pool, dir) = file_pool(4);
    drop(pool.create("a", MIB2, NamespaceOptions::default()).unwrap());
    drop(pool);
    let mut role = ChildRole::test("role_sent_beside_rust")
        .start(&dir.path().join("pool"))
        .unwrap();
    role.hear("answered").unwrap();
    assert!(role.hear("survived").is_err());
    assert_eq!(role.wait().unwrap().signal(), Some(libc::SIGBUS));
}

#[test]
#[ignore = "a role of `a_stack_overflow_is_still_reported_by_rust`"]
fn role_overflow() {
    let Some(path) = child::arguments::<std::path::PathBuf>("role_overflow") else {
        return;
    };
    let pool = Pool::open(FileHdm::open(&path).unwrap(), Role::Reader).unwrap();
    let _mapped = pool.attach("a").unwrap();
    child::tell("ready");
    fn deeper(n: u64) -> u64 {
        let big = std::hint::black_box([n; 512]);
        if n == 0 {
            0
        } else {
            deeper(n + 1) + big[(n % 512) as usize]
        }
    }
    std::hint::black_box(deeper(1));
}

/// Rust has a handler of its own for SIGBUS and SIGSEGV, which says that the stack is full.
#[test]
fn a_stack_overflow_is_still_reported_by_rust() {
    let (pool, dir) = file_pool(4);
    drop(pool.create("a", MIB2, NamespaceOptions::default()).unwrap());
    drop(pool);
    let mut role = ChildRole::test("role_overflow")
        .start(&dir.path().join("pool"))
        .unwrap();
    role.hear("ready").unwrap();
    let status = role.wait().unwrap();
    // Rust prints, and aborts; without its handler it would be the plain signal.
    assert_eq!(status.signal(), Some(libc::SIGABRT), "{status}");
}

#[test]
fn threads_that_read_what_goes_away_all_get_an_error() {
    let (pool, dir) = file_pool(8);
    let a = pool
        .create("a", ByteSize::mib(8), NamespaceOptions::default())
        .unwrap();
    fill(&a, 1);
    let file = OpenOptions::new()
        .write(true)
        .open(dir.path().join("pool"))
        .unwrap();
    std::thread::scope(|scope| {
        let readers: Vec<_> = (0..4)
            .map(|i| {
                let a = &a;
                scope.spawn(move || {
                    let mut bytes = vec![0; 1000 + 8 * i];
                    loop {
                        match a.read(4096 * i as u64, &mut bytes) {
                            Ok(()) => {}
                            Err(Error::Removed { .. }) => return true,
                            Err(why) => panic!("{why}"),
                        }
                    }
                })
            })
            .collect();
        std::thread::sleep(std::time::Duration::from_millis(20));
        file.set_len(4 << 20).unwrap();
        assert!(readers.into_iter().all(|reader| reader.join().unwrap()));
    });
}
