//! Horizontal bars: one quantity of several candidates.

use std::fmt::Write as _;

use super::axis::Fitted;
use super::{Anchor, Kind, WIDTH, document, short, text, width_of};

/// Height of one bar with the space below it.
const ROW: f64 = 28.0;
const BAR: f64 = 18.0;
const TOP: f64 = 28.0;

/// A bar, of one part or of several one behind the other.
#[derive(Debug, Clone, PartialEq)]
pub struct Bar {
    label: String,
    parts: Vec<(f64, Kind)>,
    remark: Option<String>,
}

impl Bar {
    /// A bar of one part.
    pub fn new(label: impl Into<String>, value: f64, kind: Kind) -> Self {
        Self {
            label: label.into(),
            parts: vec![(value, kind)],
            remark: None,
        }
    }

    /// Another part behind the ones so far.
    #[must_use]
    pub fn and(mut self, value: f64, kind: Kind) -> Self {
        self.parts.push((value, kind));
        self
    }

    /// Words behind the number.
    #[must_use]
    pub fn remark(mut self, words: impl Into<String>) -> Self {
        self.remark = Some(words.into());
        self
    }

    fn total(&self) -> f64 {
        self.parts.iter().map(|part| part.0.max(0.0)).sum()
    }
}

/// Horizontal bars, each with its name and its number.
#[derive(Debug, Clone, PartialEq)]
pub struct BarPlot {
    title: String,
    unit: String,
    bars: Vec<Bar>,
    bound: Option<(String, f64)>,
}

impl BarPlot {
    /// No bars yet.
    pub fn new(title: impl Into<String>, unit: impl Into<String>) -> Self {
        Self {
            title: title.into(),
            unit: unit.into(),
            bars: Vec::new(),
            bound: None,
        }
    }

    /// Adds a bar below the others.
    #[must_use]
    pub fn bar(mut self, bar: Bar) -> Self {
        self.bars.push(bar);
        self
    }

    /// Adds bars below the others.
    #[must_use]
    pub fn bars(mut self, bars: impl IntoIterator<Item = Bar>) -> Self {
        self.bars.extend(bars);
        self
    }

    /// A dashed line across all bars, with its name.
    #[must_use]
    pub fn bound(mut self, name: impl Into<String>, value: f64) -> Self {
        self.bound = Some((name.into(), value));
        self
    }

    /// The picture.
    pub fn svg(&self) -> String {
        let labels = self.bars.iter().map(|bar| width_of(&bar.label));
        let left = labels.fold(40.0, f64::max).min(WIDTH * 0.42) + 10.0;
        let number = |bar: &Bar| {
            let mut words = format!("{} {}", short(bar.total()), self.unit);
            if let Some(remark) = &bar.remark {
                let _infallible = write!(words, "  {remark}");
            }
            words
        };
        let room = self.bars.iter().map(|bar| width_of(&number(bar)));
        let right = room.fold(60.0, f64::max).min(WIDTH * 0.4) + 10.0;
        let width = (WIDTH - left - right).max(80.0);
        let largest = self
            .bars
            .iter()
            .map(Bar::total)
            .chain(self.bound.iter().map(|bound| bound.1))
            .filter(|total| total.is_finite())
            .fold(0.0, f64::max);
        let axis = Fitted::linear(0.0, if largest > 0.0 { largest } else { 1.0 });
        // The longest bar ends where the numbers begin, not at a round tick.
        let scale = width / axis.place(if largest > 0.0 { largest } else { 1.0 });
        let length = |value: f64| (axis.place(value) * scale).max(0.0);

        let mut body = String::new();
        for (i, bar) in self.bars.iter().enumerate() {
            let y = TOP + i as f64 * ROW;
            let middle = y + BAR / 2.0 + 4.0;
            text(&mut body, left - 8.0, middle, Anchor::End, "", &bar.label);
            let mut x = left;
            for (value, kind) in &bar.parts {
                if !(value.is_finite() && *value > 0.0) {
                    continue;
                }
                // A bar that is there is at least seen.
                let w = length(*value).max(1.5);
                let _infallible = write!(
                    body,
                    "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{w:.1}\" height=\"{BAR}\" rx=\"2\" class=\"f{}\"/>",
                    kind.class()
                );
                x += w;
            }
            let class = match bar.parts.first() {
                Some((_, kind)) => format!("n t{}", kind.class()),
                None => "n".to_owned(),
            };
            text(
                &mut body,
                x + 6.0,
                middle,
                Anchor::Start,
                &class,
                &number(bar),
            );
        }
        let mut height = TOP + self.bars.len() as f64 * ROW;
        if let Some((name, value)) = &self.bound
            && value.is_finite()
        {
            let x = left + length(*value);
            let _infallible = write!(
                body,
                "<path class=\"l lb\" d=\"M{x:.1} {:.1}V{height:.1}\"/>",
                TOP - 6.0
            );
            height += 16.0;
            let words = format!("{name}: {} {}", short(*value), self.unit);
            let anchor = if x > WIDTH * 0.6 {
                Anchor::End
            } else {
                Anchor::Start
            };
            text(&mut body, x, height - 4.0, anchor, "tb n", &words);
        }
        document(&self.title, height + 4.0, &body)
    }
}
