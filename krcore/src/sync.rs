//! The atomics of the ring: the model checker puts its own in their place (`tests/loom.rs`).

pub(crate) use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
