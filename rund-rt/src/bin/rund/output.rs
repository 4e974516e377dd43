//! What goes to the terminal.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "it is for that")]

use serde::Serialize;

/// One line of JSON.
pub(crate) fn json(value: &impl Serialize) -> anyhow::Result<()> {
    println!("{}", serde_json::to_string(value)?);
    Ok(())
}

pub(crate) fn line(text: &str) {
    println!("{text}");
}

pub(crate) fn note(text: &str) {
    eprintln!("{text}");
}

pub(crate) fn error(text: &str, kind: &str, as_json: bool) {
    if as_json {
        eprintln!("{}", serde_json::json!({ "error": text, "kind": kind }));
    } else {
        eprintln!("rund: {text}");
    }
}
