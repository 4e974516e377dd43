//! On a real kernel with emulated CXL devices: `cargo xtask vm directcxl` boots machines for these.
//!
//! They make and destroy regions, so that they run nowhere else.
#![allow(
    clippy::panic,
    clippy::print_stderr,
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a test says what went wrong by failing"
)]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use carlsbad_kit::child;
use carlsbad_types::ByteSize;
use directcxl::backend::{Coherence, Health, Persistence};
use directcxl::topology::{self, Mode, Request};
use directcxl::{
    Backend, DevDax, Epoch, Error, FormatOptions, HostId, Namespace, NamespaceOptions, Pool, Role,
};

/// Set by the machine's first process to the name of the test that the machine is for.
const MACHINE: &str = "DIRECTCXL_VM";
/// Emulated, every byte takes a while.
const SIZE: ByteSize = ByteSize::mib(4);
const PATIENCE: Duration = Duration::from_secs(120);
/// The same after a restart: by it the kernel knows the set again.
const SET: uuid::Uuid = uuid::uuid!("6f4b1a52-9d6c-4a30-8a8e-2f61c0de0001");

fn is_for(test: &str) -> bool {
    let here = std::env::var(MACHINE).is_ok_and(|name| name == test);
    if !here {
        eprintln!("SKIPPED cxl: cargo xtask vm directcxl");
    }
    here
}

fn sysfs() -> &'static Path {
    Path::new("/sys")
}

