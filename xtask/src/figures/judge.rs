//! Measured beside expected: medians, ratio, whether it holds.

use std::fmt;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use carlsbad_kit::figure::{Baseline, Figure};
use carlsbad_kit::sample::median;
use serde::{Deserialize, Serialize};

use super::expected::{Compare, Expected};
use super::machine::Conditions;

/// A figure with its verdict, as `target/figures/CRATE.json` lists it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Judged {
    pub(crate) id: String,
    pub(crate) what: String,
    pub(crate) unit: String,
    pub(crate) samples: Vec<f64>,
    pub(crate) baseline: Option<Baseline>,
    /// The median of the samples.
    pub(crate) value: Option<f64>,
    /// The medians' ratio, in the direction that `figures.toml` asks for.
    pub(crate) ratio: Option<f64>,
    pub(crate) least: String,
    pub(crate) goal: String,
    pub(crate) holds: bool,
    pub(crate) goal_holds: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) note: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) skipped: Option<String>,
    pub(crate) run: Conditions,
}

impl Judged {
    pub(crate) fn new(expected: &Expected, figure: Figure, run: Conditions) -> Result<Self> {
        ensure!(
            figure.unit == expected.unit,
            "{}: measured in {}, asked for in {}",
            figure.id,
            figure.unit,
            expected.unit
        );
        let mut judged = Self {
            id: figure.id,
            what: String::new(),
            unit: figure.unit,
            samples: figure.samples,
            baseline: figure.baseline,
            value: None,
            ratio: None,
            least: String::new(),
            goal: String::new(),
            holds: false,
            goal_holds: false,
            note: figure.note,
            skipped: figure.skipped,
            run,
        };
        judged.judge(expected)?;
        Ok(judged)
    }

    /// Holds the same samples against what is asked for now.
    pub(crate) fn judge_again(&mut self, expected: &[Expected]) -> Result<()> {
        match expected.iter().find(|e| e.id == self.id) {
            Some(expected) => self.judge(expected),
            None => bail!("{} is not asked for", self.id),
        }
    }

    fn judge(&mut self, expected: &Expected) -> Result<()> {
        self.what.clone_from(&expected.what);
        self.least = expected.least.to_string();
        self.goal = expected.goal.to_string();
        (self.holds, self.goal_holds) = (false, false);
        if self.skipped.is_some() {
            return Ok(());
        }
        ensure!(
            !self.samples.is_empty() && self.samples.iter().all(|sample| sample.is_finite()),
            "{}: no samples, or samples that are no numbers",
            self.id
        );
        let value = median(&self.samples);
        self.value = Some(value);
        let rival = self.baseline.as_ref().map(|b| median(&b.samples));
        self.ratio = match (expected.compare, rival) {
            (Compare::Ours, None) => None,
            // A difference in a figure that is judged by itself is shown as ours over the rival's.
            (Compare::Ours | Compare::OursByRival, Some(rival)) => Some(value / rival),
            (Compare::RivalByOurs, Some(rival)) => Some(rival / value),
            (_, None) => bail!("{}: a ratio, but no baseline was measured", self.id),
        }
        .filter(|ratio| ratio.is_finite());
        let judged = if expected.compare == Compare::Ours {
            value
        } else {
            self.ratio.unwrap_or(f64::NAN)
        };
        self.holds = expected.least.holds(judged);
        self.goal_holds = expected.goal.holds(judged);
        Ok(())
    }

    /// One word for the verdict.
    pub(crate) fn verdict(&self) -> &'static str {
        match (&self.skipped, self.holds, self.goal_holds) {
            (Some(_), ..) => "not measured",
            (None, _, true) => "goal",
            (None, true, false) => "holds",
            (None, false, false) => "MISSED",
        }
    }
}

impl fmt::Display for Judged {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:<18} {:<12}", self.id, self.verdict())?;
        if let Some(why) = &self.skipped {
            return write!(f, "{why}");
        }
        write!(
            f,
            "{} {}",
            number(self.value.unwrap_or(f64::NAN)),
            self.unit
        )?;
        if let Some(baseline) = &self.baseline {
            let rival = number(median(&baseline.samples));
            write!(f, ", {}: {rival} {}", baseline.name, self.unit)?;
        }
        if let Some(ratio) = self.ratio {
            write!(f, ", {}x", number(ratio))?;
        }
        write!(f, " (least {}, goal {})", self.least, self.goal)
    }
}

