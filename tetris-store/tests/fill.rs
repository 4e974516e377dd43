//! The fill protocol: one fill, nothing torn, nobody waits for the dead; and full memory.
#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

mod common;

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use carlsbad_kit::capability::Capability;
use carlsbad_kit::child::{self, Child, Role};
use carlsbad_kit::require;
use carlsbad_types::{ByteSize, DType};
use common::{MemoryModel, random_bytes, scratch, store};
use nix::sys::resource::{Resource, setrlimit};
use serde::{Deserialize, Serialize};
use tetris_store::{
    Error, ModelSource, Result, Sidecar, SourceFormat, SourceTensor, Store, StoreConfig,
};

const LOADERS: usize = 16;
const LEN: usize = 24 << 20;

fn one_tensor() -> MemoryModel {
    MemoryModel::default().with_random("weights", LEN, 1)
}

/// Starts `LOADERS` roles, lets them go at once, and gives what each tells in the end.
fn race(role: &str, arguments: &impl Serialize) -> Vec<String> {
    let start = |_| Role::test(role).start(arguments).unwrap();
    let mut loaders: Vec<Child> = (0..LOADERS).map(start).collect();
    for loader in &loaders {
        loader.hear("ready").unwrap();
    }
    for loader in &mut loaders {
        loader.say("go").unwrap();
    }
    let tell = |loader: &Child| loader.hear("done").unwrap();
    loaders.iter().map(tell).collect()
}

#[test]
#[ignore = "a role of the test below"]
fn role_loader() {
    let Some(root) = child::arguments::<PathBuf>("role_loader") else {
        return;
    };
    let store = Store::open(StoreConfig::at(root)).unwrap();
    let model = one_tensor();
    child::tell("ready");
    child::wait_for_parent();
    let ingested = store.ingest(&model).unwrap();
    model.check(&store, &ingested.model);
    child::tell(format!("done {}", ingested.written.get()));
}

#[test]
fn sixteen_loaders_on_one_tensor_fill_it_once_and_none_reads_it_torn() {
    let (_dir, store) = store();
    let written: Vec<u64> = race("role_loader", &store.root())
        .iter()
        .map(|bytes| bytes.parse().unwrap())
        .collect();
    assert_eq!(written.iter().sum::<u64>(), LEN as u64, "{written:?}");
    let stats = store.stats().unwrap();
    assert_eq!((stats.models, stats.objects), (1, 1));
    assert_eq!(fs::read_dir(store.root().join("tmp")).unwrap().count(), 0);
}

/// The protocol of the paper: a name from a 32-bit CRC, created with `O_EXCL` and filled in place;
/// who finds it there uses it.
#[test]
#[ignore = "a role of the test below"]
fn role_loader_of_the_paper() {
    let Some(dir) = child::arguments::<PathBuf>("role_loader_of_the_paper") else {
        return;
    };
    let bytes = random_bytes(LEN, 1);
    let path = dir.join(format!("{:08x}", crc32(&bytes)));
    child::tell("ready");
    child::wait_for_parent();
    let created = OpenOptions::new().write(true).create_new(true).open(&path);
    let torn = match created {
        Ok(mut file) => {
            file.write_all(&bytes).unwrap();
            false
        }
        Err(_) => fs::read(&path).unwrap() != bytes,
    };
    child::tell(format!("done {torn}"));
}

#[test]
fn control_the_protocol_of_the_paper_tears() {
    // Once is enough, and many tries make it certain.
    for _ in 0..20 {
        let dir = scratch();
        let torn = race("role_loader_of_the_paper", &dir.path());
        if torn.iter().any(|torn| torn == "true") {
            return;
        }
    }
    panic!("no torn read in 20 races of {LOADERS} loaders: the test above proves nothing");
}

/// CRC-32 of ISO 3309, as zlib has it.
fn crc32(bytes: &[u8]) -> u32 {
    let step = |crc: u32, byte: &u8| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
            (crc >> 1) ^ (0xedb8_8320 * (crc & 1))
        })
    };
    !bytes.iter().fold(!0, step)
}

