//! `cargo xtask figures`: measure, judge, record, render.

mod expected;
mod judge;
mod machine;
mod table;

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use carlsbad_kit::figure::{FILE_VARIABLE, Figure};

use crate::workspace::{Package, Workspace};
use crate::{peers, shell, vm};
use expected::Expected;
use judge::Judged;
use machine::Conditions;

/// Where a figure comes from when not from a bench target.
const FROM_PEERS: &str = "peers";

/// Arguments of `cargo xtask figures`.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// One of the ten; all that exist without it.
    #[arg(value_name = "CRATE")]
    name: Option<String>,
    /// Fail where a figure misses its least value, or was not measured.
    #[arg(long)]
    gate: bool,
    /// Measure although the machine is busy; the record says so.
    #[arg(long)]
    force: bool,
    /// Only these bench targets (or `peers`); the other figures keep their last measurement.
    #[arg(long, value_delimiter = ',', value_name = "BENCH,…")]
    only: Vec<String>,
    /// Measure nothing: judge and render what was measured last.
    #[arg(long, conflicts_with = "only")]
    render: bool,
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let workspace = Workspace::load()?;
    let mut missed = Vec::new();
    for package in workspace.chosen(arguments.name.as_deref())? {
        missed.extend(of(package, &workspace, arguments)?);
    }
    if arguments.gate && !missed.is_empty() {
        bail!("missed or not measured: {}", missed.join(", "));
    }
    Ok(())
}

/// Measures the figures of one crate; gives the ids of those that do not hold.
fn of(package: &Package, workspace: &Workspace, arguments: &Arguments) -> Result<Vec<String>> {
    let expected = expected::read(&package.folder().join("figures.toml"), &package.name)?;
    let record = workspace
        .target
        .join("figures")
        .join(format!("{}.json", package.name));
    let mut judged = judge::read(&record)?;
    judged.retain(|old| expected.iter().any(|figure| figure.id == old.id));
    for old in &mut judged {
        old.judge_again(&expected)?;
    }
    if !arguments.render {
        let sources: BTreeSet<&str> = expected.iter().map(|f| f.from.as_str()).collect();
        for name in &arguments.only {
            ensure!(
                sources.contains(name.as_str()),
                "no figure of {} comes from {name}; they come from {}",
                package.name,
                sources.iter().copied().collect::<Vec<_>>().join(", ")
            );
        }
        let mut sources: Vec<_> = sources.into_iter().collect();
        sources
            .retain(|name| arguments.only.is_empty() || arguments.only.iter().any(|o| o == name));
        // What is not written yet is reported as not measured, not as a failure to run cargo.
        let benches: Vec<&str> = package.targets_of("bench").collect();
        sources.retain(|name| *name == FROM_PEERS || benches.contains(name));
        let count = sources.len();
        for (i, source) in sources.into_iter().enumerate() {
            eprintln!("[{}/{count}] {} {source}", i + 1, package.name);
            let run = measure(package, workspace, source, arguments.force)?;
            for figure in run.0 {
                let Some(asked) = expected.iter().find(|e| e.id == figure.id) else {
                    bail!(
                        "{source} measured {}, which figures.toml does not ask for",
                        figure.id
                    );
                };
                let new = Judged::new(asked, figure, run.1.clone())?;
                eprintln!("  {new}");
                judged.retain(|old| old.id != new.id);
                judged.push(new);
            }
        }
        judged.sort_by_key(|j| expected.iter().position(|e| e.id == j.id));
        judge::write(&record, &judged)?;
    }
    let missing: Vec<_> = expected
        .iter()
        .filter(|e| !judged.iter().any(|j| j.id == e.id))
        .map(|e| e.id.clone())
        .collect();
    if missing.is_empty() {
        table::render(&package.folder().join("README.md"), &package.name, &judged)?;
        table::render_headline(&workspace.root.join("README.md"), &package.name, &judged)?;
    } else {
        eprintln!(
            "{}: README not rendered, not measured yet: {}",
            package.name,
            missing.join(", ")
        );
    }
    // The gate asks for what was to be measured, and no more.
    let asked = expected
        .iter()
        .filter(|e| arguments.only.is_empty() || arguments.only.contains(&e.from));
    Ok(asked
        .filter(|e| !judged.iter().any(|j| j.id == e.id && j.holds))
        .map(|e| e.id.clone())
        .collect())
}

/// Runs one bench target, or the peers, and reads what it emitted.
fn measure(
    package: &Package,
    workspace: &Workspace,
    source: &str,
    force: bool,
) -> Result<(Vec<Figure>, Conditions)> {
    let samples = workspace
        .target
        .join("figures")
        .join(format!("{}-{source}.samples", package.name));
    if let Some(directory) = samples.parent() {
        fs::create_dir_all(directory)?;
    }
    fs::write(&samples, "").with_context(|| format!("cannot write {}", samples.display()))?;
    let bench = |run: bool| {
        let mut cargo = shell::cargo();
        cargo
            .arg("bench")
            .args(package.cargo_arguments())
            .args(["--bench", source])
            .env(FILE_VARIABLE, &samples);
        if !run {
            cargo.arg("--no-run");
        }
        cargo
    };
    let command = if source == FROM_PEERS {
        format!("cargo xtask peers {}", package.name)
    } else {
        // Compiled before the machine is looked at, so that it is quiet again.
        shell::run(&mut bench(false))?;
        format!("cargo xtask figures {} --only {source}", package.name)
    };
    let before = machine::Load::look()?;
    if before.is_busy() && !force {
        bail!("the machine is busy ({before}): wait, or --force");
    }
    let clock = machine::Clock::start()?;
    if source == FROM_PEERS {
        peers::measure(package, &samples)?;
    } else if package.is_vm_bench(source) {
        vm::krcore::measure(package, source, &samples)?;
    } else {
        shell::run(&mut bench(true))?;
    }
    let conditions = Conditions::new(&workspace.root, command, before, &clock)?;
    Ok((read_samples(&samples)?, conditions))
}

fn read_samples(path: &Path) -> Result<Vec<Figure>> {
    let text = fs::read_to_string(path)?;
    let figures: Vec<Figure> = text
        .lines()
        .map(serde_json::from_str)
        .collect::<Result<_, _>>()
        .with_context(|| format!("{}: not figures", path.display()))?;
    ensure!(
        !figures.is_empty(),
        "{}: no figure was emitted",
        path.display()
    );
    Ok(figures)
}

/// What figures of `package` ask for, for a check that the file is in order.
pub(crate) fn check_expected(package: &Package) -> Result<usize> {
    let path = package.folder().join("figures.toml");
    let expected: Vec<Expected> = expected::read(&path, &package.name)?;
    let benches: Vec<&str> = package.targets_of("bench").collect();
    for figure in &expected {
        ensure!(
            figure.from == FROM_PEERS || benches.contains(&figure.from.as_str()),
            "{}: {} comes from bench target {}, which does not exist",
            path.display(),
            figure.id,
            figure.from
        );
    }
    Ok(expected.len())
}
