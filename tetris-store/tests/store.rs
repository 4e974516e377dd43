//! What goes in comes out, once.
#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

mod common;

use carlsbad_types::DType;
use common::{MemoryModel, random_bytes, store};
use tetris_store::{Error, IngestOptions};

#[test]
fn a_model_comes_out_as_it_went_in() {
    let (_dir, store) = store();
    let model = MemoryModel::default()
        .with_random("big", 5 << 20, 1)
        .with_random("one piece", 1 << 20, 2)
        .with_random("odd", (3 << 20) + 17, 3)
        .with_random("small", 100, 4)
        .with("wide", DType::F64, &[3], random_bytes(24, 5))
        .with("scalar", DType::F32, &[], random_bytes(4, 6))
        .with("empty", DType::F32, &[0, 7], vec![]);
    let ingested = store.ingest(&model).unwrap();
    assert_eq!(ingested.written, ingested.bytes);
    model.check(&store, &ingested.model);
}

#[test]
fn zero_size_and_scalar_tensors_are_tensors() {
    let (_dir, store) = store();
    let model = MemoryModel::default()
        .with("empty", DType::F32, &[0], vec![])
        .with("also empty", DType::I64, &[4, 0], vec![])
        .with("scalar", DType::BF16, &[], vec![1, 2]);
    let ingested = store.ingest(&model).unwrap();
    model.check(&store, &ingested.model);
    let nothing = store.ingest(&MemoryModel::default()).unwrap();
    MemoryModel::default().check(&store, &nothing.model);
}

#[test]
fn duplicates_write_nothing() {
    let (_dir, store) = store();
    let model = MemoryModel::default()
        .with_random("a", 3 << 20, 1)
        .with_random("b", 1000, 2);
    let first = store.ingest(&model).unwrap();
    let again = store.ingest(&model).unwrap();
    assert_eq!(first.model, again.model);
    assert_eq!(again.written.get(), 0);
    assert_eq!(again.shared(), again.bytes);

    // A fine-tune under other names shares what it did not change.
    let tuned = MemoryModel::default()
        .with_random("renamed a", 3 << 20, 1)
        .with_random("head", 1 << 20, 9);
    let tuned_in = store.ingest(&tuned).unwrap();
    assert_eq!(tuned_in.written.get(), 1 << 20);
    tuned.check(&store, &tuned_in.model);

    // Tied weights: one tensor under two names of one model.
    let tied = MemoryModel::default()
        .with_random("in", 2 << 20, 7)
        .with_random("out", 2 << 20, 7);
    let tied_in = store.ingest(&tied).unwrap();
    assert_eq!(tied_in.written.get(), 2 << 20);
    tied.check(&store, &tied_in.model);
}

#[test]
fn equal_bytes_with_another_dtype_or_shape_are_other_tensors() {
    let (_dir, store) = store();
    let bytes = random_bytes(1 << 20, 1);
    let model = MemoryModel::default()
        .with("f32", DType::F32, &[512, 512], bytes.clone())
        .with("i32", DType::I32, &[512, 512], bytes.clone())
        .with("flat", DType::F32, &[512 * 512], bytes);
    let ingested = store.ingest(&model).unwrap();
    assert_eq!(ingested.written, ingested.bytes);
    model.check(&store, &ingested.model);
    let ids: std::collections::HashSet<_> = store
        .manifest(&ingested.model)
        .unwrap()
        .tensors
        .iter()
        .map(|tensor| tensor.id)
        .collect();
    assert_eq!(ids.len(), 3);
}

#[test]
fn stored_files_are_safetensors_files() {
    let (_dir, store) = store();
    let model = MemoryModel::default()
        .with("weights", DType::F32, &[300, 300], random_bytes(360_000, 1))
        .with(
            "__metadata__",
            DType::U8,
            &[70_000],
            random_bytes(70_000, 2),
        )
        .with(
            &"long".repeat(2000),
            DType::U8,
            &[70_000],
            random_bytes(70_000, 3),
        )
        .with("half", DType::F16, &[3], random_bytes(6, 4))
        .with("double", DType::F64, &[2, 0, 3], vec![])
        .with("b", DType::F64, &[1], random_bytes(8, 5))
        .with("a \"quoted\"", DType::U8, &[5], random_bytes(5, 6));
    let ingested = store.ingest(&model).unwrap();
    let manifest = store.manifest(&ingested.model).unwrap();
    for object in manifest.objects() {
        let bytes = std::fs::read(store.object_path(&object).unwrap()).unwrap();
        let (header, _) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
        assert_eq!((header + 8) % 4096, 0);
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        for entry in manifest.tensors.iter().filter(|t| t.object == object) {
            let view = match file.tensor(&entry.name) {
                Ok(view) => view,
                Err(_) => file.tensor("tensor").unwrap(),
            };
            assert_eq!(view.shape(), entry.shape.dims());
            assert_eq!(view.data(), model.bytes_of(&entry.name));
        }
    }
}

#[test]
fn labels_and_prefixes_lead_to_models() {
    let (_dir, store) = store();
    let model = MemoryModel::default().with_random("a", 10, 1);
    let options = IngestOptions {
        label: Some("silero-v5"),
        ..Default::default()
    };
    let id = store.ingest_with(&model, &options).unwrap().model;
    assert_eq!(store.resolve("silero-v5").unwrap(), id);
    assert_eq!(store.resolve(&id.to_string()).unwrap(), id);
    assert_eq!(store.resolve(&format!("{id:.8}")).unwrap(), id);
    for unknown in ["", "silero", "../names/silero-v5", "zz"] {
        assert!(matches!(
            store.resolve(unknown),
            Err(Error::UnknownModel { .. })
        ));
    }
    for bad in ["", "../x", ".hidden", "a/b", "a b", &"x".repeat(129)] {
        let refused = store.set_label(bad, &id);
        assert!(matches!(refused, Err(Error::BadLabel { .. })), "{bad}");
    }
    assert_eq!(store.models().unwrap()[0].labels, ["silero-v5"]);
    assert!(store.remove_label("silero-v5").unwrap());
    assert!(!store.remove_label("silero-v5").unwrap());
}

