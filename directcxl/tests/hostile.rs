//! Bad input: damaged media, devices that are not what they should be, impossible requests.
#![allow(
    clippy::panic,
    clippy::print_stderr,
    clippy::unwrap_used,
    reason = "a test says what went wrong by failing"
)]

mod common;

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;

use carlsbad_types::ByteSize;
use common::{MIB2, file_pool, fill, memory, pool, pool_of, sum};
use directcxl::heap::{Heap, HeapOptions, Place};
use directcxl::{
    DevDax, Epoch, Error, FileHdm, FormatOptions, HostId, MemfdHdm, NamespaceOptions, Pool, Role,
};

const PLAIN: NamespaceOptions = {
    NamespaceOptions {
        contents: directcxl::Contents::Zeroed,
        populate: false,
    }
};

/// Every bit of the superblocks, records, leases and entries in use, one at a time.
#[test]
fn any_flipped_metadata_bit_is_mended_from_its_copy_or_a_typed_error() {
    let dir = carlsbad_kit::scratch::on_tmpfs().unwrap();
    let path = dir.path().join("pool");
    let file = FileHdm::create(&path, ByteSize::mib(24)).unwrap();
    let options = FormatOptions {
        hosts: 2,
        ..FormatOptions::default()
    };
    let pool = Pool::format(file, options).unwrap();
    for name in ["a", "b", "c"] {
        fill(&pool.create(name, MIB2, PLAIN).unwrap(), name.as_bytes()[0]);
    }
    pool.remove("b").unwrap();
    let expected = pool.list().unwrap();
    drop(pool);
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(&path)
        .unwrap();
    let area = 2u64 << 20;
    let entries = area + 65536;
    let arena = 3968 * 256;
    let places = [
        (0, 128),
        (4096, 128), // superblocks
        (area, 64),
        (area + 4096, 64),  // records of host 0
        (area + 8192, 128), // its leases
        (2 * area, 64),
        (2 * area + 4096, 64),  // records of host 1, which never wrote
        (2 * area + 8192, 128), // its leases
        (entries, 64),
        (entries + arena, 6 * 256),
    ];
    // Every bit in full; every seventh, beginning anywhere, otherwise.
    let stride = if std::env::var_os("CARLSBAD_SOAK").is_some() {
        1
    } else {
        7
    };
    let first = carlsbad_kit::seed::rng("flips").u64(0..stride);
    let mut lost = 0;
    for (at, length) in places {
        for bit in (first..length * 8).step_by(stride as usize) {
            let mut byte = [0];
            file.read_exact_at(&mut byte, at + bit / 8).unwrap();
            let flipped = [byte[0] ^ 1 << (bit % 8)];
            file.write_all_at(&flipped, at + bit / 8).unwrap();
            for role in [Role::Reader, Role::Writer(Epoch::CURRENT)] {
                let opened = Pool::open(FileHdm::open(&path).unwrap(), role);
                match opened.and_then(|pool| Ok((pool.list()?, pool))) {
                    Ok((found, pool)) => {
                        assert_eq!(found, expected, "byte {at} + {}, bit {}", bit / 8, bit % 8);
                        assert_eq!(sum(&pool.attach("a").unwrap()), b'a');
                        if role != Role::Reader {
                            pool.repair().unwrap();
                        }
                    }
                    Err(Error::Corrupt { .. } | Error::NotAPool { .. } | Error::Version { .. }) => {
                        lost += 1;
                    }
                    Err(why) => panic!("byte {at} + {}, bit {}: {why}", bit / 8, bit % 8),
                }
            }
            file.write_all_at(&byte, at + bit / 8).unwrap();
        }
    }
    // One flipped bit has a copy, always.
    assert_eq!(lost, 0);
    let pool = Pool::open(FileHdm::open(&path).unwrap(), Role::Writer(Epoch::CURRENT)).unwrap();
    assert!(pool.check().is_ok(), "{:?}", pool.check());
}

