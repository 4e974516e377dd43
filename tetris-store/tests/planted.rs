//! What somebody planted in a store, or a strict umask, hangs nobody and leads nobody astray.
#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

mod common;

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use carlsbad_kit::child::{self, Role};
use carlsbad_types::ByteSize;
use common::{MemoryModel, scratch, store};
use nix::sys::stat::{Mode, umask};
use nix::unistd::mkfifo;
use tetris_store::{Error, IngestOptions, Sidecar, Store, StoreConfig};

fn model() -> MemoryModel {
    MemoryModel::default()
        .with_random("big", 1 << 20, 1)
        .with_random("small", 1000, 2)
}

/// What cannot be read to its end.
#[derive(Debug, Clone, Copy)]
enum Plant {
    EndlessDevice,
    PipeWithoutWriter,
    Directory,
}

impl Plant {
    const ALL: [Self; 3] = [
        Self::EndlessDevice,
        Self::PipeWithoutWriter,
        Self::Directory,
    ];

    /// Puts it where `path` is.
    fn at(self, path: &Path) {
        let _was_a_file = fs::remove_file(path);
        let _was_a_directory = fs::remove_dir(path);
        match self {
            Self::EndlessDevice => symlink("/dev/zero", path).unwrap(),
            Self::PipeWithoutWriter => mkfifo(path, Mode::S_IRWXU).unwrap(),
            Self::Directory => fs::create_dir(path).unwrap(),
        }
    }
}

#[test]
fn a_manifest_that_is_no_file_is_damage() {
    let (_dir, store) = store();
    let id = store.ingest(&model()).unwrap().model;
    let path = store.root().join(format!("models/{id}"));
    for what in Plant::ALL {
        what.at(&path);
        for outcome in [
            store.attach(&id).map(drop),
            store.manifest(&id).map(drop),
            store.state(&id).map(drop),
            store.models().map(drop),
        ] {
            assert!(matches!(outcome, Err(Error::Damaged { .. })), "{what:?}");
        }
        assert_eq!(store.verify().unwrap().damaged.len(), 1, "{what:?}");
        assert_eq!(store.reclaim().unwrap().damaged, [id], "{what:?}");
    }
}

#[test]
fn a_stored_file_that_is_no_file_is_damage_and_can_be_taken_out() {
    let (_dir, store) = store();
    let model = model();
    let id = store.ingest(&model).unwrap().model;
    let object = store.manifest(&id).unwrap().tensor("big").unwrap().object;
    let path = store.object_path(&object).unwrap();
    for what in [Plant::EndlessDevice, Plant::PipeWithoutWriter] {
        what.at(&path);
        let shared = store.attach(&id).unwrap();
        assert!(
            matches!(shared.tensor("big"), Err(Error::Damaged { .. })),
            "{what:?}"
        );
        let report = store.verify().unwrap();
        assert_eq!(report.damaged.len(), 1, "{what:?}");
        store.discard(&report).unwrap();
        store.ingest(&model).unwrap();
        model.check(&store, &id);
    }
}

#[test]
fn a_directory_of_the_store_that_leads_elsewhere_is_refused() {
    for name in ["objects", "models", "names", "hints", "tmp"] {
        let (dir, store) = store();
        drop(store);
        let elsewhere = dir.path().join("elsewhere");
        fs::create_dir(&elsewhere).unwrap();
        fs::write(elsewhere.join("precious"), "mine").unwrap();
        let root = dir.path().join("store");
        fs::remove_dir_all(root.join(name)).unwrap();
        symlink(&elsewhere, root.join(name)).unwrap();
        let opened = Store::open(StoreConfig::at(&root));
        assert!(matches!(opened, Err(Error::NotAStore { .. })), "{name}");
        assert_eq!(fs::read(elsewhere.join("precious")).unwrap(), b"mine");
    }
}

#[test]
fn a_format_that_never_ends_is_refused() {
    let (dir, store) = store();
    drop(store);
    let root = dir.path().join("store");
    for what in Plant::ALL {
        what.at(&root.join("FORMAT"));
        let opened = Store::open(StoreConfig::at(&root));
        assert!(matches!(opened, Err(Error::Damaged { .. })), "{what:?}");
    }
}

#[test]
fn what_goes_with_a_model_counts_against_the_quota() {
    let dir = scratch();
    let mut config = StoreConfig::at(dir.path().join("store"));
    config.quota = Some(ByteSize::mib(3));
    let store = Store::open(config).unwrap();
    let mut small = model();
    store.ingest(&small).unwrap();
    let before = store.stats().unwrap();
    small.sidecars.push(Sidecar {
        name: "tokenizer.json".to_owned(),
        bytes: vec![0; 2 << 20],
    });
    let refused = store.ingest_with(&small, &IngestOptions::default());
    assert!(matches!(refused, Err(Error::QuotaExceeded { .. })));
    assert_eq!(store.stats().unwrap(), before);
    small.sidecars[0].bytes.truncate(1 << 20);
    store.ingest(&small).unwrap();
    assert!(store.stats().unwrap().manifests >= ByteSize::mib(1));
}

#[test]
#[ignore = "a role of `modes_do_not_depend_on_the_umask`"]
fn role_ingest() {
    let Some((root, mask)) = child::arguments::<(PathBuf, u32)>("role_ingest") else {
        return;
    };
    umask(Mode::from_bits_truncate(mask));
    let store = Store::open(StoreConfig::at(root)).unwrap();
    store.ingest(&model()).unwrap();
    child::tell("stored");
}

#[test]
fn modes_do_not_depend_on_the_umask() {
    for mask in [0o000, 0o077, 0o777] {
        let dir = scratch();
        let root = dir.path().join("store");
        let ingest = Role::test("role_ingest").start(&(&root, mask)).unwrap();
        ingest.hear("stored").unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o7777;
        assert_eq!(mode(&root), 0o755, "{mask:o}");
        for name in ["objects", "models", "names", "hints", "tmp"] {
            assert_eq!(mode(&root.join(name)), 0o755, "{mask:o} {name}");
        }
        for folder in fs::read_dir(root.join("objects")).unwrap() {
            let folder = folder.unwrap().path();
            assert_eq!(mode(&folder), 0o755, "{mask:o}");
            for file in fs::read_dir(folder).unwrap() {
                assert_eq!(mode(&file.unwrap().path()), 0o444, "{mask:o}");
            }
        }
    }
}