/// What byte is at a place, by a seed: no two pages are alike.
fn byte_at(seed: u64, at: u64) -> u8 {
    ((at ^ at >> 12 ^ seed).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8
}

fn fill(namespace: &Namespace, seed: u64) {
    let length = namespace.length().get();
    let mut part = vec![0; 64 << 10];
    for start in (0..length).step_by(part.len()) {
        for (i, byte) in part.iter_mut().enumerate() {
            *byte = byte_at(seed, start + i as u64);
        }
        namespace.write(start, &part).unwrap();
    }
    namespace.publish(0..length).unwrap();
}

/// Every byte, through the guarded copy and through a pointer.
fn verify(namespace: &Namespace, seed: u64) {
    let length = namespace.length().get();
    namespace.acquire(0..length).unwrap();
    let mut part = vec![0; 64 << 10];
    for start in (0..length).step_by(part.len()) {
        namespace.read(start, &mut part).unwrap();
        for (i, byte) in part.iter().enumerate() {
            assert_eq!(*byte, byte_at(seed, start + i as u64), "{start} + {i}");
        }
    }
    for at in (0..length).step_by(509) {
        // SAFETY: within the namespace, which lives.
        let byte = unsafe {
            namespace
                .as_ptr()
                .as_ptr()
                .wrapping_add(at as usize)
                .read_volatile()
        };
        assert_eq!(byte, byte_at(seed, at), "{at}");
    }
}

fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(
            start.elapsed() < PATIENCE,
            "no {what}: {:#?}",
            topology::scan(sysfs())
        );
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// The region over all devices of a mode.
fn make_region(mode: Mode, ways: u32) -> topology::Applied {
    until("endpoints", || {
        let topology = topology::scan(sysfs()).unwrap();
        let ready = topology
            .memdevs
            .iter()
            .filter(|memdev| memdev.endpoint.is_some());
        (ready.count() >= ways as usize).then_some(())
    });
    let topology = topology::scan(sysfs()).unwrap();
    let request = Request {
        ways: Some(ways),
        uuid: Some(SET),
        ..Request::new(mode)
    };
    let plan =
        topology::plan(&topology, &request).unwrap_or_else(|why| panic!("{why}\n{topology:#?}"));
    assert_eq!(plan.ways(), ways as usize);
    topology::apply(sysfs(), &plan).unwrap_or_else(|why| panic!("{why}\n{plan:#?}"))
}

/// The device on persistent memory, which `ndctl` makes of a region.
fn pmem_device() -> PathBuf {
    until("dax device", || {
        let topology = topology::scan(sysfs()).unwrap();
        let dax = topology.dax.iter().find(|dax| dax.size > ByteSize::ZERO)?;
        Some(Path::new("/dev").join(&dax.name))
    })
}

#[test]
fn persistent_memory_becomes_a_pool() {
    if !is_for("persistent_memory_becomes_a_pool") {
        return;
    }
    make_region(Mode::Pmem, 1);
    let made = Command::new("ndctl")
        .args(["create-namespace", "--mode=devdax", "--align=2M"])
        .output()
        .unwrap();
    assert!(made.status.success(), "{made:?}");
    let device = DevDax::open(pmem_device()).unwrap();
    assert_eq!(device.geometry().persistence, Persistence::Power);
    let pool = Pool::format(device, FormatOptions::default()).unwrap();
    for (name, seed) in [("first", 1), ("second", 2)] {
        let namespace = pool
            .create(name, SIZE, NamespaceOptions::default())
            .unwrap();
        fill(&namespace, seed);
        verify(&namespace, seed);
    }
    verify(&pool.attach("first").unwrap(), 1);
    assert!(pool.check().is_ok(), "{:?}", pool.check());
    assert_eq!(pool.health(), Health::Ok);
}

#[test]
fn persistent_memory_is_a_pool_after_a_restart() {
    if !is_for("persistent_memory_is_a_pool_after_a_restart") {
        return;
    }
    make_region(Mode::Pmem, 1);
    let device = DevDax::open(pmem_device()).unwrap();
    let pool = Pool::open(device, Role::Writer(Epoch::CURRENT)).unwrap();
    assert_eq!(pool.list().unwrap().len(), 2);
    for (name, seed) in [("first", 1), ("second", 2)] {
        verify(&pool.attach(name).unwrap(), seed);
    }
    pool.remove("first").unwrap();
    let third = pool
        .create("third", SIZE, NamespaceOptions::default())
        .unwrap();
    fill(&third, 3);
    verify(&third, 3);
    verify(&pool.attach("second").unwrap(), 2);
    assert!(pool.check().is_ok(), "{:?}", pool.check());
}

#[test]
fn two_devices_behind_a_switch_interleave_and_one_is_unplugged() {
    if !is_for("two_devices_behind_a_switch_interleave_and_one_is_unplugged") {
        return;
    }
    let applied = make_region(Mode::Volatile, 2);
    let path = applied.device.unwrap();
    let device = DevDax::open(&path).unwrap();
    assert_eq!(device.geometry().persistence, Persistence::Volatile);
    assert_eq!(device.geometry().length, ByteSize::mib(512));
    let pool = Pool::format(device, FormatOptions::default()).unwrap();
    let first = pool
        .create("first", SIZE, NamespaceOptions::default())
        .unwrap();
    let second = pool
        .create("second", SIZE, NamespaceOptions::default())
        .unwrap();
    fill(&first, 1);
    fill(&second, 2);
    verify(&first, 1);
    verify(&second, 2);
    assert!(pool.check().is_ok(), "{:?}", pool.check());
    child::tell("verified");

    // Under load: reads go on while the device goes.
    child::tell("unplug");
    let start = Instant::now();
    let mut bytes = [0; 4096];
    let gone = loop {
        match first.read(8192, &mut bytes) {
            Ok(()) => assert!(start.elapsed() < PATIENCE, "it is still there"),
            Err(why) => break why,
        }
    };
    assert!(matches!(gone, Error::Removed { .. }), "{gone}");
    // The kernel takes one mapping after the other away.
    let ends = |what: &str, ended: &dyn Fn() -> bool| until(what, || ended().then_some(()));
    let removed = |why: Result<(), Error>| matches!(why, Err(Error::Removed { .. }));
    ends("end of a write", &|| removed(second.write(0, &bytes)));
    ends("end of the log", &|| removed(pool.list().map(drop)));
    ends("end of health", &|| pool.health() == Health::Removed);
    ends("end of the device", &|| DevDax::open(&path).is_err());
    drop((first, second, pool));
}

fn shared(host: u16) -> DevDax {
    let applied = make_region(Mode::Volatile, 1);
    let device = DevDax::open(applied.device.unwrap()).unwrap();
    device.on_host(HostId(host)).coherence(Coherence::Software)
}

#[test]
fn host_zero_writes_and_follows() {
    if !is_for("host_zero_writes_and_follows") {
        return;
    }
    let options = FormatOptions {
        hosts: 2,
        ..FormatOptions::default()
    };
    let pool = Pool::format(shared(0), options).unwrap();
    let data = pool
        .create("data", SIZE, NamespaceOptions::default())
        .unwrap();
    fill(&data, 1);
    // Names are how the two hosts tell each other where they are.
    drop(
        pool.create("ready", ByteSize::mib(2), NamespaceOptions::default())
            .unwrap(),
    );
    until("answer", || pool.attach("done").ok());
    // Host 1 has taken over since.
    let refused = pool.create("too late", SIZE, NamespaceOptions::default());
    assert!(
        matches!(
            refused,
            Err(Error::Fenced {
                theirs: Epoch(2),
                ..
            })
        ),
        "{refused:?}"
    );
    verify(&pool.attach("answer").unwrap(), 2);
    verify(&data, 1);
    assert_eq!(pool.info().unwrap().writer, HostId(1));
    assert!(pool.check().is_ok(), "{:?}", pool.check());
}

#[test]
fn host_one_reads_and_takes_over() {
    if !is_for("host_one_reads_and_takes_over") {
        return;
    }
    let device = shared(1);
    let reopened = || device.reopen().unwrap();
    let pool = until("pool", || Pool::open_shared(reopened(), Role::Reader).ok());
    until("data", || pool.attach("ready").ok());
    verify(&pool.attach("data").unwrap(), 1);
    let writer = Pool::open_shared(reopened(), Role::Writer(Epoch(2))).unwrap();
    // Host 0 is attached to it: it may be removed, but not reused.
    writer.remove("data").unwrap();
    assert_eq!(writer.info().unwrap().quarantined, SIZE);
    let answer = writer
        .create("answer", SIZE, NamespaceOptions::default())
        .unwrap();
    fill(&answer, 2);
    drop(
        writer
            .create("done", ByteSize::mib(2), NamespaceOptions::default())
            .unwrap(),
    );
    assert!(writer.check().is_ok(), "{:?}", writer.check());
}

/// What `examples/key_value.rs` is called there.
const PROGRAM: &str = "/usr/bin/key_value";
/// Of each word: emulated memory of a device takes a microsecond a load.
const ROUNDS: &str = "20";

#[test]
fn one_program_uses_a_file_and_huge_pages_and_a_device() {
    if !is_for("one_program_uses_a_file_and_huge_pages_and_a_device") {
        return;
    }
    std::fs::write("/proc/sys/vm/nr_hugepages", "24").unwrap();
    std::fs::create_dir_all("/run/huge").unwrap();
    nix::mount::mount(
        Some("none"),
        "/run/huge",
        Some("hugetlbfs"),
        nix::mount::MsFlags::empty(),
        Some("pagesize=2M"),
    )
    .unwrap();
    let device = make_region(Mode::Volatile, 1).device.unwrap();
    for place in [Path::new("/tmp/pool"), Path::new("/run/huge/pool"), &device] {
        let ran = Command::new(PROGRAM)
            .arg(place)
            .arg(ROUNDS)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&ran.stdout);
        assert!(ran.status.success(), "{}: {ran:?}", place.display());
        assert!(said.contains("heap whole"), "{}: {said}", place.display());
        println!("{}: {said}", place.display());
    }
    // It was this device that the program used.
    let pool = Pool::open(DevDax::open(&device).unwrap(), Role::Reader).unwrap();
    assert_eq!(pool.list().unwrap().len(), 1);
    assert!(pool.check().is_ok(), "{:?}", pool.check());
}

