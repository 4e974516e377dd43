//! What is printed: results to standard output, everything else to standard error.

use std::io::{self, IsTerminal, Write};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;
use tetris_store::Progress;

/// Prints `text` and a line end.
pub(crate) fn line(text: impl AsRef<str>) -> anyhow::Result<()> {
    Ok(writeln!(io::stdout().lock(), "{}", text.as_ref())?)
}

/// Prints `value` as JSON.
pub(crate) fn json(value: &impl Serialize) -> anyhow::Result<()> {
    line(serde_json::to_string_pretty(value)?)
}

/// Reports what went wrong, for machines.
pub(crate) fn json_error(text: &str, kind: &str) {
    let error = serde_json::json!({ "error": text, "kind": kind });
    // Where standard error is closed there is nobody to tell.
    let _ = writeln!(io::stderr().lock(), "{error}");
}

/// Reports what went wrong.
pub(crate) fn error(text: &str) {
    // Where standard error is closed there is nobody to tell.
    let _ = writeln!(io::stderr().lock(), "tetris: {text}");
}

/// Prints rows below `header`, each column as wide as it needs to be.
pub(crate) fn table<const N: usize>(header: [&str; N], rows: &[[String; N]]) -> anyhow::Result<()> {
    let mut widths = header.map(|cell| cell.chars().count());
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let print = |cells: [&str; N]| {
        let padded = cells
            .iter()
            .zip(widths)
            .map(|(cell, width)| format!("{cell:width$}"));
        let text = padded.collect::<Vec<_>>().join("  ");
        line(text.trim_end())
    };
    print(header)?;
    for row in rows {
        print(row.each_ref().map(String::as_str))?;
    }
    Ok(())
}

/// A time as short as can be: `3m12s`.
pub(crate) fn time(time: Duration) -> String {
    let s = time.as_secs();
    match s {
        0..60 => format!("{s}s"),
        60..3_600 => format!("{}m{}s", s / 60, s % 60),
        3_600..86_400 => format!("{}h{}m", s / 3_600, s / 60 % 60),
        _ => format!("{}d{}h", s / 86_400, s / 3_600 % 24),
    }
}

/// A progress bar on standard error, if that is a terminal.
pub(crate) struct Bar(ProgressBar);

impl Bar {
    pub(crate) fn new(name: &str, quiet: bool) -> anyhow::Result<Self> {
        let target = if quiet || !io::stderr().is_terminal() {
            ProgressDrawTarget::hidden()
        } else {
            ProgressDrawTarget::stderr()
        };
        let template = "{prefix}  {wide_bar}  {bytes} of {total_bytes}  {bytes_per_sec}  {eta}";
        let bar = ProgressBar::with_draw_target(None, target);
        bar.set_style(ProgressStyle::with_template(template)?);
        bar.set_prefix(name.to_owned());
        Ok(Self(bar))
    }

    pub(crate) fn show(&self, progress: Progress) {
        self.0.set_length(progress.total.get());
        self.0.set_position(progress.done.get());
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}
