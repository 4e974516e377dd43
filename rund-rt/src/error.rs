//! What can go wrong, said so that a reader knows what was tried, on what, and what to do.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use crate::backend::Isolation;

/// A result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// Everything that can go wrong.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused something.
    #[error("cannot {what} {}: {source}", path.display())]
    Io {
        /// What was tried, as a verb.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// A backend cannot work here.
    #[error("backend {backend} cannot work here: {why}; {fix}")]
    Unavailable {
        /// The backend.
        backend: &'static str,
        /// What was found.
        why: String,
        /// What to do.
        fix: &'static str,
    },
    /// The isolation that was asked for is stronger than what the backend gives.
    #[error("{wanted} or better was asked for, and backend {backend} gives {given} here")]
    TooLittleIsolation {
        /// The backend.
        backend: &'static str,
        /// What was asked for.
        wanted: Isolation,
        /// What it gives.
        given: Isolation,
    },
    /// A program that is no ELF file that this backend runs.
    #[error("{program} cannot be run: {why}")]
    BadProgram {
        /// Its name.
        program: String,
        /// What is wrong with it.
        why: String,
    },
    /// A saved template that is damaged, of another version, or of another processor.
    #[error("template {} cannot be used: {why}; build it again", path.display())]
    BadTemplate {
        /// Where it was read.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// The template's program ended or stopped before the point at which it was to be saved.
    #[error("the program did not reach the point at which it was to be saved: {why}")]
    NoSnapshot {
        /// How it ended, with the beginning of what it said on standard error.
        why: String,
    },
    /// A template of one backend was given to another.
    #[error("this template was built by backend {built_by}, not by {backend}")]
    ForeignTemplate {
        /// Who built it.
        built_by: &'static str,
        /// Who was asked to clone it.
        backend: &'static str,
    },
    /// A setting that cannot be met.
    #[error("{what}: {why}")]
    BadSetting {
        /// The setting.
        what: &'static str,
        /// Why it cannot be met.
        why: String,
    },
    /// A sandbox of this name is alive already.
    #[error("a sandbox called {id} is alive already")]
    DuplicateId {
        /// The name.
        id: String,
    },
    /// No free slot came within the time given.
    #[error("no free {what} within {waited:?}: raise the pool's size or wait longer")]
    PoolExhausted {
        /// What is pooled.
        what: &'static str,
        /// How long was waited.
        waited: Duration,
    },
    /// What was waited for did not happen in time.
    #[error("{what} took longer than {deadline:?}")]
    DeadlineExceeded {
        /// What was waited for.
        what: &'static str,
        /// The time that was given.
        deadline: Duration,
    },
    /// A helper process broke off: it was killed, or ran out of memory.
    #[error("the {what} process is gone: {why}")]
    HelperGone {
        /// Which one.
        what: &'static str,
        /// What is known of its end.
        why: String,
    },
    /// A helper process could not do what it was asked.
    #[error("{0}")]
    Refused(String),
    /// `rund_rt::init()` was not called at the beginning of `main`, so that this program cannot be
    /// started again as a helper.
    #[error(
        "call rund_rt::init() first thing in main, or name a helper program: helper processes are \
         this program started again"
    )]
    NotInitialised,
    /// A control group could not be made, limited or entered.
    #[error("control group {}: cannot {what}: {source}", path.display())]
    Cgroup {
        /// What was tried, as a verb.
        what: &'static str,
        /// Where.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// A limit that this machine's control groups cannot enforce.
    #[error("cannot limit {what}: {why}")]
    NoController {
        /// The limit.
        what: &'static str,
        /// What is missing.
        why: String,
    },
    /// A root file system could not be made or mounted.
    #[error("root file system {}: {why}", path.display())]
    Rootfs {
        /// Where.
        path: PathBuf,
        /// What went wrong, and what to do.
        why: String,
    },
    /// An OCI bundle that asks for what this runtime does not do, or that cannot be read.
    #[error("bundle {}: {why}", path.display())]
    BadBundle {
        /// Where.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// A virtual machine monitor of its own broke off or refused (backend `qemu`).
    #[error("qemu: cannot {what}: {why}")]
    Qemu {
        /// What was tried, as a verb.
        what: &'static str,
        /// What it said.
        why: String,
    },
}

impl Error {
    /// For `map_err`: what was tried on what.
    pub(crate) fn io(
        what: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { what, path, source }
    }
}
