//! Figures: what a bench target prints and `cargo xtask figures` collects, judges and renders.
//!
//! A bench target (with `harness = false`) measures ours and the rival, interleaved, and calls
//! [`Figure::emit`] once per figure; that prints one line of JSON to the file that
//! `CARLSBAD_FIGURES` names, or to standard output. What is asked of a figure stands in the crate's
//! `figures.toml`, not in the bench.
//!
//! ```no_run
//! use carlsbad_kit::figure::{Figure, is_quick};
//! use carlsbad_kit::sample::{interleave, time_ms};
//!
//! let rounds = if is_quick() { 1 } else { 31 };
//! let samples = interleave(2, rounds, || time_ms(|| 1 + 1), || time_ms(|| 2 + 2));
//! Figure::new("tetris-store/3", "warm attach of 500 MB", "ms")
//!     .against("candle load", samples)
//!     .emit()
//!     .unwrap();
//! ```

use std::fs::OpenOptions;
use std::io::{self, Write};

use serde::{Deserialize, Serialize};

use crate::capability::Capability;
use crate::sample::Interleaved;

/// The file to which [`Figure::emit`] appends.
pub const FILE_VARIABLE: &str = "CARLSBAD_FIGURES";

/// What was measured.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Figure {
    /// The crate and the number in its specification: `tetris-store/1`, `tetris-store/1b`.
    pub id: String,
    /// What the samples are of.
    pub what: String,
    /// Their unit.
    pub unit: String,
    /// Ours, one number per round.
    #[serde(default)]
    pub samples: Vec<f64>,
    /// The rival's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub baseline: Option<Baseline>,
    /// Conditions under which it was taken, such as a size or a number of processes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
    /// Why it was not measured: the capability that is missing, and how to get it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub skipped: Option<String>,
}

/// What ours is compared with, measured in the same run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Baseline {
    /// The rival's name and version, or the bound.
    pub name: String,
    /// One number per round.
    pub samples: Vec<f64>,
}

impl Figure {
    /// A figure without samples yet.
    pub fn new(id: impl Into<String>, what: impl Into<String>, unit: impl Into<String>) -> Self {
        Self {
            id: id.into(),
            what: what.into(),
            unit: unit.into(),
            samples: Vec::new(),
            baseline: None,
            note: None,
            skipped: None,
        }
    }

    /// Ours alone.
    #[must_use]
    pub fn samples(mut self, samples: impl Into<Vec<f64>>) -> Self {
        self.samples = samples.into();
        self
    }

    /// Ours and the rival's.
    #[must_use]
    pub fn against(mut self, rival: impl Into<String>, samples: Interleaved) -> Self {
        self.samples = samples.ours;
        self.baseline = Some(Baseline {
            name: rival.into(),
            samples: samples.rival,
        });
        self
    }

    /// Under which conditions.
    #[must_use]
    pub fn note(mut self, note: impl Into<String>) -> Self {
        self.note = Some(note.into());
        self
    }

    /// Not measured, for want of `capability`.
    ///
    /// # Panics
    /// Where `CARLSBAD_REQUIRE` lists it.
    #[must_use]
    #[track_caller]
    pub fn without(mut self, capability: Capability) -> Self {
        if !capability.or_skip() {
            self.skipped = Some(capability.how_to_get_it());
        }
        self
    }

    /// Prints it for `cargo xtask figures`, or for a person. A quick run prints nothing: its
    /// numbers mean nothing.
    ///
    /// # Errors
    /// Where the file cannot be written.
    pub fn emit(&self) -> io::Result<()> {
        if is_quick() {
            return Ok(());
        }
        let mut line = serde_json::to_string(self)?;
        line.push('\n');
        match std::env::var_os(FILE_VARIABLE) {
            Some(path) => OpenOptions::new()
                .create(true)
                .append(true)
                .open(path)?
                .write_all(line.as_bytes()),
            None => io::stdout().write_all(line.as_bytes()),
        }
    }
}

/// Whether this run of a bench target is a check that it works (`cargo test --benches`, or
/// `cargo bench -- --test`), so that one round of each is enough.
pub fn is_quick() -> bool {
    let mut measured = false;
    for argument in std::env::args() {
        match argument.as_str() {
            "--test" => return true,
            "--bench" => measured = true,
            _ => {}
        }
    }
    !measured
}

#[cfg(test)]
mod tests {
    use super::Figure;
    use crate::sample::Interleaved;

    #[test]
    fn a_figure_is_one_line_that_reads_back() {
        let figure = Figure::new("x/1", "a\nb", "ms")
            .against(
                "rival",
                Interleaved {
                    ours: vec![1.0, 2.5],
                    rival: vec![3.0],
                },
            )
            .note("2 cores");
        let line = serde_json::to_string(&figure).unwrap();
        assert!(!line.contains('\n'));
        assert_eq!(serde_json::from_str::<Figure>(&line).unwrap(), figure);
    }

    #[test]
    fn tests_are_quick() {
        assert!(super::is_quick());
    }
}
