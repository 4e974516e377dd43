//! SVG plots that are readable on dark and on light pages, inside a page or as a file of their own.
//!
//! Each carries its own style, whose colours follow `prefers-color-scheme`; a page that sets the
//! attribute `data-theme="dark"` or `"light"` on an element around the plot overrules that. Ours is
//! in colour, what it is compared with is in grey, bounds are dashed. Names stand at the lines and
//! bars themselves.

mod axis;
mod bar;
mod line;

pub use axis::{Axis, Scale};
pub use bar::{Bar, BarPlot};
pub use line::{LinePlot, Series, cdf};

use std::fmt::Write as _;

/// What a line or a bar stands for; it decides the colour.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Kind {
    /// Ours.
    Ours,
    /// Another part or variant of ours.
    OursToo,
    /// What ours is compared with.
    Rival,
    /// Another rival.
    RivalToo,
    /// A limit that was asked for or that physics sets.
    Bound,
}

impl Kind {
    const fn class(self) -> &'static str {
        match self {
            Self::Ours => "o",
            Self::OursToo => "p",
            Self::Rival => "r",
            Self::RivalToo => "s",
            Self::Bound => "b",
        }
    }
}

/// Width of every plot in its own units; the page scales it.
const WIDTH: f64 = 640.0;
/// Size of the text in the same units.
const TEXT: f64 = 12.0;

/// Colours as variables, so that one rule switches them. Each pair has a contrast of at least 4.5
/// to its background where it colours text.
const STYLE: &str = "\
.cbp{--f:#1f2328;--m:#59636e;--g:#d8dee4;--o:#0b6e8f;--p:#5aa9c4;--r:#6e7781;--s:#9a6700;--b:#b42318;\
font:12px system-ui,-apple-system,'Segoe UI',sans-serif;max-width:100%;height:auto}\
@media(prefers-color-scheme:dark){.cbp{--f:#e6edf3;--m:#9aa5b1;--g:#30363d;--o:#4cc2e6;--p:#2b7d99;--r:#8b949e;--s:#d4a72c;--b:#ff8a80}}\
[data-theme=light] .cbp{--f:#1f2328;--m:#59636e;--g:#d8dee4;--o:#0b6e8f;--p:#5aa9c4;--r:#6e7781;--s:#9a6700;--b:#b42318}\
[data-theme=dark] .cbp{--f:#e6edf3;--m:#9aa5b1;--g:#30363d;--o:#4cc2e6;--p:#2b7d99;--r:#8b949e;--s:#d4a72c;--b:#ff8a80}\
.cbp text{fill:var(--f)}.cbp .h{font-weight:600;font-size:13px}.cbp .m{fill:var(--m)}\
.cbp .n{font-variant-numeric:tabular-nums}.cbp .g{stroke:var(--g);stroke-width:1;fill:none}\
.cbp .l{fill:none;stroke-width:2;stroke-linejoin:round;stroke-linecap:round}\
.cbp .lo{stroke:var(--o)}.cbp .lp{stroke:var(--p)}.cbp .lr{stroke:var(--r)}.cbp .ls{stroke:var(--s)}\
.cbp .lb{stroke:var(--b);stroke-dasharray:4 4;stroke-width:1.5}\
.cbp .fo{fill:var(--o)}.cbp .fp{fill:var(--p)}.cbp .fr{fill:var(--r)}.cbp .fs{fill:var(--s)}.cbp .fb{fill:var(--b)}\
.cbp text.to{fill:var(--o);font-weight:600}.cbp text.tp{fill:var(--o)}.cbp text.tr{fill:var(--m)}\
.cbp text.ts{fill:var(--s)}.cbp text.tb{fill:var(--b)}";

/// The whole picture around `body`.
fn document(title: &str, height: f64, body: &str) -> String {
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" class=\"cbp\" role=\"img\" \
         viewBox=\"0 0 {WIDTH} {height:.0}\" width=\"{WIDTH}\" height=\"{height:.0}\">\
         <title>{0}</title><style>{STYLE}</style>\
         <text class=\"h\" x=\"0\" y=\"14\">{0}</text>{body}</svg>",
        escape(title)
    )
}

