//! candle models on the store's pages, unmodified.

mod map_alloc;
mod mapped_linear;
mod region_plan;
mod report;
mod shared_tensors;
mod storage;
mod var_builder;
mod window;

pub use map_alloc::MapAlloc;
pub use mapped_linear::MappedLinear;
pub use report::{Copied, CopyReason, LoadReport};
pub use shared_tensors::SharedTensors;

#[cfg(test)]
mod tests;
