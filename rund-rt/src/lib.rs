//! Hundreds of secure sandboxes a second, thousands on a machine.

mod backend;
pub mod cgroup;
mod error;
mod init;
#[cfg(target_arch = "x86_64")]
mod kvm_elf;
pub mod oci;
mod process;
mod qemu;
pub mod rootfs;
mod runtime;
mod sandbox;

pub use backend::{
    Backend, Capabilities, CloneSpec, Exit, Instance, Isolation, Kill, KillHandle, Limits, Output,
    Reuse, SavedState, SnapshotPoint, Stats, Status, Stdin, Template, TemplateSpec,
};
pub use error::{Error, Result};
pub use init::init;
#[cfg(target_arch = "x86_64")]
pub use kvm_elf::KvmElf;
pub use process::ProcessBackend;
pub use qemu::{Qemu, initramfs as qemu_initramfs};
pub use runtime::{Runtime, RuntimeBuilder};
pub use sandbox::Sandbox;
