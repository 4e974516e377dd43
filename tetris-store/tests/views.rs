//! Views: what unmodified runtimes would see, read back with this crate's own parsers. The runtimes
//! themselves are exercised by `cargo xtask peers tetris-store`.
#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

use carlsbad_kit::capability::Capability;
use carlsbad_types::{ByteSize, DType};
use common::{MemoryModel, random_bytes, scratch, store};
use prost::encoding::{WireType, encode_key, encode_varint};
use tetris_store::{
    Error, GgufSource, ModelSource, OnnxSource, Sidecar, Store, ViewKind, open_model,
};

/// Every tensor of a source: its type, its shape and its bytes, by name.
fn contents(source: &dyn ModelSource) -> BTreeMap<String, (String, Vec<u8>)> {
    let read = source.tensors().iter().enumerate().map(|(index, tensor)| {
        let mut bytes = vec![0; tensor.len as usize];
        source.read_at(index, 0, &mut bytes).unwrap();
        let what = format!("{} {}", tensor.element, tensor.shape);
        (tensor.name.clone(), (what, bytes))
    });
    read.collect()
}

fn base() -> MemoryModel {
    MemoryModel::default()
        .with_random("encoder.weight", 300_000, 1)
        .with_random("head.weight", 200_000, 2)
        .with("head.bias", DType::F32, &[25], random_bytes(100, 3))
        .with("step", DType::I64, &[], random_bytes(8, 4))
        .with("none", DType::F16, &[0, 3], Vec::new())
}

/// `(device, inode)` of every file.
fn inodes(dir: &Path) -> BTreeMap<u64, String> {
    let entries = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap());
    entries
        .map(|e| {
            (
                e.metadata().unwrap().ino(),
                e.file_name().into_string().unwrap(),
            )
        })
        .collect()
}

/// What the store's `tmp` holds.
fn unfinished(store: &Store) -> usize {
    fs::read_dir(store.root().join("tmp")).unwrap().count()
}

#[test]
fn a_hugging_face_view_is_the_model_and_takes_no_memory_of_its_own() {
    let (_dir, store) = store();
    let mut model = base();
    model.sidecars = vec![
        Sidecar {
            name: "__metadata__.json".into(),
            bytes: b"{}".to_vec(),
        },
        Sidecar {
            name: "config.json".into(),
            bytes: b"{\"a\":1}".to_vec(),
        },
    ];
    let id = store.ingest(&model).unwrap().model;
    let before = store.stats().unwrap().stored;
    let dir = store.root().join("views/base");
    let view = store.export_view(&id, ViewKind::HfSharded, &dir).unwrap();
    assert_eq!(view.linked, model_size(&model));
    assert!(view.copied < ByteSize::kib(2), "{}", view.copied);
    assert_eq!(store.stats().unwrap().stored, before);
    assert_eq!(contents(&*open_model(&dir).unwrap()), contents(&model));
    assert_eq!(fs::read(dir.join("config.json")).unwrap(), b"{\"a\":1}");
    let listed: Vec<_> = view
        .files
        .iter()
        .map(|file| file.to_str().unwrap())
        .collect();
    assert_eq!(
        listed,
        [
            "config.json",
            "model-00001-of-00003.safetensors",
            "model-00002-of-00003.safetensors",
            "model-00003-of-00003.safetensors",
            "model.safetensors.index.json",
        ]
    );
    for file in &view.files {
        let meta = fs::metadata(dir.join(file)).unwrap();
        assert_eq!(meta.mode() & 0o777, 0o444);
        let shard = file.extension().unwrap() == "safetensors";
        assert_eq!(meta.nlink(), if shard { 2 } else { 1 });
    }
    assert_eq!(unfinished(&store), 0);
}

fn model_size(model: &MemoryModel) -> ByteSize {
    ByteSize::new(model.tensors().iter().map(|tensor| tensor.len).sum())
}

