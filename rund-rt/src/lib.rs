//! Hundreds of secure sandboxes a second, thousands on a machine.

mod backend;
pub mod cgroup;
mod error;
pub mod process;
pub mod rootfs;
mod sandbox;

pub use backend::{
    Backend, Capabilities, CloneSpec, Exit, Instance, Isolation, Kill, KillHandle, Limits, Output,
    Reuse, SavedState, SnapshotPoint, Stats, Status, Stdin, Template, TemplateSpec,
};
pub use error::{Error, Result};
pub use sandbox::Sandbox;