/// A source that says when half of it has been read, and then goes no further.
#[derive(Debug)]
struct Stuck {
    inner: MemoryModel,
    reads: AtomicUsize,
}

impl ModelSource for Stuck {
    fn format(&self) -> SourceFormat {
        self.inner.format()
    }
    fn tensors(&self) -> &[SourceTensor] {
        self.inner.tensors()
    }
    fn read_at(&self, index: usize, offset: u64, into: &mut [u8]) -> Result<()> {
        if self.reads.fetch_add(1, Ordering::Relaxed) > 16 {
            child::tell("half");
            std::thread::sleep(Duration::from_secs(600));
        }
        self.inner.read_at(index, offset, into)
    }
    fn sidecars(&self) -> Result<Vec<Sidecar>> {
        self.inner.sidecars()
    }
}

#[test]
#[ignore = "a role of the tests below"]
fn role_stuck_filler() {
    let Some(root) = child::arguments::<PathBuf>("role_stuck_filler") else {
        return;
    };
    let store = Store::open(StoreConfig::at(root)).unwrap();
    let source = Stuck {
        inner: one_tensor(),
        reads: AtomicUsize::new(0),
    };
    store.ingest(&source).unwrap();
}

#[test]
fn a_waiting_loader_takes_over_from_a_filler_that_died() {
    let (_dir, store) = store();
    let mut filler = Role::test("role_stuck_filler")
        .start(&store.root())
        .unwrap();
    filler.hear("half").unwrap();
    let model = one_tensor();
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| store.ingest(&model).unwrap());
        std::thread::sleep(Duration::from_millis(300));
        assert!(!waiting.is_finished(), "it must wait for the filler");
        filler.kill();
        let killed = Instant::now();
        let ingested = waiting.join().unwrap();
        assert!(killed.elapsed() < Duration::from_secs(5));
        assert_eq!(ingested.written.get(), LEN as u64);
        model.check(&store, &ingested.model);
    });
    assert_eq!(fs::read_dir(store.root().join("tmp")).unwrap().count(), 0);
}

#[test]
fn a_filler_that_hangs_is_waited_for_no_longer_than_the_deadline() {
    let (_dir, store) = store();
    let filler = Role::test("role_stuck_filler")
        .start(&store.root())
        .unwrap();
    filler.hear("half").unwrap();
    let mut config = store.config().clone();
    config.patience = Duration::from_millis(200);
    let impatient = Store::open(config).unwrap();
    let model = one_tensor();
    let start = Instant::now();
    let ingested = impatient.ingest(&model).unwrap();
    assert!(start.elapsed() >= Duration::from_millis(200));
    assert!(start.elapsed() < Duration::from_secs(10));
    model.check(&store, &ingested.model);
}

/// A file that somebody writes to while it is read: every read finds other bytes.
#[derive(Debug)]
struct Rewritten {
    inner: MemoryModel,
    reads: AtomicUsize,
}

impl ModelSource for Rewritten {
    fn format(&self) -> SourceFormat {
        self.inner.format()
    }
    fn tensors(&self) -> &[SourceTensor] {
        self.inner.tensors()
    }
    fn read_at(&self, index: usize, offset: u64, into: &mut [u8]) -> Result<()> {
        self.inner.read_at(index, offset, into)?;
        let read = self.reads.fetch_add(1, Ordering::Relaxed);
        into.iter_mut()
            .step_by(977)
            .for_each(|byte| *byte ^= read as u8);
        Ok(())
    }
    fn sidecars(&self) -> Result<Vec<Sidecar>> {
        Ok(vec![])
    }
}

