//! Other programs, run with their command shown and their time taken.

use std::ffi::OsStr;
use std::fmt::Write as _;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail};

/// The cargo that runs this command.
pub(crate) fn cargo() -> Command {
    Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
}

/// Runs `command`, which prints where it likes.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let text = show(command);
    eprintln!("$ {text}");
    let start = Instant::now();
    let status = command
        .stdin(Stdio::null())
        .status()
        .with_context(|| format!("cannot run {text}"))?;
    if !status.success() {
        bail!("{text}: {status}");
    }
    eprintln!("  {:.1} s", start.elapsed().as_secs_f64());
    Ok(())
}

/// Runs `command` and gives what it printed to standard output.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let text = show(command);
    let out = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot run {text}"))?;
    if !out.status.success() {
        bail!(
            "{text}: {}\n{}",
            out.status,
            String::from_utf8_lossy(&out.stderr).trim()
        );
    }
    String::from_utf8(out.stdout).with_context(|| format!("{text}: not text"))
}

/// A command as a person would type it.
fn show(command: &Command) -> String {
    let mut text = String::new();
    for (key, value) in command.get_envs() {
        if let Some(value) = value {
            let _infallible = write!(text, "{}={} ", shown(key), shown(value));
        }
    }
    let program = std::path::Path::new(command.get_program());
    text += &shown(program.file_name().unwrap_or(program.as_os_str()));
    for argument in command.get_args() {
        text.push(' ');
        text += &shown(argument);
    }
    text
}

fn shown(word: &OsStr) -> String {
    let word = word.to_string_lossy();
    if word.contains([' ', '\n', '"', '\'', '$', '*']) || word.is_empty() {
        format!("'{}'", word.replace('\'', "'\\''"))
    } else {
        word.into_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::{output, show};
    use std::process::Command;

    #[test]
    fn a_command_is_shown_as_it_would_be_typed() {
        let mut command = Command::new("/usr/bin/cargo");
        command.args(["test", "a b"]).env("X", "1");
        assert_eq!(show(&command), "X=1 cargo test 'a b'");
    }

    #[test]
    fn a_failure_says_what_was_run_and_what_it_said() {
        let why = output(Command::new("sh").args(["-c", "echo no >&2; exit 3"])).unwrap_err();
        let text = why.to_string();
        assert!(
            text.contains("exit status: 3") && text.contains("no"),
            "{text}"
        );
    }
}