#[test]
fn the_views_of_a_base_and_its_fine_tune_share_files() {
    let (_dir, store) = store();
    let tuned = MemoryModel::default()
        .with_random("encoder.weight", 300_000, 1)
        .with_random("head.weight", 200_000, 9);
    let mut seen = Vec::new();
    for (name, model) in [("base", base()), ("tuned", tuned)] {
        let id = store.ingest(&model).unwrap().model;
        let dir = store.root().join("views").join(name);
        store.export_view(&id, ViewKind::HfSharded, &dir).unwrap();
        assert_eq!(contents(&*open_model(&dir).unwrap()), contents(&model));
        seen.push(inodes(&dir));
    }
    let shared = seen[0].keys().filter(|inode| seen[1].contains_key(inode));
    assert_eq!(shared.count(), 1);
}

#[test]
fn a_tensor_stored_under_another_name_is_copied_and_counted() {
    let (_dir, store) = store();
    store.ingest(&base()).unwrap();
    let other = MemoryModel::default()
        .with_random("renamed", 300_000, 1)
        .with_random("head.weight", 200_000, 2)
        .with_random("tied", 200_000, 2);
    let ingested = store.ingest(&other).unwrap();
    assert_eq!(ingested.written, ByteSize::ZERO);
    let dir = store.root().join("views/other");
    let view = store
        .export_view(&ingested.model, ViewKind::HfSharded, &dir)
        .unwrap();
    assert_eq!(view.linked, ByteSize::new(200_000));
    assert!(view.copied >= ByteSize::new(500_000));
    assert_eq!(contents(&*open_model(&dir).unwrap()), contents(&other));
}

/// A field of a protobuf message.
fn field(number: u32, bytes: &[u8], into: &mut Vec<u8>) {
    encode_key(number, WireType::LengthDelimited, into);
    encode_varint(bytes.len() as u64, into);
    into.extend(bytes);
}

/// An ONNX model with the given float tensors as `raw_data`, and fields nobody knows everywhere.
fn onnx(tensors: &[(&str, &[u8])]) -> Vec<u8> {
    let mut graph = Vec::new();
    field(2, b"graph", &mut graph);
    for (name, bytes) in tensors {
        let mut tensor = Vec::new();
        encode_key(1, WireType::Varint, &mut tensor);
        encode_varint(bytes.len() as u64 / 4, &mut tensor);
        field(9, bytes, &mut tensor);
        encode_key(2, WireType::Varint, &mut tensor);
        encode_varint(1, &mut tensor);
        field(8, name.as_bytes(), &mut tensor);
        field(999, b"unknown in tensor", &mut tensor);
        field(5, &tensor, &mut graph);
    }
    field(998, b"unknown in graph", &mut graph);
    let mut model = Vec::new();
    encode_key(1, WireType::Varint, &mut model);
    encode_varint(8, &mut model);
    field(7, &graph, &mut model);
    field(997, b"unknown in model", &mut model);
    model
}

