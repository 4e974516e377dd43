//! The tour: every crate does its real job on real input. The result is checked, one headline
//! figure is measured beside its rival, and a page shows it all.
//!
//! It fails where a result is wrong. A figure below what is asked of it is marked on the page: a
//! busy machine is slow, not wrong.

// Progress and the verdict are for the person who runs it.
#![allow(clippy::print_stdout, clippy::print_stderr)]

mod page;
mod progress;
mod stop;
mod stops;

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use clap::Parser;

use progress::Progress;
use stop::{Outcome, Visit};
use stops::STOPS;

/// candle tensors can be the store's own pages only where this is the program's allocator.
#[global_allocator]
static ALLOCATOR: tetris_store::candle::MapAlloc = tetris_store::candle::MapAlloc::system();

/// The tour of the Carlsbad crates: each does its real job on real input.
#[derive(Debug, Parser)]
#[command(name = "tour", max_term_width = 100)]
struct Arguments {
    /// Visit only this crate.
    #[arg(long, value_name = "CRATE")]
    only: Option<String>,
    /// Print the figures as JSON to standard output.
    #[arg(long)]
    json: bool,
    /// Where the page and the figures go.
    #[arg(long, value_name = "DIRECTORY", default_value = "target/tour")]
    out: PathBuf,
}

fn main() -> ExitCode {
    // The tour starts itself again for whatever takes more than one process.
    rund_rt::init();
    if let Some(end) = stops::play_role() {
        return end.map_or_else(
            |why| {
                eprintln!("{why:#}");
                ExitCode::FAILURE
            },
            |()| ExitCode::SUCCESS,
        );
    }
    match run(&Arguments::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(why) => {
            eprintln!("error: {why:#}");
            ExitCode::FAILURE
        }
    }
}

/// Takes the tour; says whether every result was right.
fn run(arguments: &Arguments) -> Result<bool> {
    let start = Instant::now();
    let stops: Vec<_> = STOPS
        .iter()
        .filter(|stop| {
            arguments
                .only
                .as_deref()
                .is_none_or(|only| only == stop.name)
        })
        .collect();
    if stops.is_empty() {
        let names: Vec<_> = STOPS.iter().map(|stop| stop.name).collect();
        bail!(
            "the tour does not visit {}; it visits {}",
            arguments.only.as_deref().unwrap_or("anything"),
            names.join(", ")
        );
    }
    let mut outcomes = Vec::new();
    for (i, stop) in stops.iter().enumerate() {
        let progress = Progress::begin(i + 1, stops.len(), stop.name);
        let begun = Instant::now();
        let mut visit = Visit::new(&progress);
        let end = (stop.run)(&mut visit);
        let outcome = Outcome::new(stop, visit, end, begun.elapsed());
        progress.end(&outcome);
        outcomes.push(outcome);
    }

    fs::create_dir_all(&arguments.out)
        .with_context(|| format!("cannot make {}", arguments.out.display()))?;
    let page = arguments.out.join("index.html");
    fs::write(&page, page::render(&outcomes, start.elapsed()))
        .with_context(|| format!("cannot write {}", page.display()))?;
    let json = serde_json::to_string_pretty(&outcomes)? + "\n";
    fs::write(arguments.out.join("figures.json"), &json).context("cannot write the figures")?;
    if arguments.json {
        print!("{json}");
    }
    let right = outcomes.iter().all(Outcome::is_right);
    eprintln!(
        "{} in {:.0} s: {}",
        if right { "All right" } else { "WRONG RESULTS" },
        start.elapsed().as_secs_f64(),
        page.display()
    );
    Ok(right)
}
