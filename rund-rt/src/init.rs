//! This program started again in another role: helper processes are never forked from a program
//! that may have threads.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};

use crate::error::{Error, Result};

/// The variable by which a helper knows its role.
const ROLE: &str = "RUND_RT_ROLE";
/// The role of a zygote.
pub(crate) const ZYGOTE: &str = "zygote";

/// Whether `init` was called, so that this program can be a helper.
static CALLED: AtomicBool = AtomicBool::new(false);

/// Call this first thing in `main`, before any thread is started: where this process was started
/// as a helper of another, it does that job and never returns.
///
/// A program that cannot do that names a helper program instead
/// ([`RuntimeBuilder::helper`](crate::RuntimeBuilder::helper)), such as the command-line tool `rund`.
pub fn init() {
    CALLED.store(true, Ordering::Release);
    crate::process::helper_or_return();
    let Some(role) = std::env::var_os(ROLE) else {
        return;
    };
    #[cfg(target_arch = "x86_64")]
    if role == ZYGOTE {
        std::process::exit(crate::kvm_elf::zygote());
    }
    let _another_programs = role;
}

/// The program that is started as a helper.
pub(crate) fn program(helper: Option<&Path>) -> Result<PathBuf> {
    match helper {
        Some(path) => Ok(path.to_owned()),
        None if CALLED.load(Ordering::Acquire) => Ok("/proc/self/exe".into()),
        None => Err(Error::NotInitialised),
    }
}

/// Starts a helper whose standard input is `input`.
pub(crate) fn start(role: &str, helper: Option<&Path>, input: Stdio) -> Result<Child> {
    let program = program(helper)?;
    Command::new(&program)
        .arg0("rund-zygote")
        .env_clear()
        .env(ROLE, role)
        .current_dir("/")
        .stdin(input)
        .stdout(Stdio::null())
        .spawn()
        .map_err(Error::io("start", program))
}

use std::os::unix::process::CommandExt;