#[test]
fn an_onnx_view_is_the_model_and_links_what_is_large() {
    let (_dir, store) = store();
    let scratch = scratch();
    let path = scratch.path().join("model.onnx");
    let (large, packed, small) = (
        random_bytes(400_000, 1),
        random_bytes(2_000, 2),
        random_bytes(100, 3),
    );
    let bytes = onnx(&[
        ("large", &large),
        ("packed", &packed),
        ("small", &small),
        ("none", &[]),
    ]);
    fs::write(&path, &bytes).unwrap();
    let source = OnnxSource::open(&path).unwrap();
    let id = store.ingest(&source).unwrap().model;
    let dir = store.root().join("views/onnx");
    let view = store
        .export_view(&id, ViewKind::OnnxExternal, &dir)
        .unwrap();
    assert_eq!(view.linked, ByteSize::new(402_000));
    assert!(view.copied < ByteSize::kib(2));

    let graph = fs::read(dir.join("model.onnx")).unwrap();
    let has = |text: &[u8]| graph.windows(text.len()).any(|window| window == text);
    assert!(has(&small) && !has(&packed));
    for place in ["tensor", "graph", "model"] {
        assert!(has(format!("unknown in {place}").as_bytes()));
    }
    let again = OnnxSource::open(&dir.join("model.onnx")).unwrap();
    assert_eq!(contents(&again), contents(&source));
    // A view is a model like any other: taking it in again writes nothing, and it is the same one.
    let ingested = store.ingest(&again).unwrap();
    assert_eq!((ingested.model, ingested.written), (id, ByteSize::ZERO));
    // It goes as safetensors as well.
    let sharded = store.root().join("views/onnx-as-safetensors");
    store
        .export_view(&id, ViewKind::HfSharded, &sharded)
        .unwrap();
    assert_eq!(contents(&*open_model(&sharded).unwrap()), contents(&source));
    assert!(!sharded.join("model.onnx").exists());
}

