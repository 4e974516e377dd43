//! Leases, idle time, quota, damage.
#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

mod common;

use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use carlsbad_types::ByteSize;
use common::{MemoryModel, scratch, store};
use tetris_store::{BackingKind, Error, IngestOptions, Store, StoreConfig};

const KEEP_ALIVE: Duration = Duration::from_millis(150);

fn short_lived() -> (tempfile::TempDir, Store) {
    let dir = scratch();
    let mut config = StoreConfig::at(dir.path().join("store"));
    config.keep_alive = KEEP_ALIVE;
    let store = Store::open(config).unwrap();
    (dir, store)
}

fn is_empty(store: &Store) -> bool {
    let stats = store.stats().unwrap();
    let left = |dir: &str| std::fs::read_dir(store.root().join(dir)).unwrap().count();
    stats.models == 0
        && stats.objects == 0
        && left("names") == 0
        && left("hints") == 0
        && left("tmp") == 0
}

#[test]
fn what_nobody_uses_is_freed_when_its_time_is_over_and_no_earlier() {
    let (_dir, store) = short_lived();
    let model = MemoryModel::default()
        .with_random("a", 1 << 20, 1)
        .with_random("b", 9, 2);
    let options = IngestOptions {
        label: Some("m"),
        ..Default::default()
    };
    let id = store.ingest_with(&model, &options).unwrap().model;

    let shared = store.attach(&id).unwrap();
    std::thread::sleep(KEEP_ALIVE * 2);
    let report = store.reclaim().unwrap();
    assert_eq!((report.freed.len(), report.leased), (0, 1));

    // Reuse starts the idle time anew: the paper's does not.
    drop(shared);
    let report = store.reclaim().unwrap();
    assert_eq!((report.freed.len(), report.leased, report.idle), (0, 0, 1));
    let due = report.next_due.unwrap();
    assert!(due > KEEP_ALIVE / 2 && due <= KEEP_ALIVE, "{due:?}");

    std::thread::sleep(due);
    let report = store.reclaim().unwrap();
    assert_eq!(report.freed, [id]);
    assert_eq!(report.freed_objects, 2);
    assert!(report.freed_bytes >= ByteSize::mib(1));
    assert!(is_empty(&store));
    assert!(matches!(store.attach(&id), Err(Error::UnknownModel { .. })));
}

#[test]
fn what_another_model_needs_or_a_view_shows_stays() {
    let (dir, store) = short_lived();
    let base = MemoryModel::default()
        .with_random("a", 1 << 20, 1)
        .with_random("b", 1 << 20, 2);
    let tuned = MemoryModel::default()
        .with_random("a", 1 << 20, 1)
        .with_random("c", 1 << 20, 3);
    let base = store.ingest(&base).unwrap().model;
    let tuned_id = store.ingest(&tuned).unwrap().model;
    let shared = store.attach(&tuned_id).unwrap();
    let viewed = store.manifest(&base).unwrap().tensor("b").unwrap().object;
    std::fs::hard_link(store.object_path(&viewed).unwrap(), dir.path().join("view")).unwrap();

    std::thread::sleep(KEEP_ALIVE);
    let report = store.reclaim().unwrap();
    assert_eq!(report.freed, [base]);
    assert_eq!((report.freed_objects, report.viewed), (0, 1));
    drop(shared);
    tuned.check(&store, &tuned_id);

    // The view's end is the beginning of its tensor's idle time.
    std::fs::remove_file(dir.path().join("view")).unwrap();
    assert_eq!(store.reclaim().unwrap().freed_objects, 0);
    std::thread::sleep(KEEP_ALIVE);
    store.reclaim().unwrap();
    assert!(is_empty(&store));
}

#[test]
fn a_mapping_outlives_everything() {
    let (_dir, store) = short_lived();
    let model = MemoryModel::default().with_random("a", 3 << 20, 1);
    let id = store.ingest(&model).unwrap().model;
    let shared = store.attach(&id).unwrap();
    let bytes = shared.tensor("a").unwrap().bytes;
    std::fs::remove_dir_all(store.root()).unwrap();
    assert!(bytes == model.bytes_of("a"));
}

