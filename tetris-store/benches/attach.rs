//! Figures 3 and 3b: attach of a stored 500 MB model, beside candle's load of it.
#![allow(
    clippy::unwrap_used,
    missing_docs,
    reason = "a bench says what went wrong by failing"
)]

use std::collections::HashMap;
use std::path::Path;

use candle_core::safetensors::MmapedSafetensors;
use candle_core::{Device, Tensor};
use carlsbad_kit::figure::{Figure, is_quick};
use carlsbad_kit::sample::{Interleaved, interleave, time_ms};
use carlsbad_kit::scratch;
use tetris_store::candle::{MapAlloc, SharedTensors};
use tetris_store::{Store, StoreConfig, open_model};

#[global_allocator]
static ALLOCATOR: MapAlloc = MapAlloc::system();

/// BERT-base with 14 layers and 32,500 words: 227 tensors, 501 MB. Weights are random.
fn model(layers: usize) -> HashMap<String, Tensor> {
    let mut tensors = HashMap::new();
    let mut add = |name: String, dims: &[usize]| {
        let tensor = Tensor::rand(-1f32, 1f32, dims, &Device::Cpu).unwrap();
        tensors.insert(name, tensor);
    };
    let (hidden, wide) = (768, 3072);
    for (name, rows) in [("word", 32_500), ("position", 512), ("token_type", 2)] {
        add(
            format!("embeddings.{name}_embeddings.weight"),
            &[rows, hidden],
        );
    }
    for layer in 0..layers {
        let linears = [
            ("attention.self.query", hidden, hidden),
            ("attention.self.key", hidden, hidden),
            ("attention.self.value", hidden, hidden),
            ("attention.output.dense", hidden, hidden),
            ("intermediate.dense", wide, hidden),
            ("output.dense", hidden, wide),
        ];
        for (name, rows, columns) in linears {
            add(
                format!("encoder.layer.{layer}.{name}.weight"),
                &[rows, columns],
            );
            add(format!("encoder.layer.{layer}.{name}.bias"), &[rows]);
        }
        for name in ["attention.output.LayerNorm", "output.LayerNorm"] {
            add(format!("encoder.layer.{layer}.{name}.weight"), &[hidden]);
            add(format!("encoder.layer.{layer}.{name}.bias"), &[hidden]);
        }
    }
    tensors
}

/// Every tensor of the file, in candle's way.
fn candle_load(path: &Path) -> Vec<Tensor> {
    // SAFETY: nobody writes to the file.
    let file = unsafe { MmapedSafetensors::new(path) }.unwrap();
    let names = file.tensors();
    (names.iter())
        .map(|(name, _)| file.load(name, &Device::Cpu).unwrap())
        .collect()
}

fn main() {
    let directory = scratch::on_tmpfs().unwrap();
    let path = directory.path().join("model.safetensors");
    let store = Store::open(StoreConfig::at(directory.path().join("store"))).unwrap();
    let tensors = model(if is_quick() { 1 } else { 14 });
    candle_core::safetensors::save(&tensors, &path).unwrap();
    drop(tensors);
    let ingested = store.ingest(&*open_model(&path).unwrap()).unwrap();
    let names: Vec<String> = (store.manifest(&ingested.model).unwrap().tensors.into_iter())
        .map(|entry| entry.name)
        .collect();

    let attach = || -> Vec<Tensor> {
        let tensors = SharedTensors::of(&store.attach(&ingested.model).unwrap()).unwrap();
        names
            .iter()
            .map(|name| tensors.get(name).unwrap())
            .collect()
    };
    for (ours, theirs) in names.iter().zip(attach()) {
        // SAFETY: nobody writes to the file.
        let file = unsafe { MmapedSafetensors::new(&path) }.unwrap();
        let same = file.load(ours, &Device::Cpu).unwrap().eq(&theirs).unwrap();
        let same = same.flatten_all().unwrap().min(0).unwrap();
        assert_eq!(same.to_scalar::<u8>().unwrap(), 1, "{ours}");
    }

    let rounds = if is_quick() { 1 } else { 31 };
    let samples = interleave(
        2,
        rounds,
        || time_ms(attach),
        || time_ms(|| candle_load(&path)),
    );
    let alone = Interleaved::clone(&samples).ours;
    let note = format!(
        "{} tensors, {}, on tmpfs; until every tensor is a candle tensor",
        names.len(),
        ingested.bytes
    );
    Figure::new(
        "tetris-store/3",
        "attach of a stored 500 MB model, beside loading it",
        "ms",
    )
    .against("candle load", samples)
    .note(&note)
    .emit()
    .unwrap();
    Figure::new("tetris-store/3b", "attach of a stored 500 MB model", "ms")
        .samples(alone)
        .note(note)
        .emit()
        .unwrap();
}