/// Both copies at once: the control, which has to be noticed.
#[test]
fn what_is_damaged_in_both_copies_is_said_to_be_lost() {
    for (first, second) in [(60, 4096 + 60), (2 << 20, (2 << 20) + 4096)] {
        let (pool, dir) = file_pool(4);
        drop(pool.create("a", MIB2, PLAIN).unwrap());
        drop(pool);
        let path = dir.path().join("pool");
        let file = OpenOptions::new().write(true).open(&path).unwrap();
        file.write_all_at(&[0xff], first).unwrap();
        file.write_all_at(&[0xff], second).unwrap();
        for role in [Role::Reader, Role::Writer(Epoch::CURRENT)] {
            let refused = Pool::open(FileHdm::open(&path).unwrap(), role);
            assert!(matches!(refused, Err(Error::Corrupt { .. })), "{refused:?}");
        }
    }
    // An entry that others come after.
    let (pool, dir) = file_pool(8);
    for name in ["a", "b", "c"] {
        drop(pool.create(name, MIB2, PLAIN).unwrap());
    }
    drop(pool);
    let path = dir.path().join("pool");
    let arena = (2u64 << 20) + 65536 + 3968 * 256;
    let file = OpenOptions::new().write(true).open(&path).unwrap();
    file.write_all_at(&[0xff], arena + 256 + 70).unwrap();
    file.write_all_at(&[0xff], arena + 256 + 128 + 70).unwrap();
    let refused = Pool::open(FileHdm::open(&path).unwrap(), Role::Reader);
    assert!(matches!(refused, Err(Error::Corrupt { .. })), "{refused:?}");
}

#[test]
fn random_bytes_are_no_pool_and_no_heap() {
    let mut rng = carlsbad_kit::seed::rng("noise");
    let (pool, dir) = file_pool(4);
    drop(pool);
    let path = dir.path().join("pool");
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(&path)
        .unwrap();
    let mut original = vec![0; 4 << 20];
    file.read_exact_at(&mut original, 0).unwrap();
    for _ in 0..300 {
        let mut bytes = vec![0; rng.usize(1..200)];
        rng.fill(&mut bytes);
        for _ in 0..rng.usize(1..5) {
            let places = [
                0,
                4096,
                2 << 20,
                (2 << 20) + 4096,
                (2 << 20) + 65536 + 3968 * 256,
            ];
            let at = places[rng.usize(0..places.len())] + rng.u64(0..64);
            file.write_all_at(&bytes, at).unwrap();
        }
        if let Ok(pool) = Pool::open(FileHdm::open(&path).unwrap(), Role::Writer(Epoch::CURRENT)) {
            let _report = pool.check();
            let _made = pool.create("x", MIB2, PLAIN);
        }
        file.write_all_at(&original, 0).unwrap();
    }
    let (pool, _) = common::pool(8);
    let namespace = pool.create("heap", MIB2, PLAIN).unwrap();
    let none = Heap::open(&namespace);
    assert!(matches!(none, Err(Error::NotAHeap { .. })), "{none:?}");
    let heap = Heap::format(&namespace, HeapOptions::default()).unwrap();
    let places: Vec<_> = (0..50)
        .map(|_| heap.allocate(ByteSize::new(rng.u64(1..5000))).unwrap())
        .collect();
    for place in places.iter().step_by(2) {
        heap.free(*place).unwrap();
    }
    let mut whole = vec![0; 2 << 20];
    namespace.read(0, &mut whole).unwrap();
    for _ in 0..400 {
        let mut bytes = vec![0; rng.usize(1..32)];
        rng.fill(&mut bytes);
        let at = [0, 16, 32, 576, 4096, 8192, 60_000][rng.usize(0..7)] + rng.u64(0..64);
        namespace.write(at, &bytes).unwrap();
        if let Ok(heap) = Heap::open(&namespace) {
            let _stats = heap.check();
            for place in &places {
                let _freed = heap.free(*place);
            }
            let _place = heap.allocate(ByteSize::new(rng.u64(1..100_000)));
        }
        namespace.write(0, &whole).unwrap();
    }
}

