//! `tetris`: the store from the command line, with or without an agent.

mod attach;
mod backend;
mod options;
mod output;
mod plan;
mod serve;
mod store;

use std::io::ErrorKind;
use std::process::ExitCode;

use clap::Parser;
use tetris_store::Error;
use tetris_store::agent::Refusal;

use options::{Command, Options};

fn main() -> ExitCode {
    let options = Options::parse();
    match run(&options) {
        Ok(code) => code,
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            output::error(&format!("{error:#}"));
            ExitCode::from(exit_code(&error))
        }
    }
}

fn run(options: &Options) -> anyhow::Result<ExitCode> {
    let global = &options.global;
    match &options.command {
        Command::Serve(serve) => serve::serve(global, serve)?,
        Command::Attach(attach) => return attach::attach(global, attach),
        Command::Verify(verify) => return store::verify(global, verify),
        Command::Plan(plan) => plan::plan(global, plan)?,
        Command::Ingest(ingest) => store::ingest(global, ingest)?,
        Command::Ls => store::list(global)?,
        Command::Show(show) => store::show(global, show)?,
        Command::View(view) => store::view(global, view)?,
        Command::Overlap(overlap) => store::overlap(global, overlap)?,
        Command::Stats => store::stats(global)?,
        Command::Reclaim(reclaim) => store::reclaim(global, reclaim)?,
        Command::Label(label) => store::label(global, label)?,
        Command::Rm(rm) => store::remove_label(global, rm)?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Somebody who reads along has seen enough: `tetris ls | head -1`.
fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error
        .downcast_ref::<std::io::Error>()
        .is_some_and(|error| error.kind() == ErrorKind::BrokenPipe)
}

/// As `--help` says.
fn exit_code(error: &anyhow::Error) -> u8 {
    match error.downcast_ref::<Error>() {
        Some(
            Error::UnknownModel { .. }
            | Error::AmbiguousModel { .. }
            | Error::AgentRefused {
                kind: Refusal::Unknown,
                ..
            },
        ) => 3,
        Some(
            Error::ReadOnly { .. }
            | Error::ViewDenied { .. }
            | Error::AgentRefused {
                kind: Refusal::NotAllowed | Refusal::UnknownDomain,
                ..
            },
        ) => 4,
        Some(
            Error::QuotaExceeded { .. }
            | Error::NoSpace { .. }
            | Error::Infeasible(_)
            | Error::AgentRefused {
                kind: Refusal::NoRoom,
                ..
            },
        ) => 5,
        Some(
            Error::NoAgent { .. }
            | Error::AgentRunning { .. }
            | Error::Busy { .. }
            | Error::AgentRefused {
                kind: Refusal::TooMany | Refusal::Busy,
                ..
            },
        ) => 6,
        _ => 1,
    }
}
