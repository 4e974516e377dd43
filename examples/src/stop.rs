//! A stop of the tour, and what comes out of visiting it.

use std::time::Duration;

use anyhow::Result;
use carlsbad_kit::capability::Capability;
use carlsbad_kit::sample::median;
use serde::Serialize;

use crate::progress::Progress;

/// A crate on the tour.
pub(crate) struct Stop {
    pub(crate) name: &'static str,
    /// What the crate is for, in one line.
    pub(crate) job: &'static str,
    pub(crate) run: fn(&mut Visit<'_>) -> Result<()>,
}

/// What a stop reports while it is being visited.
pub(crate) struct Visit<'a> {
    progress: &'a Progress,
    checks: Vec<Check>,
    figures: Vec<Headline>,
    pictures: Vec<Picture>,
    tables: Vec<Table>,
    skipped: Vec<Skip>,
}

/// A result, and whether it is right.
#[derive(Debug, Serialize)]
pub(crate) struct Check {
    pub(crate) what: String,
    pub(crate) holds: bool,
}

/// A figure measured beside its rival, in the same run.
#[derive(Debug, Serialize)]
pub(crate) struct Headline {
    pub(crate) what: String,
    pub(crate) unit: &'static str,
    pub(crate) samples: Vec<f64>,
    pub(crate) baseline: Rival,
    /// Ours over the rival's.
    pub(crate) ratio: f64,
    pub(crate) least: Least,
    pub(crate) holds: bool,
}

/// What ours is measured beside.
#[derive(Debug, Serialize)]
pub(crate) struct Rival {
    pub(crate) name: &'static str,
    pub(crate) samples: Vec<f64>,
}

/// What is asked of the ratio.
#[derive(Debug, Clone, Copy, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Least {
    /// Ours may take at most this share of what the rival takes.
    AtMost(f64),
}

#[derive(Debug, Serialize)]
pub(crate) struct Picture {
    pub(crate) caption: String,
    #[serde(skip)]
    pub(crate) svg: String,
}

#[derive(Debug, Serialize)]
pub(crate) struct Table {
    pub(crate) caption: &'static str,
    pub(crate) head: Vec<&'static str>,
    pub(crate) rows: Vec<Vec<String>>,
}

#[derive(Debug, Serialize)]
pub(crate) struct Skip {
    pub(crate) what: &'static str,
    pub(crate) capability: &'static str,
    pub(crate) fix: &'static str,
}

impl<'a> Visit<'a> {
    pub(crate) fn new(progress: &'a Progress) -> Self {
        Self {
            progress,
            checks: Vec::new(),
            figures: Vec::new(),
            pictures: Vec::new(),
            tables: Vec::new(),
            skipped: Vec::new(),
        }
    }

    /// Says what is being done now.
    pub(crate) fn step(&self, words: &str) {
        self.progress.step(words);
    }

    /// A result that is right or wrong. A wrong one fails the tour.
    pub(crate) fn check(&mut self, what: impl Into<String>, holds: bool) {
        self.checks.push(Check {
            what: what.into(),
            holds,
        });
    }

    /// A figure. One that misses what is asked is marked, and does not fail the tour.
    pub(crate) fn figure(
        &mut self,
        what: impl Into<String>,
        unit: &'static str,
        samples: Vec<f64>,
        baseline: Rival,
        least: Least,
    ) {
        let (ours, rival) = (median(&samples), median(&baseline.samples));
        let ratio = ours / rival;
        let Least::AtMost(limit) = least;
        let holds = ratio <= limit;
        self.figures.push(Headline {
            what: what.into(),
            unit,
            samples,
            baseline,
            ratio,
            least,
            holds,
        });
    }

    pub(crate) fn picture(&mut self, caption: impl Into<String>, svg: String) {
        self.pictures.push(Picture {
            caption: caption.into(),
            svg,
        });
    }

    pub(crate) fn table(
        &mut self,
        caption: &'static str,
        head: Vec<&'static str>,
        rows: Vec<Vec<String>>,
    ) {
        self.tables.push(Table {
            caption,
            head,
            rows,
        });
    }

    /// Whether the machine has `capability`; where not, the page says what was left out for it.
    pub(crate) fn has(&mut self, capability: Capability, what: &'static str) -> bool {
        let present = capability.is_present();
        if !present {
            self.skipped.push(Skip {
                what,
                capability: capability.name(),
                fix: capability.fix(),
            });
        }
        present
    }
}

/// What came out of a stop.
#[derive(Debug, Serialize)]
pub(crate) struct Outcome {
    #[serde(rename = "crate")]
    pub(crate) name: &'static str,
    #[serde(skip)]
    pub(crate) job: &'static str,
    pub(crate) seconds: f64,
    pub(crate) checks: Vec<Check>,
    pub(crate) figures: Vec<Headline>,
    pub(crate) skipped: Vec<Skip>,
    pub(crate) tables: Vec<Table>,
    pub(crate) pictures: Vec<Picture>,
    /// Why the stop could not be visited to its end.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) failure: Option<String>,
}

impl Outcome {
    pub(crate) fn new(stop: &Stop, visit: Visit<'_>, end: Result<()>, took: Duration) -> Self {
        Self {
            name: stop.name,
            job: stop.job,
            seconds: (took.as_secs_f64() * 10.0).round() / 10.0,
            checks: visit.checks,
            figures: visit.figures,
            skipped: visit.skipped,
            tables: visit.tables,
            pictures: visit.pictures,
            failure: end.err().map(|why| format!("{why:#}")),
        }
    }

    /// Whether it was visited to its end, with every result right.
    pub(crate) fn is_right(&self) -> bool {
        // A stop that checks nothing shows nothing.
        self.failure.is_none()
            && !self.checks.is_empty()
            && self.checks.iter().all(|check| check.holds)
    }
}
