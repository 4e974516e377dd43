//! Figure 5: how fast a model gets into the store, beside what nobody can do without: hashing its
//! bytes, and copying them to where there was no memory before.
//!
//! Both rivals use as many threads as the ingest. The copy goes to new memory, since storing has to
//! get memory too; what a copy onto memory that is there already does is in the note.
#![allow(
    clippy::unwrap_used,
    reason = "a bench says what went wrong by failing"
)]

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::thread;

use carlsbad_kit::figure::{Figure, is_quick};
use carlsbad_kit::sample::{Interleaved, interleave, median, time};
use carlsbad_kit::scratch;
use tetris_store::{Store, StoreConfig, open_model};

/// As many and as large as the matrices and vectors of a 12-layer encoder with 768 columns.
const LAYERS: usize = 12;
const MATRICES: [usize; 6] = [
    768 * 768 * 4,
    768 * 768 * 4,
    768 * 768 * 4,
    768 * 768 * 4,
    768 * 3072 * 4,
    768 * 3072 * 4,
];
const VECTORS: [usize; 10] = [3072; 10];
const EMBEDDING: usize = 30_522 * 768 * 4;

fn main() {
    let (warm_up, rounds) = if is_quick() { (0, 1) } else { (2, 15) };
    let dir = scratch::on_tmpfs().unwrap();
    let file = dir.path().join("model.safetensors");
    let bytes = write_model(&file, if is_quick() { 1 } else { LAYERS });
    let source = open_model(&file).unwrap();
    let config = StoreConfig::at(dir.path().join("store"));
    let threads = config.threads;
    let rate = |seconds: f64| bytes.len() as f64 / 1e9 / seconds;

    let ingest = || {
        let store = Store::open(config.clone()).unwrap();
        let (elapsed, done) = time(|| store.ingest(source.as_ref()).unwrap());
        assert_eq!(done.written, done.bytes);
        std::fs::remove_dir_all(store.root()).unwrap();
        rate(elapsed.as_secs_f64())
    };
    let (mut hashed, mut copied, mut onto) = (Vec::new(), Vec::new(), Vec::new());
    let mut there = vec![1; bytes.len()];
    let rival = || {
        hashed.push(rate(hash(&bytes)));
        copied.push(rate(copy_to_new_memory(&bytes, threads)));
        onto.push(rate(time(|| there.copy_from_slice(&bytes)).0.as_secs_f64()));
        hashed.last().unwrap().min(*copied.last().unwrap())
    };
    let samples = interleave(warm_up, rounds, ingest, rival);

    let store = Store::open(config.clone()).unwrap();
    store.ingest(source.as_ref()).unwrap();
    let before = store.stats().unwrap();
    let mut again = Interleaved::default();
    for _ in 0..rounds {
        let (elapsed, done) = time(|| store.ingest(source.as_ref()).unwrap());
        again.ours.push(rate(elapsed.as_secs_f64()));
        again.rival.push(done.written.get() as f64);
    }
    assert_eq!(store.stats().unwrap().stored, before.stored);

    let note = format!(
        "{:.0} MB in {} tensors, source in the page cache, {threads} threads each; \
         blake3 {:.2} GB/s, memcpy to new memory {:.2} GB/s \
         (one thread onto memory that is there: {:.2} GB/s); a duplicate goes in at {:.2} GB/s",
        bytes.len() as f64 / 1e6,
        source.tensors().len(),
        median(&hashed),
        median(&copied),
        median(&onto),
        median(&again.ours),
    );
    Figure::new("tetris-store/5", "ingest of a new model", "GB/s")
        .against("the slower of blake3 and memcpy to new memory", samples)
        .note(note)
        .emit()
        .unwrap();
    Figure::new(
        "tetris-store/5b",
        "bytes written by the ingest of a duplicate",
        "B",
    )
    .samples(again.rival)
    .emit()
    .unwrap();
}

/// Writes a safetensors file of that many layers and gives its tensors' bytes.
fn write_model(path: &Path, layers: usize) -> Vec<u8> {
    let mut sizes = vec![(
        "embedding".to_owned(),
        if layers == 1 { 1 << 20 } else { EMBEDDING },
    )];
    for layer in 0..layers {
        let each = MATRICES.iter().chain(&VECTORS).enumerate();
        sizes.extend(each.map(|(i, size)| (format!("layer.{layer:02}.{i:02}"), *size)));
    }
    let mut header = serde_json::Map::new();
    let mut end = 0;
    for (name, size) in &sizes {
        let offsets = [end, end + size];
        let entry =
            serde_json::json!({"dtype": "F32", "shape": [size / 4], "data_offsets": offsets});
        header.insert(name.clone(), entry);
        end += size;
    }
    let mut bytes = Vec::with_capacity(end);
    let mut state = 1u64;
    while bytes.len() < end {
        // Knuth's MMIX constants: nothing here looks at the bytes but hash functions.
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        bytes.extend_from_slice(&(state >> 32).to_le_bytes()[..4]);
    }
    let header = serde_json::Value::Object(header).to_string();
    let mut file = File::create(path).unwrap();
    file.write_all(&(header.len() as u64).to_le_bytes())
        .unwrap();
    file.write_all(header.as_bytes()).unwrap();
    file.write_all(&bytes).unwrap();
    bytes
}

/// Seconds that blake3 takes, on all its threads.
fn hash(bytes: &[u8]) -> f64 {
    let digest = || {
        let mut hasher = blake3::Hasher::new();
        hasher.update_rayon(bytes);
        std::hint::black_box(hasher.finalize())
    };
    time(digest).0.as_secs_f64()
}

/// Seconds that a copy to new memory takes, on `threads` threads.
fn copy_to_new_memory(bytes: &[u8], threads: usize) -> f64 {
    let share = bytes.len().div_ceil(threads);
    let copy = || {
        thread::scope(|scope| {
            let copies: Vec<_> = bytes
                .chunks(share)
                .map(|part| scope.spawn(move || std::hint::black_box(part.to_vec())))
                .collect();
            // Kept until the clock has stopped: giving memory back is not part of it.
            copies
                .into_iter()
                .map(|copy| copy.join().unwrap())
                .collect::<Vec<_>>()
        })
    };
    time(copy).0.as_secs_f64()
}
