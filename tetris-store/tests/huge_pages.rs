//! Huge pages by a mount of the store's own.
#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

mod common;

use std::path::PathBuf;

use carlsbad_kit::capability::Capability;
use carlsbad_kit::memory::meminfo;
use carlsbad_kit::require;
use common::{MemoryModel, scratch};
use tetris_store::{HugePages, HugePagesInForce, Store, StoreConfig};

/// Unmounts also where the test fails.
struct Unmount(PathBuf);

impl Drop for Unmount {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(&self.0, nix::mount::MntFlags::MNT_DETACH);
    }
}

fn mounts() -> usize {
    let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    table
        .lines()
        .filter(|line| line.contains("tetris-store"))
        .count()
}

#[test]
fn a_mount_of_its_own_has_huge_pages_and_wastes_none() {
    require!(Capability::TmpfsMount, Capability::HugeTmpfs);
    let dir = scratch();
    let root = dir.path().join("store");
    let mut config = StoreConfig::at(&root);
    config.huge_pages = HugePages::Mount;
    let unmount = Unmount(root.clone());
    let store = Store::open(config.clone()).unwrap();
    assert_eq!(store.huge_pages().unwrap(), HugePagesInForce::WithinSize);

    let before = meminfo("ShmemHugePages").unwrap();
    let len = 33 << 20;
    let mut model = MemoryModel::default().with_random("large", len, 1);
    for i in 0..16 {
        model = model.with_random(&format!("small {i}"), 100 << 10, i + 2);
    }
    let id = store.ingest(&model).unwrap().model;
    model.check(&store, &id);
    let huge = meminfo("ShmemHugePages").unwrap().saturating_sub(before);
    assert!(huge.get() >= 24 << 20, "{huge} in huge pages");
    let stats = store.stats().unwrap();
    let unique = stats.private.get();
    assert!(stats.stored.get() <= unique + unique / 20, "{stats:?}");

    // Opened again it is not mounted again.
    drop(Store::open(config).unwrap());
    drop(store);
    let first = mounts();
    drop(unmount);
    assert_eq!(first, mounts() + 1);
}
