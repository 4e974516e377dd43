//! `cargo xtask peers`: a crate against unmodified runtimes.

mod tetris_store;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use carlsbad_kit::capability::cache_dir;
use carlsbad_kit::figure::Figure;

use crate::shell;
use crate::workspace::{Package, Workspace};

/// Arguments of `cargo xtask peers`.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// One of the ten; all that exist without it.
    #[arg(value_name = "CRATE")]
    name: Option<String>,
    /// Install the runtimes by pip, into an environment outside the source tree, and run nothing.
    #[arg(long)]
    install: bool,
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let workspace = Workspace::load()?;
    let chosen = workspace.chosen(arguments.name.as_deref())?;
    if arguments.install {
        return install(&chosen);
    }
    for package in chosen.into_iter().filter(|package| has_peers(package)) {
        for figure in of(package, 1)? {
            show(&figure);
        }
    }
    Ok(())
}

/// The figures that are measured in unmodified runtimes, appended to `samples`.
pub(crate) fn measure(package: &Package, samples: &Path) -> Result<()> {
    let mut lines = String::new();
    for figure in of(package, 3)? {
        show(&figure);
        lines += &serde_json::to_string(&figure)?;
        lines.push('\n');
    }
    fs::write(samples, lines).with_context(|| format!("cannot write {}", samples.display()))
}

/// Runs the peers of one crate: wrong results are errors, right ones give figures.
fn of(package: &Package, rounds: usize) -> Result<Vec<Figure>> {
    match package.name.as_str() {
        "tetris-store" => tetris_store::run(package, rounds),
        other => bail!("{other} has no peers"),
    }
}

fn show(figure: &Figure) {
    let line = |name: &str, samples: &[f64]| {
        let samples: Vec<String> = samples.iter().map(|x| format!("{x:.1}")).collect();
        println!("    {name}: {} {}", samples.join(" "), figure.unit);
    };
    println!("{}  {}", figure.id, figure.what);
    match (&figure.skipped, &figure.baseline) {
        (Some(why), _) => println!("    SKIPPED: {why}"),
        (None, baseline) => {
            line("ours", &figure.samples);
            if let Some(baseline) = baseline {
                line(&baseline.name, &baseline.samples);
            }
        }
    }
}

/// What a crate's peers need stands in this file of its folder.
fn requirements(package: &Package) -> PathBuf {
    package.folder().join("peers").join("requirements.txt")
}

fn has_peers(package: &Package) -> bool {
    requirements(package).exists()
}

/// Makes the environment in which [`carlsbad_kit::capability::pythons`] looks first.
fn install(packages: &[&Package]) -> Result<()> {
    let environment = cache_dir().join("peers");
    let python = environment.join("bin").join("python");
    let system = ["/usr/bin/python3", "python3"]
        .into_iter()
        .find(|python| {
            let torch = Command::new(python).args(["-c", "import torch"]).output();
            torch.is_ok_and(|out| out.status.success())
        })
        .context("no Python here has torch: apt-get install python3-torch libopenblas0-pthread")?;
    if !python.exists() {
        shell::run(
            Command::new(system)
                .args(["-m", "venv", "--system-site-packages"])
                .arg(&environment),
        )
        .context("cannot make an environment: apt-get install python3-venv")?;
    }
    for package in packages.iter().filter(|package| has_peers(package)) {
        shell::run(
            Command::new(&python)
                .args(["-m", "pip", "install", "--quiet"])
                .args(["--disable-pip-version-check", "--requirement"])
                .arg(requirements(package)),
        )
        .context("the runtimes come by pip: is the registry in reach?")?;
    }
    Ok(())
}
