//! `figures.toml`: what is asked of a crate.

use std::fmt;
use std::fs;
use std::path::Path;
use std::str::FromStr;

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;

/// One figure of a crate's specification.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Expected {
    pub(crate) id: String,
    pub(crate) what: String,
    pub(crate) rival: Option<String>,
    pub(crate) unit: String,
    pub(crate) compare: Compare,
    pub(crate) least: Bound,
    pub(crate) goal: Bound,
    pub(crate) from: String,
}

/// What is held against the bounds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub(crate) enum Compare {
    /// The median itself.
    #[serde(rename = "ours")]
    Ours,
    /// Ours over the rival's.
    #[serde(rename = "ours / rival")]
    OursByRival,
    /// The rival's over ours.
    #[serde(rename = "rival / ours")]
    RivalByOurs,
}

/// `<= 0.20` or `>= 100`.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[serde(try_from = "String")]
pub(crate) struct Bound {
    at_most: bool,
    limit: f64,
}

impl Bound {
    pub(crate) fn holds(self, value: f64) -> bool {
        // A NaN holds nothing.
        if self.at_most {
            value <= self.limit
        } else {
            value >= self.limit
        }
    }
}

impl FromStr for Bound {
    type Err = anyhow::Error;
    fn from_str(text: &str) -> Result<Self> {
        let (at_most, rest) = if let Some(rest) = text.strip_prefix("<=") {
            (true, rest)
        } else if let Some(rest) = text.strip_prefix(">=") {
            (false, rest)
        } else {
            bail!("`{text}` is no bound: write `<= 0.2` or `>= 100`");
        };
        let limit = rest
            .trim()
            .parse()
            .with_context(|| format!("`{text}`: no number after the sign"))?;
        Ok(Self { at_most, limit })
    }
}

impl TryFrom<String> for Bound {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
            .map_err(|why: anyhow::Error| format!("{why:#}"))
    }
}

impl fmt::Display for Bound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} {}",
            if self.at_most { "<=" } else { ">=" },
            self.limit
        )
    }
}

/// Reads a crate's `figures.toml`.
pub(crate) fn read(path: &Path, name: &str) -> Result<Vec<Expected>> {
    let text =
        fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    parse(&text, name).with_context(|| path.display().to_string())
}

fn parse(text: &str, name: &str) -> Result<Vec<Expected>> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct File {
        figure: Vec<Expected>,
    }
    let File { figure: figures } = toml::from_str(text)?;
    for (i, figure) in figures.iter().enumerate() {
        let number = figure
            .id
            .strip_prefix(name)
            .and_then(|s| s.strip_prefix('/'));
        ensure!(
            number.is_some_and(|n| n.starts_with(|c: char| c.is_ascii_digit())),
            "`{}`: an id is `{name}/` and the specification's number",
            figure.id
        );
        ensure!(
            figures[..i].iter().all(|other| other.id != figure.id),
            "{} stands there twice",
            figure.id
        );
        ensure!(
            figure.compare == Compare::Ours || figure.rival.is_some(),
            "{}: a ratio needs a rival",
            figure.id
        );
    }
    Ok(figures)
}

#[cfg(test)]
mod tests {
    use super::{Bound, Compare, parse};

    const FIGURE: &str = r#"
[[figure]]
id = "x/1b"
what = "load"
rival = "y"
unit = "ms"
compare = "rival / ours"
least = ">= 4"
goal = ">= 5.5"
from = "load"
"#;

    #[test]
    fn a_figure_reads_and_its_bounds_show_as_written() {
        let figures = parse(FIGURE, "x").unwrap();
        assert_eq!(figures[0].compare, Compare::RivalByOurs);
        assert_eq!(figures[0].goal.to_string(), ">= 5.5");
    }

    #[test]
    fn mistakes_are_named() {
        for (from, to, word) in [
            ("x/1b", "z/1", "x/"),
            (">= 4", "4", "no bound"),
            (">= 4", ">= many", "no number"),
            ("rival = \"y\"\n", "", "needs a rival"),
            ("unit", "units", "units"),
        ] {
            let why = format!("{:#}", parse(&FIGURE.replace(from, to), "x").unwrap_err());
            assert!(why.contains(word), "{why}");
        }
        let twice = FIGURE.repeat(2);
        assert!(
            parse(&twice, "x")
                .unwrap_err()
                .to_string()
                .contains("twice")
        );
    }

    #[test]
    fn bounds_hold_at_their_limit_and_never_for_nan() {
        let at_most: Bound = "<= 0.2".parse().unwrap();
        assert!(at_most.holds(0.2) && !at_most.holds(0.21) && !at_most.holds(f64::NAN));
        let at_least: Bound = ">=2".parse().unwrap();
        assert!(at_least.holds(2.0) && !at_least.holds(1.99) && !at_least.holds(f64::NAN));
    }
}
