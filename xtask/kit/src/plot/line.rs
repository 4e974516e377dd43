//! Lines over an axis, and cumulative distributions.

use std::fmt::Write as _;

use super::axis::{Axis, Fitted};
use super::{Anchor, Kind, WIDTH, document, short, text, width_of};

const HEIGHT: f64 = 300.0;
const TOP: f64 = 40.0;
const BOTTOM: f64 = 42.0;
const LEFT: f64 = 52.0;
/// Distance between the names of two lines that end at the same place.
const NAME: f64 = 15.0;

/// A line with its name.
#[derive(Debug, Clone, PartialEq)]
pub struct Series {
    name: String,
    kind: Kind,
    points: Vec<(f64, f64)>,
    marks: bool,
}

impl Series {
    /// A line through `points`, in their order.
    pub fn new(name: impl Into<String>, kind: Kind, points: Vec<(f64, f64)>) -> Self {
        Self {
            name: name.into(),
            kind,
            marks: points.len() <= 40,
            points,
        }
    }
}

/// Lines over one axis.
#[derive(Debug, Clone, PartialEq)]
pub struct LinePlot {
    title: String,
    x: Axis,
    y: Axis,
    series: Vec<Series>,
}

impl LinePlot {
    /// No lines yet.
    pub fn new(title: impl Into<String>, x: Axis, y: Axis) -> Self {
        Self {
            title: title.into(),
            x,
            y,
            series: Vec::new(),
        }
    }

    /// Adds a line.
    #[must_use]
    pub fn series(mut self, series: Series) -> Self {
        self.series.push(series);
        self
    }

    /// The picture.
    pub fn svg(&self) -> String {
        let all = || {
            self.series
                .iter()
                .flat_map(|series| &series.points)
                .copied()
                .filter(|(x, y)| self.x.takes(*x) && self.y.takes(*y))
        };
        let x = self.x.fit(all().map(|point| point.0));
        let y = self.y.fit(all().map(|point| point.1));
        let names = self.series.iter().map(|series| width_of(&series.name));
        let right = names.fold(24.0, f64::max).min(WIDTH * 0.35) + 14.0;
        let (width, height) = (WIDTH - LEFT - right, HEIGHT - TOP - BOTTOM);
        let at_x = |value: f64| LEFT + x.place(value) * width;
        let at_y = |value: f64| TOP + (1.0 - y.place(value)) * height;

        let mut body = String::new();
        self.grid(&mut body, &x, &y, at_x, at_y, width);
        let mut ends = Vec::new();
        for series in &self.series {
            let points: Vec<_> = series
                .points
                .iter()
                .filter(|(x, y)| self.x.takes(*x) && self.y.takes(*y))
                .map(|(x, y)| (at_x(*x), at_y(*y)))
                .collect();
            let Some(last) = points.last() else { continue };
            let class = series.kind.class();
            let mut path = String::new();
            for (i, (x, y)) in points.iter().enumerate() {
                let _infallible = write!(path, "{}{x:.1} {y:.1}", if i == 0 { 'M' } else { 'L' });
            }
            let _infallible = write!(body, "<path class=\"l l{class}\" d=\"{path}\"/>");
            if series.marks && series.kind != Kind::Bound {
                for (x, y) in &points {
                    let _infallible = write!(
                        body,
                        "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3\" class=\"f{class}\"/>"
                    );
                }
            }
            ends.push((last.0, last.1, class, series.name.as_str()));
        }
        // Names that would lie on each other are pushed apart, downwards.
        ends.sort_by(|a, b| a.1.total_cmp(&b.1));
        let mut taken: Vec<(f64, f64)> = Vec::new();
        for (x, y, class, name) in ends {
            let beside = taken.iter().filter(|(at, _)| (at - x).abs() < 2.0 * NAME);
            let y = beside.fold(y, |y, (_, above)| y.max(above + NAME));
            let class = format!("t{class}");
            text(&mut body, x + 8.0, y + 4.0, Anchor::Start, &class, name);
            taken.push((x, y));
        }
        document(&self.title, HEIGHT, &body)
    }

    fn grid(
        &self,
        body: &mut String,
        x: &Fitted,
        y: &Fitted,
        at_x: impl Fn(f64) -> f64,
        at_y: impl Fn(f64) -> f64,
        width: f64,
    ) {
        let floor = HEIGHT - BOTTOM;
        for tick in &y.ticks {
            let at = at_y(*tick);
            let _infallible = write!(body, "<path class=\"g\" d=\"M{LEFT} {at:.1}h{width:.1}\"/>");
            text(
                body,
                LEFT - 6.0,
                at + 4.0,
                Anchor::End,
                "m n",
                &short(*tick),
            );
        }
        for tick in &x.ticks {
            let at = at_x(*tick);
            let _infallible = write!(body, "<path class=\"g\" d=\"M{at:.1} {floor:.1}v4\"/>");
            text(body, at, floor + 17.0, Anchor::Middle, "m n", &short(*tick));
        }
        text(body, 0.0, TOP - 10.0, Anchor::Start, "m", &self.y.label);
        let middle = LEFT + width / 2.0;
        text(
            body,
            middle,
            HEIGHT - 6.0,
            Anchor::Middle,
            "m",
            &self.x.label,
        );
    }
}

/// Which share of the samples is at most x, for each set of samples.
pub fn cdf<'a>(
    title: impl Into<String>,
    x: Axis,
    samples: impl IntoIterator<Item = (&'a str, Kind, &'a [f64])>,
) -> LinePlot {
    let mut plot = LinePlot::new(title, x, Axis::new("share of samples"));
    for (name, kind, samples) in samples {
        let mut sorted = samples.to_vec();
        sorted.sort_by(f64::total_cmp);
        let count = sorted.len() as f64;
        let mut points = Vec::with_capacity(2 * sorted.len());
        for (i, value) in sorted.into_iter().enumerate() {
            points.push((value, i as f64 / count));
            points.push((value, (i + 1) as f64 / count));
        }
        plot.series.push(Series {
            name: name.to_owned(),
            kind,
            points,
            marks: false,
        });
    }
    plot
}