#[test]
fn a_source_rewritten_during_ingest_is_stored_as_what_was_read() {
    let (_dir, store) = store();
    let inner = MemoryModel::default()
        .with_random("a", 3 << 20, 1)
        .with_random("b", 3 << 20, 1)
        .with_random("c", 70_000, 2)
        .with_random("d", 100, 3);
    // The same tensor again, so that the path that only hashes and then finds nothing is taken.
    store.ingest(&inner).unwrap();
    for reads in 0..20 {
        let source = Rewritten {
            inner: inner.clone(),
            reads: AtomicUsize::new(reads),
        };
        let model = store.ingest(&source).unwrap().model;
        store.attach(&model).unwrap().tensors().for_each(|tensor| {
            let tensor = tensor.unwrap();
            let entry = tensor.entry;
            let domain = &store.config().domain;
            let id = tetris_store::TensorId::of(domain, entry.element, &entry.shape, tensor.bytes);
            assert_eq!(id, entry.id);
        });
    }
    assert_eq!(store.verify().unwrap().damaged, []);
}

/// A file that is cut short while it is read.
#[test]
fn a_source_cut_short_during_ingest_is_an_error_and_leaves_nothing() {
    let (dir, store) = store();
    let path = dir.path().join("model.safetensors");
    let header = br#"{"w":{"dtype":"U8","shape":[4194304],"data_offsets":[0,4194304]}}"#;
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header);
    file.extend(random_bytes(4 << 20, 1));
    fs::write(&path, &file).unwrap();
    let source = tetris_store::open_model(&path).unwrap();
    File::options()
        .write(true)
        .open(&path)
        .unwrap()
        .set_len(3 << 20)
        .unwrap();
    assert!(store.ingest(source.as_ref()).is_err());
    nothing_is_left(&store);
}

fn nothing_is_left(store: &Store) {
    let stats = store.stats().unwrap();
    assert_eq!((stats.models, stats.objects), (0, 0));
    assert_eq!(fs::read_dir(store.root().join("tmp")).unwrap().count(), 0);
}

/// A tmpfs that goes away with the value.
struct Mounted(PathBuf);

impl Mounted {
    fn new(at: &Path, options: &str) -> Self {
        fs::create_dir_all(at).unwrap();
        let mount = std::process::Command::new("mount")
            .args(["-t", "tmpfs", "-o", options, "tmpfs"])
            .arg(at)
            .status();
        assert!(mount.unwrap().success());
        Self(at.to_owned())
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg(&self.0).status();
    }
}

#[test]
fn enospc_in_mid_fill_is_an_error_and_leaves_nothing() {
    require!(Capability::TmpfsMount);
    let dir = scratch();
    let mounted = Mounted::new(&dir.path().join("small"), "size=8m");
    {
        let store = Store::open(StoreConfig::at(mounted.0.join("store"))).unwrap();
        let free = || {
            nix::sys::statvfs::statvfs(&mounted.0)
                .unwrap()
                .blocks_free()
        };
        // What a store needs for its directories is there from the first ingest on.
        let fits = MemoryModel::default().with_random("x", 100, 1);
        store.ingest(&fits).unwrap();
        let before = free();
        for (large, small) in [(6 << 20, 3 << 20), (3 << 20, 6 << 20)] {
            let mut model = MemoryModel::default()
                .with_random("a", large, 1)
                .with_random("b", 6 << 20, 2);
            for i in 0..small >> 15 {
                model = model.with_random(&format!("small {i}"), 1 << 15, i + 10);
            }
            let full = store.ingest(&model);
            assert!(matches!(full, Err(Error::NoSpace { .. })), "{full:?}");
            let left = before - free();
            assert!(left <= 64, "{left} blocks are left behind");
            assert_eq!(store.stats().unwrap().objects, 1);
        }
        fits.check(&store, &store.ingest(&fits).unwrap().model);
    }
}