/// Three digits, or all before the point.
pub(crate) fn number(value: f64) -> String {
    if value == 0.0 {
        return "0".to_owned();
    }
    let before = value.abs().log10().floor() as i32 + 1;
    let decimals = usize::try_from((3 - before).clamp(0, 6)).unwrap_or(0);
    format!("{value:.decimals$}")
}

/// What was measured so far; nothing where nothing was.
pub(crate) fn read(path: &Path) -> Result<Vec<Judged>> {
    if !path.exists() {
        return Ok(Vec::new());
    }
    let text = fs::read_to_string(path)?;
    serde_json::from_str(&text)
        .with_context(|| format!("{}: not figures (remove it)", path.display()))
}

pub(crate) fn write(path: &Path, judged: &[Judged]) -> Result<()> {
    let mut text = serde_json::to_string_pretty(judged)?;
    text.push('\n');
    fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::{Judged, number};
    use crate::figures::expected::{Compare, Expected};
    use crate::figures::machine::Conditions;
    use carlsbad_kit::figure::{Baseline, Figure};

    fn expected(compare: Compare, least: &str, goal: &str) -> Expected {
        Expected {
            id: "x/1".to_owned(),
            what: "load".to_owned(),
            rival: None,
            unit: "ms".to_owned(),
            compare,
            least: least.parse().unwrap(),
            goal: goal.parse().unwrap(),
            from: "load".to_owned(),
        }
    }

    fn figure(ours: &[f64], rival: Option<&[f64]>) -> Figure {
        let mut figure = Figure::new("x/1", "load", "ms").samples(ours);
        figure.baseline = rival.map(|samples| Baseline {
            name: "y".to_owned(),
            samples: samples.to_vec(),
        });
        figure
    }

    #[test]
    fn medians_are_compared_in_the_direction_asked_for() {
        let speedup = expected(Compare::RivalByOurs, ">= 4", ">= 5");
        let fast = Judged::new(
            &speedup,
            figure(&[2.0, 1.0, 90.0], Some(&[9.0, 8.0, 10.0])),
            Conditions::default(),
        )
        .unwrap();
        assert_eq!((fast.value, fast.ratio), (Some(2.0), Some(4.5)));
        assert!(fast.holds && !fast.goal_holds);
        assert_eq!(fast.verdict(), "holds");

        let size = expected(Compare::OursByRival, "<= 0.2", "<= 0.14");
        let large = Judged::new(&size, figure(&[3.0], Some(&[10.0])), Conditions::default());
        assert_eq!(large.unwrap().verdict(), "MISSED");

        let zero = expected(Compare::Ours, "<= 0", "<= 0");
        let none = Judged::new(&zero, figure(&[0.0], None), Conditions::default()).unwrap();
        assert!(none.holds && none.ratio.is_none());
    }

    #[test]
    fn what_was_not_measured_does_not_hold() {
        let size = expected(Compare::OursByRival, "<= 0.2", "<= 0.14");
        let mut skipped = figure(&[], None);
        skipped.skipped = Some("root: run as root".to_owned());
        let judged = Judged::new(&size, skipped, Conditions::default()).unwrap();
        assert!(!judged.holds && !judged.goal_holds);
        assert!(Judged::new(&size, figure(&[1.0], None), Conditions::default()).is_err());
        assert!(Judged::new(&size, figure(&[], None), Conditions::default()).is_err());
        // A rival of zero gives no ratio, and so holds nothing.
        let by_zero = Judged::new(&size, figure(&[1.0], Some(&[0.0])), Conditions::default());
        assert!(!by_zero.unwrap().holds);
    }

    #[test]
    fn numbers_are_shown_with_three_digits() {
        for (value, shown) in [
            (0.0, "0"),
            (0.12345, "0.123"),
            (0.003_81, "0.00381"),
            (1.0, "1.00"),
            (17.26, "17.3"),
            (1234.5, "1234"),
        ] {
            assert_eq!(number(value), shown);
        }
    }
}
