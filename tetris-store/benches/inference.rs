//! Figures 3c and 4: inference on shared weights, the first one and every other.
#![allow(
    clippy::unwrap_used,
    missing_docs,
    reason = "a bench says what went wrong by failing"
)]

mod bert;

use carlsbad_kit::capability::Capability;
use carlsbad_kit::child::{self, Role};
use carlsbad_kit::figure::{Figure, is_quick};
use carlsbad_kit::sample::{interleave, time_ms};
use carlsbad_kit::scratch;
use tetris_store::candle::MapAlloc;
use tetris_store::{ModelId, Store, StoreConfig};

#[global_allocator]
static ALLOCATOR: MapAlloc = MapAlloc::system();

/// A new process, as a new instance is: from nothing to the answer of its first inference.
fn first_inference() -> bool {
    let Some(shared) = child::arguments::<Option<(String, String)>>("first") else {
        return false;
    };
    let config = bert::config();
    let elapsed = time_ms(|| match &shared {
        None => {
            let model = bert::load_candle(&bert::weights(), &config);
            let answer = bert::infer(&model, &bert::QUESTION).unwrap();
            (bert::bits(&answer), Some(model), None)
        }
        Some((root, id)) => {
            let store = Store::open(StoreConfig::at(root)).unwrap();
            let id: ModelId = id.parse().unwrap();
            let (model, tensors) = bert::load_shared(&store, &id, &config);
            let answer = bert::infer(&model, &bert::QUESTION).unwrap();
            (bert::bits(&answer), Some(model), Some(tensors))
        }
    });
    child::tell(elapsed);
    true
}

fn main() {
    if first_inference() {
        return;
    }
    let first = Figure::new(
        "tetris-store/3c",
        "attach and first inference, page faults included",
        "ms",
    );
    let steady = Figure::new(
        "tetris-store/4",
        "inference on shared weights, outputs bit-equal",
        "ms",
    );
    if !Capability::Data.is_present() {
        first.without(Capability::Data).emit().unwrap();
        steady.without(Capability::Data).emit().unwrap();
        return;
    }
    let directory = scratch::on_tmpfs().unwrap();
    let store = Store::open(StoreConfig::at(directory.path().join("store"))).unwrap();
    let id = bert::ingest(&store);
    let config = bert::config();

    let (shared, _tensors) = bert::load_shared(&store, &id, &config);
    let private = bert::load_candle(&bert::weights(), &config);
    for ids in [&bert::QUESTION[..], &bert::text(64)] {
        let (ours, theirs) = (bert::infer(&shared, ids), bert::infer(&private, ids));
        assert!(bert::bits(&ours.unwrap()) == bert::bits(&theirs.unwrap()));
    }
    let (rounds, texts) = if is_quick() { (1, 1) } else { (101, 3) };
    let text = bert::text(64);
    let run = |model| {
        let infer = || {
            (0..texts)
                .map(|_| bert::infer(model, &text).unwrap())
                .collect::<Vec<_>>()
        };
        time_ms(infer) / f64::from(texts)
    };
    let samples = interleave(3, rounds, || run(&shared), || run(&private));
    steady
        .against("private weights", samples)
        .note("MiniLM-L6, one text of 64 tokens, in one process")
        .emit()
        .unwrap();

    let rounds = if is_quick() { 1 } else { 31 };
    let start = |shared: Option<(&str, String)>| {
        let mut role = Role::main("first").start(&shared).unwrap();
        let elapsed = role.hear_any().unwrap().parse::<f64>().unwrap();
        assert!(role.wait().unwrap().success());
        elapsed
    };
    let root = store.root().to_str().unwrap();
    let samples = interleave(
        2,
        rounds,
        || start(Some((root, id.to_string()))),
        || start(None),
    );
    first
        .against("candle load and first inference", samples)
        .note("MiniLM-L6, 90.9 MB, one question of 9 tokens, each in a new process")
        .emit()
        .unwrap();
}