#[test]
fn what_does_not_go_into_a_view_is_refused() {
    let (_dir, store) = store();
    let id = store.ingest(&base()).unwrap().model;
    let dir = store.root().join("views/x");
    let refused = store.export_view(&id, ViewKind::OnnxExternal, &dir);
    assert!(
        matches!(refused, Err(Error::ViewUnsupported { .. })),
        "{refused:?}"
    );

    let mut gguf = b"GGUF".to_vec();
    gguf.extend([3, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    gguf.extend([
        1, 0, 0, 0, 0, 0, 0, 0, b't', 1, 0, 0, 0, 32, 0, 0, 0, 0, 0, 0, 0,
    ]);
    gguf.extend([2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    gguf.resize(gguf.len().next_multiple_of(32) + 18, 0);
    let mut file = tempfile::tempfile().unwrap();
    std::io::Write::write_all(&mut file, &gguf).unwrap();
    let source = GgufSource::from_file(file, Path::new("model.gguf")).unwrap();
    let id = store.ingest(&source).unwrap().model;
    let refused = store.export_view(&id, ViewKind::HfSharded, &dir);
    assert!(
        matches!(refused, Err(Error::ViewUnsupported { .. })),
        "{refused:?}"
    );
    assert!(!dir.exists());
    assert_eq!(unfinished(&store), 0);
}

#[test]
fn a_view_appears_whole_or_not_at_all() {
    let (_dir, store) = store();
    let id = store.ingest(&base()).unwrap().model;
    let views = store.root().join("views");
    // In another mount.
    let elsewhere = tempfile::tempdir().unwrap();
    let another_mount =
        fs::metadata(elsewhere.path()).unwrap().dev() != fs::metadata(store.root()).unwrap().dev();
    if another_mount {
        let refused = store.export_view(&id, ViewKind::HfSharded, &elsewhere.path().join("view"));
        assert!(
            matches!(refused, Err(Error::ViewElsewhere { .. })),
            "{refused:?}"
        );
        assert_eq!(fs::read_dir(elsewhere.path()).unwrap().count(), 0);
    }
    // Where something is already.
    fs::create_dir_all(views.join("full/inside")).unwrap();
    fs::write(views.join("file"), "").unwrap();
    for taken in ["full", "file"] {
        let refused = store.export_view(&id, ViewKind::HfSharded, &views.join(taken));
        assert!(
            matches!(refused, Err(Error::ViewExists { .. })),
            "{refused:?}"
        );
    }
    // An empty folder is as good as none.
    fs::create_dir(views.join("empty")).unwrap();
    store
        .export_view(&id, ViewKind::HfSharded, &views.join("empty"))
        .unwrap();
    assert_eq!(unfinished(&store), 0);
    let objects = store.stats().unwrap().objects;
    assert_eq!(objects, 3);
}

#[test]
fn another_user_is_told_why_he_cannot_link() {
    // What makes the kernel refuse; on a machine without it, anybody may link.
    let protected = fs::read_to_string("/proc/sys/fs/protected_hardlinks").unwrap();
    if protected.trim() == "0" || !Capability::Root.or_skip() {
        return;
    }
    let (dir, store) = store();
    let id = store.ingest(&base()).unwrap().model;
    for open in [dir.path().to_owned(), store.root().join("tmp")] {
        fs::set_permissions(open, fs::Permissions::from_mode(0o777)).unwrap();
    }
    let refused = std::thread::scope(|scope| {
        let nobody = scope.spawn(|| {
            // Of this thread alone, and with it the rights of root in the file system.
            nix::unistd::setfsuid(nix::unistd::Uid::from_raw(65534));
            store.export_view(&id, ViewKind::HfSharded, &dir.path().join("view"))
        });
        nobody.join().unwrap()
    });
    assert!(
        matches!(refused, Err(Error::ViewDenied { .. })),
        "{refused:?}"
    );
    assert_eq!(unfinished(&store), 0);
    // The control: the owner may.
    store
        .export_view(&id, ViewKind::HfSharded, &dir.path().join("view"))
        .unwrap();
}

#[test]
fn a_sidecar_cannot_leave_the_view() {
    let (_dir, store) = store();
    for name in [
        "../out",
        "/tmp/out",
        "a/b",
        "..",
        ".",
        "",
        "a\0b",
        "model.onnx/",
    ] {
        let mut model = base();
        let name = name.to_owned();
        model.sidecars = vec![Sidecar {
            name: name.clone(),
            bytes: b"x".to_vec(),
        }];
        // The store may refuse it at once; what it takes must not get out through a view.
        let Ok(ingested) = store.ingest(&model) else {
            continue;
        };
        let dir = store.root().join("views/v");
        let refused = store.export_view(&ingested.model, ViewKind::HfSharded, &dir);
        assert!(
            matches!(refused, Err(Error::ViewUnsupported { .. })),
            "{name}: {refused:?}"
        );
        assert!(!dir.exists());
    }
    // Nor take the place of the view's own files.
    let mut model = base();
    let index = "model.safetensors.index.json";
    model.sidecars = vec![Sidecar {
        name: index.into(),
        bytes: b"{}".to_vec(),
    }];
    let id = store.ingest(&model).unwrap().model;
    let dir = store.root().join("views/v");
    store.export_view(&id, ViewKind::HfSharded, &dir).unwrap();
    assert_eq!(contents(&*open_model(&dir).unwrap()), contents(&model));
}

#[test]
fn what_a_view_copies_counts_against_the_stores_quota() {
    let (dir, store) = store();
    let renamed = |prefix: &str, store: &Store| {
        let model = MemoryModel::default()
            .with_random(&format!("{prefix}a"), 400_000, 1)
            .with_random(&format!("{prefix}b"), 400_000, 2);
        store.ingest(&model).unwrap().model
    };
    renamed("", &store);
    let id = renamed("other.", &store);
    let stored = store.stats().unwrap().stored;
    // Room for one copy of what the store has under other names, and not for two.
    let limited = Store::open(tetris_store::StoreConfig {
        quota: Some(stored + ByteSize::new(1_000_000)),
        ..store.config().clone()
    })
    .unwrap();
    let views = limited.root().join("views");
    let export = |name| limited.export_view(&id, ViewKind::HfSharded, &views.join(name));
    let first = export("one").unwrap();
    assert!(first.copied > ByteSize::new(800_000), "{}", first.copied);
    assert!(limited.stats().unwrap().views >= first.copied);
    let refused = export("two").unwrap_err();
    assert!(matches!(refused, Error::QuotaExceeded { .. }), "{refused}");
    assert!(!views.join("two").exists());
    assert_eq!(unfinished(&limited), 0);
    fs::remove_dir_all(views.join("one")).unwrap();
    export("two").unwrap();
    drop(dir);
}
