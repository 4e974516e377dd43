//! Sandboxes with an address space of their own, by the hundred a second.
//!
//! A [`Runtime`] makes a [`Template`] of a program: it runs it to a point and saves memory and
//! registers. Each [`Sandbox`] is a clone of a template, in a virtual machine of its own, whose pages
//! are the template's until it writes to them. What it may see is a directory, read-only; what it
//! writes goes to a layer of its own, which is gone when it is.
//!
//! # How to start
//!
//! ```no_run
//! use rund_rt::{CloneSpec, Runtime, SnapshotPoint, Stdin, TemplateSpec};
//!
//! fn main() -> rund_rt::Result<()> {
//!     rund_rt::init(); // helper processes are this program started again
//!     let runtime = Runtime::builder().require_vm().build()?;
//!     let spec = TemplateSpec::new("/srv/function") // a static Linux program
//!         .root("/srv/image")
//!         .snapshot(SnapshotPoint::FirstInput);
//!     let template = runtime.prepare(&spec)?;
//!     let input = Stdin::Bytes(b"a request\n".to_vec());
//!     let sandbox = runtime.start(&template, CloneSpec::new().stdin(input))?;
//!     let exit = sandbox.wait(None)?;
//!     assert!(exit.status.success());
//!     Ok(())
//! }
//! ```
//!
//! # What to look at for what
//!
//! | you want to | look at |
//! |---|---|
//! | know which isolation is in force | [`Runtime::capabilities`], [`Isolation`], [`Stats`] |
//! | decide when a template is saved | [`SnapshotPoint`], [`Template::shared_draws`] |
//! | keep a template on disk | [`Template::save`], [`Runtime::load`] |
//! | give and take bytes while it runs | [`Stdin::Piped`], [`Output::Piped`] |
//! | limit, kill, wait | [`Limits`], [`Sandbox::kill_handle`], [`Sandbox::wait`] |
//! | have a machine that nobody had before | [`Reuse::Fresh`] |
//! | limit memory and processors | [`cgroup::CgroupPool`], [`RuntimeBuilder::cgroups`] |
//! | split root file systems for other backends | [`rootfs`] |
//! | run OCI bundles | [`oci`], and feature `shim` for containerd |
//! | run a guest with a Linux kernel | [`Qemu`] |
//! | run without KVM, with less isolation | [`ProcessBackend`] |
//!
//! # How it fits together
//!
//! A [`Backend`] makes templates and clones. `KvmElf`, the default, starts a *zygote* for each
//! template: this program again, with one thread, which gives up files, system calls and
//! capabilities before it does anything. The zygote forks a *virtual machine monitor* for each
//! sandbox; one that has served is set back to the template and serves again. The guest has no
//! kernel: its system calls are answered by a shim inside the machine, or by the monitor, which knows
//! those that programs need and answers ENOSYS to the others.
//!
//! Every failure is an [`Error`] that says what was tried, on what, and what to do. What the crate
//! does not do stands in the README under *Limits*.

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

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
pub use carlsbad_types::ByteSize;
pub use error::{Error, Result};
pub use init::init;
#[cfg(target_arch = "x86_64")]
pub use kvm_elf::KvmElf;
#[cfg(all(fuzzing, target_arch = "x86_64"))]
#[doc(hidden)]
pub use kvm_elf::fuzzing;
pub use process::ProcessBackend;
pub use qemu::{Qemu, initramfs as qemu_initramfs};
pub use runtime::{Runtime, RuntimeBuilder};
pub use sandbox::Sandbox;