/// Text that may stand in XML.
fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            c if c.is_control() => out.push(' '),
            c => out.push(c),
        }
    }
    out
}

/// Where text begins with respect to its point.
#[derive(Clone, Copy)]
enum Anchor {
    Start,
    Middle,
    End,
}

fn text(out: &mut String, x: f64, y: f64, anchor: Anchor, class: &str, words: &str) {
    let anchor = match anchor {
        Anchor::Start => "start",
        Anchor::Middle => "middle",
        Anchor::End => "end",
    };
    let _infallible = write!(
        out,
        "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\" class=\"{class}\">{}</text>",
        escape(words)
    );
}

/// About how wide `words` are.
fn width_of(words: &str) -> f64 {
    words.chars().count() as f64 * TEXT * 0.56
}

/// A number with three digits, without zeros that say nothing.
pub(crate) fn short(value: f64) -> String {
    if value == 0.0 || !value.is_finite() {
        return if value == 0.0 {
            "0".into()
        } else {
            "–".into()
        };
    }
    let magnitude = value.abs();
    if magnitude >= 1e6 {
        return format!("{value:.2e}");
    }
    let digits_before = magnitude.log10().floor() as i32 + 1;
    let decimals = usize::try_from((3 - digits_before).clamp(0, 6)).unwrap_or(0);
    let shown = format!("{value:.decimals$}");
    let shown = if shown.contains('.') {
        shown.trim_end_matches('0').trim_end_matches('.')
    } else {
        &shown
    };
    // Thousands are easier to read apart.
    match shown.len() {
        5.. if !shown.contains('.') && magnitude >= 1e4 => {
            let cut = shown.len() - 3;
            format!("{},{}", &shown[..cut], &shown[cut..])
        }
        _ => shown.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::{Axis, Bar, BarPlot, Kind, LinePlot, Series, cdf, escape, short};

    #[test]
    fn numbers_are_short() {
        for (value, shown) in [
            (0.0, "0"),
            (0.05, "0.05"),
            (12.0, "12"),
            (1.234, "1.23"),
            (999.6, "1000"),
            (12_345.0, "12,345"),
            (2.5e7, "2.50e7"),
            (f64::NAN, "–"),
        ] {
            assert_eq!(short(value), shown);
        }
    }

    #[test]
    fn text_cannot_end_an_element() {
        assert_eq!(escape("a<b>&\"\n"), "a&lt;b&gt;&amp;&quot; ");
    }

    #[test]
    fn plots_of_odd_data_are_whole_and_hold_no_nan() {
        let bars = |values: &[f64]| {
            BarPlot::new("t", "MiB")
                .bars(values.iter().map(|v| Bar::new("x", *v, Kind::Ours)))
                .svg()
        };
        let lines = |points: &[(f64, f64)]| {
            LinePlot::new("t", Axis::new("x"), Axis::log("y"))
                .series(Series::new("s", Kind::Rival, points.to_vec()))
                .svg()
        };
        for svg in [
            bars(&[]),
            bars(&[0.0]),
            bars(&[1e-9, 1e12]),
            bars(&[f64::NAN, -1.0]),
            lines(&[]),
            lines(&[(1.0, 0.0)]),
            lines(&[(f64::INFINITY, 1.0), (2.0, 5.0)]),
            cdf(
                "t",
                Axis::new("ms"),
                [("s", Kind::Ours, &[3.0, 1.0, 2.0][..])],
            )
            .svg(),
        ] {
            assert!(svg.starts_with("<svg") && svg.ends_with("</svg>"), "{svg}");
            assert!(!svg.contains("NaN") && !svg.contains("inf\""), "{svg}");
            for element in ["svg", "text", "title", "style"] {
                let open = svg.matches(&format!("<{element}")).count();
                assert_eq!(open, svg.matches(&format!("</{element}>")).count());
            }
        }
    }
}
