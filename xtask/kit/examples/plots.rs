//! Writes a page with one plot of each kind: `cargo run -p carlsbad-kit --example plots > x.html`.

#![allow(clippy::print_stdout)]

use carlsbad_kit::plot::{Axis, Bar, BarPlot, Kind, LinePlot, Series, cdf};

fn main() {
    let bars = BarPlot::new("Memory of 8 processes with one model", "MiB")
        .bar(Bar::new("one copy for all", 91.2, Kind::Ours).and(9.0, Kind::OursToo))
        .bar(Bar::new("a copy each", 727.4, Kind::Rival).remark("8.0x"))
        .bound("unique bytes", 90.9);
    let growth =
        |per: f64, once: f64| (1..=8).map(move |n| (f64::from(n), once + per * f64::from(n)));
    let lines = LinePlot::new(
        "Memory over the number of processes",
        Axis::new("processes"),
        Axis::new("MiB"),
    )
    .series(Series::new(
        "shared",
        Kind::Ours,
        growth(1.1, 91.0).collect(),
    ))
    .series(Series::new(
        "private",
        Kind::Rival,
        growth(91.0, 0.0).collect(),
    ))
    .series(Series::new(
        "unique bytes",
        Kind::Bound,
        vec![(1.0, 90.9), (8.0, 90.9)],
    ));
    let spread = |middle: f64| -> Vec<f64> {
        (0..60)
            .map(|i| middle * (1.0 + 0.3 * (f64::from(i) * 0.7).sin()))
            .collect()
    };
    let cdf = cdf(
        "First inference",
        Axis::log("ms"),
        [
            ("attach", Kind::Ours, &spread(4.0)[..]),
            ("load", Kind::Rival, &spread(90.0)[..]),
        ],
    );
    println!(
        "<!doctype html><meta charset=utf-8><style>:root{{color-scheme:light dark}}body{{max-width:42rem;margin:2rem auto}}</style>"
    );
    for svg in [bars.svg(), lines.svg(), cdf.svg()] {
        println!("<p>{svg}</p>");
    }
}
