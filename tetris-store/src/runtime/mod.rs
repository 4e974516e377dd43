//! Runtime sharing: many requests in one instance, by batching and by concurrency (§3.1).

mod profile;

pub(crate) use profile::seconds;
pub use profile::{CpuPrice, Profile, ProfileRow};
