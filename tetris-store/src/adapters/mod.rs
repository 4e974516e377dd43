//! Runtimes that link against this crate.

#[cfg(feature = "candle")]
pub mod candle;