#[test]
fn impossible_requests_are_refused_with_what_to_do() {
    let (pool, again) = pool(4);
    let make = |name: &str, length| pool.create(name, length, PLAIN).map(drop);
    assert!(matches!(make("", MIB2), Err(Error::BadName { .. })));
    assert!(matches!(
        make(&"x".repeat(65), MIB2),
        Err(Error::BadName { .. })
    ));
    assert!(matches!(make("a\nb", MIB2), Err(Error::BadName { .. })));
    assert!(matches!(
        make("a", ByteSize::ZERO),
        Err(Error::ZeroLength { .. })
    ));
    assert!(matches!(
        make("a", ByteSize::MAX),
        Err(Error::OutOfRange { .. })
    ));
    assert!(matches!(
        make("a", ByteSize::gib(4)),
        Err(Error::NoRoom { .. })
    ));
    make(&"x".repeat(64), MIB2).unwrap();
    make("ü", MIB2).unwrap();
    assert!(matches!(make("ü", MIB2), Err(Error::NameTaken { .. })));
    assert!(matches!(
        pool.attach("nobody"),
        Err(Error::UnknownNamespace { .. })
    ));
    assert!(matches!(
        pool.remove("nobody"),
        Err(Error::UnknownNamespace { .. })
    ));
    assert!(matches!(
        pool.resize("ü", ByteSize::ZERO),
        Err(Error::ZeroLength { .. })
    ));
    assert!(matches!(pool.evict(HostId(0)), Err(Error::OwnHost { .. })));

    let namespace = pool.attach("ü").unwrap();
    let end = namespace.length().get();
    assert!(matches!(
        namespace.write(end, &[0]),
        Err(Error::OutOfRange { .. })
    ));
    assert!(matches!(
        namespace.write(u64::MAX, &[0]),
        Err(Error::OutOfRange { .. })
    ));
    assert!(matches!(
        namespace.read(end - 1, &mut [0; 2]),
        Err(Error::OutOfRange { .. })
    ));
    assert!(matches!(
        namespace.publish(0..end + 1),
        Err(Error::OutOfRange { .. })
    ));
    #[allow(clippy::reversed_empty_ranges, reason = "it is what is refused")]
    let backwards = namespace.acquire(2..1);
    assert!(matches!(backwards, Err(Error::OutOfRange { .. })));

    assert!(matches!(
        Pool::open(again(7), Role::Reader),
        Err(Error::BadHost { .. })
    ));
    let live = Pool::format(again(0), FormatOptions::default());
    assert!(matches!(live, Err(Error::Live { .. })), "{live:?}");
    for options in [
        FormatOptions {
            hosts: 0,
            ..FormatOptions::default()
        },
        FormatOptions {
            hosts: 65,
            ..FormatOptions::default()
        },
        FormatOptions {
            entries: 0,
            ..FormatOptions::default()
        },
        FormatOptions {
            entries: u64::MAX,
            ..FormatOptions::default()
        },
        FormatOptions {
            hosts: 64,
            ..FormatOptions::default()
        },
    ] {
        let refused = Pool::format(memory(1), options);
        assert!(
            matches!(refused, Err(Error::BadGeometry { .. })),
            "{refused:?}"
        );
    }
    assert!(matches!(
        MemfdHdm::new(ByteSize::ZERO),
        Err(Error::BadGeometry { .. })
    ));
    assert!(matches!(
        MemfdHdm::new(ByteSize::MAX),
        Err(Error::BadGeometry { .. })
    ));
}

#[test]
fn a_full_log_says_so_and_goes_on_when_something_is_removed() {
    let memory = MemfdHdm::new(ByteSize::mib(64)).unwrap();
    let options = FormatOptions {
        entries: 8,
        ..FormatOptions::default()
    };
    let pool = Pool::format(memory, options).unwrap();
    for i in 0..6 {
        drop(pool.create(&format!("{i}"), MIB2, PLAIN).unwrap());
    }
    let full = pool.create("one more", MIB2, PLAIN);
    assert!(
        matches!(
            full,
            Err(Error::LogFull {
                used: 6,
                most: 6,
                ..
            })
        ),
        "{full:?}"
    );
    for _ in 0..50 {
        pool.remove("3").unwrap();
        drop(pool.create("3", MIB2, PLAIN).unwrap());
    }
    assert_eq!(pool.list().unwrap().len(), 6);
}

