//! candle tensors on the store's pages, in a program whose global allocator is `MapAlloc`.
#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

mod common;

use std::collections::HashMap;
use std::fs;
use std::sync::Arc;
use std::time::{Duration, Instant};

use candle_core::{DType, Device, Module, Tensor};
use candle_nn::Linear;
use carlsbad_kit::child::{self, Role};
use carlsbad_kit::leak::LeakGuard;
use carlsbad_kit::memory::MemoryUse;
use carlsbad_types::DType as Stored;
use common::{MemoryModel, random_bytes, scratch, store};
use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous, munmap};
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, fork};
use proptest::prelude::*;
use tetris_store::candle::{CopyReason, MapAlloc, MappedLinear, SharedTensors};
use tetris_store::{Error, ModelId, Store, StoreConfig};

#[global_allocator]
static ALLOCATOR: MapAlloc = MapAlloc::system();

/// Random numbers around 1, which no arithmetic turns into something that is not a number.
fn weights(elements: usize, seed: u64) -> Vec<u8> {
    (random_bytes(2 * elements, seed).chunks_exact(2))
        .flat_map(|bits| {
            (f32::from(u16::from_le_bytes([bits[0], bits[1]])) / 65536.0).to_le_bytes()
        })
        .collect()
}

fn model(seed: u64) -> MemoryModel {
    MemoryModel::default()
        .with(
            "wide.weight",
            Stored::F32,
            &[100, 500],
            weights(50_000, seed),
        )
        .with("wide.bias", Stored::F32, &[100], weights(100, seed + 1))
        .with(
            "deep.weight",
            Stored::F32,
            &[30, 40],
            weights(1200, seed + 2),
        )
        .with("ids", Stored::I64, &[7], random_bytes(56, seed + 3))
}

fn bits(tensor: &Tensor) -> Vec<u8> {
    let mut bytes = Vec::new();
    tensor.write_bytes(&mut bytes).unwrap();
    bytes
}

fn shared(store: &Store, model: &ModelId) -> SharedTensors {
    SharedTensors::of(&store.attach(model).unwrap()).unwrap()
}