#[test]
fn a_clock_jump_frees_nothing_early() {
    // Stamps count from boot; a stamp of an earlier boot may lie ahead.
    let (_dir, store) = short_lived();
    let id = store
        .ingest(&MemoryModel::default().with_random("a", 1 << 20, 1))
        .unwrap()
        .model;
    let manifest = std::fs::File::open(store.root().join(format!("models/{id}"))).unwrap();
    let ahead = std::time::SystemTime::UNIX_EPOCH + Duration::from_secs(1 << 31);
    manifest.set_modified(ahead).unwrap();
    assert_eq!(store.reclaim().unwrap().idle, 1);
    std::thread::sleep(KEEP_ALIVE);
    assert_eq!(store.reclaim().unwrap().freed, [id]);
}

#[test]
fn after_a_reboot_idle_time_begins_anew_and_stale_temporaries_go() {
    let (_dir, store) = short_lived();
    let model = MemoryModel::default().with_random("a", 1 << 20, 1);
    let id = store.ingest(&model).unwrap().model;
    // As an earlier boot would have left them: a stamp long before now, and a filler's claim.
    let manifest = std::fs::File::open(store.root().join(format!("models/{id}"))).unwrap();
    manifest
        .set_modified(std::time::SystemTime::UNIX_EPOCH)
        .unwrap();
    std::fs::write(store.root().join("boot"), "another boot").unwrap();
    std::fs::write(store.root().join("tmp/claim-00"), "").unwrap();

    let store = Store::open(store.config().clone()).unwrap();
    let report = store.reclaim().unwrap();
    assert_eq!((report.freed.len(), report.idle, report.stale), (0, 1, 1));
    std::thread::sleep(KEEP_ALIVE);
    assert_eq!(store.reclaim().unwrap().freed, [id]);
}

#[test]
fn stale_temporaries_are_swept() {
    let (_dir, store) = short_lived();
    let tmp = store.root().join("tmp");
    for left in ["claim-00", "reserve-1-1", "anything"] {
        std::fs::write(tmp.join(left), "").unwrap();
    }
    // Looking removes nothing: whoever looks may have a read-only mount.
    assert_eq!(store.stats().unwrap().reserved, ByteSize::ZERO);
    assert_eq!(store.reclaim().unwrap().stale, 3);
    assert!(is_empty(&store));
}

#[test]
fn the_quota_holds_and_a_refused_model_leaves_nothing() {
    let dir = scratch();
    let mut config = StoreConfig::at(dir.path().join("store"));
    config.quota = Some(ByteSize::mib(10));
    let store = Store::open(config).unwrap();
    let fits = MemoryModel::default()
        .with_random("a", 6 << 20, 1)
        .with_random("b", 500, 2);
    store.ingest(&fits).unwrap();
    let before = store.stats().unwrap();
    let too_much = MemoryModel::default()
        .with_random("a", 6 << 20, 1)
        .with_random("c", 2 << 20, 3)
        .with_random("d", 3 << 20, 4);
    let refused = store.ingest(&too_much);
    assert!(
        matches!(refused, Err(Error::QuotaExceeded { .. })),
        "{refused:?}"
    );
    assert_eq!(store.stats().unwrap(), before);
    assert_eq!(
        std::fs::read_dir(store.root().join("tmp")).unwrap().count(),
        0
    );
    // What is shared costs nothing.
    let shares = MemoryModel::default()
        .with_random("a", 6 << 20, 1)
        .with_random("c", 3 << 20, 3);
    store.ingest(&shares).unwrap();
    assert!(store.stats().unwrap().stored <= ByteSize::mib(10));
    assert_eq!(store.stats().unwrap().reserved, ByteSize::ZERO);
}

