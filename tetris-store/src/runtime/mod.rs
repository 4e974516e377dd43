//! Runtime sharing: many requests in one instance, by batching and by concurrency (Tetris, ATC'22).
//!
//! ```
//! use std::time::Duration;
//! use carlsbad_types::ByteSize;
//! use tetris_store::runtime::{CpuPrice, Instance, InstanceConfig, Profile, ProfileRow};
//!
//! // Measured: one request alone takes 20 ms; sixteen at a time take 40 ms.
//! let alone = ProfileRow {
//!     cpus: 1.0, gpu_share: 0.0, memory: ByteSize::mib(60),
//!     batch: 1, concurrency: 1, latency: Duration::from_millis(20),
//! };
//! let batched = ProfileRow { batch: 16, latency: Duration::from_millis(40), ..alone };
//! let profile = Profile::new(vec![alone, batched])?;
//!
//! let slo = Duration::from_millis(200);
//! let row = profile.cheapest(slo, CpuPrice::default())?;
//! assert_eq!(row.batch, 16);
//!
//! let instance = Instance::start(InstanceConfig::new(row, slo), |batch: Vec<f32>| {
//!     batch.into_iter().map(f32::sqrt).collect()
//! })?;
//! assert_eq!(instance.call(9.0)?, 3.0);
//! # Ok::<(), tetris_store::Error>(())
//! ```

mod batcher;
mod instance;
mod profile;

pub use instance::{Instance, InstanceConfig, InstanceStats, Ticket};
pub(crate) use profile::seconds;
pub use profile::{CpuPrice, Profile, ProfileRow};
