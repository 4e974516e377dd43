//! What is printed: results to standard output, everything else to standard error.

use std::fmt;
use std::io::{self, Write};

use serde_json::Value;

/// Standard output takes nothing: its disk is full, or nobody reads it any more.
#[derive(Debug)]
pub(crate) struct Unprinted(pub(crate) io::Error);

impl fmt::Display for Unprinted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cannot write to standard output: {}", self.0)
    }
}

// Its message has its source in it already.
impl std::error::Error for Unprinted {}

/// Prints `text` and a line end.
pub(crate) fn line(text: impl AsRef<str>) -> anyhow::Result<()> {
    Ok(writeln!(io::stdout().lock(), "{}", text.as_ref()).map_err(Unprinted)?)
}

/// Prints `value` as JSON.
pub(crate) fn json(value: &Value) -> anyhow::Result<()> {
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
    let _ = writeln!(io::stderr().lock(), "directcxl: {text}");
}

/// Prints rows below `header`, each column as wide as it needs to be. Nothing without rows.
pub(crate) fn table<const N: usize>(header: [&str; N], rows: &[[String; N]]) -> anyhow::Result<()> {
    if rows.is_empty() {
        return Ok(());
    }
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
        line(padded.collect::<Vec<_>>().join("  ").trim_end())
    };
    print(header)?;
    for row in rows {
        print(row.each_ref().map(String::as_str))?;
    }
    Ok(())
}