#[test]
#[ignore = "a role of the tests below"]
fn role_under_limits() {
    let Some((root, limit)) = child::arguments::<(PathBuf, Limit)>("role_under_limits") else {
        return;
    };
    let store = Store::open(StoreConfig::at(root)).unwrap();
    let model = MemoryModel::default()
        .with_random("a", 8 << 20, 1)
        .with_random("b", 8 << 20, 2)
        .with_random("c", 1000, 3);
    if let Limit::FileSize = limit {
        setrlimit(Resource::RLIMIT_FSIZE, 1 << 20, 1 << 20).unwrap();
        let refused = store.ingest(&model);
        assert!(matches!(refused, Err(Error::NoSpace { .. })), "{refused:?}");
        nothing_is_left(&store);
        // Files within the limit, reservations beyond it: ten of them are under way at once.
        let quota = StoreConfig {
            quota: Some(ByteSize::mib(100)),
            threads: 10,
            ..store.config().clone()
        };
        let many = (0..40).fold(MemoryModel::default(), |model, seed| {
            model.with_random(&format!("t{seed}"), 900_000, seed)
        });
        let store = Store::open(quota).unwrap();
        many.check(&store, &store.ingest(&many).unwrap().model);
        child::tell("held");
        return;
    }
    let id = store.ingest(&model).unwrap().model;
    match limit {
        Limit::FileSize => unreachable!(),
        Limit::Descriptors => {
            // All but one: an attach needs one for the lease and one for a moment.
            let (_, hard) = nix::sys::resource::getrlimit(Resource::RLIMIT_NOFILE).unwrap();
            setrlimit(Resource::RLIMIT_NOFILE, 64, hard).unwrap();
            let mut taken = Vec::new();
            while let Ok(file) = File::open("/dev/null") {
                taken.push(file);
            }
            assert!(matches!(store.attach(&id), Err(Error::Io { .. })));
            assert!(matches!(store.ingest(&model), Err(Error::Io { .. })));
            taken.pop();
            let leased = store.attach(&id).unwrap();
            assert!(matches!(leased.tensor("a"), Err(Error::Io { .. })));
            taken.pop();
            assert!(leased.tensor("a").unwrap().bytes == model.bytes_of("a"));
            drop(taken);
        }
        Limit::AddressSpace => {
            let pages = fs::read_to_string("/proc/self/statm").unwrap();
            let used: u64 = pages.split(' ').next().unwrap().parse().unwrap();
            let (_, hard) = nix::sys::resource::getrlimit(Resource::RLIMIT_AS).unwrap();
            let shared = store.attach(&id).unwrap();
            setrlimit(Resource::RLIMIT_AS, used * 4096 + (4 << 20), hard).unwrap();
            let refused = shared.tensor("a");
            assert!(matches!(refused, Err(Error::Io { .. })), "{refused:?}");
            setrlimit(Resource::RLIMIT_AS, hard, hard).unwrap();
            assert!(shared.tensor("a").unwrap().bytes == model.bytes_of("a"));
        }
    }
    model.check(&store, &id);
    child::tell("held");
}

#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
enum Limit {
    FileSize,
    Descriptors,
    AddressSpace,
}

fn under(limit: Limit) {
    let (_dir, store) = store();
    let role = Role::test("role_under_limits")
        .start(&(store.root(), limit))
        .unwrap();
    role.hear("held").unwrap();
}

#[test]
fn a_file_size_limit_is_an_error_and_not_a_signal() {
    under(Limit::FileSize);
}

#[test]
fn running_out_of_descriptors_is_an_error_and_passes() {
    under(Limit::Descriptors);
}

#[test]
fn running_out_of_mappings_is_an_error_and_passes() {
    under(Limit::AddressSpace);
}

#[test]
fn wide_and_narrow_tensors_stay_aligned_in_a_pack() {
    let (_dir, store) = store();
    let mut model = MemoryModel::default();
    for i in 0..200usize {
        let dtype = DType::ALL[i % DType::ALL.len()];
        let bytes = random_bytes(dtype.size() * (i % 7), i as u64);
        model = model.with(&format!("t{i}"), dtype, &[i % 7], bytes);
    }
    let id = store.ingest(&model).unwrap().model;
    model.check(&store, &id);
    assert_eq!(store.verify().unwrap().damaged, []);
}
