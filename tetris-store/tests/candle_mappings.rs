//! A process that attaches for ever is told, and can still allocate: a test binary of its own, since
//! nothing else may map meanwhile.
#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

mod common;

use common::{MemoryModel, store};
use tetris_store::candle::{CopyReason, MapAlloc, SharedTensors};

#[global_allocator]
static ALLOCATOR: MapAlloc = MapAlloc::system();

/// Stored files of the model: a mapping each.
const FILES: u64 = 400;
/// More than that many attaches, no machine's limit allows that has the kernel's default.
const ATTACHES: usize = 200;

#[test]
fn attaching_for_ever_leaves_mappings_for_the_rest_of_the_program() {
    let limit = std::fs::read_to_string("/proc/sys/vm/max_map_count").unwrap();
    let limit: usize = limit.trim().parse().unwrap();
    if limit > ATTACHES * FILES as usize {
        println!("SKIPPED: vm.max_map_count is {limit}, too many to use up");
        return;
    }
    let (_dir, store) = store();
    let model = (0..FILES).fold(MemoryModel::default(), |model, seed| {
        model.with_random(&format!("t{seed}"), 64 << 10, seed)
    });
    let id = store.ingest(&model).unwrap().model;
    let mut attached = Vec::new();
    let reason = loop {
        let shared = store.attach(&id).unwrap();
        attached.push(SharedTensors::of(&shared).unwrap());
        let report = attached.last().unwrap().report();
        if let Some(copied) = report.copied.first() {
            break copied.reason;
        }
        assert!(attached.len() < ATTACHES, "no limit was met");
    };
    assert!(matches!(reason, CopyReason::NoVa), "{reason}");
    // glibc maps each of these.
    let large: Vec<Vec<u8>> = (0..1000).map(|_| vec![1; 256 << 10]).collect();
    assert_eq!(large.len(), 1000);
    // What was given back can be used again.
    drop((attached, large));
    let again = SharedTensors::of(&store.attach(&id).unwrap()).unwrap();
    assert_eq!(again.report().copied.len(), 0);
}
