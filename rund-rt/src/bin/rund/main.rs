//! `rund`: sandboxes from the command line.

mod options;
mod output;
mod processes;
mod run;
mod storm;

use std::process::ExitCode;

use clap::Parser;
use rund_rt::Error;

use options::{Command, Options};

fn main() -> ExitCode {
    // Helper processes are this program started again.
    rund_rt::init();
    let options = Options::parse();
    match dispatch(&options) {
        Ok(code) => code,
        // Who listened has heard enough.
        Err(why) if is_broken_pipe(&why) => ExitCode::SUCCESS,
        Err(why) => {
            let code = exit_code(&why);
            output::error(&causes(&why), kind(code), options.json);
            ExitCode::from(code)
        }
    }
}

fn dispatch(options: &Options) -> anyhow::Result<ExitCode> {
    match &options.command {
        Command::Run(run) => run::run(options, run),
        Command::Template(template) => run::template(options, template),
        Command::Probe => run::probe(options),
        Command::Storm(storm) => storm::storm(options, storm),
        Command::Ps => processes::list(options),
        Command::Stats => processes::stats(options),
    }
}

/// What went wrong and why, each said once: many errors say their cause themselves.
fn causes(why: &anyhow::Error) -> String {
    why.chain().fold(String::new(), |said, cause| {
        let cause = cause.to_string();
        if said.contains(&cause) {
            return said;
        }
        let between = if said.is_empty() { "" } else { ": " };
        format!("{said}{between}{cause}")
    })
}

fn is_broken_pipe(why: &anyhow::Error) -> bool {
    why.downcast_ref::<std::io::Error>()
        .is_some_and(|why| why.kind() == std::io::ErrorKind::BrokenPipe)
}

/// As `--help` says.
fn exit_code(why: &anyhow::Error) -> u8 {
    match why.downcast_ref::<Error>() {
        Some(Error::Unavailable { .. } | Error::TooLittleIsolation { .. }) => 121,
        Some(Error::BadProgram { .. } | Error::BadTemplate { .. } | Error::NoSnapshot { .. }) => {
            122
        }
        Some(Error::BadSetting { .. } | Error::DuplicateId { .. }) => 123,
        _ => 125,
    }
}

const fn kind(code: u8) -> &'static str {
    match code {
        121 => "unavailable",
        122 => "bad_program",
        123 => "bad_setting",
        _ => "failed",
    }
}
