//! Processes killed at random points of publish, attach and reclaim.
#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

mod common;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use carlsbad_kit::child::{self, Role, kill_at_random};
use carlsbad_kit::seed;
use common::{MemoryModel, scratch};
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, fork};
use tetris_store::{Error, Store, StoreConfig};

const KEEP_ALIVE: Duration = Duration::from_millis(300);
const MODELS: u64 = 4;

fn open(root: PathBuf) -> Store {
    let mut config = StoreConfig::at(root);
    config.keep_alive = KEEP_ALIVE;
    Store::open(config).unwrap()
}

/// Model 0 is kept in use throughout; the others share a tensor with it and come and go.
fn model(n: u64) -> MemoryModel {
    MemoryModel::default()
        .with_random("shared", 2 << 20, 100)
        .with_random("own", (1 << 20) + n as usize, n)
        .with_random("small", 1000, n + 200)
}

#[test]
#[ignore = "a role of the test below"]
fn role_worker() {
    let Some((root, seed)) = child::arguments::<(PathBuf, u64)>("role_worker") else {
        return;
    };
    let store = open(root);
    let models: Vec<_> = (0..MODELS).map(model).collect();
    let mut rng = seed::Rng::with_seed(seed);
    child::tell("working");
    for _ in 0..200 {
        let n = rng.u64(1..MODELS);
        let model = &models[n as usize];
        match rng.u32(0..4) {
            0 | 1 => {
                let id = store.ingest(model).unwrap().model;
                if rng.bool() {
                    model.check(&store, &id);
                }
            }
            2 => {
                store.reclaim().unwrap();
            }
            _ => attach_any(&store, &models),
        }
    }
}

/// Every model that can be attached is whole.
fn attach_any(store: &Store, models: &[MemoryModel]) {
    for stored in store.models().unwrap() {
        let attached = store.attach(&stored.id);
        if matches!(attached, Err(Error::UnknownModel { .. })) {
            continue;
        }
        let shared = attached.unwrap();
        let own = shared.tensor("own").unwrap();
        let model = models
            .iter()
            .find(|model| model.bytes_of("own").len() == own.bytes.len())
            .unwrap();
        for tensor in shared.tensors() {
            let tensor = tensor.unwrap();
            let name = &tensor.entry.name;
            assert!(tensor.bytes == model.bytes_of(name), "{name} is torn");
        }
    }
}

#[test]
fn sigkill_at_random_points_of_publish_attach_and_reclaim() {
    let times = if std::env::var_os("CARLSBAD_SOAK").is_some() {
        1000
    } else {
        60
    };
    let dir = scratch();
    let store = open(dir.path().join("store"));
    let models: Vec<_> = (0..MODELS).map(model).collect();
    let kept = store.ingest(&models[0]).unwrap().model;
    let lease = store.attach(&kept).unwrap();

    let mut rng = seed::rng("kill");
    let first = rng.u64(..);
    let report = kill_at_random(
        &mut rng,
        times,
        Duration::from_millis(60),
        |round| {
            let arguments = (store.root(), first.wrapping_add(round as u64));
            let child = Role::test("role_worker").start(&arguments)?;
            child.hear("working")?;
            Ok(child)
        },
        |_| {
            attach_any(&store, &models);
            // No early reclaim: somebody has it all the time, and the killed ones swept.
            models[0].check(&store, &kept);
        },
    )
    .unwrap();
    assert!(report.killed > times / 2, "{report:?}");

    // No leak after keep-alive + 1 s.
    drop(lease);
    let end = Instant::now() + KEEP_ALIVE + Duration::from_secs(1);
    while Instant::now() < end {
        store.reclaim().unwrap();
        std::thread::sleep(Duration::from_millis(50));
    }
    let stats = store.stats().unwrap();
    assert_eq!((stats.models, stats.objects), (0, 0), "{stats:?}");
    for folder in ["models", "names", "hints", "tmp"] {
        let left = std::fs::read_dir(store.root().join(folder)).unwrap();
        let left: Vec<_> = left.map(|entry| entry.unwrap().file_name()).collect();
        assert!(left.is_empty(), "{folder}: {left:?}");
    }
}

#[test]
#[ignore = "a role of the test below"]
fn role_forks() {
    let Some(root) = child::arguments::<PathBuf>("role_forks") else {
        return;
    };
    let store = open(root);
    let shared = store.attach(&store.resolve("m").unwrap()).unwrap();
    // SAFETY: the child calls nothing but sleep and _exit, both async-signal-safe.
    match unsafe { fork() }.unwrap() {
        ForkResult::Child => {
            nix::unistd::sleep(2);
            // SAFETY: ends the process without running the test harness' exit handlers.
            unsafe { nix::libc::_exit(0) }
        }
        ForkResult::Parent { child } => {
            drop(shared);
            child::tell("dropped");
            waitpid(child, None).unwrap();
            child::tell("ended");
        }
    }
}

#[test]
fn a_forked_child_keeps_the_lease_that_its_parent_gave_back() {
    let dir = scratch();
    let store = open(dir.path().join("store"));
    let options = tetris_store::IngestOptions {
        label: Some("m"),
        ..Default::default()
    };
    let id = store.ingest_with(&model(1), &options).unwrap().model;
    let role = Role::test("role_forks").start(&store.root()).unwrap();
    role.hear("dropped").unwrap();
    std::thread::sleep(KEEP_ALIVE * 2);
    let report = store.reclaim().unwrap();
    assert_eq!((report.leased, report.freed.len()), (1, 0));
    role.hear("ended").unwrap();
    assert_eq!(store.reclaim().unwrap().freed, []);
    std::thread::sleep(KEEP_ALIVE);
    assert_eq!(store.reclaim().unwrap().freed, [id]);
}
