//! `directcxl`: CXL memory and its namespaces from the command line.

mod devices;
mod namespaces;
mod options;
mod output;

use std::io::ErrorKind;
use std::process::ExitCode;

use clap::Parser;
use directcxl::Error;

use options::{Command, Options};
use output::Unprinted;

/// clap's exit code.
const BAD_USAGE: u8 = 2;

fn main() -> ExitCode {
    let options = match Options::try_parse() {
        Ok(options) => options,
        Err(error) if error.use_stderr() && std::env::args_os().any(|it| it == "--json") => {
            output::json_error(error.to_string().trim_end(), kind(BAD_USAGE));
            return ExitCode::from(BAD_USAGE);
        }
        Err(error) if error.use_stderr() => error.exit(),
        // Help, and the version.
        Err(text) => {
            let printed = text.print().map_err(Unprinted);
            return printed
                .map_or_else(|why| report(&why.into(), false, ""), |()| ExitCode::SUCCESS);
        }
    };
    // Nothing is printed before it is done.
    let done = if options.command.changes_something() {
        "; what was asked for is done"
    } else {
        ""
    };
    run(&options).unwrap_or_else(|error| report(&error, options.global.json, done))
}

/// Says what went wrong; `done` where it was only the printing.
fn report(error: &anyhow::Error, json: bool, done: &str) -> ExitCode {
    let code = exit_code(error);
    // Ours have their source in their message already.
    let text = match (error.downcast_ref(), error.downcast_ref()) {
        // Somebody who reads along has seen enough: `directcxl list P | head -1`.
        (Some(Unprinted(why)), _) if why.kind() == ErrorKind::BrokenPipe => {
            return ExitCode::SUCCESS;
        }
        (Some(unprinted), _) => format!("{unprinted}{done}"),
        (None, Some(ours)) => Error::to_string(ours),
        (None, None) => format!("{error:#}"),
    };
    if json {
        output::json_error(&text, kind(code));
    } else {
        output::error(&text);
    }
    ExitCode::from(code)
}

fn run(options: &Options) -> anyhow::Result<ExitCode> {
    let global = &options.global;
    match &options.command {
        Command::Scan => devices::show(global)?,
        Command::Plan(request) => devices::plan(global, request)?,
        Command::Apply(request) => devices::apply(global, request)?,
        Command::Destroy { region } => devices::destroy(global, region)?,
        Command::Format(format) => namespaces::format(global, format)?,
        Command::Create(create) => namespaces::create(global, create)?,
        Command::List { place } => namespaces::list(global, place)?,
        Command::Check { place, repair } => return namespaces::check(global, place, *repair),
        Command::Resize(resize) => namespaces::resize(global, resize)?,
        Command::Remove { place, name } => namespaces::remove(global, place, name)?,
        Command::Evict { place, dead } => namespaces::evict(global, place, *dead)?,
    }
    Ok(ExitCode::SUCCESS)
}

/// The name of an exit code.
const fn kind(code: u8) -> &'static str {
    match code {
        BAD_USAGE => "bad_usage",
        3 => "no_such_thing",
        4 => "not_allowed",
        5 => "no_room",
        6 => "unavailable",
        7 => "damaged",
        _ => "failed",
    }
}

/// As `--help` says.
fn exit_code(error: &anyhow::Error) -> u8 {
    match error.downcast_ref::<Error>() {
        Some(Error::UnknownNamespace { .. } | Error::NotAPool { .. } | Error::Stale { .. }) => 3,
        Some(
            Error::Fenced { .. }
            | Error::EpochTaken { .. }
            | Error::BadEpoch { .. }
            | Error::NotWriter { .. }
            | Error::ReadOnly { .. }
            | Error::Live { .. }
            | Error::Foreign { .. }
            | Error::InUse { .. }
            | Error::OwnHost { .. },
        ) => 4,
        Some(
            Error::NoRoom { .. }
            | Error::NoSpace { .. }
            | Error::LogFull { .. }
            | Error::NoHugePages { .. },
        ) => 5,
        Some(Error::Removed { .. } | Error::Busy { .. } | Error::Topology { .. }) => 6,
        Some(
            Error::Corrupt { .. }
            | Error::Poisoned { .. }
            | Error::Shrunk { .. }
            | Error::Version { .. },
        ) => 7,
        Some(Error::Io { source, .. }) if source.kind() == ErrorKind::NotFound => 3,
        Some(Error::Io { source, .. }) if source.kind() == ErrorKind::StorageFull => 5,
        Some(Error::Io { source, .. }) if source.kind() == ErrorKind::PermissionDenied => 4,
        _ => 1,
    }
}
