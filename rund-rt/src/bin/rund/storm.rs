//! `rund storm`: many sandboxes at once.

use std::process::ExitCode;
use std::time::Instant;

use anyhow::Context;
use rund_rt::{CloneSpec, Stdin};
use serde_json::json;

use crate::options::{Options, Storm};
use crate::output;

pub(crate) fn storm(options: &Options, storm: &Storm) -> anyhow::Result<ExitCode> {
    let runtime = super::run::runtime(&storm.guest, None)?;
    let template = runtime.prepare(&super::run::spec(&storm.guest, &storm.program)?)?;
    let input = match &storm.input {
        Some(path) => {
            std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?
        }
        None => Vec::new(),
    };
    let clone = || CloneSpec::new().stdin(Stdin::Bytes(input.clone()));
    let first = runtime.start(&template, clone())?.wait(None)?;
    if !first.status.success() {
        output::note(&format!("rund: the first ended with {}", first.status));
    }
    let expected = (first.status, first.stdout);

    let began = Instant::now();
    let sandboxes: Vec<_> = runtime
        .start_many(&template, (0..storm.number).map(|_| clone()))
        .into_iter()
        .collect::<Result<_, _>>()?;
    let mut starts = Vec::new();
    let mut wrong = 0;
    for sandbox in &sandboxes {
        let exit = sandbox.wait(None)?;
        starts.push(exit.stats.start.as_secs_f64() * 1e3);
        wrong += usize::from((exit.status, exit.stdout) != expected);
    }
    let took = began.elapsed().as_secs_f64();
    starts.sort_by(f64::total_cmp);
    let at = |q: f64| starts[((starts.len() - 1) as f64 * q) as usize];
    let rate = f64::from(storm.number) / took;
    if let Some(path) = &storm.svg {
        let title = format!("{} sandboxes, {rate:.0} a second", storm.number);
        std::fs::write(path, distribution(&title, &starts))
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    if options.json {
        output::json(&json!({
            "sandboxes": storm.number,
            "seconds": took,
            "per_second": rate,
            "start_seconds": { "p50": at(0.5) / 1e3, "p99": at(0.99) / 1e3, "max": at(1.0) / 1e3 },
            "wrong": wrong,
            "exit_code": first.status.shell_code(),
            "isolation": runtime.capabilities().isolation,
        }))?;
    } else {
        output::line(format!(
            "{} sandboxes in {took:.3} s, {rate:.0} a second; from request to first instruction \
             p50 {:.2} ms, p99 {:.2} ms; {wrong} said something else than the first; isolation: {}",
            storm.number,
            at(0.5),
            at(0.99),
            runtime.capabilities().isolation
        ))?;
    }
    Ok(ExitCode::from(u8::from(
        wrong > 0 || !first.status.success(),
    )))
}

/// A picture of sorted times in milliseconds: which share was started within which time.
fn distribution(title: &str, sorted: &[f64]) -> String {
    const WIDTH: f64 = 640.0;
    const HEIGHT: f64 = 300.0;
    const MARGIN: f64 = 40.0;
    let most = sorted.last().copied().unwrap_or(1.0).max(1e-3);
    let x = |ms: f64| MARGIN + ms / most * (WIDTH - 2.0 * MARGIN);
    let y = |share: f64| HEIGHT - MARGIN - share * (HEIGHT - 2.0 * MARGIN);
    let mut path = format!("M{:.1} {:.1}", x(0.0), y(0.0));
    for (i, ms) in sorted.iter().enumerate() {
        let (before, after) = (i as f64, (i + 1) as f64);
        let n = sorted.len() as f64;
        path += &format!(
            "L{:.1} {:.1}L{:.1} {:.1}",
            x(*ms),
            y(before / n),
            x(*ms),
            y(after / n)
        );
    }
    let mut body = String::new();
    for quarter in 0..=4 {
        let share = f64::from(quarter) / 4.0;
        body += &format!(
            "<path d=\"M{MARGIN} {0:.1}H{1:.1}\" stroke=\"#8888\" fill=\"none\"/>\
             <text x=\"4\" y=\"{0:.1}\">{2:.0}%</text>\
             <text x=\"{3:.1}\" y=\"{4:.1}\" text-anchor=\"middle\">{5:.2}</text>",
            y(share),
            WIDTH - MARGIN,
            share * 100.0,
            x(share * most),
            HEIGHT - MARGIN + 18.0,
            share * most
        );
    }
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\">\
         <style>text{{font:12px system-ui,sans-serif;fill:#767676}}</style>\
         <text x=\"{MARGIN}\" y=\"20\">{title}</text>{body}\
         <path d=\"{path}\" stroke=\"#0b6e8f\" stroke-width=\"2\" fill=\"none\"/>\
         <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">ms from request to first instruction</text>\
         </svg>\n",
        WIDTH - MARGIN,
        HEIGHT - 6.0
    )
}
