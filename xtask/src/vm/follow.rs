//! Reading what a machine says, to its end.

use std::io::{BufRead, BufReader};
use std::process::Child;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// What the last line of a machine's output begins with.
const RESULT: &str = "CARLSBAD RESULT ";

/// Shows what `machine` says on its serial line, and gives each line to `look`, until it is off or
/// its time is over; it is off then.
///
/// # Errors
/// Where it does not say that all went well.
pub(super) fn follow(
    machine: &mut Child,
    patience: Duration,
    mut look: impl FnMut(&str),
) -> Result<()> {
    let output = machine.stdout.take().context("no output")?;
    let (sender, lines) = std::sync::mpsc::channel();
    // Reads until the machine is off, and is joined there.
    let reader = std::thread::spawn(move || {
        for line in BufReader::new(output).split(b'\n') {
            let Ok(line) = line else { return };
            let line = String::from_utf8_lossy(&line).trim_end().to_owned();
            if sender.send(line).is_err() {
                return;
            }
        }
    });
    let deadline = Instant::now() + patience;
    let mut result = None;
    while let Ok(line) = lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
        println!("    {line}");
        look(&line);
        if let Some((_, status)) = line.split_once(RESULT) {
            result = Some(status.trim().to_owned());
        }
    }
    let _already_off = machine.kill();
    machine.wait()?;
    let _panicked = reader.join();
    match result.as_deref() {
        Some("0") => Ok(()),
        Some(status) => bail!("the tests ended with status {status}"),
        None => bail!("the machine said no result within {} s", patience.as_secs()),
    }
}