#[test]
fn a_flipped_bit_is_found_and_repaired() {
    let (_dir, store) = store();
    let model = MemoryModel::default()
        .with_random("a", 3 << 20, 1)
        .with_random("b", 70_000, 2)
        .with_random("c", 10, 3);
    let id = store.ingest(&model).unwrap().model;
    let report = store.verify().unwrap();
    assert_eq!((report.sound, report.damaged.len()), (3, 0));

    for tensor in ["a", "c"] {
        let object = store.manifest(&id).unwrap().tensor(tensor).unwrap().object;
        let path = store.object_path(&object).unwrap();
        let mut bytes = std::fs::read(&path).unwrap();
        *bytes.last_mut().unwrap() ^= 4;
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
        std::fs::write(&path, bytes).unwrap();
        let report = store.verify().unwrap();
        assert_eq!(report.damaged.len(), 1, "{tensor}");
        assert_eq!(report.damaged[0].object, Some(object));
        assert_eq!(report.damaged[0].models, [id]);
        store.discard(&report).unwrap();
        let missing = store.attach(&id).unwrap().tensor(tensor).err();
        assert!(
            matches!(missing, Some(Error::Damaged { .. })),
            "{missing:?}"
        );
        store.ingest(&model).unwrap();
        model.check(&store, &id);
    }

    // The same for a manifest.
    let path = store.root().join(format!("models/{id}"));
    let mut bytes = std::fs::read(&path).unwrap();
    let at = bytes.windows(1).rposition(|b| b == b"a").unwrap();
    bytes[at] = b'x';
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
    std::fs::write(&path, bytes).unwrap();
    let report = store.verify().unwrap();
    assert_eq!(report.damaged[0].models, [id]);
    store.discard(&report).unwrap();
    store.ingest(&model).unwrap();
    model.check(&store, &id);
}

#[test]
fn overlap_counts_the_union_once() {
    let (_dir, store) = store();
    let model = |seeds: &[u64]| {
        seeds.iter().fold(MemoryModel::default(), |model, seed| {
            model.with_random(&format!("t{seed}"), 100_000, *seed)
        })
    };
    let ids: Vec<_> = [&[1, 2, 3][..], &[1, 4], &[2, 5, 5 + 1]]
        .iter()
        .map(|seeds| store.ingest(&model(seeds)).unwrap().model)
        .collect();
    let manifests: Vec<_> = ids.iter().map(|id| store.manifest(id).unwrap()).collect();
    // The second and the third have one tensor each of the first: 2 of 3, not the pairwise 1 of 3.
    let overlap = manifests[0].overlap(&manifests[1..]);
    assert_eq!(overlap.shared, ByteSize::new(200_000));
    assert_eq!(overlap.missing, ByteSize::new(100_000));
    assert_eq!(store.overlap(&manifests[0]).unwrap().ratio(), 1.0);
}

#[test]
fn a_report_of_damage_that_is_repaired_meanwhile_costs_nothing() {
    let (_dir, store) = store();
    let model = MemoryModel::default().with_random("a", 70_000, 2);
    let id = store.ingest(&model).unwrap().model;
    let object = store.manifest(&id).unwrap().tensor("a").unwrap().object;
    std::fs::remove_file(store.object_path(&object).unwrap()).unwrap();
    let manifest = store.root().join(format!("models/{id}"));
    let whole = std::fs::read(&manifest).unwrap();
    let missing = store.verify().unwrap();
    assert_eq!(missing.damaged.len(), 1);
    store.ingest(&model).unwrap();
    store.discard(&missing).unwrap();
    model.check(&store, &id);

    std::fs::set_permissions(&manifest, std::fs::Permissions::from_mode(0o644)).unwrap();
    std::fs::write(&manifest, &whole[..whole.len() - 1]).unwrap();
    let cut = store.verify().unwrap();
    assert_eq!(cut.damaged.len(), 1);
    std::fs::write(&manifest, &whole).unwrap();
    store.discard(&cut).unwrap();
    model.check(&store, &id);
    std::fs::remove_file(&manifest).unwrap();
    store.discard(&cut).unwrap();
}

#[test]
fn a_store_of_memory_files_opens_whatever_a_dead_owner_left() {
    let dir = scratch();
    let mut config = StoreConfig::at(dir.path().join("store"));
    config.backing = BackingKind::Memfd;
    drop(Store::open(config.clone()).unwrap());
    let left = dir.path().join("store/tmp/view-1-0");
    std::fs::create_dir(&left).unwrap();
    std::fs::write(left.join("half"), "half").unwrap();
    Store::open(config).unwrap();
    assert!(!left.exists());
}

#[test]
fn a_model_that_just_fits_the_quota_fits_however_many_threads_store_it() {
    let model = (0..48).fold(MemoryModel::default(), |model, seed| {
        model.with_random(&format!("t{seed}"), 1 << 20, seed)
    });
    for _ in 0..10 {
        let dir = scratch();
        let mut config = StoreConfig::at(dir.path().join("store"));
        let manifest = 8192;
        config.quota = Some(ByteSize::new(48 * ((1 << 20) + 4096) + manifest));
        config.threads = 8;
        let store = Store::open(config).unwrap();
        store.ingest(&model).unwrap();
    }
}