const PAGE: u64 = 4096;

/// Who says that a page is broken gets a signal for it, so that it is another process.
#[test]
#[ignore = "a role of `a_poisoned_page_is_an_error_and_its_neighbours_are_read`"]
fn role_poison() {
    let Some(at) = child::arguments::<u64>("role_poison") else {
        return;
    };
    let file = directcxl::FileHdm::open(POISONED).unwrap();
    let pool = Pool::open(file, Role::Writer(Epoch::CURRENT)).unwrap();
    let a = pool.attach("a").unwrap();
    let page = a.as_ptr().as_ptr().wrapping_add(at as usize);
    // SAFETY: one page of a mapping that lives.
    let told = unsafe { libc::madvise(page.cast(), PAGE as usize, libc::MADV_HWPOISON) };
    assert_eq!(told, 0, "{}", std::io::Error::last_os_error());
}

const POISONED: &str = "/dev/shm/pool";

/// The kernel takes a page for broken when it is told to, and answers as it does for a real one.
#[test]
fn a_poisoned_page_is_an_error_and_its_neighbours_are_read() {
    if !is_for("a_poisoned_page_is_an_error_and_its_neighbours_are_read") {
        return;
    }
    let file = directcxl::FileHdm::create(POISONED, ByteSize::mib(16)).unwrap();
    let pool = Pool::format(file, FormatOptions::default()).unwrap();
    let a = pool.create("a", SIZE, NamespaceOptions::default()).unwrap();
    fill(&a, 1);
    let mut bytes = [0; 64];
    // With the second setting whoever has it mapped is told at once (BUS_MCEERR_AO): Rust's own
    // handler, to which that signal goes on, may not take ours away.
    for (early, bad) in [("0", 5 * PAGE), ("1", 9 * PAGE)] {
        std::fs::write("/proc/sys/vm/memory_failure_early_kill", early).unwrap();
        let mut other = child::Role::test("role_poison").start(&bad).unwrap();
        other.wait().unwrap();
        let at = a.handle().offset + bad;
        for _ in 0..3 {
            let read = a.read(bad, &mut bytes);
            assert!(
                matches!(read, Err(Error::Poisoned { offset, .. }) if offset / PAGE == at / PAGE),
                "{read:?}"
            );
            let written = a.write(bad + 64, &bytes);
            assert!(
                matches!(written, Err(Error::Poisoned { .. })),
                "{written:?}"
            );
        }
        // A copy that comes to it in its middle.
        let mut longer = vec![0; 2 * PAGE as usize];
        let read = a.read(bad - PAGE, &mut longer);
        assert!(matches!(read, Err(Error::Poisoned { .. })), "{read:?}");
        for near in [bad - 64, bad + PAGE] {
            a.read(near, &mut bytes).unwrap();
            for (byte, at) in bytes.iter().zip(near..) {
                assert_eq!(*byte, byte_at(1, at));
            }
        }
    }
    // The pool goes on.
    pool.create("b", SIZE, NamespaceOptions::default()).unwrap();
    assert!(pool.check().is_ok(), "{:?}", pool.check());
}