#[test]
fn a_file_that_is_no_pool_or_something_else_is_not_touched() {
    let dir = carlsbad_kit::scratch::on_tmpfs().unwrap();
    let path = dir.path().join("file");
    let make = |length: u64, bytes: &[u8]| {
        let file = OpenOptions::new()
            .create(true)
            .truncate(true)
            .write(true)
            .open(&path)
            .unwrap();
        file.set_len(length).unwrap();
        file.write_all_at(bytes, 1080).unwrap();
        FileHdm::open(&path).unwrap()
    };
    let open = |backend| Pool::open(backend, Role::Reader).map(drop);
    assert!(matches!(open(make(0, b"")), Err(Error::NotAPool { .. })));
    assert!(matches!(open(make(100, b"")), Err(Error::NotAPool { .. })));
    assert!(matches!(
        open(make(16 << 20, b"")),
        Err(Error::NotAPool { .. })
    ));
    // The mark of ext4 is at 1080.
    let ext4 = make(16 << 20, &[0x53, 0xef]);
    let refused = Pool::format(ext4, FormatOptions::default());
    assert!(matches!(refused, Err(Error::Foreign { .. })), "{refused:?}");
    let options = FormatOptions {
        overwrite: true,
        ..FormatOptions::default()
    };
    drop(Pool::format(FileHdm::open(&path).unwrap(), options).unwrap());
    // Cut below the pool's length.
    OpenOptions::new()
        .write(true)
        .open(&path)
        .unwrap()
        .set_len(8 << 20)
        .unwrap();
    let refused = open(FileHdm::open(&path).unwrap());
    assert!(matches!(refused, Err(Error::Shrunk { .. })), "{refused:?}");
    assert!(matches!(FileHdm::open(dir.path()), Err(Error::Io { .. })));
    assert!(matches!(
        FileHdm::open("/dev/null"),
        Err(Error::BadGeometry { .. })
    ));
    assert!(matches!(
        FileHdm::open(dir.path().join("none")),
        Err(Error::Io { .. })
    ));
    let taken = FileHdm::create(&path, MIB2);
    assert!(matches!(taken, Err(Error::Io { .. })), "{taken:?}");
    assert!(path.exists());
    assert!(matches!(
        DevDax::open("/dev/dax99.9"),
        Err(Error::BadGeometry { .. })
    ));
}

/// A tmpfs of so many MiB, which is unmounted when it is dropped.
struct SmallTmpfs(tempfile::TempDir);

impl SmallTmpfs {
    fn of(mib: u32) -> Self {
        let dir = carlsbad_kit::scratch::on_disk().unwrap();
        let flags = nix::mount::MsFlags::empty();
        let size = format!("size={mib}m");
        nix::mount::mount(
            Some("tmpfs"),
            dir.path(),
            Some("tmpfs"),
            flags,
            Some(&*size),
        )
        .unwrap();
        Self(dir)
    }

    fn pool(&self) -> std::path::PathBuf {
        self.0.path().join("pool")
    }

    fn make(&self, mib: u64) -> Pool {
        let file = FileHdm::create(self.pool(), ByteSize::mib(mib)).unwrap();
        Pool::format(file, FormatOptions::default()).unwrap()
    }

    /// Bytes that are taken.
    fn used(&self) -> u64 {
        let system = nix::sys::statfs::statfs(self.0.path()).unwrap();
        (system.blocks() - system.blocks_free()) * system.block_size() as u64
    }
}

impl Drop for SmallTmpfs {
    fn drop(&mut self) {
        let _gone = nix::mount::umount2(self.0.path(), nix::mount::MntFlags::MNT_DETACH);
    }
}

/// It was said to be removed.
#[test]
fn a_full_file_system_is_an_error_of_its_own_and_no_signal() {
    use carlsbad_kit::capability::Capability;
    carlsbad_kit::require!(Capability::Root, Capability::TmpfsMount);
    let small = SmallTmpfs::of(7);
    let pool = small.make(16);
    let a = pool.create("a", ByteSize::mib(4), PLAIN).unwrap();
    let mut last = Ok(());
    let mut written = 0;
    while last.is_ok() {
        last = a.write(written, &[1]);
        written += 4096;
    }
    assert!(
        matches!(last, Err(Error::NoSpace { offset, .. }) if offset == a.handle().offset + written - 4096),
        "{last:?}"
    );
    // What was written is there, for a reader as well; a hole is no page that was removed.
    let reader = Pool::open(FileHdm::open_read_only(small.pool()).unwrap(), Role::Reader).unwrap();
    let seen = reader.attach("a").unwrap();
    let mut byte = [0];
    seen.read(written - 8192, &mut byte).unwrap();
    assert_eq!(byte, [1]);
    let refused = seen.read(written, &mut byte);
    assert!(matches!(refused, Err(Error::NoSpace { .. })), "{refused:?}");
    // The log has its room: what is full can be emptied, and its memory is the file system's again.
    drop((a, seen));
    pool.remove("a").unwrap();
    let a = pool.create("a", MIB2, PLAIN).unwrap();
    fill(&a, 7);
    assert_eq!(sum(&a), 7);
    // The control: what is cut is removed, full or not.
    std::fs::write(small.0.path().join("rest"), vec![1; 8 << 20]).unwrap_err();
    let file = OpenOptions::new().write(true).open(small.pool()).unwrap();
    file.set_len(a.handle().offset).unwrap();
    let cut = a.read(0, &mut byte);
    assert!(matches!(cut, Err(Error::Removed { .. })), "{cut:?}");
}

