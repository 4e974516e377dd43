//! A program that keeps its own global allocator gets copies, and is told why.
#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

mod common;

use candle_core::{DType, Module, Tensor};
use carlsbad_kit::leak::LeakGuard;
use carlsbad_types::DType as Stored;
use common::{MemoryModel, store};
use std::sync::Arc;
use tetris_store::candle::{CopyReason, MappedLinear, SharedTensors};

fn ones(elements: usize) -> Vec<u8> {
    1f32.to_le_bytes().repeat(elements)
}

#[test]
fn not_registered_is_reported_and_the_copies_are_right() {
    let (dir, store) = store();
    let model = MemoryModel::default()
        .with("l.weight", Stored::F32, &[300, 200], ones(60_000))
        .with("l.bias", Stored::F32, &[300], ones(300));
    let id = store.ingest(&model).unwrap().model;
    let leaks = LeakGuard::beneath(dir.path());
    let attached = Arc::new(store.attach(&id).unwrap());
    let tensors = SharedTensors::of(&attached).unwrap();
    let report = tensors.report();
    assert_eq!(report.mapped, 0);
    assert_eq!(report.copied.len(), 2);
    for copied in &report.copied {
        assert_eq!(copied.reason, CopyReason::NotRegistered);
    }
    assert!(
        report.to_string().contains("#[global_allocator]"),
        "{report}"
    );
    let x = Tensor::ones((2, 200), DType::F32, &candle_core::Device::Cpu).unwrap();
    let builder = tensors.var_builder(DType::F32).pp("l");
    let copied = candle_nn::linear(200, 300, builder)
        .unwrap()
        .forward(&x)
        .unwrap();
    // The layer over mapped bytes needs no allocator.
    let mapped = MappedLinear::load(&attached, "l")
        .unwrap()
        .forward(&x)
        .unwrap();
    for y in [copied, mapped] {
        assert!(
            y.flatten_all()
                .unwrap()
                .to_vec1::<f32>()
                .unwrap()
                .iter()
                .all(|&y| y == 201.0)
        );
    }
    drop((attached, tensors));
    leaks.check();
}