/// Whether the model is leased or not, as `expected`. What another test starts meanwhile has this
/// process' descriptors until it executes its program, so a lease may take a moment to end.
fn lease_is(expected: bool, store: &Store, model: &ModelId) -> bool {
    let path = store.root().join("models").join(model.to_string());
    let start = Instant::now();
    loop {
        let leased = fs::File::open(&path).unwrap().try_lock().is_err();
        if leased == expected {
            return true;
        }
        if start.elapsed() > Duration::from_secs(1) {
            return false;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_model_is_shared_until_its_last_tensor_goes() {
    let (dir, store) = store();
    let source = model(1);
    let id = store.ingest(&source).unwrap().model;
    let leaks = LeakGuard::beneath(dir.path());
    let tensors = shared(&store, &id);
    let report = tensors.report();
    assert_eq!(
        (report.mapped, &report.copied[..]),
        (4, &[][..]),
        "{report}"
    );
    tensors.prefault().unwrap();
    for name in ["wide.weight", "wide.bias", "deep.weight", "ids"] {
        let tensor = tensors.get(name).unwrap();
        assert!(bits(&tensor) == source.bytes_of(name), "{name}");
    }
    let kept = tensors.get("wide.bias").unwrap();
    drop(tensors);
    assert!(lease_is(true, &store, &id));
    std::thread::spawn(move || drop(kept)).join().unwrap();
    assert!(lease_is(false, &store, &id));
    leaks.check();
}

#[test]
fn pages_are_shared_and_a_change_is_private() {
    let (_dir, store) = store();
    let source = model(2);
    let id = store.ingest(&source).unwrap().model;
    let (one, other) = (shared(&store, &id), shared(&store, &id));
    one.prefault().unwrap();
    other.prefault().unwrap();
    let root = store.root().to_str().unwrap().to_owned();
    let private = || {
        let of_store = |name: &str| name.starts_with(&root);
        MemoryUse::of_mappings(std::process::id(), of_store)
            .unwrap()
            .anonymous
            .get()
    };
    assert_eq!(private(), 0);
    let changed = one.get("wide.weight").unwrap();
    changed.zero_set().unwrap();
    assert!(private() >= 200_000);
    assert!(bits(&changed).iter().all(|&byte| byte == 0));
    assert!(bits(&other.get("wide.weight").unwrap()) == source.bytes_of("wide.weight"));
    source.check(&store, &id);
    drop((one, changed));
    assert_eq!(private(), 0);
}

#[test]
fn a_mapped_linear_layer_gives_candles_own_bits() {
    let (_dir, store) = store();
    let source = model(3);
    let id = store.ingest(&source).unwrap().model;
    let attached = Arc::new(store.attach(&id).unwrap());
    for (path, rows, columns, biased) in [("wide", 100, 500, true), ("deep", 30, 40, false)] {
        let tensor = |name: String, dims: &[usize]| {
            let bytes = source.bytes_of(&name);
            Tensor::from_raw_buffer(bytes, DType::F32, dims, &Device::Cpu).unwrap()
        };
        let weight = tensor(format!("{path}.weight"), &[rows, columns]);
        let bias = biased.then(|| tensor(format!("{path}.bias"), &[rows]));
        let theirs = Linear::new(weight, bias);
        let ours = MappedLinear::load(&attached, path).unwrap();
        assert_eq!((ours.out_features(), ours.in_features()), (rows, columns));
        let input = |dims: &[usize]| {
            let elements = dims.iter().product();
            Tensor::from_raw_buffer(&weights(elements, 9), DType::F32, dims, &Device::Cpu).unwrap()
        };
        let inputs = [
            input(&[1, columns]),
            input(&[17, columns]),
            input(&[5, 3, columns]),
            input(&[2, 3, 4, columns]),
            input(&[columns, 17]).t().unwrap(),
            input(&[3, columns, 5]).transpose(1, 2).unwrap(),
            input(&[5, 3, columns]).transpose(0, 1).unwrap(),
            input(&[2, 9, columns]).narrow(1, 2, 4).unwrap(),
            input(&[2, 3, columns, 4]).transpose(2, 3).unwrap(),
            input(&[0, columns]),
        ];
        for x in inputs {
            let expected = theirs.forward(&x).unwrap();
            let got = ours.forward(&x).unwrap();
            assert_eq!(got.dims(), expected.dims());
            assert!(bits(&got) == bits(&expected), "{:?}", x.layout());
        }
        assert!(ours.forward(&input(&[2, columns + 1])).is_err());
    }
    assert!(MappedLinear::load(&attached, "none").is_err());
    assert!(MappedLinear::load(&attached, "ids").is_err());
}

#[test]
fn a_mapped_linear_layer_has_candles_types() {
    let (_dir, store) = store();
    let full = Tensor::from_raw_buffer(&weights(64 * 48, 5), DType::F32, &[64, 48], &Device::Cpu);
    let x =
        Tensor::from_raw_buffer(&weights(6 * 48, 6), DType::F32, &[6, 48], &Device::Cpu).unwrap();
    for (stored, dtype) in [
        (Stored::F16, DType::F16),
        (Stored::BF16, DType::BF16),
        (Stored::F64, DType::F64),
    ] {
        let weight = full.as_ref().unwrap().to_dtype(dtype).unwrap();
        let source = MemoryModel::default().with("l.weight", stored, &[64, 48], bits(&weight));
        let id = store.ingest(&source).unwrap().model;
        let ours = MappedLinear::load(&Arc::new(store.attach(&id).unwrap()), "l").unwrap();
        let x = x.to_dtype(dtype).unwrap();
        let expected = Linear::new(weight, None).forward(&x).unwrap();
        assert!(
            bits(&ours.forward(&x).unwrap()) == bits(&expected),
            "{stored}"
        );
        let other = x.to_dtype(DType::U8).unwrap();
        assert!(ours.forward(&other).is_err());
    }
}

#[test]
fn threads_attach_use_and_drop_side_by_side() {
    let (dir, store) = store();
    let models: Vec<_> = (0..4)
        .map(|seed| {
            let source = model(100 * seed);
            let id = store.ingest(&source).unwrap().model;
            (source, id)
        })
        .collect();
    let leaks = LeakGuard::beneath(dir.path());
    std::thread::scope(|scope| {
        let (sender, receiver) = std::sync::mpsc::channel::<Tensor>();
        for worker in 0..6usize {
            let (models, store, sender) = (&models, &store, sender.clone());
            scope.spawn(move || {
                for round in 0..50 {
                    let (source, id) = &models[(worker + round) % models.len()];
                    let tensors = shared(store, id);
                    assert_eq!(tensors.report().copied, []);
                    let tensor = tensors.get("wide.weight").unwrap();
                    assert!(bits(&tensor) == source.bytes_of("wide.weight"));
                    // Half of them are dropped by another thread, at some later time.
                    if round % 2 == 0 {
                        sender.send(tensor).unwrap();
                    }
                }
            });
        }
        drop(sender);
        scope.spawn(move || receiver.into_iter().for_each(drop));
    });
    leaks.check();
}

#[derive(Debug, Clone)]
enum Step {
    Attach(usize),
    Get(usize, usize),
    Change(usize, u8),
    Drop(usize),
    Detach(usize),
    Grow(usize),
    Shrink(usize),
}

fn step() -> impl Strategy<Value = Step> {
    let n = 0..1000usize;
    prop_oneof![
        2 => n.clone().prop_map(Step::Attach),
        4 => (n.clone(), n.clone()).prop_map(|(a, b)| Step::Get(a, b)),
        2 => (n.clone(), any::<u8>()).prop_map(|(a, b)| Step::Change(a, b)),
        3 => n.clone().prop_map(Step::Drop),
        2 => n.clone().prop_map(Step::Detach),
        2 => n.clone().prop_map(Step::Grow),
        1 => n.prop_map(Step::Shrink),
    ]
}

/// What should be in a live tensor: of which attach and name, with which bytes.
struct Live {
    attach: usize,
    name: &'static str,
    tensor: Tensor,
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(
        if std::env::var_os("CARLSBAD_SOAK").is_some() { 2000 } else { 48 }
    ))]

    /// Against a model in plain memory: which attaches live, and what each tensor holds.
    #[test]
    fn storms_of_attaches_changes_and_ordinary_allocations(
        steps in prop::collection::vec(step(), 1..120)
    ) {
        const NAMES: [&str; 3] = ["wide.weight", "deep.weight", "ids"];
        let (dir, store) = store();
        let sources = [model(10), model(20)];
        let ids = sources.each_ref().map(|source| store.ingest(source).unwrap().model);
        let leaks = LeakGuard::beneath(dir.path());
        let mut handles: Vec<(usize, usize, SharedTensors)> = Vec::new();
        let mut of_attach: Vec<usize> = Vec::new();
        // Bytes by attach and name, where they are not the stored ones.
        let mut changed: HashMap<(usize, &str), Vec<u8>> = HashMap::new();
        let mut live: Vec<Live> = Vec::new();
        let mut ordinary: Vec<(Vec<u8>, u8)> = Vec::new();
        for step in steps {
            match step {
                Step::Attach(n) => {
                    let which = n % ids.len();
                    let tensors = shared(&store, &ids[which]);
                    prop_assert_eq!(tensors.report().copied, []);
                    handles.push((of_attach.len(), which, tensors));
                    of_attach.push(which);
                }
                Step::Get(n, m) if !handles.is_empty() => {
                    let (attach, _, tensors) = &handles[n % handles.len()];
                    let name = NAMES[m % NAMES.len()];
                    let tensor = tensors.get(name).unwrap();
                    live.push(Live { attach: *attach, name, tensor });
                }
                Step::Change(n, to) if !live.is_empty() => {
                    let Live { attach, name, tensor } = &live[n % live.len()];
                    let patch = Tensor::full(f32::from(to), (1, 1), &Device::Cpu).unwrap();
                    if tensor.rank() == 2 {
                        let patch = patch.broadcast_as((1, tensor.dims()[1])).unwrap();
                        tensor.slice_set(&patch.contiguous().unwrap(), 0, n % tensor.dims()[0]).unwrap();
                        let bytes = changed.entry((*attach, name)).or_insert_with(|| {
                            sources[of_attach[*attach]].bytes_of(name).to_vec()
                        });
                        let row = 4 * tensor.dims()[1];
                        let start = row * (n % tensor.dims()[0]);
                        for element in bytes[start..start + row].chunks_exact_mut(4) {
                            element.copy_from_slice(&f32::from(to).to_le_bytes());
                        }
                    }
                }
                Step::Drop(n) if !live.is_empty() => drop(live.swap_remove(n % live.len())),
                Step::Detach(n) if !handles.is_empty() => {
                    drop(handles.swap_remove(n % handles.len()));
                }
                Step::Grow(n) => {
                    let fill = n as u8;
                    match ordinary.get_mut(n % 8) {
                        Some((block, fill)) => block.resize(block.len() + n * 37, *fill),
                        None => ordinary.push((vec![fill; n * 53], fill)),
                    }
                }
                Step::Shrink(n) if !ordinary.is_empty() => {
                    let at = n % ordinary.len();
                    let (block, _) = &mut ordinary[at];
                    block.truncate(n);
                    block.shrink_to_fit();
                }
                _ => {}
            }
            for Live { attach, name, tensor } in &live {
                let which = of_attach[*attach];
                let stored = || sources[which].bytes_of(name);
                let expected = changed.get(&(*attach, *name)).map_or_else(stored, Vec::as_slice);
                prop_assert!(bits(tensor) == expected);
            }
            for (block, fill) in &ordinary {
                prop_assert!(block.iter().all(|byte| byte == fill));
            }
            for (which, id) in ids.iter().enumerate() {
                let held = handles.iter().any(|(_, of, _)| *of == which)
                    || live.iter().any(|live| of_attach[live.attach] == which);
                prop_assert!(lease_is(held, &store, id));
            }
        }
        drop((handles, live));
        for (source, id) in sources.iter().zip(&ids) {
            prop_assert!(lease_is(false, &store, id));
            source.check(&store, id);
        }
        leaks.check();
    }
}

/// Attaches until there is no address space left, and again after some was given back.
fn attach_until_exhausted(store: &Store, id: &ModelId, source: &MemoryModel) -> usize {
    let mut held = Vec::new();
    let first_copy = loop {
        let tensors = shared(store, id);
        assert!(bits(&tensors.get("wide.weight").unwrap()) == source.bytes_of("wide.weight"));
        let report = tensors.report();
        if report.mapped == 0 {
            break report.copied[0].reason;
        }
        assert_eq!(report.copied, []);
        held.push(tensors);
        assert!(held.len() < 100_000, "there is always address space left");
    };
    assert_eq!(first_copy, CopyReason::NoVa);
    let count = held.len();
    held.truncate(count / 2);
    assert_eq!(
        shared(store, id).report().copied,
        [],
        "what was given back is taken again"
    );
    count
}

#[test]
#[ignore = "a role of `without_address_space_tensors_are_copies`"]
fn role_limited() {
    let Some((root, limit)) = child::arguments::<(String, u64)>("role_limited") else {
        return;
    };
    let store = Store::open(StoreConfig::at(root)).unwrap();
    let source = model(1);
    let id = store.ingest(&source).unwrap().model;
    setrlimit(Resource::RLIMIT_AS, limit << 20, limit << 20).unwrap();
    child::tell(attach_until_exhausted(&store, &id, &source));
}

#[test]
fn without_address_space_tensors_are_copies() {
    let dir = scratch();
    let root = dir.path().join("store");
    let leaks = LeakGuard::beneath(dir.path());
    let mut counts = Vec::new();
    for limit in [1500u64, 6000] {
        let mut limited = Role::test("role_limited").start(&(&root, limit)).unwrap();
        counts.push(limited.hear_any().unwrap().parse::<usize>().unwrap());
        assert!(limited.wait().unwrap().success());
    }
    // 64 MiB for each attach, and half of what is left can be too little for a window's half.
    assert!((2..=24).contains(&counts[0]), "{counts:?}");
    assert!((16..=94).contains(&counts[1]), "{counts:?}");
    leaks.check();
}

#[test]
#[ignore = "a role of `without_mappings_tensors_are_copies`"]
fn role_exhausted() {
    let Some(root) = child::arguments::<String>("role_exhausted") else {
        return;
    };
    let store = Store::open(StoreConfig::at(root)).unwrap();
    let source = model(1);
    let id = store.ingest(&source).unwrap().model;
    let page = std::num::NonZeroUsize::new(4096).unwrap();
    let mut access = ProtFlags::PROT_NONE;
    let mut taken = Vec::new();
    loop {
        // Neighbours with different rights are not merged into one mapping.
        access ^= ProtFlags::PROT_READ;
        // SAFETY: a new mapping at an address of the kernel's choice touches nothing.
        match unsafe { mmap_anonymous(None, page, access, MapFlags::MAP_PRIVATE) } {
            Ok(at) => taken.push(at),
            Err(_) => break,
        }
    }
    // Room for what the process itself needs meanwhile, and for a part of the model.
    for at in taken.drain(..).step_by(2).take(2) {
        // SAFETY: mapped above, and nothing points there.
        unsafe { munmap(at, 4096) }.unwrap();
    }
    let tensors = shared(&store, &id);
    assert!(bits(&tensors.get("wide.weight").unwrap()) == source.bytes_of("wide.weight"));
    let report = tensors.report();
    assert_eq!(
        report.copied.first().map(|copied| copied.reason),
        Some(CopyReason::NoVa)
    );
    child::tell(report);
}

#[test]
fn without_mappings_tensors_are_copies() {
    let limit = fs::read_to_string("/proc/sys/vm/max_map_count").unwrap();
    if limit.trim().parse::<u64>().unwrap() > 1 << 18 {
        println!("SKIPPED map exhaustion: sysctl vm.max_map_count=65530");
        return;
    }
    let dir = scratch();
    let mut role = Role::test("role_exhausted")
        .start(&dir.path().join("store"))
        .unwrap();
    let report = role.hear_any().unwrap();
    assert!(report.contains("vm.max_map_count"), "{report}");
    assert!(role.wait().unwrap().success());
}

#[test]
#[ignore = "a role of `without_descriptors_there_is_an_error_and_nothing_is_held`"]
fn role_without_descriptors() {
    let Some(root) = child::arguments::<String>("role_without_descriptors") else {
        return;
    };
    let store = Store::open(StoreConfig::at(root)).unwrap();
    let id = store.ingest(&model(1)).unwrap().model;
    let attached = store.attach(&id).unwrap();
    let leaks = LeakGuard::process();
    setrlimit(Resource::RLIMIT_NOFILE, 64, 64).unwrap();
    let mut spare: Vec<_> = std::iter::from_fn(|| fs::File::open("/dev/null").ok())
        .take(100_000)
        .collect();
    let error = SharedTensors::of(&attached).unwrap_err();
    assert!(matches!(error, Error::Io { .. }), "{error}");
    spare.clear();
    leaks.check();
    assert_eq!(SharedTensors::of(&attached).unwrap().report().copied, []);
    child::tell("done");
}

#[test]
fn without_descriptors_there_is_an_error_and_nothing_is_held() {
    let dir = scratch();
    let mut role = Role::test("role_without_descriptors")
        .start(&dir.path().join("store"))
        .unwrap();
    role.hear("done").unwrap();
    assert!(role.wait().unwrap().success());
}

#[test]
#[ignore = "a role of `a_forked_child_shares_and_lets_go_of_its_own`"]
fn role_forking() {
    let Some(root) = child::arguments::<String>("role_forking") else {
        return;
    };
    let store = Store::open(StoreConfig::at(root)).unwrap();
    let source = model(1);
    let id = store.ingest(&source).unwrap().model;
    let tensors = shared(&store, &id);
    let tensor = tensors.get("wide.weight").unwrap();
    // SAFETY: the child only uses what it inherited, allocates, and leaves by _exit.
    match unsafe { fork() }.unwrap() {
        ForkResult::Child => {
            let right = bits(&tensor) == source.bytes_of("wide.weight");
            tensor.zero_set().unwrap();
            let changed = bits(&tensor).iter().all(|&byte| byte == 0);
            drop((tensor, tensors));
            // Its parent's lease is its own as well, and dropping it here took it from nobody.
            let leased = lease_is(true, &store, &id);
            let again = shared(&store, &id);
            let mapped = again.report().copied.is_empty();
            let fresh = bits(&again.get("wide.weight").unwrap()) == source.bytes_of("wide.weight");
            let all = right && changed && leased && mapped && fresh;
            // SAFETY: ends the child without the test harness' exit handlers.
            unsafe { nix::libc::_exit(if all { 0 } else { 1 }) }
        }
        ForkResult::Parent { child } => {
            assert_eq!(waitpid(child, None).unwrap(), WaitStatus::Exited(child, 0));
        }
    }
    assert!(
        bits(&tensor) == source.bytes_of("wide.weight"),
        "the child's change was its own"
    );
    // A program that is executed meanwhile inherits neither memory nor lease.
    let mut other = std::process::Command::new("sleep")
        .arg("60")
        .spawn()
        .unwrap();
    drop((tensor, tensors));
    let free = lease_is(false, &store, &id);
    other.kill().unwrap();
    other.wait().unwrap();
    assert!(free);
    child::tell("done");
}

#[test]
fn a_forked_child_shares_and_lets_go_of_its_own() {
    let dir = scratch();
    let mut role = Role::test("role_forking")
        .start(&dir.path().join("store"))
        .unwrap();
    role.hear("done").unwrap();
    assert!(role.wait().unwrap().success());
}

#[test]
#[ignore = "a role of `a_killed_process_leaves_no_lease`"]
fn role_holding() {
    let Some(root) = child::arguments::<String>("role_holding") else {
        return;
    };
    let store = Store::open(StoreConfig::at(root)).unwrap();
    let id = store.ingest(&model(1)).unwrap().model;
    let _held = shared(&store, &id);
    child::tell(id);
    child::wait_for_parent();
}

#[test]
fn a_killed_process_leaves_no_lease() {
    let (_dir, store) = store();
    let mut role = Role::test("role_holding").start(&store.root()).unwrap();
    let id: ModelId = role.hear_any().unwrap().parse().unwrap();
    assert!(lease_is(true, &store, &id));
    assert!(role.kill());
    assert!(lease_is(false, &store, &id));
}
