//! `tetris attach MODEL -- COMMAND`.

use std::io;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, ExitCode};

use anyhow::Context;
use nix::sys::signal::{SigHandler, Signal, signal};

use crate::backend::Backend;
use crate::options::{Attach, Global};

/// Runs the command with a lease. Where the lease is this process's own, the command takes this
/// process's place and has it; where it belongs to a connection, this process waits and holds that.
pub(crate) fn attach(global: &Global, attach: &Attach) -> anyhow::Result<ExitCode> {
    let backend = global.backend()?;
    let shared = match &backend {
        Backend::Store(store) => store.attach(&store.resolve(&attach.model)?)?,
        Backend::Agent(client) => client.attach(&attach.model)?,
    };
    let (program, arguments) = attach.command.split_first().context("no command")?;
    let mut command = Command::new(program);
    command
        .args(arguments)
        .env("TETRIS_MODEL", shared.id().to_string());
    // The store that the model is in, and no other: the agent's may not be seen here.
    match backend.visible_store() {
        Ok(store) => command.env("TETRIS_STORE", store.root()),
        Err(_) => command.env_remove("TETRIS_STORE"),
    };
    match global.socket() {
        Some(socket) => command.env("TETRIS_AGENT", std::path::absolute(socket)?),
        None => command.env_remove("TETRIS_AGENT"),
    };
    let cannot = || format!("cannot run {}", program.display());
    if !shared.has_own_lease() {
        // Ctrl-C goes to both: the command decides, and this process stays until it has.
        for signal_ in [Signal::SIGINT, Signal::SIGQUIT] {
            // SAFETY: ignoring a signal installs no handler.
            unsafe { signal(signal_, SigHandler::SigIgn) }?;
        }
        // SAFETY: between fork and exec it only makes system calls.
        unsafe { command.pre_exec(heed_signals) };
        let status = command.status().with_context(cannot)?;
        drop(shared);
        // As shells report it.
        let code = status.code().or(status.signal().map(|signal| 128 + signal));
        return Ok(ExitCode::from(code.unwrap_or(1) as u8));
    }
    shared.keep_lease_on_exec()?;
    Err(command.exec()).with_context(cannot)
}

/// What is ignored stays ignored in a new program, unless it is undone.
fn heed_signals() -> io::Result<()> {
    for signal_ in [Signal::SIGINT, Signal::SIGQUIT] {
        // SAFETY: the default action installs no handler.
        unsafe { signal(signal_, SigHandler::SigDfl) }?;
    }
    Ok(())
}