#[test]
fn a_pool_for_which_there_is_no_room_is_not_made() {
    use carlsbad_kit::capability::Capability;
    carlsbad_kit::require!(Capability::Root, Capability::TmpfsMount);
    let small = SmallTmpfs::of(3);
    let file = FileHdm::create(small.pool(), ByteSize::mib(16)).unwrap();
    let refused = Pool::format(file, FormatOptions::default());
    assert!(matches!(refused, Err(Error::NoSpace { .. })), "{refused:?}");
    let none = Pool::open(FileHdm::open(small.pool()).unwrap(), Role::Reader);
    assert!(matches!(none, Err(Error::NotAPool { .. })), "{none:?}");
}

/// A line is touched when it is flushed: the process died of it.
#[test]
fn a_flush_of_what_cannot_be_touched_is_an_error_and_no_signal() {
    use carlsbad_kit::capability::Capability;
    use directcxl::backend::Coherence;
    carlsbad_kit::require!(Capability::Root, Capability::TmpfsMount);
    let small = SmallTmpfs::of(6);
    let file = FileHdm::create(small.pool(), ByteSize::mib(16)).unwrap();
    let file = file.coherence(Coherence::Software);
    let pool = Pool::format(file, FormatOptions::default()).unwrap();
    let a = pool.create("a", ByteSize::mib(8), PLAIN).unwrap();
    let all = 0..a.length().get();
    for refused in [a.publish(all.clone()), a.acquire(all.clone())] {
        assert!(matches!(refused, Err(Error::NoSpace { .. })), "{refused:?}");
    }
    let file = OpenOptions::new().write(true).open(small.pool()).unwrap();
    file.set_len(a.handle().offset).unwrap();
    for refused in [a.publish(0..8), a.acquire(0..8), a.publish(all)] {
        assert!(matches!(refused, Err(Error::Removed { .. })), "{refused:?}");
    }
}

/// A pipe without a writer had whoever opened it for reading wait for one.
#[test]
fn a_pipe_is_refused_and_not_waited_for() {
    let dir = carlsbad_kit::scratch::on_tmpfs().unwrap();
    let path = dir.path().join("pipe");
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
    for refused in [FileHdm::open_read_only(&path), FileHdm::open(&path)] {
        assert!(
            matches!(refused, Err(Error::BadGeometry { .. })),
            "{refused:?}"
        );
    }
    let device = std::fs::File::open("/dev/zero").unwrap();
    let refused = MemfdHdm::from_fd(device.into());
    assert!(
        matches!(refused, Err(Error::BadGeometry { .. })),
        "{refused:?}"
    );
}

/// `MAP_POPULATE` does not say that it failed: the first touch of the mapping was a signal. And what
/// could not be populated was there nevertheless, and kept what it had taken.
#[test]
fn what_cannot_be_populated_is_not_made() {
    use carlsbad_kit::capability::Capability;
    carlsbad_kit::require!(Capability::Root, Capability::TmpfsMount);
    let small = SmallTmpfs::of(7);
    let options = NamespaceOptions {
        populate: true,
        ..NamespaceOptions::default()
    };
    let pool = small.make(16);
    let (before, used) = (pool.info().unwrap(), small.used());
    for _ in 0..50 {
        let refused = pool.create("large", ByteSize::mib(8), options);
        assert!(matches!(refused, Err(Error::NoSpace { .. })), "{refused:?}");
    }
    assert!(pool.list().unwrap().is_empty());
    assert_eq!(pool.info().unwrap(), before);
    assert_eq!(small.used(), used);
    // What there is room for is had at once.
    let large = pool.create("large", MIB2, options).unwrap();
    assert_eq!(small.used(), used + MIB2.get());
    fill(&large, 3);
    drop(large);
    // What was there before stays, when it cannot be populated.
    drop(pool.create("sparse", ByteSize::mib(8), PLAIN).unwrap());
    let refused = pool.attach_populated("sparse");
    assert!(matches!(refused, Err(Error::NoSpace { .. })), "{refused:?}");
    assert_eq!(pool.list().unwrap().len(), 2);
    assert!(pool.check().is_ok());
}

