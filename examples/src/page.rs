//! The page: one file, without anything from elsewhere, dark or light as the reader's system is.

use std::fmt::Write as _;
use std::time::Duration;

use carlsbad_kit::sample::median;

use crate::stop::{Headline, Least, Outcome};

const STYLE: &str = "\
:root{color-scheme:light dark;--b:#fff;--f:#1f2328;--m:#59636e;--l:#d8dee4;--s:#f6f8fa;--ok:#1a7f37;--no:#b42318;--slow:#9a6700}\
@media(prefers-color-scheme:dark){:root{--b:#0d1117;--f:#e6edf3;--m:#9aa5b1;--l:#30363d;--s:#161b22;--ok:#3fb950;--no:#ff8a80;--slow:#d4a72c}}\
*{box-sizing:border-box}body{margin:0 auto;max-width:46rem;padding:2.5rem 1.25rem 4rem;background:var(--b);color:var(--f);\
font:16px/1.55 system-ui,-apple-system,'Segoe UI',sans-serif}\
h1{font-size:1.7rem;margin:0}h2{margin:3rem 0 .2rem;font-size:1.3rem}p{margin:.4rem 0}.m{color:var(--m)}\
.big{display:flex;flex-wrap:wrap;gap:1rem;margin:1.2rem 0}.big div{flex:1 1 12rem;padding:.8rem 1rem;background:var(--s);border:1px solid var(--l);border-radius:8px}\
.big b{display:block;font-size:1.9rem;line-height:1.2;font-variant-numeric:tabular-nums}.big span{font-size:.85rem;color:var(--m);display:block}\
ul{padding:0;list-style:none;margin:1rem 0}li{padding-left:1.6rem;position:relative;margin:.25rem 0}li::before{position:absolute;left:0;font-weight:700}\
li.ok::before{content:'\\2713';color:var(--ok)}li.no::before{content:'\\2717';color:var(--no)}li.sk::before{content:'\\2013';color:var(--slow)}\
figure{margin:1.6rem 0}figcaption,caption{color:var(--m);font-size:.9rem;text-align:left;padding-bottom:.4rem}\
.w{overflow-x:auto;margin:1.4rem 0}table{border-collapse:collapse;width:100%;font-size:.9rem}td,th{padding:.3rem .7rem .3rem 0;border-bottom:1px solid var(--l);text-align:left}\
td+td,th+th{text-align:right;font-variant-numeric:tabular-nums}.slow{color:var(--slow)}.no{color:var(--no)}.ok{color:inherit}\
code{background:var(--s);padding:.1em .3em;border-radius:4px;font-size:.9em}a{color:inherit}";

pub(crate) fn render(outcomes: &[Outcome], took: Duration) -> String {
    let mut out = String::from(
        "<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width,initial-scale=1\">\
         <title>The tour of Carlsbad</title><style>",
    );
    out += STYLE;
    out += "</style></head><body>";
    let wrong = outcomes
        .iter()
        .filter(|outcome| !outcome.is_right())
        .count();
    let _infallible = write!(
        out,
        "<h1>The tour of Carlsbad</h1><p class=\"m\">{} visited in {:.0} s on this machine, each with \
         its real job on real input. {}</p>",
        match outcomes.len() {
            1 => "One crate".to_owned(),
            n => format!("{n} crates"),
        },
        took.as_secs_f64(),
        match wrong {
            0 => "Every result was right.".to_owned(),
            n => format!("<b class=\"no\">{n} with a wrong result.</b>"),
        }
    );
    for outcome in outcomes {
        stop(&mut out, outcome);
    }
    out += "<p class=\"m\">Figures are medians; ours and the rival's were taken in this run. \
            <code>cargo xtask figures</code> measures the full set.</p></body></html>\n";
    out
}

fn stop(out: &mut String, outcome: &Outcome) {
    let _infallible = write!(
        out,
        "<section id=\"{0}\"><h2>{0}</h2><p class=\"m\">{1} <span>({2:.1} s)</span></p>",
        escape(outcome.name),
        escape(outcome.job),
        outcome.seconds
    );
    if let Some(why) = &outcome.failure {
        let _infallible = write!(out, "<p class=\"no\">{}</p>", escape(why));
    }
    if !outcome.figures.is_empty() {
        out.push_str("<div class=\"big\">");
        for figure in &outcome.figures {
            headline(out, figure);
        }
        out.push_str("</div>");
    }
    out.push_str("<ul>");
    for check in &outcome.checks {
        let class = if check.holds { "ok" } else { "no" };
        let _infallible = write!(out, "<li class=\"{class}\">{}</li>", escape(&check.what));
    }
    for skip in &outcome.skipped {
        let _infallible = write!(
            out,
            "<li class=\"sk\">Skipped: {} ({}). To get it: <code>{}</code></li>",
            escape(skip.what),
            escape(skip.capability),
            escape(skip.fix)
        );
    }
    out.push_str("</ul>");
    for picture in &outcome.pictures {
        let _infallible = write!(
            out,
            "<figure>{}<figcaption>{}</figcaption></figure>",
            picture.svg,
            escape(&picture.caption)
        );
    }
    for table in &outcome.tables {
        let _infallible = write!(
            out,
            "<div class=\"w\"><table><caption>{}</caption><thead><tr>",
            escape(table.caption)
        );
        for cell in &table.head {
            let _infallible = write!(out, "<th>{}</th>", escape(cell));
        }
        out.push_str("</tr></thead><tbody>");
        for row in &table.rows {
            out.push_str("<tr>");
            for cell in row {
                let _infallible = write!(out, "<td>{}</td>", escape(cell));
            }
            out.push_str("</tr>");
        }
        out.push_str("</tbody></table></div>");
    }
    out.push_str("</section>");
}

fn headline(out: &mut String, figure: &Headline) {
    let Least::AtMost(limit) = figure.least;
    let number = format!("{:.0}%", figure.ratio * 100.0);
    let asked = format!("at most {:.0}%", limit * 100.0);
    let class = if figure.holds { "ok" } else { "slow" };
    let _infallible = write!(
        out,
        "<div><b class=\"{class}\">{number}</b>{}<span>{} {unit}, {}: {} {unit}</span>\
         <span class=\"{class}\">asked: {asked}{}</span></div>",
        escape(&figure.what),
        digits(median(&figure.samples)),
        escape(figure.baseline.name),
        digits(median(&figure.baseline.samples)),
        if figure.holds { "" } else { " \u{2013} missed" },
        unit = escape(figure.unit),
    );
}

fn digits(value: f64) -> String {
    match value.abs() {
        v if v >= 100.0 => format!("{value:.0}"),
        v if v >= 10.0 => format!("{value:.1}"),
        v if v >= 0.1 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::{Outcome, render};
    use crate::stop::Check;
    use std::time::Duration;

    #[test]
    fn the_page_says_what_is_wrong_and_escapes_it() {
        let outcome = Outcome {
            name: "x",
            job: "does x",
            seconds: 1.0,
            checks: vec![Check {
                what: "1 < 0".to_owned(),
                holds: false,
            }],
            figures: Vec::new(),
            skipped: Vec::new(),
            tables: Vec::new(),
            pictures: Vec::new(),
            failure: None,
        };
        assert!(!outcome.is_right());
        let page = render(&[outcome], Duration::from_secs(1));
        assert!(page.contains("1 with a wrong result") && page.contains("1 &lt; 0"));
        assert!(!page.contains("http://") && !page.contains("https://"));
    }
}