#[test]
fn a_directory_with_something_else_in_it_is_refused() {
    let dir = common::scratch();
    std::fs::write(dir.path().join("precious"), "data").unwrap();
    let refused = tetris_store::Store::open(tetris_store::StoreConfig::at(dir.path()));
    assert!(matches!(refused, Err(Error::NotAStore { .. })));

    let (_dir, store) = store();
    let mut other = store.config().clone();
    other.domain = tetris_store::Domain::new("tenant");
    let refused = tetris_store::Store::open(other);
    assert!(matches!(refused, Err(Error::NotAStore { .. })));
}

#[test]
fn memory_files_are_sealed_belong_to_one_process_and_end_with_it() {
    let dir = common::scratch();
    let mut config = tetris_store::StoreConfig::at(dir.path().join("store"));
    config.backing = tetris_store::BackingKind::Memfd;
    config.keep_alive = std::time::Duration::ZERO;
    let store = tetris_store::Store::open(config.clone()).unwrap();
    let model = MemoryModel::default()
        .with_random("a", 3 << 20, 1)
        .with_random("b", 100, 2);
    let first = store.ingest(&model).unwrap();
    assert_eq!(store.ingest(&model).unwrap().written.get(), 0);
    model.check(&store, &first.model);
    assert_eq!(store.verify().unwrap().damaged, []);
    assert!(matches!(
        tetris_store::Store::open(config.clone()),
        Err(Error::Busy { .. })
    ));

    let shared = store.attach(&first.model).unwrap();
    assert!(
        store
            .object_path(&shared.manifest().tensors[0].object)
            .is_none()
    );
    assert_eq!(store.reclaim().unwrap().leased, 1);
    drop(shared);
    assert_eq!(store.reclaim().unwrap().freed_objects, 2);

    store.ingest(&model).unwrap();
    drop(store);
    let next = tetris_store::Store::open(config).unwrap();
    assert_eq!(next.stats().unwrap().models, 0);
    assert_eq!(next.ingest(&model).unwrap().written, first.written);
}

/// The seals that nobody can take away: no writing, no truncating, no new writable mapping.
#[test]
fn a_sealed_memory_file_cannot_be_changed_even_by_its_owner() {
    let dir = common::scratch();
    let mut config = tetris_store::StoreConfig::at(dir.path().join("store"));
    config.backing = tetris_store::BackingKind::Memfd;
    let store = tetris_store::Store::open(config).unwrap();
    let model = MemoryModel::default().with_random("a", 1 << 20, 1);
    store.ingest(&model).unwrap();
    let mut tried = 0;
    for fd in std::fs::read_dir("/proc/self/fd").unwrap() {
        let path = fd.unwrap().path();
        let target = std::fs::read_link(&path).unwrap_or_default();
        if !target.to_string_lossy().contains("memfd:tetris-store") {
            continue;
        }
        let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
        if file.metadata().unwrap().len() != (1 << 20) + 4096 {
            continue;
        }
        tried += 1;
        assert!(file.set_len(0).is_err());
        assert!(std::os::unix::fs::FileExt::write_at(&file, b"x", 5000).is_err());
    }
    assert!(tried > 0);
}

#[test]
fn a_tensor_of_many_extents_is_stored_whole() {
    let (_dir, store) = store();
    let mut shape = vec![1; 3000];
    shape.push(70_000);
    let model = MemoryModel::default().with("a", DType::U8, &shape, random_bytes(70_000, 1));
    let ingested = store.ingest(&model);
    match ingested {
        Ok(ingested) => {
            model.check(&store, &ingested.model);
            assert_eq!(store.verify().unwrap().damaged, []);
        }
        Err(error) => assert!(matches!(error, Error::BadShape { .. }), "{error}"),
    }
}

/// A sparse file costs its owner nothing, and may be longer than any memory.
struct Endless(Vec<tetris_store::SourceTensor>);

impl tetris_store::ModelSource for Endless {
    fn format(&self) -> tetris_store::SourceFormat {
        tetris_store::SourceFormat::Safetensors
    }
    fn tensors(&self) -> &[tetris_store::SourceTensor] {
        &self.0
    }
    fn read_at(&self, _: usize, offset: u64, into: &mut [u8]) -> tetris_store::Result<()> {
        into.fill(0);
        if (4 << 20..1 << 61).contains(&offset) {
            return Err(Error::Io {
                what: "read",
                path: "endless".into(),
                source: std::io::ErrorKind::UnexpectedEof.into(),
            });
        }
        Ok(())
    }
    fn sidecars(&self) -> tetris_store::Result<Vec<tetris_store::Sidecar>> {
        Ok(Vec::new())
    }
}

#[test]
fn a_tensor_longer_than_any_memory_takes_none_before_it_is_read() {
    let (_dir, store) = store();
    let len = 1 << 62;
    let endless = Endless(vec![tetris_store::SourceTensor {
        name: "a".into(),
        element: tetris_store::ElementType::Plain(DType::U8),
        shape: carlsbad_types::Shape::from([len as usize]),
        len,
    }]);
    let refused = store.ingest(&endless);
    assert!(matches!(refused, Err(Error::Io { .. })), "{refused:?}");
    assert_eq!(store.stats().unwrap().objects, 0);
}
