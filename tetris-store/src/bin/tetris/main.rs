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
    let options = match Options::try_parse() {
        Ok(options) => options,
        Err(error) if error.use_stderr() && wants_json() => {
            output::json_error(error.to_string().trim_end(), kind(BAD_USAGE));
            return ExitCode::from(BAD_USAGE);
        }
        Err(error) => error.exit(),
    };
    match run(&options) {
        Ok(code) => code,
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            let code = exit_code(&error);
            let text = text(&error);
            if options.global.json {
                output::json_error(&text, kind(code));
            } else {
                output::error(&text);
            }
            ExitCode::from(code)
        }
    }
}

/// What went wrong and why, each cause once: the library's messages end with their own.
fn text(error: &anyhow::Error) -> String {
    error
        .chain()
        .skip(1)
        .fold(error.to_string(), |text, cause| {
            let cause = cause.to_string();
            if text.ends_with(&cause) {
                text
            } else {
                format!("{text}: {cause}")
            }
        })
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

/// clap's exit code.
const BAD_USAGE: u8 = 2;

/// Whether JSON was asked for by a command line that cannot be understood. What comes behind `--`
/// is for another program.
fn wants_json() -> bool {
    let ours = std::env::args_os().skip(1).take_while(|it| it != "--");
    ours.into_iter().any(|it| it == "--json")
}

/// The name of an exit code.
const fn kind(code: u8) -> &'static str {
    match code {
        BAD_USAGE => "bad_usage",
        3 => "no_such_model",
        4 => "not_allowed",
        5 => "no_room",
        6 => "unavailable",
        _ => "failed",
    }
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
