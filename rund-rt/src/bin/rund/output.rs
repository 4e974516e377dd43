//! What goes to the terminal.

use std::io::{self, Write};

use anyhow::Context;
use serde::Serialize;

/// One line of JSON.
pub(crate) fn json(value: &impl Serialize) -> anyhow::Result<()> {
    line(serde_json::to_string(value)?)
}

/// Prints `text` and a line end.
pub(crate) fn line(text: impl AsRef<str>) -> anyhow::Result<()> {
    writeln!(io::stdout().lock(), "{}", text.as_ref()).context("cannot write to standard output")
}

/// Says something beside the results.
pub(crate) fn note(text: &str) {
    // Where standard error is closed there is nobody to tell.
    let _ = writeln!(io::stderr().lock(), "{text}");
}

pub(crate) fn error(text: &str, kind: &str, as_json: bool) {
    if as_json {
        note(&serde_json::json!({ "error": text, "kind": kind }).to_string());
    } else {
        note(&format!("rund: {text}"));
    }
}
