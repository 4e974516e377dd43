//! Progress on standard error: a spinner for a person, lines for a log.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

use crate::stop::Outcome;

/// The progress of one stop.
pub(crate) struct Progress {
    name: &'static str,
    bar: ProgressBar,
}

impl Progress {
    pub(crate) fn begin(number: usize, of: usize, name: &'static str) -> Self {
        let bar = ProgressBar::new_spinner();
        if let Ok(style) = ProgressStyle::with_template("{spinner} {prefix} {wide_msg} {elapsed}") {
            bar.set_style(style);
        }
        bar.set_prefix(format!("[{number}/{of}] {name}"));
        bar.enable_steady_tick(Duration::from_millis(120));
        if bar.is_hidden() {
            eprintln!("[{number}/{of}] {name}");
        }
        Self { name, bar }
    }

    pub(crate) fn step(&self, words: &str) {
        if self.bar.is_hidden() {
            eprintln!("    {words}");
        } else {
            self.bar.set_message(words.to_owned());
        }
    }

    pub(crate) fn end(&self, outcome: &Outcome) {
        self.bar.finish_and_clear();
        let mark = if outcome.is_right() { "ok" } else { "WRONG" };
        eprintln!("{mark:>5}  {} ({:.1} s)", self.name, outcome.seconds);
        for check in outcome.checks.iter().filter(|check| !check.holds) {
            eprintln!("       wrong: {}", check.what);
        }
        for figure in &outcome.figures {
            let slow = if figure.holds {
                ""
            } else {
                "  (below what is asked)"
            };
            eprintln!("       {}: {:.3}x{slow}", figure.what, figure.ratio);
        }
        for skip in &outcome.skipped {
            eprintln!(
                "       SKIPPED {}: {}: {}",
                skip.what, skip.capability, skip.fix
            );
        }
        if let Some(why) = &outcome.failure {
            eprintln!("       {why}");
        }
    }
}