#[test]
fn a_heap_refuses_what_it_did_not_give() {
    let (pool, _) = pool_of(4, 1);
    let namespace = pool.create("heap", MIB2, PLAIN).unwrap();
    for smallest in [0, 1, 32, 96, 1 << 21] {
        let options = HeapOptions {
            smallest: ByteSize::new(smallest),
        };
        assert!(Heap::format(&namespace, options).is_err());
    }
    let heap = Heap::format(&namespace, HeapOptions::default()).unwrap();
    let place = heap.allocate(ByteSize::new(1000)).unwrap();
    assert_eq!(heap.length_of(place).unwrap(), ByteSize::new(1024));
    for bad in [0, 1, place.0 + 1, place.0 + 64, MIB2.get(), u64::MAX] {
        assert!(
            matches!(heap.free(Place(bad)), Err(Error::NotAllocated { .. })),
            "{bad}"
        );
        let into = heap.allocate_into(ByteSize::new(8), Place(bad));
        // Inside the block is a program's own place.
        assert_eq!(into.is_ok(), bad == place.0 + 64, "{bad}");
    }
    assert!(matches!(
        heap.allocate(ByteSize::ZERO),
        Err(Error::ZeroLength { .. })
    ));
    assert!(matches!(
        heap.allocate(ByteSize::MAX),
        Err(Error::NoRoom { .. })
    ));
    assert!(matches!(heap.allocate(MIB2), Err(Error::NoRoom { .. })));
    assert!(heap.root(64).is_err());
    heap.free(place).unwrap();
    assert!(matches!(heap.free(place), Err(Error::NotAllocated { .. })));
}

#[test]
fn too_few_huge_pages_are_an_error_that_says_how_many() {
    use carlsbad_kit::capability::Capability;
    carlsbad_kit::require!(Capability::HugeTlb);
    let huge = carlsbad_kit::scratch::on_hugetlbfs(8 << 20).unwrap();
    let file = FileHdm::create(huge.path().join("pool"), ByteSize::mib(64)).unwrap();
    let pool = Pool::format(file, FormatOptions::default()).unwrap();
    let kept = NamespaceOptions {
        contents: directcxl::Contents::Kept,
        populate: true,
    };
    let refused = pool.create("large", ByteSize::mib(32), kept);
    assert!(
        matches!(refused, Err(Error::NoHugePages { pages: 16, .. })),
        "{refused:?}"
    );
    // It is not there either: its name and its place are free.
    assert!(pool.list().unwrap().is_empty());
    let refused = pool.create("large", ByteSize::mib(32), PLAIN);
    assert!(
        matches!(refused, Err(Error::NoHugePages { .. })),
        "{refused:?}"
    );
    assert!(pool.list().unwrap().is_empty());
    // What is there is used, and zeroed by hand: its pages are not given back.
    let small = pool.create("small", MIB2, PLAIN).unwrap();
    fill(&small, 3);
    assert_eq!(sum(&small), 3);
    drop(small);
    pool.remove("small").unwrap();
    assert_eq!(sum(&pool.create("small", MIB2, PLAIN).unwrap()), 0);
}

/// Leases and locks are the kernel's: neither a process id nor the clock is written down, so that an
/// id that is used again and a clock that jumps mean nothing. What would be written is looked for.
#[test]
fn neither_process_ids_nor_times_are_on_the_medium() {
    let made = |seed: u64| {
        let (pool, again) = pool_of(8, 2);
        let a = pool.create("a", MIB2, PLAIN).unwrap();
        let reader = Pool::open(again(1), Role::Reader).unwrap();
        let b = reader.attach("a").unwrap();
        let bytes = {
            use std::os::fd::AsFd;
            let file: std::fs::File = pool_fd(&a).as_fd().try_clone_to_owned().unwrap().into();
            let mut bytes = vec![0; 6 << 20];
            file.read_exact_at(&mut bytes, 0).unwrap();
            bytes
        };
        drop((a, b, reader, seed));
        bytes
    };
    let first = made(1);
    std::thread::sleep(std::time::Duration::from_millis(20));
    let second = made(2);
    let pid = u64::from(std::process::id()).to_le_bytes();
    for bytes in [&first, &second] {
        // Behind the superblock, whose numbers could be one by accident.
        let areas = bytes[2 << 20..].chunks_exact(8);
        let ids = areas.filter(|word| **word == pid);
        assert_eq!(ids.count(), 0);
    }
    // Leases do not differ between runs, but for what the pool's incarnation does to their crc.
    let slots = (2 << 20) + 8256..(2 << 20) + 8256 + 64;
    assert_eq!(first[slots.clone()], second[slots]);
}

fn pool_fd(namespace: &directcxl::Namespace) -> std::os::fd::BorrowedFd<'_> {
    namespace.mapping().0
}
